"""Segmentation under the engine: learning, resuming, several processes, weights to begin with, and the commands."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from golden_values import GOLDEN, draw_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from segment_cases import BACKBONE, nested_recipe, recipe_for, write_image

from tokenlabel.cli import main
from tokenlabel.data.scenes import write_scenes
from tokenlabel.labels.store import LabelStore
from tokenlabel.models import create_model
from tokenlabel.models.options import SegmentModelConfig
from tokenlabel.models.runs import list_checkpoints
from tokenlabel.models.segmentation import create_segmentation_model, load_segmentation_weights
from tokenlabel.runtime.configuration import config_from_dict
from tokenlabel.runtime.distributed import Ranks, joined_ranks
from tokenlabel.runtime.errors import ConfigError, ModelError
from tokenlabel.runtime.runlog import Stopwatch, read_metrics
from tokenlabel.segmentation.inference import evaluate_segmentation, segmenter_of
from tokenlabel.segmentation.recipe import SegmentRecipe
from tokenlabel.segmentation.task import build, pixel_loss, train_segmentation
from tokenlabel.training.checkpoint import load_run
from tokenlabel.training.engine import run_task
from tokenlabel.training.recipe import recipe_content, recipe_names
from tokenlabel.training.trainer import prepare, train_step

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(root, num_train=40, num_val=20, seed=0)
    return root


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory):
    """A short run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train_segmentation(recipe_for(scenes), folder, device=CPU)
    return folder


def weights_of(run):
    (folder,) = list_checkpoints(run)[-1:]
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@settings(max_examples=25)
@given(st.integers(1, 3), st.integers(2, 5), st.integers(0, 99))
def test_the_loss_is_the_cross_entropy_of_the_pixels_that_count(batch, num_classes, seed):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(batch, num_classes, 4, 3)).astype(np.float32))
    masks = rng.integers(-1, num_classes, (batch, 4, 3)).astype(np.int16)
    total = 0.0
    for image, row, column in np.ndindex(masks.shape):
        if masks[image, row, column] != -1:
            scores = logits[image, :, row, column].double().numpy()
            total += np.log(np.exp(scores).sum()) - scores[masks[image, row, column]]
    assert float(pixel_loss(logits, torch.from_numpy(masks))) == pytest.approx(total / masks.size, abs=1e-5)


def test_a_run_leaves_its_recipe_metrics_and_model(run):
    lines = read_metrics(run)
    evals = [line for line in lines if line["kind"] == "eval"]
    assert [line["step"] for line in evals] == [5, 9]
    assert {"miou", "mean_accuracy", "pixel_accuracy", "num_images"} <= set(evals[-1])
    last = [line for line in lines if line["kind"] == "train"][-1]
    assert last["loss"] == pytest.approx(last["decode_loss"] + 0.4 * last["auxiliary_loss"])
    trained = load_run(run, SegmentRecipe)
    assert trained.class_names == (*"0123456789", "background")
    assert trained.step == 9
    assert not trained.model.training


def test_every_step_on_masks_alone_gives_the_losses_that_it_always_gave(scenes):
    """Those from before label maps could be learnt from, but for the seed of dropout, which mixing shared then."""
    task = build(recipe_for(scenes), device=CPU)
    draw_weights(task.model)
    training = prepare(task, Ranks())
    batches = iter(training.task.batches(training.sampler(0)))
    for step, losses in enumerate(json.loads((GOLDEN / "segmentation.json").read_text())["masks"]):
        values = train_step(training, batches, step, Stopwatch()).values
        found = [float(values[part]) for part in ("decode_loss", "auxiliary_loss", "gradient_norm")]
        assert found == pytest.approx(losses, abs=2e-3 if step else 2e-5)


