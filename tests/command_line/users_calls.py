"""What people call from Python, run as they run it: without the type checker of the other tests.

Each function is one case; `test_as_users_call.py` runs them all in one process, in an empty folder, and reports each.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import contextlib
import io
import json
import resource
import sys
import tarfile
import traceback
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

import tokenlabel as tl
from tokenlabel.core.batch import Batch
from tokenlabel.core.config import LossConfig, MixConfig
from tokenlabel.core.scores import from_mask, from_top
from tokenlabel.evaluation.evaluators import Accuracy, observe
from tokenlabel.evaluation.options import EvalOptions
from tokenlabel.labels.encoding import pack
from tokenlabel.labels.inspection import InspectConfig
from tokenlabel.labels.options import ImportConfig, PublishedLayout
from tokenlabel.models import TokenModel
from tokenlabel.models.options import SegmentModelConfig
from tokenlabel.segmentation.layouts import open_pairs
from tokenlabel.segmentation.recipe import SegmentDataConfig, SegmentEvalConfig
from tokenlabel.training.recipe import DataConfig, EvalConfig, ModelConfig, OptimConfig, Recipe

CLASSES = ["ant", "bee"]
README = Path(__file__).parents[2] / "README.md"


def refuses(call, *words, error=ValueError):
    """Require an error of one line with all of the words."""
    try:
        call()
    except error as refused:
        message = str(refused)
        assert "\n" not in message, message
        assert all(word in message for word in words), message
    else:
        raise AssertionError(f"was not refused; expected an error with {words}")


@cache
def data():
    """Return the folder of eight images of two classes in images/train, with masks of their classes."""
    rng = np.random.default_rng(0)
    for i in range(8):
        for folder, pixels in (
            ("images/train", rng.integers(0, 256, (40, 48, 3), np.uint8)),
            ("masks", rng.integers(0, 2, (40, 48)).astype(np.uint8)),
        ):
            path = Path(folder, CLASSES[i % 2], f"{i}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return Path("images/train")


@cache
def labels():
    """Return a store of their labels."""
    tl.annotate(str(data()), "labels", tl.AnnotateConfig(teacher="masks:masks", size=8))
    return tl.LabelStore("labels")


def dataset(**options):
    return tl.TokenLabelDataset(tl.open_images(data()), tl.TrainTransform(tl.AugmentConfig(), 16), **options)


def batch_of_logits():
    """Return a batch of one map whose kept logits say little: the modes differ."""
    ids = np.array([[[0, 1], [1, 2]], [[2, 0], [0, 2]]])
    one = from_top(ids, np.linspace(0.5, 3, 8).reshape(2, 2, 2), num_classes=50, kind="logits")
    assert one.kind is tl.Kind.LOGITS
    return tl.collate_score_maps([one])


def mixes_go_by_name():
    assert tl.sample_mix("none", 4, grid=14, img_size=224) is None
    generator = torch.Generator().manual_seed(0)
    for name, shape, on_tokens in (
        ("mixtoken", (7, 7), True), ("cutmix", (16, 24), False), ("mixup", (1, 1), False)
    ):  # fmt: skip
        plan = tl.sample_mix(name, 4, grid=np.int64(7), img_size=[16, 24], generator=generator)
        assert (*plan.mask.shape[1:],) == shape
        assert plan.on_tokens == on_tokens
    assert tl.mix_images(images := torch.rand(4, 3, 16, 24), None) is images
    by_member = tl.sample_mix(
        tl.Mixing.CUTMIX, 4, grid=(7, 7), img_size=(16, 24), generator=torch.Generator().manual_seed(3)
    )
    by_name = tl.sample_mix("cutmix", 4, grid=7, img_size=(16, 24), generator=torch.Generator().manual_seed(3))
    assert torch.equal(by_name.mask, by_member.mask)
    refuses(lambda: tl.sample_mix("mixtokens", 4, grid=7, img_size=16), "Mixing", "mixtokens", "mixtoken, cutmix")
    refuses(lambda: tl.sample_mix("cutmix", 4, grid=7, img_size=(1, 2, 3)), "img_size", "(1, 2, 3)")
    refuses(lambda: tl.sample_mix("cutmix", 4, grid=7, img_size=16.5), "img_size", "16.5")
    refuses(lambda: tl.sample_mix("cutmix", 4, grid=0, img_size=16), "grid", "at least 1")


def maps_of_logits_go_by_the_name_of_a_mode():
    maps, views = batch_of_logits(), tl.stack_views([tl.View.crop(tl.Box())])
    found = {name: tl.align(maps, views, 2, logits=name).dense(50) for name in ("zero", "kept", "published")}
    for mode in tl.LogitsMode:
        assert torch.equal(found[mode.value], tl.align(maps, torch.from_numpy(views), (2, 2), logits=mode).dense(50))
    assert found["zero"].amax() < 0.5 < found["kept"].amax()
    refuses(lambda: tl.align(maps, views, 2, logits="nil"), "LogitsMode", "zero, kept, published", "nil")
    refuses(lambda: tl.align(None, views, 2), "no score maps")
    refuses(lambda: tl.align(maps, views, "2"), "grid")


def score_maps_go_by_the_name_of_their_kind_and_are_checked_when_they_are_written():
    codes = np.zeros((1, 1, 1), np.uint8)
    one = tl.ScoreMap(np.array([1]), codes, np.ones((1, 1, 1), np.float32), 2, kind="logits")
    assert one.kind is tl.Kind.LOGITS
    refuses(lambda: tl.ScoreMap(np.array([1]), codes, one.probs, 2, kind="odds"), "Kind", "odds")
    refuses(lambda: tl.ScoreMap([1], codes, one.probs, 2), "NumPy arrays", "list")
    refuses(lambda: tl.ScoreMap(one.palette, codes, one.probs, 2, region=(0, 0, 1, 1)), "Box", "tuple")
    sure = tl.ScoreMap(one.palette, codes, one.probs, 2)
    for changes, *words in (
        ({"probs": one.probs * 80}, "sum to at most 1", "80"),
        ({"probs": -one.probs}, "at least 0", "-1"),
        ({"probs": one.probs * np.nan}, "not finite"),
        ({"codes": codes + 1}, "codes", "from 1 to 1"),
        ({"codes": codes.astype(np.float32)}, "codes", "float32"),
        ({"palette": np.array([2])}, "palette", "[2]"),
    ):
        mine = replace(sure, **changes)
        refuses(lambda mine=mine: tl.collate_score_maps([sure, mine]), "score_maps[1]: ", *words)
    with tl.LabelStoreWriter("of my own", tl.Manifest(num_classes=2, topk=1)) as writer:
        for palette, bad_codes, *words in (
            (np.array([0.5]), codes, "class ids from 0 to 1"),
            (one.palette, codes.astype(int) - 1, "codes", "-1 to -1"),
        ):
            refuses(lambda p=palette, c=bad_codes: writer.add("x", tl.ScoreMap(p, c, one.probs, 2)), "x: ", *words)


def augmentations_go_by_name():
    before = tl.AugmentConfig(order="before_crop", interpolation="bilinear", randaugment="rand-m9-inc1")
    assert before.order is tl.Order.BEFORE_CROP
    assert before.interpolation is tl.Interpolation.BILINEAR
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    by_member = tl.AugmentConfig(
        order=tl.Order.BEFORE_CROP, interpolation=tl.Interpolation.BILINEAR, randaugment="rand-m9-inc1"
    )
    shown = [tl.TrainTransform(c, 16)(pixels, np.random.default_rng(1))[0] for c in (before, by_member)]
    np.testing.assert_array_equal(*shown)
    assert shown[0].shape == (16, 16, 3)
    assert tl.ErasingConfig(mode="const").mode is tl.ErasingMode.CONST
    refuses(lambda: tl.AugmentConfig(order="before"), "AugmentConfig.order", "after_crop, before_crop")
    refuses(lambda: tl.ErasingConfig(mode="noise"), "ErasingConfig.mode", "const, rand, pixel")
    refuses(lambda: tl.EvalTransform(16, interpolation="lanczos"), "Interpolation", "lanczos")
    refuses(lambda: tl.EvalTransform(16, interpolation="random"), "not random")


def sizes_are_numbers_or_pairs():
    pixels = np.zeros((40, 48, 3), np.uint8)
    for size, expected in (
        (16, (16, 16)),
        (np.int64(16), (16, 16)),
        ([16, 24], (16, 24)),
        (torch.Size([8, 9]), (8, 9)),
    ):
        for transform in (tl.TrainTransform(tl.AugmentConfig(), size), tl.EvalTransform(size)):
            assert transform(pixels, np.random.default_rng(0))[0].shape == (*expected, 3)
    np.testing.assert_array_equal(tl.View.rotation(9, img_size=5).frames, tl.View.rotation(9, img_size=(5, 5)).frames)
    np.testing.assert_array_equal(tl.View.shear(1, 0, img_size=5).frames, tl.View.shear(1, 0, img_size=(5, 5)).frames)
    model = tl.create_model("lvvit_t", num_classes=2, img_size=32, depth=1)
    assert model.grid == (2, 2)
    assert model.grid_for(64) == model.grid_for([64, 64]) == model.grid_for(np.int64(64)) == (4, 4)
    assert tl.create_model("test_vit", num_classes=np.int64(2), img_size=64).grid_for(64) == (4, 4)
    assert ModelConfig(name="x", img_size=96).img_size == (96, 96)
    assert SegmentModelConfig(name="x", img_size=[96, 64], layers=[1, 2]).layers == (1, 2)
    refuses(lambda: tl.create_model("lvvit_t", num_classes=2, img_size="224"), "img_size", "'224'")
    refuses(lambda: ModelConfig(name="x", img_size=(96.5, 96)), "ModelConfig.img_size", "96.5")


def recipes_are_built_of_dicts_lists_and_paths():
    recipe = Recipe(
        data={"train": Path("images"), "labels": [Path("a"), "b"], "check": "none"},
        model={"name": "lvvit_t", "img_size": 32},
        optim={"lr": 1, "lr_batch_size": np.int64(32)},
        mix={"kind": "cutmix"},
        loss={"class_target": "teacher", "teacher": {"name": "x", "precision": "bf16"}},
        augment=tl.AugmentConfig(warp={"degrees": 10}, crop_scale=[0.5, 1]),
        batch_size=np.int64(8),
        epochs=1,
    )
    assert recipe.data == DataConfig(train="images", labels=["a", "b"], check=tl.ImageCheck.NONE)
    assert recipe.optim == OptimConfig(lr=1.0, lr_batch_size=32)
    assert recipe.mix.kind is tl.Mixing.CUTMIX
    assert recipe.loss.class_target is tl.ClassTarget.TEACHER
    assert recipe.loss.teacher.precision == "bf16"
    assert (recipe.augment.warp.degrees, recipe.augment.crop_scale) == (10, (0.5, 1.0))
    assert type(recipe.batch_size) is int


def configurations_refuse_what_means_nothing():
    data = DataConfig(train="images")
    optim = OptimConfig(lr=1, lr_batch_size=1)
    needed = {"data": data, "model": ModelConfig(name="x"), "optim": optim, "epochs": 1, "batch_size": 1}
    for call, *words in (
        (lambda: Recipe(**needed, precision="fp8"), "Recipe.precision", "fp32, bf16, fp16", "fp8"),
        (lambda: Recipe(**needed, compile="yes"), "Recipe.compile", "yes"),
        (lambda: Recipe(**{**needed, "model": {"name": "x", "size_px": 9}}), "size_px; it is called img_size"),
        (lambda: Recipe(**needed, sharded="false"), "Recipe.sharded", "bool"),
        (lambda: Recipe(**needed | {"epochs": 1.5}), "Recipe.epochs", "1.5"),
        (lambda: Recipe(**needed | {"epochs": "3"}), "Recipe.epochs", "'3'"),
        (lambda: Recipe(**needed | {"data": "images"}), "Recipe.data", "DataConfig", "images"),
        (lambda: Recipe(**needed | {"data": {"trian": "x"}}), "Recipe.data", "trian"),
        (lambda: Recipe(**needed, mix={"kind": "mix"}), "Recipe.mix", "MixConfig.kind", "mixtoken"),
        (lambda: OptimConfig(lr="1e-3", lr_batch_size=1), "OptimConfig.lr", "float", "1e-3"),
        (lambda: OptimConfig(lr=1, lr_batch_size=1, schedule="linear"), "schedule", "cosine, poly, constant"),
        (lambda: tl.AugmentConfig(crop_scale=(0.9,)), "AugmentConfig.crop_scale"),
        (lambda: Recipe(**needed | {"optim": {"lr": 1, "eps": 1e-6}}), "unknown key eps; it is gone", "1e-8"),
        (lambda: DataConfig(train="x", check="some"), "DataConfig.check", "decode", "some"),
        (lambda: DataConfig(train=3), "DataConfig.train", "3"),
        (lambda: MixConfig(kind="mixtokens"), "MixConfig.kind", "mixtoken"),
        (lambda: EvalConfig(inference="all"), "EvalConfig.inference", "combined", "all"),
        (lambda: LossConfig(class_target="label"), "LossConfig.class_target", "truth, teacher, both"),
        (lambda: LossConfig(tokens="some"), "LossConfig.tokens", "confident"),
        (lambda: LossConfig(extent="all"), "LossConfig.extent", "crop, image"),
        (lambda: LossConfig(map_mode="nil"), "LossConfig.map_mode", "zero"),
        (lambda: LossConfig(teacher={"head": "both"}), "LossConfig.teacher", "classifier", "both"),
        (lambda: tl.AnnotateConfig(teacher="x", crop="centre"), "AnnotateConfig.crop", "none, center"),
        (lambda: tl.AnnotateConfig(teacher="x", head="head"), "AnnotateConfig.head", "auto"),
        (lambda: tl.AnnotateConfig(teacher="x", precision="fp16"), "AnnotateConfig.precision", "fp32, bf16"),
        (lambda: tl.AnnotateConfig(teacher="x", encoding="zip"), "AnnotateConfig.encoding", "raw, compact"),
        (lambda: tl.AnnotateConfig(teacher=["x", 3]), "AnnotateConfig.teacher"),
        (lambda: tl.AnnotateConfig(teacher="x", flip="no"), "AnnotateConfig.flip"),
        (lambda: EvalOptions(set="imagenet"), "EvalOptions.set", "imagenet-v2"),
        (lambda: EvalOptions(inference="mean"), "EvalOptions.inference", "tokens"),
        (lambda: InspectConfig(sample="all"), "InspectConfig.sample"),
        (lambda: ImportConfig(num_classes=2, layout="cw"), "ImportConfig.layout", "hw, wh"),
        (lambda: SegmentEvalConfig(mode="tile"), "SegmentEvalConfig.mode", "slide, whole"),
        (lambda: SegmentModelConfig(name="x", head="unet"), "SegmentModelConfig.head", "upernet"),
        (lambda: SegmentModelConfig(name="x", neck="fpn"), "SegmentModelConfig.neck", "pyramid"),
        (lambda: SegmentDataConfig(layout="coco", root="x"), "SegmentDataConfig.layout", "ade20k"),
        (lambda: SegmentDataConfig(layout="folders", train="a", masks="b", class_names="cat"),
         "SegmentDataConfig.class_names", "cat"),
        (lambda: open_pairs(SegmentDataConfig(layout="ade20k", root="x"), "test"), "split", "train, val"),
        (lambda: tl.Manifest(num_classes=2, topk=1, kind="odds"), "Manifest.kind", "odds"),
        (lambda: tl.Manifest(num_classes=2.5, topk=1), "Manifest.num_classes", "2.5"),
        (lambda: tl.create_model("lvvit_t", num_classes=2, img_size=32, depth="2"), "LVViTConfig.depth", "'2'"),
        (lambda: tl.create_model("lvvit_t", num_classes=2, img_size=32, conv_stem="no"), "conv_stem"),
    ):  # fmt: skip
        refuses(call, *words)


def encodings_go_by_name():
    assert labels().packed("ant/0.png")[0] == 2  # a compact record, as `AnnotateConfig` has it by default
    for name, number in (("compact", 2), ("raw", 0)):
        config = tl.AnnotateConfig(teacher="masks:masks", encoding=name, size=np.int64(8))
        tl.annotate(data(), Path(name), config, device="cpu")
        assert tl.LabelStore(name).packed("ant/0.png")[0] == number
        other = tl.merge_stores(["compact"], f"merged {name}", encoding=name)
        assert other.packed("ant/0.png")[0] == number
        manifest = tl.Manifest(num_classes=2, topk=1, class_names=CLASSES, encoding=name)
        with tl.LabelStoreWriter(f"written {name}", manifest) as writer:
            writer.add("ant/0.png", from_mask(np.array([[0, 1]]), num_classes=2))
        assert tl.LabelStore(f"written {name}").packed("ant/0.png")[0] == number
        assert pack(labels()["ant/0.png"], name)[0] == number
    assert tl.LabelStore("written raw").manifest.class_names == ("ant", "bee")
    refuses(lambda: tl.merge_stores(["compact"], "merged", encoding="zip"), "raw, compact", "zip")
    refuses(lambda: pack(labels()["ant/0.png"], "zip"), "raw, compact", "zip")
    assert PublishedLayout("wh") is ImportConfig(num_classes=2, layout="wh").layout


def checks_go_by_name():
    class Unread:
        keys, class_ids, class_names = ["a/1.png"], np.zeros(1, np.int64), ["a"]

        def __len__(self):
            return 1

        def read(self, index):
            raise AssertionError("was read")

    source = Unread()
    assert tl.check_images(source, check="none") is source
    refuses(lambda: tl.check_images(source, check="some"), "ImageCheck", "decode, ends, none")


def predictions_and_choices_of_tokens_go_by_name():
    head = torch.nn.Linear(4, 2)
    outputs = tl.Outputs(torch.randn(3, 2), torch.randn(3, 6, 4), head, (2, 3))
    for inference in tl.Inference:
        assert torch.equal(outputs.logits(inference.value), outputs.logits(inference))
    refuses(lambda: outputs.logits("mean"), "Inference", "class, tokens, combined", "mean")
    refuses(lambda: LossConfig(tokens="some"), "LossConfig.tokens", "some")
    model = tl.create_model("lvvit_t", num_classes=2, img_size=16, depth=1, width=16, num_heads=2)
    batches = [next(iter(DataLoader(dataset(), batch_size=8)))]
    with contextlib.redirect_stderr(io.StringIO()):
        figures = observe(model, batches, {tl.Inference.CLASS: [Accuracy()]}, precision="fp32")
    assert figures[tl.Inference.CLASS]["num_images"] == 8
    refuses(lambda: observe(model, batches, {}, precision="half"), "precision", "bf16")


def a_dataset_is_indexed_as_any_other():
    images = dataset(store=labels())
    assert len(images) == len(list(images)) == 8
    for index in (3, np.int64(3), torch.tensor(3), -5, (0, 3), (np.int64(0), -5)):
        assert torch.equal(images[index].image, images[0, 3].image)
        assert images[index].key == images[0, 3].key
    for index in (8, -9, (0, 8)):
        refuses(lambda index=index: images[index], error=IndexError)
    images.set_epoch(np.int64(2))
    assert torch.equal(images[3].image, images[2, 3].image)
    assert not torch.equal(images[3].image, images[0, 3].image)
    assert torch.equal(images[0, 3].image, dataset(seed=0)[0, 3].image)
    refuses(lambda: images.set_epoch(-1), "at least 0", "-1")


def epoch(loader):
    """Return the images of a pass by their keys."""
    return {key: image for batch in loader for key, image in zip(batch.keys, batch.images, strict=True)}


def a_plain_loader_gives_batches():
    images = dataset(store=labels())
    for options in ({}, {"collate_fn": tl.collate}, {"num_workers": 2, "persistent_workers": True}):
        options = {"multiprocessing_context": "fork", **options} if "num_workers" in options else options
        loader = DataLoader(images, batch_size=3, shuffle=True, **options)
        for number in (0, 1, 0, 5):
            images.set_epoch(number)
            found = epoch(loader)
            assert len(found) == 8
            for index, key in enumerate(images.source.keys):
                assert torch.equal(found[key], images[number, index].image)
    assert isinstance(next(iter(loader)), Batch)
    pairs = tl.BatchSampler(num_images=8, batch_size=4, seed=0, num_steps=2)
    found = epoch(tl.make_loader(images, pairs, num_workers=0))
    assert torch.equal(found["ant/0.png"], images[0, 0].image)


def processes_share_the_images_of_an_epoch():
    images = dataset()
    seen = []
    for rank in range(2):
        sampler = DistributedSampler(images, num_replicas=2, rank=rank)
        sampler.set_epoch(1)
        images.set_epoch(1)
        seen += epoch(DataLoader(images, batch_size=2, sampler=sampler))
    assert sorted(seen) == sorted(images.source.keys)


def lines_of_epochs(images, *, set_epoch):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        for number in range(3):
            if set_epoch:
                images.set_epoch(number)
            epoch(DataLoader(images, batch_size=4))
    return said.getvalue().splitlines()


def epochs_that_nobody_sets_are_said_once():
    (line,) = lines_of_epochs(dataset(), set_epoch=False)
    assert "dataset.set_epoch(epoch)" in line
    assert lines_of_epochs(dataset(), set_epoch=True) == []
    still = tl.TokenLabelDataset(tl.open_images(data()), tl.EvalTransform(16))
    assert lines_of_epochs(still, set_epoch=False) == []  # nothing is drawn


def class_labels_are_given_as_to_cross_entropy():
    logits = torch.randn(4, 3, requires_grad=True)
    outputs = tl.Outputs(logits, torch.randn(4, 6, 5), torch.nn.Linear(5, 3), (2, 3))
    ids = torch.tensor([2, 0, 1, 1])
    soft = torch.rand(4, 3).softmax(dim=1)
    for given, truth in (
        (ids, ids), (ids.int(), ids), (ids.to(torch.uint8), ids), (soft, soft), (soft.double(), soft),
        (F.one_hot(ids, 3).half(), ids), (tl.class_targets(ids), ids), (tl.class_targets([2, 0, 1, 1]), ids),
    ):  # fmt: skip
        expected = F.cross_entropy(logits, truth)
        found = tl.token_label_loss(outputs, given, None).total
        torch.testing.assert_close(found, expected)
        ours, theirs = (torch.autograd.grad(loss, logits)[0] for loss in (found, expected))
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    for labels, *words in (
        (ids + 1, "from 1 to 3", "from 0 to 2"),
        (ids - 1, "from -1"),
        (ids.float(), "torch.float32", "(4,)", "class ids [B]"),
        (ids > 0, "torch.bool"),
        (F.one_hot(ids, 3), "torch.int64", "(4, 3)"),
        (ids[:3], "(3, 1)"),
        (logits.detach(), "sum to 1", "softmax"),
        (torch.full((4, 2), 0.5), "2 classes", "3"),
    ):
        refuses(lambda labels=labels: tl.token_label_loss(outputs, labels, None), *words)
    refuses(lambda: tl.token_label_loss(outputs, ids, soft), "TokenTargets", "Tensor")
    refuses(lambda: tl.normalize_images(torch.rand(1, 3, 4, 4), mean=[0] * 3, std=[1] * 3), "uint8", "float32")


def doors_refuse_what_would_be_wrong_in_silence():
    images, pixels, ids = dataset(store=labels()), torch.zeros(2, 3, 16, 16, dtype=torch.uint8), [0, 1]
    outputs = tl.Outputs(torch.randn(2, 3), torch.randn(2, 6, 4), torch.nn.Linear(4, 3), (2, 3))
    model = tl.create_model("lvvit_t", num_classes=2, img_size=16, depth=1, width=16, num_heads=2)
    transform, plan = (tl.TrainTransform({"order": "before_crop"}, 16), tl.sample_mix("cutmix", 4, grid=1, img_size=16))
    rng, shape = np.random.default_rng(0), (20, 24, 3)
    batch, tokens = tl.collate([images[0], images[1]]), tl.sample_mix("mixtoken", 2, grid=(2, 3), img_size=16)
    targets, mask = tl.align(batch.score_maps, batch.views, (2, 3)), torch.zeros(2, 2, 3)
    flat = tl.TokenLabelDataset(tl.open_images("images/train/ant"), images.transform, store=labels())
    assert transform.config.order is tl.Order.BEFORE_CROP
    assert transform(Image.new("L", (20, 24)), rng)[0].shape == (16, 16, 3)
    assert tl.EvalTransform(16)(np.zeros(shape, np.uint8))[0].shape == (16, 16, 3)
    for call, *words in (
        (lambda: tl.normalize_images(pixels, mean=[123.0, 117.0, 104.0], std=[58.0, 57.0, 57.0]), "[0, 1]", "255"),
        (lambda: tl.normalize_images(pixels, mean=[0] * 3, std=[0] * 3), "std"),
        (lambda: tl.normalize_images(pixels, mean=[0.5], std=[0.5]), "three numbers"),
        (lambda: tl.token_label_loss(outputs, ids, None, beta=-1), "beta", "-1"),
        (lambda: tl.TokenLabelDataset("images/train", transform), "source", "open_images"),
        (lambda: tl.TokenLabelDataset(images.source, transform, store="labels"), "store", "LabelStore"),
        (lambda: tl.TokenLabelDataset(images.source, transform, seed=-1), "seed", "-1"),
        (lambda: tl.TrainTransform("before_crop", 16), "config", "AugmentConfig"),
        (lambda: transform(np.zeros((3, 20, 24), np.uint8), rng), "[height, width, 3]", "(3, 20, 24)"),
        (lambda: transform(np.zeros(shape, np.float32), rng), "uint8", "float32"),
        (lambda: transform(torch.zeros(shape, dtype=torch.uint8), rng), "NumPy"),
        (lambda: tl.TokenLabelDataset(iter(()), transform), "source", "open_images", "streamed"),
        (lambda: tl.sample_mix("cutmix", -1, grid=1, img_size=16), "num_images", "-1"),
        (lambda: tl.sample_mix("cutmix", 2.5, grid=1, img_size=16), "num_images", "2.5"),
        (lambda: tl.sample_mix("cutmix", 4, grid=1, img_size=16, alpha=float("nan")), "alpha", "nan"),
        (lambda: tl.sample_mix("cutmix", 4, grid=1, img_size=16, alpha="1"), "alpha", "'1'"),
        (lambda: tl.token_label_loss(outputs, ids, None, beta="0.5"), "beta", "'0.5'"),
        (lambda: tl.align(batch.score_maps, batch.views, 2, samples=2.5), "samples", "2.5"),
        (lambda: tl.align(batch.score_maps, batch.views[:, :0], 2), "views", "(2, 0, 2, 3)"),
        (lambda: tl.mix_targets(targets, tokens, (3, 2)), "(2, 3)", "(3, 2)"),
        (lambda: tl.mix_targets(targets, "mixtoken", (2, 3)), "plan", "'mixtoken'"),
        (lambda: tl.mix_targets(batch.class_ids, tokens, (2, 3)), "class_targets", "int64"),
        (lambda: tl.MixPlan(mask, tokens.partner[:1], on_tokens=True), "partner [B]", "(2, 2, 3)", "(1,)"),
        (lambda: tl.MixPlan(mask > 0, tokens.partner, on_tokens=True), "float32", "bool"),
        (lambda: targets.smoothed(2), "epsilon", "at most 1"),
        (lambda: targets.smoothed(0.1, 7), "2 classes", "num_classes 7"),
        (lambda: tl.View(np.eye(3)), "frames [F, 2, 3]", "(3, 3)"),
        (lambda: tl.View.identity().then(tl.Box()), "View", "tokenlabel.Box"),
        (lambda: tl.collate([images[0], flat[0]]), "0 and 2 classes"),
        (lambda: tl.BatchSampler(num_images=8, batch_size=4, seed=0, num_steps=1, grad_accum_steps=0), "grad_accum"),
        (lambda: tl.mix_images(torch.rand(2, 3, 16, 16), plan), "4 images", "2"),
        (lambda: tl.create_model("lvvit_t", num_classes=0, img_size=16), "num_classes", "0"),
        (lambda: tl.create_model("lvvit_t", num_classes="3", img_size=16), "num_classes", "'3'"),
        (lambda: model(pixels), "torch.uint8", "normalize_images"),
        (lambda: tl.merge_stores([], "merged none"), "folders"),
        (lambda: tl.BatchSampler(num_images=8, batch_size=4, seed=0, num_steps=-1), "num_steps", "-1"),
        (lambda: tl.annotate(data(), "anew", "masks:masks"), "config", "AnnotateConfig"),
        (lambda: tl.annotate(data(), "anew", {"teacher": "masks:masks"}, device="gpu"), "gpu", "cuda:1"),
    ):  # fmt: skip
        refuses(call, *words)


def doors_say_what_they_expected():
    store, images = labels(), dataset(store=labels())
    samples = [images[0, i] for i in range(2)]
    batch, pixels, usual = tl.collate(samples), torch.zeros(2, 3, 16, 16, dtype=torch.uint8), {"mean": [0.5] * 3}
    usual |= {"std": [0.5] * 3}
    model = tl.create_model("lvvit_t", num_classes=2, img_size=16, depth=1, width=16, num_heads=2)
    head, plan = tl.Head(torch.eye(3), kind="words"), tl.sample_mix("cutmix", 2, grid=1, img_size=16)
    by_hand = np.stack([sample.view.frames for sample in samples])  # float64
    assert torch.equal(
        tl.align(batch.score_maps, by_hand, 2).dense(2), tl.align(batch.score_maps, batch.views, 2).dense(2)
    )
    for call, *words in (
        (lambda: tl.normalize_images(pixels.permute(0, 2, 3, 1), **usual), "[B, 3, height, width]", "(2, 16, 16, 3)"),
        (lambda: tl.normalize_images(pixels[0], **usual), "(3, 16, 16)"),
        (lambda: tl.normalize_images(pixels.numpy(), **usual), "tensor", "numpy.ndarray of uint8"),
        (lambda: tl.normalize_images(samples, **usual), "got list"),
        (lambda: tl.normalize_images(pixels, mean=0.5, std=0.5), "three numbers", "0.5"),
        (lambda: model(np.zeros((2, 3, 16, 16), np.float32)), "numpy.ndarray of float32", "normalize_images"),
        (lambda: model(torch.rand(3, 16, 16)), "(3, 16, 16)"),
        (lambda: model(torch.rand(2, 16, 16, 3)), "(2, 16, 16, 3)"),
        (lambda: model(batch), "tokenlabel.Batch"),
        (lambda: model(torch.rand(2, 3, 16, 16), "cutmix"), "plan", "sample_mix"),
        (lambda: tl.mix_images(torch.rand(2, 3, 16, 16), "cutmix"), "plan", "sample_mix"),
        (lambda: tl.mix_images(pixels, plan), "torch.uint8"),
        (lambda: tl.open_images(None), "path", "None"),
        (lambda: tl.LabelStore(None), "folder", "None"),
        (lambda: tl.LabelStoreWriter(None, store.manifest), "folder", "None"),
        (lambda: tl.LabelStoreWriter("anew", None), "manifest", "Manifest"),
        (lambda: tl.merge_stores(["labels"], None), "output", "None"),
        (lambda: tl.annotate(None, "anew", tl.AnnotateConfig(teacher="masks:masks")), "images", "None"),
        (lambda: tl.annotate(data(), None, tl.AnnotateConfig(teacher="masks:masks")), "folder", "None"),
        (lambda: tl.check_images("images/train"), "open_images"),
        (lambda: store[0], "key", "'ant/0.png'", "got 0"),
        (lambda: tl.collate([]), "samples", "Sample", "an empty list"),
        (lambda: tl.collate(samples[0]), "list", "tokenlabel.Sample"),
        (lambda: tl.collate_score_maps([None]), "score_maps", "NoneType"),
        (lambda: tl.collate_score_maps([]), "an empty list"),
        (lambda: tl.stack_views([]), "views", "an empty list"),
        (lambda: tl.View.crop((0, 0, 0.5, 0.5)), "Box(left=0", "from_pixels", "(0, 0, 0.5, 0.5)"),
        (lambda: tl.View.rotation(float("nan"), img_size=16), "finite"),
        (lambda: tl.Box("0"), "left < right"),
        (lambda: images[:2], "epoch and number", "slice(None, 2, None)", "for i in"),
        (lambda: images[0, 1, 2], "epoch and number", "(0, 1, 2)"),
        (lambda: images.set_epoch(1.5), "epoch", "1.5"),
        (lambda: tl.TokenLabelDataset(images.source, None), "transform", "None"),
        (lambda: tl.TokenLabelDataset(images.source, images.transform, seed=None), "seed", "None"),
        (lambda: images.transform(np.zeros((0, 4, 3), np.uint8), np.random.default_rng(0)), "(0, 4, 3)"),
        (lambda: tl.BatchSampler(num_images=8, batch_size=4, seed=None, num_steps=1), "BatchSampler.seed", "None"),
        (lambda: tl.align(batch.score_maps, batch.views[:1], 2), "views", "2 score maps", "(1, "),
        (lambda: tl.align(samples, batch.views, 2), "score_maps", "collate_score_maps", "list"),
        (lambda: tl.token_label_loss(torch.rand(2, 3), [0, 1], None), "outputs", "torch.Tensor"),
        (lambda: tl.token_label_loss(model(torch.rand(2, 3, 16, 16)), None, None), "class ids [B]", "None"),
        (lambda: tl.create_model("test_vit", num_classes=2, img_size=64, num_token_classes=-3), "num_token_classes"),
        (lambda: tl.ScoreMap(np.array([1]), np.zeros((1, 1, 1), np.uint8), np.ones((1, 1, 2)), 2), "(1, 1, 2)"),
        (lambda: tl.Outputs(torch.zeros(2, 3), torch.zeros(2, 6, 4), model.token_head, (2, 2)), "6 tokens", "(2, 2)"),
        (lambda: head(torch.rand(5, 4)), "[..., 3]", "(5, 4)"),
        (lambda: head.top(torch.rand(5, 3), k=9), "k from 1 to 3", "9"),
        (lambda: tl.Head(np.eye(3), kind="words"), "matrix", "numpy.ndarray"),
    ):  # fmt: skip
        refuses(call, *words)


def what_cannot_be_written_or_was_cut_short_is_named():
    Path("a file").write_text("")
    refuses(lambda: tl.LabelStoreWriter("a file/labels", labels().manifest), "a file is a file", "another place")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # as a full disk
    refuses(lambda: tl.Head(torch.eye(2), kind="words").save("head.safetensors"), "head.safetensors", error=OSError)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    tar, cut = Path("whole.tar"), Path("cut.tar")
    with tarfile.open(tar, "w") as file:
        file.add(data() / "ant", "ant")
        file.add(data() / "bee", "bee")
        end = file.offset
    cut.write_bytes(tar.read_bytes()[:end])
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert len(tl.open_images(tar)) == 8
    assert not said.getvalue()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert len(tl.open_images(cut)) == 8
    assert "cut.tar: has no end" in said.getvalue()


def stores_are_read_as_mappings_are():
    store = labels()
    assert sorted(store) == sorted(store.keys())
    assert len(list(store)) == 8
    assert Path("ant/0.png") in store  # pyright: ignore[reportOperatorIssue]
    assert store[Path("ant/0.png")].num_classes == 2
    assert len(tl.merge_stores("labels", "merged one")) == 8


def the_lines_of_the_readme_run():
    labels()
    text = README.read_text(encoding="utf-8").split("## In Python")[1].split("\n## ")[0]
    code = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    for of_readme, small in (("vit_small_patch16_224", "test_vit"), ("(224, 224)", "64"), ("range(32)", "range(8)")):
        assert of_readme in code
        code = code.replace(of_readme, small)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert isinstance(names["model"], TokenModel)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in names["model"].token_head.parameters())


if __name__ == "__main__":
    results = {}
    for name in sys.argv[1:]:
        try:
            globals()[name]()
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))
