"""What is pushed to a hub is read by its name; a hub in small runs on this machine."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from command_process import CommandProcess
from hub_server import TOKEN, running_hub
from huggingface_hub import HfApi
from PIL import Image
from segment_cases import write_segmentation_state

from tokenlabel.cli import main
from tokenlabel.labels.manifest import Failure, read_manifest, update_failures, write_manifest
from tokenlabel.push import push
from tokenlabel.runtime.errors import ConfigError, ModelError
from tokenlabel.teachers.heads import Head
from tokenlabel.training.checkpoint import load_run

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


SECRETS = (b"PASSWORD", b"SECRET")
SIGNED = "https://me:PASSWORD@host/p-{0..1}.tar?X-Amz-Signature=SECRET"


def packed(thing, folder, **options):
    """Return all that a push would send, and the head of its card."""
    push(thing, "me/some", folder=folder, **options)
    sent = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    return sent, yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def test_secrets_in_urls_are_not_sent(pushed, tmp_path):
    run = shutil.copytree(pushed[0] / "run", tmp_path / "run")
    for path in run.glob("checkpoints/0*/state.json"):
        path.write_text(json.dumps(with_images(json.loads(path.read_text()), SIGNED)))
    head = Head.load(pushed[0] / "own.safetensors")
    head.fitted["asked"]["images"] = SIGNED
    head.save(tmp_path / "head.safetensors")
    labels = shutil.copytree(pushed[0] / "labels", tmp_path / "labels")
    update_failures(labels, [Failure("ant/9.png", f"{SIGNED}: no such file")])
    for name in ("run", "head.safetensors", "labels"):
        sent, _ = packed(tmp_path / name, tmp_path / f"sent {name}", licence="mit")
        assert b"https://host/p-{0..1}.tar" in sent, name
        assert not [secret for secret in SECRETS if secret in sent], name
    assert SIGNED in next(run.glob("checkpoints/0*/state.json")).read_text(), "it has to go on"
    assert load_run(tmp_path / "sent run").recipe.data.train == "https://host/p-{0..1}.tar"
    assert Head.load(tmp_path / "sent head.safetensors" / "head.safetensors").hash == head.hash
    assert not read_manifest(tmp_path / "sent labels").differences(read_manifest(labels))


def with_images(state, url):
    state["recipe"]["data"]["train"] = url
    return state


@pytest.mark.parametrize(
    ("licence", "stated"),
    [
        ("CC BY-NC 4.0", {"license": "cc-by-nc-4.0"}),
        ("fair-noncommercial-research-license", {"license": "fair-noncommercial-research-license"}),
        ("dinov3-license", {"license": "other", "license_name": "dinov3-license"}),
    ],
)
def test_a_licence_that_the_hub_does_not_list_is_another_by_its_name(pushed, tmp_path, licence, stated):
    head = Head.load(pushed[0] / "own.safetensors")
    head.backbone["licence"] = licence
    head.save(tmp_path / "head.safetensors")
    _, metadata = packed(tmp_path / "head.safetensors", tmp_path / "sent")
    assert {name: value for name, value in metadata.items() if name.startswith("license")} == stated


def test_a_mistyped_licence_is_said(pushed, tmp_path, capsys):
    packed(pushed[0] / "own.safetensors", tmp_path / "sent", licence="apache2")
    assert "--licence apache2: is none that the hub lists (did you mean apache-2.0?)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("licences", "outcome"),
    [
        (["mit", "mit"], "mit"),
        (["mit", "cc-by-4.0"], r"several \(mit for 0, cc-by-4\.0 for 1\); give --licence"),
        (["mit", None], r"several \(mit for 0, unknown for 1\); give --licence"),
        ([None], "none is known; give --licence"),
    ],
)
def test_labels_of_several_teachers_have_the_licence_of_all(pushed, tmp_path, licences, outcome):
    labels = shutil.copytree(pushed[0] / "labels", tmp_path / "labels")
    members = [{"name": str(i), "licence": licence} for i, licence in enumerate(licences)]
    members[0] = {"name": "0", "backbone": {"licence": licences[0]}}
    write_manifest(labels, replace(read_manifest(labels), teacher={"members": members}))
    if outcome == "mit":
        assert packed(labels, tmp_path / "sent")[1]["license"] == "mit"
    else:
        with pytest.raises(ConfigError, match=outcome):
            packed(labels, tmp_path / "sent")


@pytest.mark.parametrize("teacher", [{"members": ["a", "b"]}, {"members": 2}, {"name": "mine", "backbone": "a"}])
def test_labels_of_a_teacher_that_describes_itself_in_its_own_way(pushed, tmp_path, teacher):
    labels = shutil.copytree(pushed[0] / "labels", tmp_path / "labels")
    manifest = replace(read_manifest(labels), teacher=teacher)
    write_manifest(labels, manifest)
    with pytest.raises(ConfigError, match="none is known; give --licence"):
        packed(labels, tmp_path / "sent")
    assert main(["inspect", str(labels)]) == 0
    assert manifest.differences(replace(manifest, teacher={**teacher, "members": ["a", "c"]}))


def test_what_the_hub_has_against_a_card_is_said(pushed, monkeypatch):
    def refuse(*_, **__):
        raise ValueError('Invalid metadata in README.md.\n- "license" must be one of [mit, ...]\n- another')

    monkeypatch.setattr("tokenlabel.push.hub_answers", lambda: True)
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: None)
    monkeypatch.setattr(HfApi, "upload_folder", refuse)
    reasons = r'refuses it: Invalid metadata in README\.md\. - "license" must be one of \[mit, \.\.\.\] - another$'
    with pytest.raises(ConfigError, match=reasons):
        push(pushed[0] / "own.safetensors", "me/some", licence="mit")


def test_a_run_of_segmentation_is_refused_before_its_licence(tmp_path):
    write_segmentation_state(tmp_path / "road" / "checkpoints" / "00000001")
    with pytest.raises(ModelError, match="holds a segmentation model"):
        push(tmp_path / "road", "me/road", folder=tmp_path / "sent")


@pytest.mark.parametrize("name", ["hf://me/run", Path("hf://datasets/me/labels"), "https://host/run"])
def test_what_is_not_on_this_machine_is_not_pushed(name):
    with pytest.raises(ConfigError, match=r"(hf|https)://.*: is not on this machine"):
        push(name, "me/again", licence="mit")


def test_without_a_network_a_push_says_so(pushed):
    message = "me/own: the hub cannot be reached; --dry-run FOLDER writes what would be sent"
    assert pushed[1][UNREACHED] == (2, "", f"tokenlabel push: error: {message}\n")
