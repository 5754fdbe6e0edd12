"""Each example trains on the embedded data with few marked lines, and its loss falls. Run by `make examples`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tokenlabel import AnnotateConfig, annotate
from tokenlabel.data.scenes import write_scenes

FOLDER = Path(__file__).parent
MAX_LINES = 10
STEPS = 60

# Options of each script for a small ViT, 60 steps of 32 images of 64 px.
OPTIONS = {
    "timm_script.py": ["--img-size=64", "--batch-size=32", "--epochs=6", "--workers=0", "--lr=3e-3", "--device=cpu"],
    "hf_trainer.py": [
        "--img_size=64",
        "--per_device_train_batch_size=32",
        f"--max_steps={STEPS}",
        "--logging_steps=10",
        "--report_to=none",
        "--save_strategy=no",
        "--disable_tqdm=true",
        "--learning_rate=3e-3",
        "--use_cpu",
    ],
    "lightning_module.py": ["--img-size=64", "--batch-size=32", f"--steps={STEPS}", "--workers=0", "--lr=3e-3"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """320 scenes, and their masks as labels."""
    root = tmp_path_factory.mktemp("data")
    write_scenes(root / "scenes", num_train=320, num_val=10, seed=0)
    config = AnnotateConfig(teacher=f"masks:{root / 'scenes' / 'masks' / 'train'}")
    annotate(root / "scenes" / "train", root / "labels", config)
    return root


@pytest.mark.parametrize("name", OPTIONS)
def test_an_example_takes_few_lines_and_all_of_them_are_marked(name):
    """At most ten."""
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    ours = [line for line in lines if re.search(r"\btl\.|import tokenlabel", line)]
    assert all(line.endswith("# +") for line in ours), [line for line in ours if not line.endswith("# +")]
    assert len(ours) <= MAX_LINES


@pytest.mark.parametrize("name", OPTIONS)
def test_the_loss_of_an_example_falls(name, data, tmp_path):
    """From the first 20 steps to the last 20."""
    images, labels = data / "scenes" / "train", data / "labels"
    words = [sys.executable, FOLDER / name, images, labels, "--model", "test_vit", *OPTIONS[name]]
    words += [f"--output_dir={tmp_path}"] if name == "hf_trainer.py" else []
    done = subprocess.run(
        words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(loss) for loss in re.findall(r"\bloss'?:? '?(\d+\.\d+)", done.stdout)]
    assert len(losses) == STEPS // 10, done.stdout
    assert sum(losses[-2:]) < sum(losses[:2]) - 0.02
