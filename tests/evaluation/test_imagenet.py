"""`tokenlabel eval` on small folders in each data set's own layout, and against timm's own validation."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data.config import resolve_data_config
from timm.data.dataset import ImageDataset
from timm.data.imagenet_info import ImageNetInfo
from timm.data.loader import create_loader
from timm.utils.metrics import accuracy

from tokenlabel.data.imagenet import (
    ALEXNET_ERRORS,
    SETS,
    SEVERITIES,
    corruption_figures,
    corruption_folders,
    read_multi_labels,
    read_real_labels,
)
from tokenlabel.evaluation.assessment import assess
from tokenlabel.evaluation.options import EvalOptions, as_text
from tokenlabel.models.load import load_model

CPU = torch.device("cpu")
WNIDS = ImageNetInfo("imagenet-1k").label_names()
# Both of ImageNet-A and of ImageNet-R; of R alone.
GOLDFINCH, STINGRAY, TERRIER = "n01531178", "n01498041", "n02094433"
SIDE_PX = 64


def write_image(path, rng):
    """A picture of large patches, of its own size and aspect."""
    width, height = (int(side) for side in rng.integers(70, 130, 2))
    patches = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    patches.resize((width, height), Image.Resampling.BICUBIC).save(path)


def write_folders(root, names, rng, count=2):
    for name in names:
        for number in range(count):
            write_image(root / name / f"{number}.jpg", rng)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of a tiny timm network, for 12 and for 1,000 classes, by number of classes."""
    folder, files = tmp_path_factory.mktemp("weights"), {}
    for num_classes in (12, 1000):
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=num_classes)
        tensors = model.state_dict()
        tensors["fc.weight"].mul_(30)  # clear answers
        files[num_classes] = folder / f"{num_classes}.safetensors"
        save_file(tensors, files[num_classes])
    return files


