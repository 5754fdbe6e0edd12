"""`inspect --out-of-fold`: heads that never saw an image's label say whether it is right."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from command_process import CommandProcess
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from tokenlabel.cli import main
from tokenlabel.runtime.errors import ModelError
from tokenlabel.teachers.folds import NUM_FOLDS, FoldPredictions, fit_folds, folds
from tokenlabel.teachers.solvers import Examples, fit_linear

BACKBONE = ["--out-of-fold", "resnet10t", "--weights", "resnet10t.safetensors", "--size", "64"]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_folds_divide_each_class_evenly(class_ids, seed):
    ids = torch.tensor(class_ids)
    fold_of = folds(ids, seed=seed)
    for class_id in ids.unique():
        counts = torch.bincount(fold_of[ids == class_id], minlength=NUM_FOLDS)
        assert counts.max() - counts.min() <= 1


def test_no_label_of_an_image_reaches_the_head_that_judges_it():
    """Of vectors that only name their image, a head that saw the label would know it; others cannot even guess."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, (60,), generator=generator)
    examples = Examples(torch.eye(60)[:, None], ids, torch.ones(60), 3)
    seen = fit_linear(examples, 1e-4).logits(torch.eye(60)).argmax(dim=1)
    assert (seen == ids).all()
    probs = fit_folds(torch.eye(60), ids, num_classes=3)
    assert (probs.argmax(dim=1) == ids).float().mean() < 0.6
    torch.testing.assert_close(probs.sum(dim=1), torch.ones(60))


def test_a_wrong_label_is_the_first_suspect():
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(80) % 4
    vectors = torch.nn.functional.one_hot(ids, 6).float() + 0.2 * torch.randn(80, 6, generator=generator)
    noisy = ids.clone()
    noisy[17] = (ids[17] + 1) % 4
    probs = fit_folds(vectors, noisy, num_classes=4)
    found = FoldPredictions([str(i) for i in range(80)], noisy.numpy(), probs.numpy(), list("abcd"))
    first = found.suspects(3)[0]
    assert (first.key, first.class_name, first.top_class_name) == ("17", "abcd"[noisy[17]], "abcd"[ids[17]])
    with pytest.raises(ModelError, match="no class has 5 images"):
        fit_folds(vectors[:12], ids[:12], num_classes=4)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Red and blue images, one of them in the wrong folder, and labels that agree with the folders."""
    root = tmp_path_factory.mktemp("folds")
    rng = np.random.default_rng(0)
    for i in range(24):
        shown = "blue" if i % 2 else "red"
        folder = root / "images" / ("red" if i == 5 else shown)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(100, 156, (64, 64, 3), dtype=np.uint8)
        pixels[..., 2 if shown == "blue" else 0] = 255
        Image.fromarray(pixels).save(folder / f"{i}.png")
    torch.manual_seed(0)
    save_file(timm.create_model("resnet10t", num_classes=2).state_dict(), root / "teacher.safetensors")
    save_file(timm.create_model("resnet10t").state_dict(), root / "resnet10t.safetensors")
    teacher = ["--teacher", "resnet10t", "--weights", "teacher.safetensors", "--class-map", "order"]
    options = ["--probabilities", "probs.npz", "--output", "figures.json", "--num-suspects", "2"]
    with CommandProcess(root) as process:
        process.check("annotate", "images", "labels", *teacher, "--size", "64")
        printed = process.check("inspect", "labels", "--images", "images", *BACKBONE, *options)
    (root / "printed.txt").write_text(printed)
    return root


def test_inspect_finds_the_image_in_the_wrong_folder_and_writes_what_cleanlab_takes(here):
    """As users run it."""
    printed = (here / "printed.txt").read_text()
    assert "out of fold, " in printed
    assert "red/5.png: red has" in printed.split("out of fold, ")[1].splitlines()[2]
    figures = json.loads((here / "figures.json").read_text())["out_of_fold"]
    assert figures["num_images"] == 24
    assert figures["suspects"][0]["key"] == "red/5.png"
    with np.load(here / "probs.npz") as file:
        assert file["pred_probs"].shape == (24, 2)
        assert file["class_names"].tolist() == ["blue", "red"]
        row = file["keys"].tolist().index("red/5.png")
        assert (file["labels"][row], file["pred_probs"][row].argmax()) == (1, 0)


def test_what_cannot_be_judged_is_refused_in_a_line(here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    for options, says in (
        (BACKBONE, "--out-of-fold needs the images and their classes"),
        (["--images", "images", "--probabilities", "p.npz"], "are about --out-of-fold BACKBONE"),
        (["--images", "images/red", *BACKBONE], "no classes"),
    ):
        assert main(["inspect", "labels", *options]) == 2
        errors = capsys.readouterr().err.strip().splitlines()
        assert says in errors[-1], errors
