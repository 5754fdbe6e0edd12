"""Heads on backbones: the vectors of locations, the file, visual words, and labels that they make."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from command_process import CommandProcess
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import tokenlabel as tl
from tokenlabel.cli import main
from tokenlabel.core.config import OnlineTeacherConfig
from tokenlabel.models.lvvit import LVVIT_CONFIGS
from tokenlabel.runtime.errors import ModelError
from tokenlabel.teachers.backbone import load_backbone
from tokenlabel.teachers.dense import ClassifierNetwork, HeadNetwork
from tokenlabel.teachers.ensemble import load_online_teacher, load_teachers
from tokenlabel.teachers.heads import Head
from tokenlabel.teachers.options import TeacherConfig
from tokenlabel.teachers.solvers import DECAYS, Examples, cross_entropy, fit_linear, fit_words
from tokenlabel.teachers.texts import PROMPTS, OpenClipTower, text_embeddings

CPU = torch.device("cpu")
CLIP, EUPE = "vit_xsmall_patch16_clip_224.tinyclip_yfcc15m", "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m"
SMALL = {"depth": 1, "embed_dim": 48, "num_heads": 2}

# name, options, width of a vector: prefix tokens, kinds of pooling, projections to where texts lie
FAMILIES = [
    ("vit_tiny_patch16_224", {"depth": 1, "class_token": False, "global_pool": "avg"}, 192),
    ("vit_tiny_patch16_224", {"depth": 1}, 192),
    ("deit_tiny_distilled_patch16_224", {"depth": 1}, 192),
    ("vit_tiny_patch16_224", {"depth": 1, "reg_tokens": 4}, 192),
    ("vit_base_patch32_clip_224.openai", SMALL, 512),
    ("vit_base_patch16_siglip_224.webli", SMALL, 48),
    ("vit_pe_core_tiny_patch16_384.fb", {"depth": 1}, 512),
    ("vit_pe_spatial_tiny_patch16_512.fb", {"depth": 1}, 192),
    ("vit_small_patch14_dinov2.lvd142m", {"depth": 1}, 384),
    ("vit_small_patch14_reg4_dinov2.lvd142m", {"depth": 1}, 384),
    ("vit_small_patch16_dinov3.lvd1689m", {"depth": 1}, 384),
    ("vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m", {"depth": 1}, 192),
    ("vit_base_patch14_reg1_tipsv2.webli", SMALL, 48),
    ("vit_base_patch16_radio_v3.c_radio", SMALL, 48),
    ("vit_base_patch16_224.mae", SMALL, 48),
    ("convnext_tiny.dinov3_lvd1689m", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}, 32),
    ("resnet10t.c3_in1k", {}, 512),
    ("tf_efficientnet_lite0.in1k", {}, 1280),
    ("mobilenetv3_small_050.lamb_in1k", {}, 1024),
    ("swin_tiny_patch4_window7_224.ms_in1k", {"depths": (1, 1, 1, 1)}, 768),
]


@pytest.mark.parametrize(("name", "options", "width"), FAMILIES, ids=lambda part: part if isinstance(part, str) else "")
@torch.no_grad()
def test_the_vector_of_a_location_is_that_of_an_image_that_shows_it_everywhere(name, options, width):
    """Oracle: one location after the other, put everywhere, through the network's own `forward_head`."""
    torch.manual_seed(0)
    try:
        model: Any = timm.create_model(name, **options, dynamic_img_size=True).eval()
    except TypeError:  # no transformer
        model = timm.create_model(name, **options).eval()
    if width not in (512, model.num_classes) or "resnet" in name:
        model.reset_classifier(0)
    stride = 14 if "patch14" in name else 32
    images = torch.randn(2, 3, 3 * stride, 4 * stride)
    network = ClassifierNetwork(model, name=name)
    grid = network.grid_for((3 * stride, 4 * stride))
    found = network(images)
    features = model.forward_features(images)
    assert found.locations.shape == (2, *grid, width)
    torch.testing.assert_close(found.image, model(images))
    for row in range(grid[0]):
        for column in range(grid[1]):
            if features.ndim == 3:
                at = features.shape[1] - grid[0] * grid[1] + row * grid[1] + column
                everywhere = features[:, at : at + 1].expand_as(features)
            elif features.shape[1:3] == grid:
                everywhere = features[:, row : row + 1, column : column + 1].expand_as(features)
            else:
                everywhere = features[:, :, row : row + 1, column : column + 1].expand_as(features)
            expected = model.forward_head(everywhere)
            torch.testing.assert_close(found.locations[:, row, column], expected, atol=1e-4, rtol=1e-4)


def random_head(num_classes: int, width: int, *, kind: Any = "words", **changes: Any) -> Any:
    generator = torch.Generator().manual_seed(num_classes)
    options = {"normalised": True, "scale": 9.0, "center": torch.randn(width, generator=generator), **changes}
    return Head(torch.randn(num_classes, width, generator=generator), kind=kind, **options)


