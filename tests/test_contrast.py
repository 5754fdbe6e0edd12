"""Runs side by side on the same images."""

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenlabel.cli import main
from tokenlabel.core.batch import normalize_images
from tokenlabel.data.scenes import write_scenes
from tokenlabel.evaluation.observation import evaluation_set
from tokenlabel.report.contrast import class_accuracies, contrast_sections, location_maps
from tokenlabel.report.names import short_names
from tokenlabel.report.runs import read_run, write_report
from tokenlabel.training.checkpoint import load_model


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of one step that begin with other weights."""
    folder = tmp_path_factory.mktemp("runs")
    write_scenes(folder / "scenes", num_train=10, num_val=20, seed=0)
    data = [f"--data.train={folder / 'scenes' / 'train'}", f"--data.val={folder / 'scenes' / 'val'}"]
    options = ["--epochs=1", "--batch-size=10", "--data.num-workers=0", "--model.options.depth=1"]
    names = ("first", "second")
    for seed, name in enumerate(names):
        arguments = ["--recipe", "demo_class_labels", "--run", str(folder / name), f"--seed={seed}"]
        assert main(["train", *arguments, *data, *options]) == 0
    return [folder / name for name in names]


def test_both_ways_to_differ_are_shown(runs):
    sections = "".join(contrast_sections(short_names(runs)))
    assert "Right by first, wrong by second" in sections
    assert "Right by second, wrong by first" in sections
    assert "first over second, points" in sections


def test_a_run_beside_its_copy_never_differs(runs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(runs[0], copy)
    sections = "".join(contrast_sections(short_names([runs[0], copy])))
    assert sections.count("0 of 20 images") == 2
    assert sections.count("<td>+0.0</td>") == 10


def test_a_run_alone_has_its_classes(runs):
    (only,) = contrast_sections(short_names(runs[:1]))
    assert "Accuracy by class" in only


def test_the_report_has_curves_against_steps_and_time(runs, tmp_path):
    write_report(runs, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Accuracy by class" in page
    assert page.count("<svg") == 1


def test_runs_in_folders_of_one_name_are_told_apart(runs, tmp_path):
    """As `compare` lays them out: OUT/runs/ROW/SEED."""
    folders = [tmp_path / "row" / "0", tmp_path / "other" / "0"]
    for run, folder in zip(runs, folders, strict=True):
        shutil.copytree(run, folder)
    assert short_names(folders) == {folders[0]: "row/0", folders[1]: "other/0"}
    write_report(folders, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Right by row/0, wrong by other/0" in page
    assert "<th>row/0</th><th>other/0</th>" in page


def test_runs_without_token_labels_show_what_their_classifier_says_of_locations(runs, tmp_path):
    write_report(runs, tmp_path / "report.html")
    assert "What first says about the locations of val images" in (tmp_path / "report.html").read_text()
    trained = load_model(runs[0])
    images = evaluation_set(trained.recipe, class_names=trained.class_names)
    image = images[0, 0].image[None]
    outputs = trained.model(normalize_images(image, mean=trained.model.mean, std=trained.model.std))
    expected = (
        trained.model.get_submodule("backbone.head")(outputs.tokens).softmax(dim=2).unflatten(1, outputs.grid)
    )
    found = location_maps(runs[0], image)
    assert found is not None
    np.testing.assert_allclose(found, expected.detach(), atol=1e-5)


def test_time_is_what_the_steps_took(runs):
    """10 steps of 10 images at 50 images/s, then half of 10 more at 100: 2 s and 0.5 s."""
    record = read_run(runs[0], "first")
    lines = [{"step": 10, "images_per_s": 50.0}, {"step": 20, "images_per_s": 100.0}]
    record.train_lines[:] = lines
    assert record.minutes_at(15) == pytest.approx(2.5 / 60)
    assert record.minutes_at(0) == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_accuracy_by_class_is_what_counting_gives(seed):
    rng = np.random.default_rng(seed)
    truth, guesses = rng.integers(0, 5, 30), rng.integers(0, 5, 30)
    found = class_accuracies(guesses, truth, 6)
    for class_id in range(6):
        of_class = [g == t for g, t in zip(guesses, truth, strict=True) if t == class_id]
        if of_class:
            assert found[class_id] == pytest.approx(np.mean(of_class))
        else:
            assert np.isnan(found[class_id])