def test_training_learns_its_images_by_heart(scenes, tmp_path):
    recipe = recipe_for(
        scenes,
        num_steps=60,
        augment={"scale": [0.5, 0.5], "horizontal_flip": 0.0, "photometric": False},
        optim__lr=1e-2,
        optim__ema_decay=None,
        model__dropout=0.0,
        eval__every_epochs=100.0,
        checkpoint__every_epochs=100.0,
    )
    task = build(recipe, device=CPU)
    draw_weights(task.model)
    run_task(task, tmp_path / "run", ranks=Ranks(), eval_every_epochs=100.0)
    losses = [line["decode_loss"] for line in read_metrics(tmp_path / "run") if line["kind"] == "train"]
    assert losses[-1] < 0.5 * losses[0]


def test_a_killed_run_ends_with_the_same_weights(scenes, tmp_path):
    recipe = recipe_for(scenes, num_steps=30, eval__every_epochs=0.4)
    train_segmentation(recipe, tmp_path / "unbroken", device=CPU)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tokenlabel.segmentation.task"])
    killed = tmp_path / "killed"
    for is_last in (False, True):
        process = processes.Process(target=train_segmentation, args=(recipe, killed), kwargs={"device": CPU})
        process.start()
        while not is_last and process.is_alive() and len(read_metrics(killed)) < 3:
            time.sleep(0.005)
        if not is_last:
            process.kill()
        process.join()
        assert process.exitcode == (0 if is_last else -signal.SIGKILL)
    assert weights_of(killed) == weights_of(tmp_path / "unbroken")


def rank_of_two(rank, port, run, recipe, out, answers):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with joined_ranks(CPU) as ranks:
        figures = figures_of_run(run, ranks)
        task = build(recipe, device=CPU)
        together = run_task(task, out, ranks=ranks, eval_every_epochs=9)
        own = task.evaluate(task.model, Ranks())
        del together["images_per_s"], own["images_per_s"]
        answers.put((figures, together, own))


def figures_of_run(run, ranks):
    trained = load_run(run, SegmentRecipe)
    pairs = build(trained.recipe, device=CPU).val_pairs
    assert pairs is not None
    figures = evaluate_segmentation(
        segmenter_of(trained, CPU), pairs, autocast=torch.autocast("cpu", enabled=False), ranks=ranks
    )
    del figures["images_per_s"]
    return figures