@given(
    num_classes=st.integers(2, 9),
    width=st.integers(1, 6),
    normalised=st.booleans(),
    centred=st.booleans(),
    biased=st.booleans(),
    k=st.integers(1, 9),
)
@settings(max_examples=40, deadline=None)
def test_logits_are_scaled_products_with_the_rows(num_classes, width, normalised, centred, biased, k):
    head = random_head(
        num_classes,
        width,
        normalised=normalised,
        center=torch.randn(width) if centred else None,
        bias=torch.randn(num_classes) if biased else None,
    )
    vectors = torch.randn(2, 3, width)
    logits = head(vectors)
    for i in range(2):
        for j in range(3):
            x = vectors[i, j].numpy() - (head.center.numpy() if centred else 0)
            x = x / max(float(np.linalg.norm(x)), 1e-12) if normalised else x
            expected = [head.scale * float(x @ row) for row in head.matrix.numpy()]
            expected = np.array(expected) + (head.bias.numpy() if biased else 0)
            np.testing.assert_allclose(logits[i, j].numpy(), expected, atol=1e-4, rtol=1e-4)
    k = min(k, num_classes)
    class_ids, probs = head.top(vectors.flatten(0, 1), k)
    expected = logits.flatten(0, 1).softmax(dim=1).topk(k, dim=1)
    torch.testing.assert_close(probs, expected.values)
    assert class_ids.equal(expected.indices)


def test_a_head_comes_back_from_its_file(tmp_path):
    labels = random_head(3, 4, kind="labels", bias=torch.zeros(3), class_names=["a", "b", "c"])
    words = random_head(5, 4)
    for head in (labels, words):
        head.save(tmp_path / "head.safetensors")
        again = tl.Head.load(str(tmp_path / "head.safetensors"))
        assert again.hash == head.hash
        assert again.class_names == head.class_names
        vectors = torch.randn(7, 4)
        assert again(vectors).equal(head(vectors))
    assert labels.class_names == ("a", "b", "c")
    assert words.class_names[4] == "word 4"
    assert labels.hash != words.hash


def test_files_that_hold_no_head(tmp_path):
    file = tmp_path / "head.safetensors"
    with pytest.raises(ModelError, match="no such file; `tokenlabel fit-head` makes heads"):
        Head.load(file)
    random_head(5, 4).save(file)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="damaged"):
        Head.load(file)
    file.write_bytes(whole[:-3] + b"\x00\x01\x02")
    with pytest.raises(ModelError, match="damaged"):
        Head.load(file)
    save_file({"weight": torch.zeros(2)}, file)
    with pytest.raises(ModelError, match=r"holds no head, but other tensors; .* --teacher NAME --weights"):
        Head.load(file)
    with pytest.raises(ValueError, match="needs the names"):
        random_head(3, 4, kind="labels")