def evaluate(weights, data, **options):
    chosen = EvalOptions(data=data, weights=str(weights), size=SIDE_PX, num_workers=0, **options)
    return assess("test_resnet", chosen, device=CPU)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder of twelve classes that no model knows the names of."""
    root = tmp_path_factory.mktemp("own")
    write_folders(root, [f"class{number:02d}" for number in range(12)], np.random.default_rng(0), count=4)
    return root


@pytest.fixture(scope="module")
def timms(weights, own):
    """What timm's own data set, loader and accuracy make of these images."""
    model = timm.create_model("test_resnet", num_classes=12, checkpoint_path=str(weights[12])).eval()
    data = resolve_data_config({"img_size": SIDE_PX}, model=model, use_test_size=True)
    loader = create_loader(
        ImageDataset(str(own)),
        input_size=data["input_size"],
        batch_size=16,
        use_prefetcher=False,
        interpolation=data["interpolation"],
        mean=data["mean"],
        std=data["std"],
        num_workers=0,
        crop_pct=data["crop_pct"],
        crop_mode=data["crop_mode"],
    )
    right, losses = np.zeros(2), []
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # timm's reader leaves files open
        for images, class_ids in loader:
            logits = model(images)
            right += [float(a) * len(images) / 100 for a in accuracy(logits, class_ids, topk=(1, 5))]
            losses += torch.nn.functional.cross_entropy(logits, class_ids, reduction="none").tolist()
    return {"num_images": 48, "top1": right[0] / 48, "top5": right[1] / 48, "loss": float(np.mean(losses))}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"set": "imagenet-c", "per_class": True}, "leave --per-class out"),
        ({"set": "imagenet-c", "probe": Path("few")}, "leave --probe out"),
        ({"multi_labels": Path("f.json"), "real": Path("real.json")}, "leave --real out"),
        ({"multi_labels": Path("f.json"), "set": "imagenet-a"}, "--set imagenet-a"),
        ({"crop_fraction": 0.0}, "--crop-fraction must be above 0 and at most 1, got 0.0"),
        ({"masks": Path("masks")}, "no head for tokens that was trained"),
    ],
)
def test_options_that_would_change_nothing_are_refused(weights, own, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(weights[12], own, **options)
    with pytest.raises(ValueError, match="--size must be at least 1, got 0"):
        assess("test_resnet", EvalOptions(data=own, size=0), device=CPU)


def test_figures_are_timms_to_the_last_image(weights, own, timms):
    found = evaluate(weights[12], own)
    assert 0 < timms["top1"] < timms["top5"] < 1
    assert {name: found[name] for name in timms} == pytest.approx(timms, abs=1e-5)


def test_processes_divide_images_exactly(weights, own, timms):
    """48 images in batches of 5 over two processes: nothing is padded, nothing is counted twice."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tokenlabel", "eval"]
    options = ["test_resnet", "--data", str(own), "--weights", str(weights[12]), f"--size={SIDE_PX}"]
    options += ["--batch-size=5", "--num-workers=0", "--json", "--device=cpu"]
    done = subprocess.run(
        [sys.executable, *words, *options], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found = json.loads(line)
    assert {name: found[name] for name in timms} == pytest.approx(timms, abs=1e-5)


def test_folders_of_wordnet_ids_are_imagenet_1k_and_sketch(weights, tmp_path):
    names = [WNIDS[3], WNIDS[500], WNIDS[999]]
    write_folders(tmp_path, names, np.random.default_rng(1))
    images = SETS["folder"](tmp_path, WNIDS, 1000)
    assert images.source.class_ids.tolist() == [3, 3, 500, 500, 999, 999]
    assert images.competing is None
    found = evaluate(weights[1000], tmp_path, per_class=True)
    assert found["num_images"] == 6
    assert set(found["per_class"]) == set(names)


def test_numbered_folders_are_imagenet_v2(tmp_path):
    """10 comes before 2 among names; the class is the number."""
    write_folders(tmp_path, ["0", "2", "10", "999"], np.random.default_rng(1), count=1)
    images = SETS["imagenet-v2"](tmp_path, WNIDS, 1000)
    by_key = dict(zip(images.source.keys, images.source.class_ids.tolist(), strict=True))
    assert by_key == {"0/0.jpg": 0, "10/0.jpg": 10, "2/0.jpg": 2, "999/0.jpg": 999}
    write_folders(tmp_path, ["1000"], np.random.default_rng(1), count=1)
    with pytest.raises(ValueError, match="0 to 999; found '1000'"):
        SETS["imagenet-v2"](tmp_path, WNIDS, 1000)


@pytest.mark.parametrize(
    ("name", "folders"), [("imagenet-a", [GOLDFINCH, STINGRAY]), ("imagenet-r", [STINGRAY, TERRIER])]
)
def test_of_a_and_r_200_classes_compete(name, folders, tmp_path):
    write_folders(tmp_path, folders, np.random.default_rng(1), count=1)
    images = SETS[name](tmp_path, WNIDS, 1000)
    assert images.competing is not None
    assert images.competing.sum() == 200
    assert sorted(WNIDS[i] for i in images.source.class_ids) == sorted(folders)
    assert all(images.competing[i] for i in images.source.class_ids)
    with pytest.raises(ValueError, match="models of ImageNet-1k's 1,000 classes, this one has 12"):
        SETS[name](tmp_path, WNIDS[:12], 12)


def test_a_class_that_is_not_in_the_set_is_named(tmp_path):
    write_folders(tmp_path, [WNIDS[0]], np.random.default_rng(1), count=1)  # a tench is not in ImageNet-A
    with pytest.raises(ValueError, match="ImageNet-A has 200 classes, and 'n01440764' is none of them"):
        SETS["imagenet-a"](tmp_path, WNIDS, 1000)


def test_a_class_that_does_not_compete_cannot_win(weights, tmp_path):
    """The same images: among 200 classes the top 5 is at least as often right as among 1,000."""
    write_folders(tmp_path, [STINGRAY, GOLDFINCH], np.random.default_rng(1), count=6)
    among_all = evaluate(weights[1000], tmp_path)
    among_some = evaluate(weights[1000], tmp_path, set="imagenet-a")
    assert among_some["loss"] < among_all["loss"]
    assert among_some["top5"] >= among_all["top5"]


def test_real_labels_are_by_the_number_of_the_image(weights, tmp_path):
    rng = np.random.default_rng(1)
    for number in (1, 2, 3):
        write_image(tmp_path / "val" / WNIDS[number] / f"ILSVRC2012_val_{number:08d}.JPEG", rng)
    (tmp_path / "real.json").write_text(json.dumps([list(range(1000)), [], [0]]))
    labels = read_real_labels(tmp_path / "real.json")
    assert labels["ILSVRC2012_val_00000003.JPEG"] == [0]
    found = evaluate(weights[1000], tmp_path / "val", real=tmp_path / "real.json")
    assert found["num_real_images"] == 2
    assert found["real"] in (0.5, 1.0)  # any answer is right for the first image


def test_corruptions_lie_in_folders_of_corruption_and_severity(weights, tmp_path):
    rng = np.random.default_rng(1)
    for corruption in ALEXNET_ERRORS:
        for severity in SEVERITIES:
            write_folders(tmp_path / corruption / str(severity), [WNIDS[7]], rng, count=1)
    found = evaluate(weights[1000], tmp_path, set="imagenet-c")
    assert found["mce"] == pytest.approx(np.mean([found[f"ce_{name}"] for name in ALEXNET_ERRORS]))
    (tmp_path / "fog" / "5" / WNIDS[7] / "0.jpg").rename(tmp_path / "gone.jpg")
    (tmp_path / "fog" / "5" / WNIDS[7]).rmdir()
    (tmp_path / "fog" / "5").rmdir()
    with pytest.raises(ValueError, match="1 are missing"):
        corruption_folders(tmp_path)


def test_the_mean_corruption_error_of_alexnet_is_one():
    top1 = {(name, s): 1 - error for name, error in ALEXNET_ERRORS.items() for s in SEVERITIES}
    assert corruption_figures(top1)["mce"] == pytest.approx(1)


def test_images_with_several_labels_have_a_mean_average_precision(weights, tmp_path):
    rng = np.random.default_rng(1)
    for name in ("a", "b", "c"):
        write_image(tmp_path / "images" / f"{name}.png", rng)
    labels = {"images/a.png": [WNIDS[3], 5], "images/b.png": [WNIDS[3]], "images/c.png": []}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    assert read_multi_labels(tmp_path / "labels.json", WNIDS)["images/a.png"] == [3, 5]
    found = evaluate(weights[1000], tmp_path, multi_labels=tmp_path / "labels.json")
    assert found["num_images"] == 3
    assert 0 < found["map"] <= 1
    (tmp_path / "labels.json").write_text(json.dumps({"images/a.png": ["unicorn"]}))
    with pytest.raises(ValueError, match="'unicorn', which the model does not"):
        read_multi_labels(tmp_path / "labels.json", WNIDS)
    for wrong, message in ((3, "to lists of classes"), ("cat", "to lists of classes"), ([True], "the class True")):
        (tmp_path / "labels.json").write_text(json.dumps({"images/a.png": wrong}))
        with pytest.raises(ValueError, match=rf"labels\.json: .*{message}"):
            read_multi_labels(tmp_path / "labels.json", WNIDS)
    for nothing in ({}, {"images/a.png": []}):
        (tmp_path / "labels.json").write_text(json.dumps(nothing))
        with pytest.raises(ValueError, match="expected a mapping from paths of images to lists of classes"):
            read_multi_labels(tmp_path / "labels.json", WNIDS)


def test_size_and_crop_change_what_is_seen(weights, own):
    usual = evaluate(weights[12], own)
    closer = evaluate(weights[12], own, crop_fraction=0.5)
    assert closer["loss"] != usual["loss"]
    assert usual["img_size"] == [SIDE_PX, SIDE_PX]


def test_what_does_not_fit_is_named(weights, own, tmp_path):
    with pytest.raises(ValueError, match="no network 'resnet5O'"):
        load_model("resnet5O")
    with pytest.raises(ValueError, match="'class00' is no class of the model"):
        evaluate(weights[1000], own)
    write_folders(tmp_path, ["a", "b"], np.random.default_rng(0), count=1)
    with pytest.raises(ValueError, match="has 2 classes, the model 12"):
        evaluate(weights[12], tmp_path)
    with pytest.raises(ValueError, match="has no val images of its own"):
        evaluate(weights[12], None)
    with pytest.raises(ValueError, match="trained without token labels"):
        evaluate(weights[12], own, inference="tokens")
    with pytest.raises(ValueError, match="no head for tokens"):
        evaluate(weights[12], own, masks=tmp_path)


def test_figures_read_as_a_table(weights, own):
    text = as_text(evaluate(weights[12], own, per_class=True))
    assert "top1" in text
    assert "\nclass    per_class\n" in text
    assert "class07" in text
    assert "%" in text