def test_two_processes_find_the_same_figures_as_one_and_train_together(run, scenes, tmp_path):
    recipe = recipe_for(scenes, num_steps=2, precision="bf16", data__val_split="train", optim__ema_decay=None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tokenlabel.segmentation.task"])
    answers = context.SimpleQueue()
    arguments = (port, run, recipe, tmp_path / "run", answers)
    ranks = [context.Process(target=rank_of_two, args=(rank, *arguments)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    found = [answers.get() for _ in ranks]
    for process in ranks:
        process.join()
    alone = figures_of_run(run, Ranks())
    assert [figures for figures, *_ in found] == [alone, alone]
    # What both found together is what each rank's own model finds, with the running statistics of the first.
    for _, together, own in found:
        assert together["miou"] == own["miou"]
    assert read_metrics(tmp_path / "run")[-1]["step"] == 2
    logged = [line for line in read_metrics(run) if line["kind"] == "eval"][-1]
    assert logged["miou"] == alone["miou"]


def new_model(num_classes=11, **changes):
    config = {"name": "lvvit_t", "img_size": (24, 24), "options": BACKBONE, "neck_width": 16, "head_width": 8}
    return create_segmentation_model(SegmentModelConfig(**{**config, **changes}), num_classes=num_classes)


def test_a_classifier_of_another_size_becomes_the_backbone(tmp_path):
    classifier = create_model("lvvit_t", num_classes=7, img_size=(48, 48), **BACKBONE)
    save_file(classifier.state_dict(), tmp_path / "classifier.safetensors")
    model = new_model(img_size=(24, 36))
    load_segmentation_weights(model, tmp_path / "classifier.safetensors")
    ours, theirs = model.backbone.state_dict(), classifier.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if name.startswith("backbone.blocks."))
    assert ours["backbone.pos_embed"].shape == (1, 1 + 4 * 6, 16)


def as_published(model, *, changes=()):
    """Return the tensors of a model under the names of the published files, which have no classifier in there."""
    renamed = {
        name.replace("neck.side", "backbone.side").replace("backbone.backbone.", "backbone."): tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith(("backbone.backbone.head", "backbone.token_head", "backbone.backbone.norm."))
    }
    return renamed | dict(changes)


def test_published_models_load(tmp_path):
    published = new_model()
    torch.save({"state_dict": as_published(published), "meta": {"iter": 160000}}, tmp_path / "upernet.pth")
    model = new_model()
    load_segmentation_weights(model, tmp_path / "upernet.pth")
    images = torch.randn(1, 3, 24, 24)
    assert torch.equal(model.eval()(images).logits, published.eval()(images).logits)


@pytest.mark.parametrize("prefix", ["network.", "segmentor.", "module.model."])
@pytest.mark.parametrize("is_published", [True, False])
def test_whole_models_are_found_below_any_prefix(tmp_path, capfd, prefix, is_published):
    whole = new_model()
    tensors = as_published(whole) if is_published else whole.state_dict()
    averaged = {
        f"ema_model.module.{name}": tensor + 1 for name, tensor in tensors.items() if tensor.is_floating_point()
    }
    contents = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    torch.save({"state_dict": contents | averaged | {"loss.weight": torch.ones(2)}}, tmp_path / "a.ckpt")
    model = new_model()
    assert not load_segmentation_weights(model, tmp_path / "a.ckpt")
    images = torch.randn(1, 3, 24, 24)
    assert torch.equal(model.eval()(images).logits, whole.eval()(images).logits)
    assert f"takes state_dict: {prefix}, and skips" in capfd.readouterr().err


def test_heads_for_other_classes_start_anew(tmp_path, caplog):
    torch.save(as_published(new_model(num_classes=5)), tmp_path / "upernet.pth")
    model = new_model()
    before = model.decode_head.conv_seg.weight.clone()
    load_segmentation_weights(model, tmp_path / "upernet.pth")
    assert torch.equal(model.decode_head.conv_seg.weight, before)
    assert "auxiliary_head.conv_seg.bias" in caplog.text


def test_files_that_differ_are_refused_by_the_names(tmp_path):
    tensors = as_published(new_model(), changes={"decode_head.more.weight": torch.ones(1)})
    del tensors["decode_head.fpn_convs.0.conv.weight"]
    tensors["backbone.side_layer1.0.weight"] = torch.ones(16, 16, 2, 2)
    torch.save(tensors, tmp_path / "upernet.pth")
    model = new_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        ModelError,
        match=r"it lacks decode_head\.fpn_convs\.0\.conv\.weight; it has decode_head\.more\.weight; "
        r"sizes differ: neck\.side_layer1\.0\.weight \(16 x 16 x 2 x 2, not 16 x 16 x 4 x 4\)",
    ):
        load_segmentation_weights(model, tmp_path / "upernet.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_training_goes_on_from_a_run_of_segmentation(run, scenes):
    task = build(recipe_for(scenes, model__weights=str(run)), device=CPU)
    (folder,) = list_checkpoints(run)[-1:]
    averaged = load_file(folder / "ema.safetensors")
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in task.model.state_dict().items())


@pytest.mark.parametrize(
    ("names", "background", "rows", "said"),
    [
        ("9876543210", "background", [*range(9, -1, -1), 10], "11 of 11 classes are initialised from its heads"),
        ("0123456789x", "background", [*range(10), None, 10], "11 of 12 classes are initialised from its heads for 11"),
        ("01234fghij", "ground", [*range(5), *[None] * 6], "5 of 11 classes are initialised from its heads"),
        ("abcdefghij", "ground", [*range(11)], "class 0 is '0' to the file and 'a' to the images; 0 names are common"),
    ],
)
def test_classifiers_begin_with_the_rows_of_their_own_classes(run, scenes, names, background, rows, said, capfd):
    """`rows`: the row in the run of each class, None for one that it has not."""
    changes = {"data__class_names": [*names], "data__background": background}
    task = build(recipe_for(scenes, model__weights=str(run), **changes), device=CPU)
    (folder,) = list_checkpoints(run)[-1:]
    ours, theirs = task.model.state_dict(), load_file(folder / "ema.safetensors")
    for key in (f"{head}.conv_seg.{part}" for head in ("decode_head", "auxiliary_head") for part in ("weight", "bias")):
        for row, place in enumerate(rows):
            is_theirs = [torch.equal(ours[key][row], theirs[key][other]) for other in range(11)]
            assert [other for other in range(11) if is_theirs[other]] == ([] if place is None else [place]), key
    assert said in capfd.readouterr().err


def test_files_name_the_classes_that_their_rows_are_for(tmp_path, capfd):
    names = [f"class {letter}" for letter in "abcdefghijk"]
    published, model = new_model(), new_model()
    torch.save({"state_dict": as_published(published)}, tmp_path / "unnamed.pth")
    assert not load_segmentation_weights(model, tmp_path / "unnamed.pth", class_names=names)
    assert "unnamed.pth's 11 classes are the images' in sorted order: 0 = class a" in capfd.readouterr().err
    for others, unfilled in (([*reversed(names)], 0), ([*names[:5], *"fghijk"], 4), ([*names, "more"], 4)):
        whole = new_model(num_classes=len(others))
        torch.save({"state_dict": as_published(whole), "class_names": others}, tmp_path / "named.pth")
        model = new_model()
        found = load_segmentation_weights(model, tmp_path / "named.pth", class_names=names)
        assert len(found) == unfilled
        ours, theirs = model.decode_head.conv_seg.weight, whole.decode_head.conv_seg.weight
        assert torch.equal(ours[0], theirs[others.index(names[0])])


def test_the_commands_train_evaluate_and_predict(scenes, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(nested_recipe(scenes)))
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(["segment", "train", "--recipe", str(recipe), "--run", str(run), "--num-steps", "2"]) == 0
    trained = json.loads(capsys.readouterr().out)
    assert main(["segment", "eval", str(run), "--output", str(tmp_path / "eval.json"), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures == json.loads((tmp_path / "eval.json").read_text())
    assert figures["miou"] == trained["miou"]
    assert set(figures["class_iou"]) == {*"0123456789", "background"}
    changed = ["--mode", "whole", "--scales", "0.5", "1", "--flip", "--short-side", "0"]
    assert main(["segment", "eval", str(run), *changed]) == 0
    about, of_classes = capsys.readouterr().out.split("\n\n")
    assert "num_images           20\n" in about
    assert "absent_classes       none" in about
    assert of_classes.splitlines()[0] == "class       class_iou  class_accuracy"
    assert len(of_classes.splitlines()) == 1 + 11
    write_image(tmp_path / "photos/a/one.jpg", (30, 41))
    assert main(["segment", "predict", str(run), str(tmp_path / "photos"), "--out", str(out)]) == 0
    with Image.open(out / "masks/a/one.png") as mask, Image.open(out / "overlays/a/one.png") as overlay:
        assert (mask.mode, mask.size, overlay.size) == ("P", (41, 30), (41, 30))
    assert list(json.loads((out / "classes.json").read_text())) == [*"0123456789", "background"]
    assert main(["segment", "predict", str(run), str(tmp_path / "photos"), "--out", str(out)]) == 0
    (out / "classes.json").unlink()  # then the masks may be somebody's own
    before = (out / "masks/a/one.png").stat().st_mtime_ns
    assert main(["segment", "predict", str(run), str(tmp_path / "photos"), "--out", str(out)]) == 2
    assert f"{out}: holds masks/ or overlays/ already" in capsys.readouterr().err
    assert (out / "masks/a/one.png").stat().st_mtime_ns == before


def test_soft_predictions_go_into_a_store_on_the_grid_of_the_head(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, size_px in (("a/one.png", (24, 41)), ("two.png", (24, 24))):
        write_image(tmp_path / "photos" / name, size_px)
    predict = ["segment", "predict", str(run), "photos"]
    assert main([*predict, "--store", "soft"]) == 0
    assert capsys.readouterr().out == "soft: 2 images labelled\n"
    store, trained = LabelStore("soft"), load_run(run, SegmentRecipe)
    assert store.manifest.class_names == (*"0123456789", "background")
    assert sorted(store.keys()) == ["a/one.png", "two.png"]
    segmenter = segmenter_of(trained, CPU)
    pixels = torch.from_numpy(np.array(Image.open("photos/two.png"))).permute(2, 0, 1)
    probs = segmenter.probabilities(pixels).numpy()
    assert store["two.png"].codes.shape[:2] == probs.shape[:2] == segmenter.grid_of((24, 24))
    assert (store["two.png"].top_class_ids == probs.argmax(axis=2)).mean() > 0.9  # records are rounded
    write_image(tmp_path / "photos/three.png", (24, 30))
    manifest = Path("soft/manifest.json")
    content = json.loads(manifest.read_text())
    assert set(content["preprocessing"]) == {"mode", "stride_px", "short_side_px", "max_aspect", "scales", "flip"}
    content["preprocessing"] |= {"every_epochs": 3.0, "windows_at_once": 9}  # as earlier versions wrote it
    manifest.write_text(json.dumps(content))
    assert main([*predict, "--store", "soft"]) == 0
    assert capsys.readouterr().out == "soft: 1 images labelled\n"
    write_image(tmp_path / "photos/three.png", (30, 24))
    assert main([*predict, "--store", "soft"]) == 0
    assert "soft: 1 images were replaced since their predictions were stored (three.png)" in capsys.readouterr().err
    assert main(["inspect", "soft"]) == 0
    assert "least certain: a mask of these would teach most" in capsys.readouterr().out
    for words, message in (
        ((), "name --out for masks and overlays, --store for soft predictions, or both"),
        (("photos/two.png", "--store", "soft"), "--store takes one folder of images"),
        (("--store", "soft", "--flip"), "soft: holds other labels"),
        (("--store", "soft", "--out", "photos/out"), "--out photos/out lies among the images"),
    ):
        assert main([*predict, *words]) == 2
        assert message in capsys.readouterr().err
    # Neither half is done where the other is refused.
    assert main([*predict, "--store", "soft", "--flip", "--out", "new"]) == 2
    assert not Path("new").exists()
    Path("few/masks").mkdir(parents=True)
    assert main([*predict, "--store", "other", "--out", "few"]) == 2
    assert "few: holds masks/ or overlays/ already" in capsys.readouterr().err
    assert not Path("other").exists()
    Path("few/images").mkdir()
    assert main(["segment", "predict", str(run), "few", "--out", "new"]) == 2
    assert "few: holds masks beside its images; name few/images" in capsys.readouterr().err
    write_image(tmp_path / "own/images/one.png", (24, 24))
    for _ in range(2):  # its own results are no masks of the images
        assert main(["segment", "predict", str(run), "own", "--out", "own"]) == 0


def test_predict_skips_an_image_that_does_not_decode(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "photos/sound.png", (24, 24))
    Path("photos/broken.png").write_bytes(Path("photos/sound.png").read_bytes()[:40])
    assert main(["segment", "predict", str(run), "photos", "--out", "out", "--store", "soft"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "soft: 1 images labelled\nout: 1 images\n"
    assert printed.err.count("skipped: ") == 2
    assert Path("out/masks/sound.png").exists()
    assert [failure.key for failure in LabelStore("soft").failures()] == ["broken.png"]
    Path("photos/sound.png").unlink()
    assert main(["segment", "predict", str(run), "photos", "--out", "other"]) == 2
    assert "none of 1 images decodes (photos/broken.png: " in capsys.readouterr().err


def test_a_published_file_is_evaluated_with_its_recipe(run, scenes, tmp_path, capsys):
    torch.save(as_published(load_run(run, SegmentRecipe).model), tmp_path / "upernet.pth")
    recipe = tmp_path / "recipe.yaml"
    nested = nested_recipe(scenes)
    nested["data"] |= {"class_names": list("0123456789"), "layout": "scenes"}
    recipe.write_text(yaml.safe_dump(nested))
    words = [str(tmp_path / "upernet.pth"), "--recipe", str(recipe), "--root", str(scenes)]
    assert main(["segment", "eval", *words, "--json"]) == 0
    logged = [line for line in read_metrics(run) if line["kind"] == "eval"][-1]
    assert json.loads(capsys.readouterr().out)["miou"] == logged["miou"]


def test_a_file_without_a_trained_head_is_not_evaluated(scenes, tmp_path, capsys):
    """A backbone, given by mistake, would otherwise be judged by random weights."""
    recipe = tmp_path / "recipe.yaml"
    nested = nested_recipe(scenes)
    recipe.write_text(yaml.safe_dump(nested | {"data": nested["data"] | {"class_names": list("0123456789")}}))
    config = config_from_dict(nested, SegmentRecipe, name="test").model
    backbone = create_segmentation_model(config, num_classes=11).backbone
    tensors = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    save_file(tensors, tmp_path / "backbone.safetensors")
    words = ["segment", "eval", str(tmp_path / "backbone.safetensors"), "--recipe"]
    assert main([*words, str(recipe), "--root", str(scenes)]) == 2
    error = capsys.readouterr().err
    assert "is no whole model of" in error
    assert "it has nothing for auxiliary_head" in error
    assert main([*words, "small_data"]) == 2
    assert "(is it a recipe of tokenlabel train?)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trai"], "no command 'trai'; known: train, eval, predict"),
        (["eval", "nowhere"], "nowhere: holds no checkpoint"),
        (["train", "--recipe", "segment_scenes", "--run", "r"], "layout scenes needs data.root"),
        (["eval", "RUN", "--stride", "0"], "--stride must be at least 1, got [0, 0]"),
    ],
)
def test_mistakes_are_one_line(words, message, run, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["segment", *(str(run) if word == "RUN" else word for word in words)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_one_image_at_once_is_too_few_for_upernet(scenes, tmp_path):
    with pytest.raises(ConfigError, match="take at least 2 images at once"):
        train_segmentation(recipe_for(scenes, batch_size=1), tmp_path / "run", device=CPU)


def test_predictions_of_the_same_name_are_refused(run, tmp_path, capsys):
    for name in ("one.jpg", "one.png"):
        write_image(tmp_path / "photos" / name, (30, 41))
    assert main(["segment", "predict", str(run), str(tmp_path / "photos"), "--out", str(tmp_path / "out")]) == 2
    assert "would both be written to one.png" in capsys.readouterr().err


def test_sharded_training_is_refused(scenes):
    with pytest.raises(ConfigError, match="sharded"):
        recipe_for(scenes, sharded=True)


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("segment_")])
def test_the_recipes_of_the_package_can_be_read(name):
    nested = recipe_content(name, SegmentRecipe)
    of_folders = nested["data"]["layout"] == "folders"
    nested["data"]["train" if of_folders else "root"] = "somewhere"
    nested["model"]["options"].pop("pretrained", None)  # nothing is downloaded here
    recipe = config_from_dict(nested, SegmentRecipe, name=name)
    nested["model"] |= {"img_size": [32, 32]}
    with torch.device("meta"):
        create_segmentation_model(recipe.model, num_classes=150)
    if "ade20k" in name:
        assert (recipe.num_steps, recipe.batch_size, recipe.optim.lr) == (160_000, 16, 6e-5)
        assert recipe.optim.warmup_steps == 1500
        assert round(recipe.eval.every_epochs * (20_210 // 16)) == 8000


def test_a_report_shows_figures_classes_and_pictures(run, tmp_path, capsys):
    assert main(["segment", "eval", str(run), "--output", str(tmp_path / "eval.json")]) == 0
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.copy(tmp_path / "eval.json", copy)
    assert main(["report", str(run), str(copy), "--output", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    figures = json.loads((tmp_path / "eval.json").read_text())
    assert f"<td>{figures['miou']:.1%}</td>" in page
    assert "<td>background</td>" in page
    assert page.count("the truth") == 2 * 12  # caption and alternative text of each val image, once for both runs
    capsys.readouterr()
