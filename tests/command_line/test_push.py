"""What is pushed to a hub is read by its name; a hub in small runs on this machine."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from command_process import CommandProcess
from hub_server import TOKEN, running_hub
from PIL import Image

SMALL = "--epochs 1 --min-epoch-steps 1 --batch-size 8 --micro-batch-size 8 --data.num-workers 0 --precision fp32"
COMMANDS = f"""
train --recipe small_data --out run --data.train images --data.val images --model.name test_vit --loss.beta 0 \
 --model.img-size 32 --model.options.pretrained false --optim.warmup-epochs 0 {SMALL}
annotate images labels --teacher run
fit-head images own.safetensors --backbone run --from labels --size 32
push run me/run
push run me/run --licence Apache-2.0
push labels me/labels --licence mit
push own.safetensors me/head --licence mit
fit-head images hub.safetensors --backbone test_vit --weights hf://me/run --from labels --size 32
push run you/run --licence mit
push images me/images --licence mit
push run run --licence mit
push typo/run me/run --licence mit
push run me/run --licence mit --dry-run folder
push run me/run --licence mit --dry-run folder
push labels me/look --licence mit --dry-run look
eval hf://me/run --data images
inspect hf://datasets/me/labels
annotate images again --teacher hf://me/run
annotate images by-head --teacher hf://me/head
annotate images by-hub --teacher hub.safetensors
annotate images hf://datasets/me/more --teacher hf://me/run
train --recipe finetune --out more --model.weights hf://me/run --data.labels hf://datasets/me/labels \
 --data.train images --data.val images --optim.warmup-epochs 0 {SMALL}
eval hf://me/absent --data images
eval hf://me/run@v9 --data images
eval hf://me --data images
"""
# What an earlier push left: a checkpoint of more steps, a file of other labels.
STALE = {"models/me/run": "checkpoints/99999999/state.json", "datasets/me/labels": "0-earlier.safetensors"}
UNREACHED = "push own me/own --licence mit"


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """The folder that the commands ran in, what each said, and what the hub holds then."""
    folder, rng = tmp_path_factory.mktemp("push"), np.random.default_rng(0)
    for i in range(8):
        path = folder / "images" / ("ant", "bee")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)).save(path)
    (folder / "own").mkdir()
    lines = COMMANDS.replace("\\\n", "").strip().splitlines()
    with running_hub() as hub:
        for repo, name in STALE.items():
            hub.repos[repo] = {"private": True, "files": {name: b"of an earlier push"}}
        process = CommandProcess(folder, {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "cache"), "HF_TOKEN": TOKEN})
        outcomes = [process.run(*line.split()) for line in lines]
    with process:  # the hub is gone
        lines.append(UNREACHED)
        outcomes.append(process.run(*UNREACHED.split()))
        assert TOKEN not in process.errors() + str(outcomes)
    said = {" ".join(line.split()): outcome for line, outcome in zip(lines, outcomes, strict=True)}
    repeated = [outcome for line, outcome in zip(lines, outcomes, strict=True) if "--dry-run" in line]
    return folder, said, hub.repos, repeated


def said_by(said, command):
    """Return what the one command that begins so came to."""
    (outcome,) = (outcome for line, outcome in said.items() if line.startswith(command))
    return outcome


def refusal(outcome):
    """Return the line of an error, which is all that was said of it."""
    status, _, err = outcome
    lines = [line for line in err.splitlines() if "error: " in line]
    assert status == 2, outcome
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0].partition("error: ")[2]


def card(repos, name):
    """Return the head of a card, and its text."""
    _, head, text = repos[name]["files"]["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(head), text


def test_all_are_private_and_named_as_they_are_read(pushed):
    _, said, repos, _ = pushed
    assert said_by(said, "push run me/run --licence Apache-2.0")[:2] == (0, "hf://me/run\n")
    assert said_by(said, "push labels me/labels")[:2] == (0, "hf://datasets/me/labels\n")
    assert repos.keys() == {"models/me/run", "datasets/me/labels", "models/me/head"}
    assert all(repo["private"] for repo in repos.values())


def test_a_card_says_what_is_known(pushed):
    _, _, repos, _ = pushed
    head, text = card(repos, "models/me/run")
    assert (head["license"], head["library_name"]) == ("apache-2.0", "timm")
    assert 'timm.create_model("hf-hub:me/run", pretrained=True)' in text
    assert "tokenlabel eval run" in text
    assert re.search(r"top1 \| [01]", text)
    head, text = card(repos, "datasets/me/labels")
    assert head["license"] == "mit"
    assert "| teacher name | run |" in text
    assert "ant, bee" in text
    assert "| backbone name | run |" in card(repos, "models/me/head")[1]


def test_checksums_are_those_of_the_files(pushed):
    folder, _, repos, _ = pushed
    for name, repo in repos.items():
        root = folder / "downloaded" / name
        for path, data in repo["files"].items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)
        sums = card(repos, name)[1].rpartition("```\n")[0].rpartition("```\n")[2]
        assert len(sums.splitlines()) == len(repo["files"]) - 1
        subprocess.run(["sha256sum", "--check", "--quiet"], cwd=root, input=sums, text=True, check=True)


def test_timm_reads_a_pushed_run_without_us(pushed):
    folder, _, _, repeated = pushed
    assert repeated[0][:2] == (0, "folder\n")
    code = "import timm; print(timm.create_model('local-dir:folder', pretrained=True).num_classes)"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout == "2\n"
    assert not (folder / "folder" / "checkpoints").joinpath("best").exists()
    assert not list(Path(folder, "folder").rglob("optimizer.safetensors"))


def test_what_is_written_for_a_look_may_be_edited(pushed):
    folder, said, _, _ = pushed
    assert said_by(said, "push labels me/look")[0] == 0
    assert (folder / "look" / "manifest.json").stat().st_nlink == 1


@pytest.mark.parametrize(
    "command",
    [
        "eval hf://me/run --",
        "inspect hf:",
        "annotate images again",
        "annotate images by-head",
        "fit-head images hub",
        "annotate images by-hub",
        "train --recipe finetune",
    ],
)
def test_it_is_read_wherever_a_local_one_is(pushed, command):
    status, _, err = said_by(pushed[1], command)
    assert status == 0, err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("push run you/run", "you may not write there"),
        ("push images", "expected a run folder, a label store or a head"),
        ("push run run", "expected USER/NAME"),
        ("push typo/run", "typo/run: expected a run folder, a label store or a head"),
        ("annotate images hf:", "labels are written to a folder of this machine"),
        ("eval hf://me/absent", "hf://me/absent: not there, or private"),
        ("eval hf://me --data", "expected hf://USER/NAME"),
        ("eval hf://me/run@v9", "not there"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(pushed, command, words):
    assert words in refusal(said_by(pushed[1], command))
    assert not (pushed[0] / "typo").exists()


def test_a_card_without_licence_and_a_folder_that_is_there_are_refused(pushed):
    _, said, _, repeated = pushed
    assert "needs a licence" in refusal(said["push run me/run"])
    assert "exists already" in refusal(repeated[1])


def test_without_a_network_a_push_says_so(pushed):
    message = "me/own: the hub cannot be reached; --dry-run FOLDER writes what would be sent"
    assert pushed[1][UNREACHED] == (2, "", f"tokenlabel push: error: {message}\n")