@pytest.mark.parametrize("num_words", [2, 8, 24])
def test_words_find_clusters_and_their_scale_keeps_nine_tenths(num_words):
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(8, 16, generator=generator), dim=1)
    members = torch.randint(8, (2000,), generator=generator)
    noise = torch.randn(2000, 16, generator=generator)
    vectors = (5 * directions[members] + 0.3 * noise + 2).half()
    words = fit_words(vectors, num_words, topk=3, seed=0)
    again = fit_words(vectors, num_words, topk=3, seed=0)
    assert words.matrix.equal(again.matrix)
    torch.testing.assert_close(words.center, vectors.float().mean(dim=0))
    torch.testing.assert_close(words.matrix.norm(dim=1), torch.ones(num_words))
    cosines = torch.nn.functional.normalize(vectors.float() - words.center, dim=1) @ words.matrix.T
    if num_words > 8:  # each cluster has words of its own
        for word in range(num_words):
            inside = members[cosines.argmax(dim=1) == word]
            assert len(inside) == 0 or (inside == inside[0]).all()
        assert cosines.amax(dim=1).mean() > 0.95
    k = min(3, max(1, num_words // 4))
    kept = (cosines * words.scale).softmax(dim=1).topk(k, dim=1).values.sum(dim=1).mean()
    assert float(kept) == pytest.approx(0.9, abs=0.01)


def test_words_that_nothing_takes_start_anew():
    """Most vectors are one and the same, so most first words are, too; the others still get words of their own."""
    rare = torch.eye(8)
    vectors = torch.cat([torch.ones(500, 8) * torch.tensor([1.0, *[0.0] * 7]), rare.repeat(4, 1)])
    words = fit_words(vectors, 8, topk=2, seed=0)
    cosines = torch.nn.functional.normalize(rare - words.center, dim=1) @ words.matrix.T
    assert cosines.amax(dim=1).min() > 0.99


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two shapes of images in two class folders."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(12):
        folder = root / "images" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (64, 64 if i % 3 else 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    torch.manual_seed(0)
    for name in (
        "resnet10t",
        "vit_xsmall_patch16_clip_224.tinyclip_yfcc15m",
        "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m",
    ):
        save_file(timm.create_model(name).state_dict(), root / f"{name}.safetensors")
    return root


def fit(images, head, *options, backbone="resnet10t"):
    weights = [] if "--weights" in options else ["--weights", str(images / f"{backbone}.safetensors")]
    words = ["fit-head", str(images / "images"), str(head), "--backbone", backbone, *weights]
    return main([*words, "--size", "64", "--num-workers", "1", *options])


def test_words_of_a_backbone_label_images_that_have_other_classes(images, tmp_path, monkeypatch, capsys):
    """As users run it: a process, relative paths; a store of words knows its words by the head's hash."""
    monkeypatch.chdir(images)
    head, store = str(tmp_path / "words.safetensors"), str(tmp_path / "labels")
    options = ["--backbone", "resnet10t", "--weights", "resnet10t.safetensors", "--from", "words", "--words", "6"]
    with CommandProcess(images) as process:
        process.check("fit-head", "images", head, *options, "--size", "64")
        process.check("annotate", "images", store, "--teacher", head, "--topk", "2")
    words = Head.load(head)
    labels = tl.LabelStore(store)
    assert len(labels) == 12
    assert (labels.manifest.num_classes, labels.manifest.class_names) == (6, ())
    assert labels.manifest.words == words.hash
    assert labels.manifest.teacher["head_fitted"]["from"] == "words"
    assert labels.manifest.teacher["backbone"]["name"] == "resnet10t"
    backbone = load_backbone("resnet10t", CPU, weights="resnet10t.safetensors", size=64)
    pixels, _ = backbone.input.of(Image.open("images/b/1.png"))
    mean, std = (torch.tensor(v)[:, None, None] for v in (backbone.input.mean, backbone.input.std))
    normalised = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std
    with torch.no_grad():
        expected = words(backbone.network(normalised[None]).locations)[0].softmax(dim=2)
    score_map = labels["b/1.png"]
    kept = expected.gather(2, torch.from_numpy(score_map.class_ids.astype(np.int64))).numpy()
    np.testing.assert_allclose(score_map.probs, np.where(score_map.probs > 0, kept, 0), atol=0.01)
    assert (score_map.top_class_ids == expected.argmax(dim=2).numpy()).all()
    assert score_map.codes.shape[2] <= 2

    again = ["annotate", "images", store, "--topk", "2", "--teacher"]
    assert main([*again, head]) == 0
    assert "12 had been" in capsys.readouterr().out
    other = str(tmp_path / "other.safetensors")
    assert main(["fit-head", "images", other, *options, "--size", "64", "--seed", "1"]) == 0
    assert main([*again, other]) == 2  # other words do not go into this store
    assert f"holds other labels (the teacher is {head} there, {other} here); choose" in capsys.readouterr().err
    assert main([*again, head, "--flip"]) == 2
    assert f"(the teacher is {head} there, {head} with --flip here)" in capsys.readouterr().err


def test_the_same_command_finds_its_head_and_another_does_not_write_over_it(images, tmp_path, capsys):
    head = tmp_path / "head.safetensors"
    assert fit(images, head, "--from", "words", "--words", "4") == 0
    first = head.read_bytes()
    capsys.readouterr()
    assert fit(images, head, "--from", "words", "--words", "4") == 0
    assert "exists, fitted by the same command" in capsys.readouterr().err
    assert fit(images, head, "--from", "words", "--words", "5") == 2
    assert "was fitted with other options (words); name another file, or --overwrite" in capsys.readouterr().err
    assert head.read_bytes() == first
    assert fit(images, head, "--from", "words", "--words", "5", "--overwrite") == 0
    assert Head.load(head).num_classes == 5
    save_file({"weight": torch.zeros(2)}, head)
    assert fit(images, head, "--from", "words", "--overwrite") == 2
    assert "exists and is no head" in capsys.readouterr().err
    assert fit(images, tmp_path / "head.pth", "--from", "words") == 2
    assert "a head is a .safetensors file" in capsys.readouterr().err


def test_few_locations_for_many_words_are_said(images, tmp_path, capsys):
    assert fit(images, tmp_path / "head.safetensors", "--from", "words", "--words", "20") == 0
    said = capsys.readouterr().err
    assert re.search(r"12 images have \d+ locations, [\d.]+ for each of 20 words: .*; --words \d+ have 32 each", said)


def test_a_head_of_other_images_is_not_taken_for_one_of_these(images, tmp_path):
    weights = str(images / "resnet10t.safetensors")
    config = tl.FitConfig(backbone="resnet10t", weights=weights, size=64, from_="words", words=4)
    source = tl.open_images(images / "images")
    head = tl.fit_head(source, tmp_path / "head.safetensors", config)
    assert tl.fit_head(source, tmp_path / "head.safetensors", config).hash == head.hash
    (tmp_path / "few.txt").write_text("".join(f"{images}/images/a/{i}.png\ta\n" for i in (0, 2, 4, 6)))
    with pytest.raises(ModelError, match=r"fitted with other options \(images\)"):
        tl.fit_head(tl.open_images(tmp_path / "few.txt"), tmp_path / "head.safetensors", config)


def test_a_head_on_a_run_that_takes_one_size_which_is_no_square(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ["--data.train", str(images / "images"), "--data.val", str(images / "images"), "--data.num-workers", "0"]
    network = ["--model.name", "gmlp_ti16_224", "--model.options", "{pretrained: false}", "--model.img-size", "32x64"]
    few = ["--num-steps", "1", "--optim.warmup-epochs", "0", "--batch-size", "4", "--micro-batch-size", "4"]
    plain = ["--loss.beta", "0", "--precision", "fp32", "--device", "cpu"]
    assert main(["train", "--recipe", "small_data", "--out", "run", *data, *network, *few, *plain]) == 0
    assert main(["fit-head", str(images / "images"), "head.safetensors", "--backbone", "run", "--from", "labels"]) == 0
    assert main(["annotate", str(images / "images"), "labels", "--teacher", "head.safetensors"]) == 0
    assert {tl.LabelStore("labels")[key].codes.shape[:2] for key in tl.LabelStore("labels")} == {(2, 4)}


def test_a_head_on_lvvit_sees_images_at_another_size(images, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("lvvit_t", img_size=(32, 32), num_classes=2, depth=1, width=32, num_heads=2)
    save_file(model.state_dict(), tmp_path / "lvvit_t.safetensors")
    small = {"depth": 1, "width": 32, "num_heads": 2}
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(LVVIT_CONFIGS, "lvvit_t", replace(LVVIT_CONFIGS["lvvit_t"], **small))
        options = ["--from", "labels", "--weights", str(tmp_path / "lvvit_t.safetensors"), "--size", "32"]
        assert fit(images, tmp_path / "head.safetensors", *options, backbone="lvvit_t") == 0
        for size, cells in ((32, (2, 2)), (64, (4, 4))):
            config = TeacherConfig(teacher=str(tmp_path / "head.safetensors"), size=size)
            teacher = load_teachers(config, ("a", "b"), CPU)
            found, _ = teacher.top(torch.zeros(1, 3, size, size, dtype=torch.uint8), 1)
            assert tuple(found.shape[1:3]) == cells


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--from", "words"), "too few for 8,192 words; give more images, a larger --size, or --words of at most"),
        (("--from", "wrods"), "--from is labels, words, text, masks:DIR, or a file of embeddings"),
        (("--from", "masks:nowhere"), "nowhere: no such folder of masks"),
        (("--from", "labels", "--words", "9"), "--words: means nothing for a head --from labels; leave it out"),
        (("--from", "text"), "no file of class names"),
        (("--from", "nowhere.npy"), "no file of class names"),
        (("--from", "words", "--words", "1"), "--words must be at least 2"),
        (("--from", "words", "--weights", "nowhere.safetensors"), "nowhere.safetensors"),
    ],
)
def test_what_cannot_be_fitted_says_so_in_one_line_and_leaves_nothing(images, tmp_path, capsys, options, message):
    assert fit(images, tmp_path / "head.safetensors", *options) == 2
    assert message in [*filter(None, capsys.readouterr().err.splitlines())][-1]
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("factor", [1e6, 1e-8])
@pytest.mark.parametrize("source", ["words", "labels"])
def test_vectors_that_half_precision_cannot_hold_are_refused(images, tmp_path, capsys, factor, source):
    weights = timm.create_model("test_vit", num_classes=0).state_dict()
    save_file(weights | {"norm.weight": weights["norm.weight"] * factor}, tmp_path / "test_vit.safetensors")
    backbone = ["--backbone", "test_vit", "--weights", str(tmp_path / "test_vit.safetensors")]
    head = tmp_path / "head.safetensors"
    command = [
        "fit-head",
        str(images / "images"),
        str(head),
        "--from",
        source,
        *backbone,
        "--device",
        "cpu",
        "--size",
        "32",
    ]
    assert main(command) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "test_vit: its vectors have numbers up to" in said
    assert "samples of them are kept in half precision" in said
    assert not head.exists()


def test_images_that_do_not_decode_are_passed_over(images, tmp_path, capsys):
    (tmp_path / "images" / "a").mkdir(parents=True)
    for path in (images / "images" / "a").iterdir():
        (tmp_path / "images" / "a" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "images" / "a" / "broken.png").write_bytes(b"no image")
    weights = ["--weights", str(images / "resnet10t.safetensors"), "--size", "64"]
    command = ["fit-head", str(tmp_path / "images"), str(tmp_path / "head.safetensors"), "--backbone", "resnet10t"]
    assert main([*command, *weights, "--from", "words", "--words", "3"]) == 0
    assert "1 of 7 images were skipped (a/broken.png" in capsys.readouterr().err


def test_a_head_belongs_to_the_weights_that_it_was_fitted_on(images, tmp_path, capsys):
    head = tmp_path / "head.safetensors"
    assert fit(images, head, "--from", "words", "--words", "4") == 0
    torch.manual_seed(1)
    model = timm.create_model("resnet10t", num_classes=3)
    save_file(model.state_dict(), tmp_path / "other.safetensors")
    command = ["annotate", str(images / "images"), str(tmp_path / "labels"), "--teacher", str(head), "--weights"]
    assert main([*command, str(tmp_path / "other.safetensors")]) == 2
    assert "was fitted on resnet10t with other weights" in capsys.readouterr().err
    # The classifier is no part of the backbone: another one, or none, changes nothing.
    weights = load_file(images / "resnet10t.safetensors")
    bare = {name: tensor for name, tensor in weights.items() if not name.startswith("fc.")}
    save_file(bare, tmp_path / "bare.safetensors")
    assert main([*command, str(tmp_path / "bare.safetensors")]) == 0
    assert main([*command, str(tmp_path / "gone.safetensors")]) == 2
    assert "gone.safetensors, the weights of its backbone resnet10t, is not there" in capsys.readouterr().err


def test_embeddings_of_image_text_networks_are_vectors_and_transformers_keep_the_aspect(images):
    clip = load_backbone(CLIP, CPU, weights=str(images / f"{CLIP}.safetensors"), size=64)
    assert clip.width == timm.create_model(CLIP).num_classes
    assert clip.input.size_px((96, 64)) == (48, 80)
    eupe = load_backbone(EUPE, CPU, weights=str(images / f"{EUPE}.safetensors"), size=64)
    assert (eupe.width, eupe.input.fixed_size_px) == (192, None)
    assert eupe.description["licence"] == "fair-noncommercial-research-license"
    resnet = load_backbone("resnet10t", CPU, weights=str(images / "resnet10t.safetensors"), size=64)
    assert resnet.width == 512


def test_words_of_two_heads_are_not_averaged_and_mirror_images_are(images, tmp_path):
    for seed in "01":
        assert fit(images, tmp_path / f"{seed}.safetensors", "--from", "words", "--words", "4", "--seed", seed) == 0
    files = [str(tmp_path / f"{seed}.safetensors") for seed in "01"]
    with pytest.raises(ModelError, match="visual words of one head mean nothing to another"):
        load_teachers(TeacherConfig(teacher=files), [], CPU)
    flipped = load_teachers(TeacherConfig(teacher=files[0], flip=True), ["a", "b"], CPU)
    plain = load_teachers(TeacherConfig(teacher=files[0]), ["a", "b"], CPU)
    assert flipped.words == plain.words == flipped.description["words"] == Head.load(files[0]).hash
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    expected = (plain.probabilities(pixels) + plain.probabilities(pixels.flip(3)).flip(2)) / 2
    class_ids, probs = flipped.top(pixels, 2)
    torch.testing.assert_close(probs, expected.topk(2, dim=3).values)
    assert class_ids.shape == (2, 2, 2, 2)


@torch.no_grad()
def test_many_words_never_exist_as_one_dense_map(images, monkeypatch):
    """65,536 words at once would be 4 GB for 64 images: the blocks give the same, and none is larger than is said."""
    backbone = load_backbone("resnet10t", CPU, weights=str(images / "resnet10t.safetensors"), size=64)
    head = random_head(50, backbone.width)
    network, pixels = HeadNetwork(backbone.network, head), torch.randn(3, 3, 64, 96)
    expected = network(pixels).locations.softmax(dim=3).topk(5, dim=3)
    sizes = []
    head.register_forward_hook(lambda module, inputs, output: sizes.append(output.numel()))
    monkeypatch.setattr("tokenlabel.teachers.dense.MAX_LOGITS", 200)
    class_ids, probs = network.top(pixels, 5)
    torch.testing.assert_close(probs, expected.values)
    assert class_ids.equal(expected.indices)
    assert max(sizes) == 200
    assert sum(sizes) == 3 * 2 * 3 * 50


def test_in_python_it_is_what_the_page_shows(images, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "heads.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    small = 'backbone="resnet10t", weights="resnet10t.safetensors", size=64'
    code = code.replace('backbone="vit_small_patch16_dinov3.lvd1689m"', small).replace("words=8192", "words=4")
    assert small in code
    for name in ("images", "resnet10t.safetensors"):
        (tmp_path / name).symlink_to(images / name)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"features": torch.randn(2, 3, 512)}
    exec(code.replace("store.manifest.words == head.hash", "same = store.manifest.words == head.hash"), names)
    assert names["same"] is True
    assert names["logits"].shape == (2, 3, 4)
    assert len(names["store"]) == 12


@given(seed=st.integers(0, 99), length=st.integers(1, 3), soft=st.booleans(), decay=st.sampled_from(DECAYS[:3]))
@settings(max_examples=15, deadline=None)
def test_linear_heads_are_at_the_least_of_their_loss(seed, length, soft, decay):
    """Oracle: the loss bag by bag in a loop; around what is fitted it is larger in every direction."""
    generator = torch.Generator().manual_seed(seed)
    vectors = 2 + 3 * torch.randn(12, length, 4, generator=generator)
    shares = torch.rand(12, 3, generator=generator)
    targets = shares / shares.sum(dim=1, keepdim=True) if soft else shares.argmax(dim=1)
    weights = 0.5 + torch.rand(12, generator=generator)
    examples = Examples(vectors, targets, weights, 3)
    fit = fit_linear(examples, decay)
    flat = vectors.flatten(0, 1)
    std = flat.std(dim=0, correction=0)

    def loss(matrix, bias):
        total = torch.zeros(())
        for bag, target, weight in zip(vectors, targets, weights, strict=True):
            pooled = (bag @ matrix.T + bias).exp().mean(dim=0).log().log_softmax(dim=0)
            total = total - weight * ((target * pooled).sum() if soft else pooled[target])
        return total / weights.sum()

    found = loss(fit.matrix, fit.bias)
    assert cross_entropy(fit, examples) == pytest.approx(float(found), abs=1e-4)
    penalised = found + decay / 2 * (fit.matrix * std).square().sum()
    for step in torch.randn(20, 3, 5, generator=generator) * 0.02:
        matrix, bias = fit.matrix + step[:, :4] / std, fit.bias + step[:, 4]
        assert loss(matrix, bias) + decay / 2 * (matrix * std).square().sum() > penalised - 1e-5


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Left half of a class's colour, red or blue, right half grey; masks of that, and the classes' names."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for i in range(20):
        name, channel = ("blue", 2) if i % 2 else ("red", 0)
        for kind in ("images", "masks"):
            (root / kind / name).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(100, 156, (64, 128, 3), dtype=np.uint8)
        pixels[:, :64, channel] = 255
        Image.fromarray(pixels).save(root / "images" / name / f"{i}.png")
        mask = np.full((64, 128), 255, np.uint8)
        mask[:, :64] = i % 2 == 0  # blue is class 0, red class 1, as class folders are sorted
        Image.fromarray(mask).save(root / "masks" / name / f"{i}.png")
    torch.manual_seed(0)
    save_file(timm.create_model("resnet10t").state_dict(), root / "resnet10t.safetensors")
    (root / "classes.txt").write_text("blue\nred\n")
    return root


@pytest.mark.parametrize("source", ["labels", "masks:masks"])
def test_heads_from_labels_and_masks_find_the_classes_where_they_are(colours, tmp_path, monkeypatch, capsys, source):
    monkeypatch.chdir(colours)
    head, store = str(tmp_path / "head.safetensors"), str(tmp_path / "labels")
    command = ["--backbone", "resnet10t", "--weights", "resnet10t.safetensors", "--size", "64"]
    assert main(["fit-head", "images", head, *command, "--from", source, "--num-workers", "1"]) == 0
    fitted = Head.load(head).fitted
    assert fitted["held_out_accuracy"] > 0.9
    assert fitted["held_out_images"] == 4
    assert "held-out" in capsys.readouterr().err
    assert Head.load(head).class_names == ("blue", "red")
    assert main(["annotate", "images", store, "--teacher", head]) == 0
    labels = tl.LabelStore(store)
    assert labels.manifest.words == ""
    assert labels.manifest.teacher["head_fitted"]["held_out_accuracy"] == fitted["held_out_accuracy"]
    right = [(labels[key].top_class_ids[:, 0] == key.startswith("red")).mean() for key in labels]
    assert np.mean(right) > 0.9


def test_few_masks_are_enough_and_their_classes_may_have_names_of_their_own(colours, tmp_path, capsys):
    for number in (0, 1, 2):
        name = "blue" if number % 2 else "red"
        (tmp_path / "masks" / name).mkdir(parents=True, exist_ok=True)
        mask = np.full((64, 128), 2, np.uint8)
        mask[:, 64:] = number % 2
        Image.fromarray(mask).save(tmp_path / "masks" / name / f"{number}.png")
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    weights = ["--weights", str(colours / "resnet10t.safetensors"), "--size", "64"]
    command = [
        "fit-head",
        str(colours / "images"),
        str(tmp_path / "head.safetensors"),
        "--backbone",
        "resnet10t",
        *weights,
    ]
    assert main([*command, "--from", f"masks:{tmp_path / 'masks'}"]) == 2
    assert "holds 2, which is no id of 2 classes" in capsys.readouterr().err
    (tmp_path / "classes.txt").write_text("b\na\nc\n")
    capsys.readouterr()
    assert main([*command, "--from", f"masks:{tmp_path / 'masks'}", "--class-names", str(tmp_path / "names.txt")]) == 0
    assert "; --class-names holds" in capsys.readouterr().err
    head = Head.load(tmp_path / "head.safetensors")
    assert (head.class_names, head.fitted["images"]) == (("a", "b", "c"), 3)
    # A mask without a class neither counts nor is held out, and one mask is too few.
    Image.fromarray(np.full((64, 128), 255, np.uint8)).save(tmp_path / "masks/blue/3.png")
    names = ["--from", f"masks:{tmp_path / 'masks'}", "--class-names", str(tmp_path / "names.txt"), "--overwrite"]
    assert main([*command, *names]) == 0
    assert Head.load(tmp_path / "head.safetensors").fitted["images"] == 3
    for number, name in ((0, "red"), (1, "blue")):
        Image.fromarray(np.full((64, 128), 255, np.uint8)).save(tmp_path / "masks" / name / f"{number}.png")
    capsys.readouterr()
    assert main([*command, *names]) == 2
    assert "1 of 4 images have a mask that shows a class; two at least are needed" in capsys.readouterr().err
    # None of its classes is one of the images': labels are about its own. One that is leaves the others in doubt.
    annotate = [
        "annotate",
        str(colours / "images"),
        str(tmp_path / "l"),
        "--teacher",
        str(tmp_path / "head.safetensors"),
    ]
    assert main(annotate) == 0
    assert "labels are about the teacher's classes (a, b, c), none of which" in capsys.readouterr().err
    assert tl.LabelStore(tmp_path / "l").manifest.class_names == ("a", "b", "c")
    (tmp_path / "names.txt").write_text("a\nb\nred\n")
    Image.fromarray(np.zeros((64, 128), np.uint8)).save(tmp_path / "masks/red/0.png")
    assert main([*command, *names]) == 0
    assert main(annotate) == 2
    assert "the images have 2" in capsys.readouterr().err


def test_labels_of_one_class_or_of_one_image_each_are_refused(colours, tmp_path, capsys):
    weights = ["--weights", str(colours / "resnet10t.safetensors"), "--size", "64", "--from", "labels"]
    for lines, message in (
        ("images/red/0.png\tred\nimages/red/2.png\tred\n", "one class only (red)"),
        ("images/red/0.png\tred\nimages/blue/1.png\tblue\n", "none of 2 classes has two images"),
    ):
        (colours / "list.txt").write_text(lines)
        command = ["fit-head", str(colours / "list.txt"), str(tmp_path / "head.safetensors"), "--backbone", "resnet10t"]
        assert main([*command, *weights]) == 2
        assert message in capsys.readouterr().err


def test_embeddings_from_a_file_are_scaled_cosines(colours, tmp_path, capsys):
    rows = np.random.default_rng(0).normal(size=(2, 512)).astype(np.float32)
    np.save(tmp_path / "two.npy", rows)
    np.save(tmp_path / "narrow.npy", rows[:, :100])
    save_file({"embeddings": torch.from_numpy(rows), "other": torch.zeros(3, 3)}, tmp_path / "two.safetensors")
    weights = ["--weights", str(colours / "resnet10t.safetensors"), "--size", "64"]
    command = ["fit-head", str(colours / "classes.txt"), str(tmp_path / "head.safetensors"), "--backbone", "resnet10t"]
    for file in ("two.npy", "two.safetensors"):
        assert main([*command, *weights, "--from", str(tmp_path / file), "--temperature", "0.05", "--overwrite"]) == 0
        head = Head.load(tmp_path / "head.safetensors")
        assert (head.kind, head.class_names, head.scale) == ("file", ("blue", "red"), pytest.approx(20))
        vector = torch.randn(512)
        expected = 20 * torch.nn.functional.cosine_similarity(vector, torch.from_numpy(rows))
        torch.testing.assert_close(head(vector), expected)
    assert main([*command, *weights, "--from", str(tmp_path / "narrow.npy"), "--overwrite"]) == 2
    message = "expected an embedding of 512 numbers, the width of resnet10t, for each of 2 class names"
    assert message in capsys.readouterr().err
    np.save(tmp_path / "narrow.npy", rows * np.inf)
    assert main([*command, *weights, "--from", str(tmp_path / "narrow.npy"), "--overwrite"]) == 2
    assert "narrow.npy: holds numbers that are not finite" in capsys.readouterr().err
    np.save(tmp_path / "zeros.npy", rows * [[1], [0]])
    assert main([*command, *weights, "--from", str(tmp_path / "zeros.npy"), "--overwrite"]) == 2
    assert "zeros.npy: row 1 (from 0) holds zeros alone" in capsys.readouterr().err
    np.save(tmp_path / "complex.npy", rows + 1j)
    np.savez(tmp_path / "several.npz", rows=rows)
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    for file in ("complex.npy", "several.npy"):
        assert main([*command, *weights, "--from", str(tmp_path / file), "--overwrite"]) == 2
        assert "cannot be read as embeddings (expected one array of real numbers)" in capsys.readouterr().err
    for content in (b"no array", b""):
        (tmp_path / "two.npy").write_bytes(content)
        assert main([*command, *weights, "--from", str(tmp_path / "two.npy"), "--overwrite"]) == 2
        assert "cannot be read as embeddings" in capsys.readouterr().err


class OneHotTower:
    """Says of a text at which places which letters are."""

    scale = 100.0

    def encode(self, texts):
        return torch.stack(
            [torch.bincount(torch.tensor(list(text.encode())) % 512, minlength=512).float() for text in texts]
        )


def test_texts_are_the_mean_of_their_prompts_and_other_backbones_are_refused(
    colours, images, tmp_path, monkeypatch, capsys
):
    asked = []
    monkeypatch.setattr("tokenlabel.teachers.texts.load_tower", lambda name: asked.append(name) or OneHotTower())
    command = [
        "fit-head",
        str(colours / "classes.txt"),
        str(tmp_path / "head.safetensors"),
        "--from",
        "text",
        "--size",
        "64",
    ]
    assert main([*command, "--backbone", CLIP, "--weights", str(images / f"{CLIP}.safetensors")]) == 0
    head = Head.load(tmp_path / "head.safetensors")
    assert (asked, head.kind, head.scale, head.class_names) == ([CLIP], "text", pytest.approx(100), ("blue", "red"))
    for row, name in zip(head.matrix, head.class_names, strict=True):
        vectors = [np.bincount([*prompt.format(name).encode()], minlength=512) for prompt in PROMPTS]
        mean = np.mean([vector / np.linalg.norm(vector) for vector in vectors], axis=0)
        np.testing.assert_allclose(row.numpy(), mean / np.linalg.norm(mean), atol=1e-5)
    monkeypatch.undo()
    weights = ["--weights", str(images / "resnet10t.safetensors"), "--overwrite"]
    assert main([*command, "--backbone", "resnet10t", *weights]) == 2
    assert "resnet10t: its text tower is not known, if it has one; known are those of" in capsys.readouterr().err


def test_a_text_tower_of_open_clip():
    """With random weights, and a tokenizer of letters."""
    open_clip = pytest.importorskip("open_clip")
    vision = open_clip.CLIPVisionCfg(layers=1, width=64, head_width=32, patch_size=16, image_size=32)
    text = open_clip.CLIPTextCfg(context_length=40, vocab_size=300, width=32, heads=2, layers=1)
    network = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text).eval()

    def tokenizer(texts):
        return torch.tensor([[1, *(byte % 256 for byte in text.encode()[:38]), 299, *[0] * 40][:40] for text in texts])

    embeddings = text_embeddings(OpenClipTower(network, tokenizer, 100.0), ["cat", "dog"])
    assert embeddings.shape == (2, 24)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))


