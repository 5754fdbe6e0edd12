"""`tokenlabel report`, and what a run writes for it while it has its data."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenlabel import report as report_module
from tokenlabel.classification.pictures import Answering, map_of_targets
from tokenlabel.cli import main
from tokenlabel.core.batch import Batch, normalize_images
from tokenlabel.core.targets import TokenTargets
from tokenlabel.data.augment import EvalTransform
from tokenlabel.data.batches import TokenLabelDataset
from tokenlabel.data.scenes import write_scenes
from tokenlabel.data.sources import open_images
from tokenlabel.drawing.page import Page
from tokenlabel.drawing.pictures import ClassGrid, Tile, make_album, read_album
from tokenlabel.evaluation.answers import Answers, read_answers
from tokenlabel.evaluation.evaluators import Predictions
from tokenlabel.models import TokenModel
from tokenlabel.models.load import load_model
from tokenlabel.report import class_accuracies, read_run, short_names
from tokenlabel.runtime.distributed import Ranks

FEW = ("--epochs=1", "--batch-size=10", "--data.num-workers=0", "--model.options.depth=1", "--device=cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Scenes, two runs of one step without token labels that begin with other weights, and one with token labels."""
    folder = tmp_path_factory.mktemp("made")
    write_scenes(folder / "scenes", num_train=10, num_val=20, seed=0)
    data = [f"--data.train={folder / 'scenes' / 'train'}", f"--data.val={folder / 'scenes' / 'val'}"]
    for seed, name in enumerate(("first", "second")):
        words = ["--recipe", "demo_class_labels", "--out", str(folder / name), f"--seed={seed}"]
        assert main(["train", *words, *data, *FEW]) == 0
    masks = f"masks:{folder / 'scenes' / 'masks' / 'train'}"
    assert main(["annotate", str(folder / "scenes" / "train"), str(folder / "labels"), "--teacher", masks]) == 0
    words = ["--recipe", "demo_token_labels", "--out", str(folder / "third"), "--mix.probability=1"]
    assert main(["train", *words, f"--data.labels={folder / 'labels'}", *data, *FEW]) == 0
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A folder with copies of the runs alone: their images and labels are elsewhere, or gone."""
    for name in ("first", "second", "third"):
        shutil.copytree(made / name, tmp_path / name)
        recipe = tmp_path / name / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace(str(made), "/nowhere"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def report(*words: str) -> str:
    assert main(["report", *words, "--output", "page.html"]) == 0
    return Path("page.html").read_text()


def refusal(capsys, *words: str) -> str:
    capsys.readouterr()
    assert main(["report", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


class TestReport:
    def test_shows_no_signature_of_a_url_and_takes_no_run_on_the_hub(self, here, capsys):
        recipe = Path("first", "recipe.yaml")
        recipe.write_text(recipe.read_text().replace("/nowhere/scenes/train", "http://host/a.tar?sig=SECRET"))
        page = report("first").replace("<wbr>", "")
        assert "http://host/a.tar" in page
        assert "SECRET" not in page
        assert "hf://me/run: expected a run folder on this machine" in refusal(capsys, "hf://me/run")

    def test_needs_neither_torch_nor_images_nor_labels(self, here):
        code = (
            "import sys; from tokenlabel.cli import main\n"
            "assert main(['report', './third', 'first', '--output', 'out/page.html']) == 0\n"
            "print({'torch', 'timm', 'tokenlabel.labels.store', 'tokenlabel.data.sources'} & sys.modules.keys())"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == ["out/page.html", "set()"]
        page = Path("out/page.html").read_text()
        for title in ("Results", "Curves", "Accuracy by class", "What third is trained on", "Settings that differ"):
            assert title in page
        assert page.count("<svg") == 4
        assert re.findall(r'(?:src|href)="(?!data:)([^"#]+)"', page) == []

    def test_is_the_same_file_each_time(self, here):
        assert report("first", "third") == report("first", "third")

    def test_both_ways_to_differ_are_shown(self, here):
        page = report("first", "second")
        ours, theirs = read_answers(Path("first")), read_answers(Path("second"))
        assert ours is not None
        assert theirs is not None
        for names, right, wrong in ((("first", "second"), ours, theirs), (("second", "first"), theirs, ours)):
            count = ((right.guesses == right.truth) & (wrong.guesses != wrong.truth)).sum()
            assert "Right by {}, wrong by {}: ".format(*names) + f"{count} of 20 images" in page
        assert "first over second, points" in page

    def test_a_run_beside_its_copy_never_differs(self, here):
        shutil.copytree("first", "copy")
        page = report("first", "copy")
        assert page.count("0 of 20 images") == 2
        assert page.count("<td>+0.0</td>") == 10

    def test_runs_in_folders_of_one_name_are_told_apart(self, here):
        """As `compare` lays them out: OUT/runs/ROW/SEED."""
        for run, folder in (("first", Path("row/0")), ("second", Path("other/0"))):
            shutil.copytree(run, folder)
        assert [*short_names([Path("row/0"), Path("other/0")]).values()] == ["row/0", "other/0"]
        assert "Right by row/0, wrong by other/0" in report("row/0", "other/0").replace("<wbr>", "")

    def test_a_run_of_an_older_version_has_a_page_that_says_what_is_missing(self, here):
        shutil.rmtree("first/pictures")
        Path("first/answers.npz").unlink()
        page = report("first")
        assert "first: holds no pictures; an older version trained it" in page
        assert "Accuracy by class" not in page
        assert page.count("<svg") == 3

    def test_an_unfinished_run_shows_what_is_there(self, here):
        shutil.rmtree("third/checkpoints")
        Path("third/answers.npz").unlink()
        Path("third/pictures/val.json").write_text("{")  # as a power cut leaves it
        lines = Path("third/metrics.jsonl").read_text().splitlines()
        Path("third/metrics.jsonl").write_text("\n".join(line for line in lines if '"eval"' not in line))
        album = json.loads(Path("third/pictures/train.json").read_text())
        Path("third/pictures/train.json").write_text(json.dumps({**album, "num_steps": 400}))
        page = report("third")
        assert "<td>1 of 400</td>" in page
        assert "targets of its tokens" in page
        (Path("third/metrics.jsonl")).unlink()
        assert "third: has taken no steps yet" in report("third")

    def test_figures_of_an_older_checkpoint_say_so_and_others_than_figures_are_skipped(self, here):
        Path("first/eval.json").write_text(json.dumps({"step": 0, "top1": 0.875}))
        page = report("first")
        assert "<td>87.5%</td>" in page
        assert "first: the figures are of step 0, and the run has gone on since" in page
        assert "of eval.json" not in page
        Path("first/eval.json").write_text(json.dumps({"num_images": 1234, "top1": 0.875}))
        assert "first: the figures of eval.json are of 1,234 images" in report("first")
        for content in ("[]", "3", '{"class": 3}'):
            Path("first/eval.json").write_text(content)
            assert "87.5%" not in report("first")
        Path("first/pictures/val.json").write_text('{"sheet": "val.jpg"}')
        report("first")

    def test_an_accuracy_of_0_is_a_point_of_the_curve(self, here, monkeypatch):
        charts = {}
        monkeypatch.setattr(report_module, "line_chart", lambda title, x, runs: charts.setdefault(title, runs) and ())
        lines = [{"kind": "eval", "step": 1, "top1": 0.0}, {"kind": "eval", "step": 2, "top1": 0.5}]
        Path("first/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        report("first")
        assert charts["top-1 on val, %"] == [[(1, 0.0), (2, 50.0)]]

    def test_says_what_is_wrong_in_a_line_and_keeps_an_older_page(self, here, capsys):
        Path("none").mkdir()
        Page("older").write(Path("page.html"))
        older = Path("page.html").read_text()
        assert "none: holds no recipe.yaml" in refusal(capsys, "first", "none", "--output", "page.html")
        told = refusal(capsys, "first", "./first", "second/../first", "--output", "page.html")
        assert told.endswith("first and first are the same run; name it once")
        assert "first: is a folder" in refusal(capsys, "first", "--output", "first")
        for output in ("page.html/x.html", "/proc/x.html"):
            assert f"{output}: cannot be written (" in refusal(capsys, "first", "--output", output)
        assert "exists and is no page of tokenlabel's" in refusal(capsys, "first", "--output", "first/recipe.yaml")
        assert Path("page.html").read_text() == older
        assert "model:" in Path("first/recipe.yaml").read_text()

    def test_time_is_what_the_steps_took(self, here):
        """10 steps of 10 images at 50 images/s, then half of 10 more at 100: 2 s and 0.5 s."""
        record = read_run(Path("first"), "first")
        record.lines[:] = [
            {"kind": "train", "step": 10, "images_per_s": 50.0},
            {"kind": "train", "step": 20, "images_per_s": 100.0},
        ]
        assert record.minutes_at(15) == pytest.approx(2.5 / 60)
        assert record.minutes_at(0) == 0


class TestWhatARunWrites:
    def test_its_first_batch_with_the_targets_of_its_tokens_and_of_its_partners(self, made):
        album = read_album(made / "third" / "pictures", "train")
        assert album is not None
        assert (album.about["step"], album.about["num_steps"], len(album.about["pictures"])) == (0, 1, 6)
        for picture in album.about["pictures"]:
            texts = [tile["text"] for tile in picture["tiles"]]
            assert texts[:3] == ["the teacher's map", "augmented image", "targets of its tokens"]
            assert texts[3].startswith("partner ")
            assert texts[4] == "mixed, as trained on"
            assert picture["caption"].startswith("target of the class token: ")

    @pytest.mark.parametrize(("name", "head"), [("first", "backbone.head"), ("third", "token_head")])
    def test_what_the_model_says_of_locations(self, made, name, head):
        """Without token labels it is the classifier that answers for them."""
        album, network = read_album(made / name / "pictures", "val"), load_model(made / name)
        model = network.model
        assert album is not None
        assert isinstance(model, TokenModel)
        assert len(album.about["pictures"]) == 20
        images = open_images(made / "scenes" / "val")
        transform = EvalTransform(network.img_size, crop_fraction=network.crop_fraction)
        for index in (0, 13):
            image = TokenLabelDataset(images, transform, seed=0)[0, index].image[None]
            with torch.inference_mode():
                outputs = model(normalize_images(image, mean=model.mean, std=model.std))
                probs, ids = model.get_submodule(head)(outputs.tokens)[0].softmax(dim=1).max(dim=1)
            photo, predicted = album.about["pictures"][index]["tiles"]
            assert photo["map"] is None
            assert album.about["photos"][photo["photo"]][2:] == [48, 48]
            found = album.class_map(predicted)
            assert found is not None
            assert found.strength is not None
            classes = [int(album.about["classes"][i]) for i in found.ids.flatten()]
            assert classes == ids.tolist()
            np.testing.assert_allclose(found.strength.flatten(), (probs * 10 - 1) / 9, atol=2e-3)

    def test_the_answer_to_every_image(self, made, capsys):
        answers = read_answers(made / "first")
        assert answers is not None
        assert (len(answers.keys), answers.class_names) == (20, tuple("0123456789"))
        assert [key.split("/")[0] for key in answers.keys] == [str(truth) for truth in answers.truth]
        capsys.readouterr()
        assert main(["eval", str(made / "first"), "--json", "--device", "cpu", "--num-workers", "0"]) == 0
        assert json.loads(capsys.readouterr().out)["top1"] == (answers.guesses == answers.truth).mean()

    def test_the_answers_of_several_processes_are_those_of_one(self):
        torch.manual_seed(0)
        logits, class_ids, keys = torch.randn(6, 3), torch.arange(6) % 3, [f"k{i}" for i in range(6)]

        def asked(rows: slice) -> Answering:
            evaluator = Answering(keys[1:5], of_tokens=False)
            batch = Batch(
                images=torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 3, 2, 2)[rows],
                class_ids=class_ids[rows],
                num_classes=3,
                views=torch.zeros(len(logits[rows]), 1, 2, 3),
                score_maps=None,
                keys=keys[rows],
                has_class=torch.ones(len(logits[rows]), dtype=torch.bool),
            )
            evaluator.add(Predictions(batch, (1, 1), logits[rows], None))
            return evaluator

        whole, parts = asked(slice(None)), [asked(slice(0, 2)), asked(slice(2, 6))]
        gathered = [(part.answers, part.pixels, part.maps) for part in parts]

        class TwoRanks(Ranks):
            def all_gather(self, value: Any) -> Any:
                return gathered

        parts[0].join(TwoRanks(world_size=2))
        assert parts[0].answers == whole.answers
        assert parts[0].pixels.keys() == {*keys[1:5]}
        assert {key: int(pixels[0, 0, 0]) for key, pixels in parts[0].pixels.items()} == {
            f"k{i}": i for i in range(1, 5)
        }

    def test_a_run_that_goes_on_keeps_the_pictures_of_its_first_batch(self, made, tmp_path):
        run = tmp_path / "first"
        shutil.copytree(made / "first", run)
        before = (run / "pictures" / "train.json").read_bytes()
        data = [f"--data.train={made / 'scenes' / 'train'}", f"--data.val={made / 'scenes' / 'val'}"]
        assert main(["train", "--recipe", "demo_class_labels", "--out", str(run), "--seed=0", *data, *FEW]) == 0
        assert (run / "pictures" / "train.json").read_bytes() == before


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


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), num_entries=st.integers(1, 6))
def test_the_map_of_targets_is_that_of_dense_ones(seed, num_entries):
    rng = torch.Generator().manual_seed(seed)
    weight = (torch.rand(2, 6, generator=rng) > 0.3).float()
    targets = TokenTargets(
        classes=torch.randint(0, 5, (2, num_entries), generator=rng),  # a class twice, as mixing leaves them
        excess=torch.rand(2, 6, num_entries, generator=rng) / num_entries * weight[..., None] / 2,
        floor=torch.full((2, 6), 0.05) * weight,
        weight=weight,
    )
    found, dense = map_of_targets(targets, 1, (2, 3), 5), targets.dense(5)[1].reshape(2, 3, 5)
    probs, ids = dense.max(dim=2)
    assert found.strength is not None
    np.testing.assert_allclose(found.strength, ((probs * 5 - 1) / 4).clamp(0, 1), atol=1e-6)
    np.testing.assert_array_equal(found.ids, torch.where(probs > 0, ids, -1))


@settings(max_examples=30, deadline=None)
@given(
    keys=st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1), min_size=1),
    seed=st.integers(0, 10_000),
)
def test_answers_come_back_as_they_were_written(tmp_path_factory, keys, seed):
    rng, run = np.random.default_rng(seed), tmp_path_factory.mktemp("run")
    keys = (*keys, "caf\udce9")
    truth, guesses = (rng.integers(-1, 70_000, len(keys)).astype(np.int32) for _ in range(2))
    probs = rng.random(len(keys)).astype(np.float16)
    Answers(keys, truth, guesses, probs, ("a", "b c")).write(run)
    found = read_answers(run)
    assert found is not None
    assert (found.keys, found.class_names) == (keys, ("a", "b c"))
    for array, expected in ((found.truth, truth), (found.guesses, guesses), (found.probs, probs)):
        np.testing.assert_array_equal(array, expected)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.tuples(st.integers(1, 30), st.integers(1, 30)))
def test_maps_come_back_as_they_were_written(tmp_path_factory, seed, size):
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("album")
    ids = rng.integers(-1, 100_000, size)
    strength = rng.integers(0, 256, size) / 255
    photo = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    album = make_album([([Tile(photo, "x", ClassGrid(ids, strength, (0, 0.25, 1, 0.75)))], {"key": "k"})], ["a"] * 50)
    album.write(folder, "val", step=3)
    album.write(folder, "val", step=4)
    again = read_album(folder, "val")
    assert again is not None
    assert (again.about["step"], len([*folder.iterdir()])) == (4, 2)
    found = again.class_map(again.about["pictures"][0]["tiles"][0])
    assert found is not None
    assert found.region == (0, 0.25, 1, 0.75)
    names = [[again.about["classes"][i] if i >= 0 else "" for i in row] for row in found.ids.tolist()]
    assert names == [["" if i < 0 else "a" if i < 50 else str(i) for i in row] for row in ids.tolist()]
    assert found.strength is not None
    np.testing.assert_allclose(found.strength, strength, atol=1e-6)


def test_the_legend_has_the_classes_that_are_shown_the_most_frequent_first():
    photo = np.zeros((8, 8, 3), np.uint8)
    maps = [ClassGrid(np.array([[0, 1], [1, -1]])), ClassGrid(np.array([[2] * 40]))]
    album = make_album([([Tile(photo, "", one)], {"key": "k"}) for one in maps], ["<ant>", "bee", "cat", "dog"])
    page = Page("x", [album])
    legend = page.legend((album, picture) for picture in album.about["pictures"])
    assert re.findall(r"</i>([^<]*)</span>", legend) == ["cat", "bee", "&lt;ant&gt;", "no label"]
    photo = np.zeros((8, 100, 3), np.uint8)
    many = make_album([([Tile(photo, "", ClassGrid(np.arange(100)[None]))], {"key": "k"})], [*map(str, range(100))])
    legend = Page("x", [many]).legend((many, picture) for picture in many.about["pictures"])
    assert len(set(re.findall(r"rgb\([^)]*\)", legend))) == 21
    assert "80 others" in legend
