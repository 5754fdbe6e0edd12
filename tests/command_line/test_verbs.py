"""Every verb as its users run it: in a process of its own, without the tests' type checker, on paths such as ./out."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from command_process import CommandProcess
from segment_cases import write_image

from tokenlabel.cli import VERBS
from tokenlabel.core.scores import from_mask
from tokenlabel.labels.manifest import Manifest
from tokenlabel.labels.writer import LabelStoreWriter

# The demo, smaller.
SETUP = """
from tokenlabel import demo

few = ("--epochs=1", "--batch-size=10", "--data.num-workers=0", "--eval.every-epochs=1")
demo.FAST = demo.DemoSize(
    num_train=20,
    num_val=10,
    teacher_overrides=(*few, "--model.options.channels=[8,8,8,8]"),
    student_overrides=(*few, "--model.options.depth=1"),
)
"""

COMMANDS = """
demo --fast --out ./demo
train --recipe demo_class_labels --out ./out --data.train ./demo/scenes/train --batch_size 10 --num-steps 2 \
 --data.num-workers 0 --model.options.depth 1
index ./tars
annotate ./demo/scenes/train ./strict --teacher ./demo/teacher --batch-size 8
fit-head ./demo/scenes/train ./head.safetensors --backbone ./demo/teacher --from words --words 8
annotate ./demo/scenes/train ./words --teacher ./head.safetensors
import-labels ./files ./imported --images ./images --num-classes 2
inspect ./strict --images ./demo/scenes/train --pictures ./maps.html --output ./output
merge ./strict ./encoding
export ./out ./out.safetensors
push ./strict me/labels --licence mit --dry-run ./parcel
eval ./out --data ./demo/scenes/val --output r.json --num_workers 0 --json
report ./out --output ./output.html
segment train --recipe segment_scenes --run ./mode --num-steps 2 \
 --data.layout folders --data.train ./demo/scenes/train --data.masks ./demo/scenes/masks/train \
 --data.class-names [0,1,2,3,4,5,6,7,8,9] \
 --batch-size 4 --data.num-workers 0 --model.name lvvit_t --model.img-size [24,24] --model.neck-width 16 \
 --model.head-width 8 --eval.short-side-px 24 --eval.every-epochs 9 \
 --model.options.patch-size 6 --model.options.depth 2 --model.options.width 16 --model.options.num_heads 2 \
 --model.options.stem-width=8
segment eval ./mode --images ./demo/scenes/val --masks ./demo/scenes/masks/val --scales .5 1 --output ./s.json
segment predict ./mode ./demo/scenes/val/0 --out ./flip --scales 1
train --recipe demo_class_labels --out ./more --data.train ./demo/scenes/train --batch-size 10 --num-steps 2 \
 --data.num-workers 0 --model.options.depth 1 --model.weights ./out