def test_a_head_teaches_in_the_step_and_words_do_not(colours, images, tmp_path):
    head = tmp_path / "head.safetensors"
    command = ["fit-head", str(colours / "images"), str(head), "--backbone", "resnet10t", "--from", "labels"]
    weights = str(colours / "resnet10t.safetensors")
    assert main([*command, "--weights", weights, "--size", "64"]) == 0
    teacher = load_online_teacher(OnlineTeacherConfig(name=str(head)), ["blue", "red"], CPU)
    assert teacher is not None
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    of_images, of_locations = teacher.probabilities(pixels)
    assert (of_images.shape, of_locations.shape) == ((2, 2), (2, 2, 2, 2))
    offline = load_teachers(TeacherConfig(teacher=str(head)), ["blue", "red"], CPU)
    torch.testing.assert_close(of_locations, offline.probabilities(pixels))
    assert fit(images, tmp_path / "words.safetensors", "--from", "words", "--words", "4") == 0
    with pytest.raises(ModelError, match="predicts visual words, not classes; label the images once"):
        load_online_teacher(OnlineTeacherConfig(name=str(tmp_path / "words.safetensors")), ["blue", "red"], CPU)


def test_a_fit_that_was_stopped_leaves_nothing(images, tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("tokenlabel.teachers.fitting.fit_words", stop)
    assert fit(images, tmp_path / "head.safetensors", "--from", "words", "--words", "4") == 130
    assert "stopped; nothing was written" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
    monkeypatch.undo()
    monkeypatch.setattr("os.fsync", stop)  # while the file is being written
    assert fit(images, tmp_path / "head.safetensors", "--from", "words", "--words", "4") == 130
    assert not [*tmp_path.iterdir()]


@torch.no_grad()
def test_images_of_a_new_shape_cost_no_more_than_others(images, monkeypatch):
    backbone = load_backbone("resnet10t", CPU, weights=str(images / "resnet10t.safetensors"), size=64)
    network: Any = backbone.network.backbone
    blank = []
    monkeypatch.setattr(network, "forward_intermediates", lambda *_, **__: blank.append(1))
    for img_size in ((96, 160), (32, 224)):
        found = backbone.network(torch.randn(1, 3, *img_size)).locations
        assert found.shape == (1, img_size[0] // 32, img_size[1] // 32, 512)
    assert not blank