"""

REFUSED = """
train --recipe demo_class_labels --out ./demo/scenes/train/run --data.train ./demo/scenes/train: is inside the images
train --recipe demo_class_labels --out ./x --data.train ./demo/scenes/train --model.name LVViT-S: did you mean lvvit_s
eval ./mode: segmentation model
eval ./out/checkpoints: did you mean the run, out?
eval ./out --data ./demo/scenes/val --ignore-index 3: give --masks
inspect ./strict --ignore-index 3: give --masks
fit-head ./demo/scenes/train ./head.safetensors --backbone ./demo/teacher --from words --words 9: other options (words)
segment eval ./mode --images ./demo/scenes/val --masks ./demo/scenes/masks/val --split val: leave one out
segment eval ./mode --images ./demo/scenes/val --masks ./demo/scenes/masks/val --mode whole --stride 9: leave one out
segment eval ./mode --images ./demo/scenes/val --masks ./demo/scenes/masks/val --scales 0: --scales must be above 0
"""

LEFT_BEHIND = """
parcel/README.md
demo/report.html out/checkpoints tars/tokenlabel-index.npz strict/manifest.json imported/manifest.json maps.html output
head.safetensors words/manifest.json
encoding/manifest.json out.safetensors r.json output.html mode/checkpoints s.json flip/masks
more/checkpoints
"""


def commands() -> list[list[str]]:
    return [line.split() for line in str(COMMANDS).replace("\\\n", "").strip().splitlines()]


def refused() -> list[tuple[list[str], str]]:
    pairs = [line.split(": ", 1) for line in str(REFUSED).strip().splitlines()]
    return [(words.split(), message) for words, message in pairs]


def test_every_verb_takes_paths_of_the_folder_it_runs_in(tmp_path: Path) -> None:
    for i, name in enumerate(("ant", "bee")):
        write_image(tmp_path / "images" / name / "0.png", (20, 20), seed=i)
        logits, ids = torch.randn(2, 4, 4), torch.arange(2.0)[:, None, None].expand(2, 4, 4)
        (tmp_path / "files" / name).mkdir(parents=True)
        torch.save(torch.stack([logits, ids]).half(), tmp_path / "files" / name / "0.pt")
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as tar:
        for name in ("ant", "bee"):
            tar.add(tmp_path / "images" / name / "0.png", f"{name}/0.png")
    assert {words[0] for words in commands()} == set(VERBS)

    with CommandProcess(tmp_path, setup=SETUP) as process:
        done = [process.run(*words) for words in commands()]
        wrong = [process.run(*words) for words, _ in refused()]
    said = {" ".join(words[:2]): (out, err) for words, (_, out, err) in zip(commands(), done, strict=True)}
    failed = [(words, result) for words, result in zip(commands(), done, strict=True) if result[0] != 0]
    assert not failed, "\n".join(f"{words}: {status}\n{err[-2000:]}" for words, (status, _, err) in failed)
    assert [name for name in LEFT_BEHIND.split() if not (tmp_path / name).exists()] == []
    # Without val images the last line is no empty object.
    for trained in ("train --recipe", "segment train"):
        figures = json.loads(said[trained][0].splitlines()[-1])
        assert figures["step"] == 2
        assert figures["loss"] > 0
    assert json.loads((tmp_path / "r.json").read_text())["num_images"] == 10
    for (words, message), (status, _, err) in zip(refused(), wrong, strict=True):
        assert status == 2, (words, status)
        assert message in err.splitlines()[-1], (words, err)
    assert not (tmp_path / "demo/scenes/train/run").exists()


@pytest.mark.parametrize("words", ["--help", "inspect ./labels"])
def test_a_reader_that_goes_away_is_no_error(words: str, tmp_path: Path) -> None:
    """As in `tokenlabel inspect labels | head -1`."""
    with LabelStoreWriter(tmp_path / "labels", Manifest(num_classes=2, class_names=("a", "b"), topk=1)) as writer:
        writer.add("a/0.png", from_mask(np.zeros((4, 4), np.uint8), num_classes=2))
    command = [sys.executable, "-m", "tokenlabel", *words.split()]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141  # as the shell says of a program that SIGPIPE ended


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="not on this system")
def test_output_that_does_not_fit_on_the_disk_is_an_error_of_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-m", "tokenlabel", "--help"], stdout=full, stderr=subprocess.PIPE)
    assert done.stderr == b"tokenlabel: error: the output cannot be written (No space left on device)\n"
    assert done.returncode == 2


def test_the_console_script_is_the_same_program() -> None:
    script = Path(sys.executable).with_name("tokenlabel")
    ways = ([script], [sys.executable, "-m", "tokenlabel"])
    said = [subprocess.run([*way, "trian"], capture_output=True, text=True) for way in ways]
    assert said[0].returncode == said[1].returncode == 2
    assert said[0].stderr == said[1].stderr == "tokenlabel: no verb 'trian'; did you mean train?\n"
