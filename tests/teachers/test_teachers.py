from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models import get_pretrained_cfg

from tokenlabel.cli import main
from tokenlabel.core.config import OnlineTeacherConfig
from tokenlabel.core.geometry import WHOLE_IMAGE
from tokenlabel.core.scores import from_top
from tokenlabel.data.augment import EvalTransform
from tokenlabel.data.config import Interpolation
from tokenlabel.models import TimmAdapter, create_model
from tokenlabel.models.names import check_classes
from tokenlabel.runtime.errors import ConfigError, ModelError
from tokenlabel.teachers.classmap import ClassMap, class_map_for
from tokenlabel.teachers.dense import ClassifierNetwork, TokenNetwork
from tokenlabel.teachers.ensemble import Ensemble, load_online_teacher, load_teachers
from tokenlabel.teachers.input import TeacherInput
from tokenlabel.teachers.networks import NetworkTeacher, Teacher, load_teacher
from tokenlabel.teachers.options import TeacherConfig

CPU = torch.device("cpu")

# name, (height, width), options: maps and sequences, all kinds of pooling and heads; wide where they take it
FAMILIES = [
    ("resnet10t", (64, 96), {}),
    ("resnest14d", (64, 64), {}),
    ("test_nfnet", (64, 96), {}),
    ("convnext_atto", (64, 96), {}),
    ("mobilenetv3_small_050", (64, 64), {}),
    ("vit_tiny_patch16_224", (64, 64), {"img_size": 64, "depth": 2}),
    ("vit_tiny_patch16_224", (64, 64), {"img_size": 64, "depth": 2, "global_pool": "avg"}),
    ("vit_tiny_patch16_224", (64, 64), {"img_size": 64, "depth": 2, "reg_tokens": 4}),
    ("deit_tiny_distilled_patch16_224", (64, 64), {"img_size": 64, "depth": 2}),
    ("vit_base_patch16_siglip_224", (64, 64), {"img_size": 64, "depth": 1, "embed_dim": 48, "num_heads": 2}),
    ("mixer_s32_224", (64, 64), {"img_size": 64}),
    ("swin_tiny_patch4_window7_224", (64, 64), {"img_size": 64, "window_size": 2, "depths": (1, 1, 1, 1)}),
]


def input(**changes) -> TeacherInput:
    defaults = {
        "size": 64,
        "stride_px": 32,
        "fixed_size_px": None,
        "crop_fraction": None,
        "interpolation": Interpolation.BICUBIC,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
    }
    return TeacherInput(**{**defaults, **changes})


def timm_model(name: str, **options) -> Any:
    return timm.create_model(name, **options)


def some_images(img_size=(64, 64), num_images=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num_images, 3, *img_size), dtype=torch.uint8, generator=generator)


@pytest.fixture(params=FAMILIES, ids=lambda family: "-".join([family[0], *map(str, family[2].values())]))
def network(request):
    name, img_size, options = request.param
    torch.manual_seed(0)
    backbone = timm_model(name, num_classes=7, **options).eval()
    classifier = backbone.get_classifier()
    for head in classifier if isinstance(classifier, tuple) else (classifier,):
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.5)  # many begin at zero
    images = torch.randn(2, 3, *img_size, generator=torch.Generator().manual_seed(1))
    return ClassifierNetwork(backbone, name=name).eval(), images


@torch.no_grad()
def test_the_head_answers_for_every_position(network):
    """Oracle: for each position the head's answer to features that are this position's everywhere."""
    dense, images = network
    logits = dense(images)
    seen = dense.backbone.forward_features(images)
    torch.testing.assert_close(logits.image, dense.backbone(images))
    h, w = dense.grid_for((images.shape[2], images.shape[3]))
    assert logits.locations.shape == (2, h, w, 7)
    for row in range(h):
        for column in range(w):
            if seen.ndim == 3:
                position = seen[:, seen.shape[1] - h * w + row * w + column]
                everywhere = position[:, None, :].expand_as(seen)
            elif seen.shape[1:3] == (h, w):
                everywhere = seen[:, row, column][:, None, None, :].expand_as(seen)
            else:
                everywhere = seen[:, :, row, column][:, :, None, None].expand_as(seen)
            expected = dense.backbone.forward_head(everywhere)
            torch.testing.assert_close(logits.locations[:, row, column], expected, atol=1e-4, rtol=1e-4)
    if dense.averages_linearly(images):
        torch.testing.assert_close(logits.locations.mean(dim=(1, 2)), logits.image, atol=1e-4, rtol=1e-4)


AVERAGE = {"resnet10t", "resnest14d", "test_nfnet", "mixer_s32_224", "swin_tiny_patch4_window7_224"}


@torch.no_grad()
def test_networks_that_average_linearly_are_known(network):
    dense, images = network
    # ConvNeXt, MobileNet and the ViT have layers after pooling; the others look at class tokens or weigh positions.
    assert dense.averages_linearly(images) == (dense.name in AVERAGE)


def test_the_published_teacher_gives_18_by_18():
    with torch.device("meta"):
        backbone = timm_model("dm_nfnet_f6")
        assert ClassifierNetwork(backbone, name="dm_nfnet_f6").grid_for((576, 576)) == (18, 18)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("pit_ti_224", "not one vector for each"), ("crossvit_tiny_240", "forward_intermediates|several branches")],
)
def test_heads_that_cannot_be_moved_are_refused_by_name(name, reason):
    backbone = timm_model(name, num_classes=5).eval()
    side = backbone.default_cfg["input_size"][1]
    with pytest.raises(ModelError, match=f"^{name} has no dense map: .*({reason})"):
        ClassifierNetwork(backbone, name=name).grid_for((side, side))


def test_volo_and_lv_vit_answer_by_their_token_heads(tmp_path):
    torch.manual_seed(0)
    volo = timm_model("volo_d1_224", num_classes=5, img_size=64).eval()
    images = torch.randn(1, 3, 64, 64)
    expected = volo.aux_head(volo.forward_features(images)[:, 1:])
    network = TokenNetwork(TimmAdapter(volo, name="volo", num_classes=5, img_size=(64, 64)).eval())
    with torch.no_grad():
        torch.testing.assert_close(network(images).locations.flatten(1, 2), expected)
    assert network.answers_with == "tokens"

    model = create_model("lvvit_t", num_classes=5, img_size=(64, 64), depth=1)
    with torch.no_grad():
        outputs = model.eval()(images)
        locations = TokenNetwork(model)(images).locations
        by_classifier = ClassifierNetwork(model.get_submodule("backbone"), name="lvvit_t")(images).locations
    torch.testing.assert_close(locations.flatten(1, 2), outputs.token_logits)
    expected = model.get_submodule("backbone.head")(outputs.tokens).detach()
    torch.testing.assert_close(by_classifier.flatten(1, 2), expected)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    model = timm_model("resnet10t", num_classes=6)
    path = tmp_path_factory.mktemp("weights") / "resnet10t.safetensors"
    save_file(model.state_dict(), path)
    return path, model.eval()


def test_a_teacher_by_name_with_a_checkpoint_file(weights):
    path, model = weights
    config = TeacherConfig(teacher="resnet10t", weights=str(path), size=96)
    teacher = load_teachers(config, [f"class {i}" for i in range(6)], CPU)
    assert isinstance(teacher, NetworkTeacher)
    assert teacher.num_classes == 6
    assert (teacher.input.stride_px, teacher.input.fixed_size_px) == (32, None)
    images = some_images((64, 96))
    mean, std = (torch.tensor(v)[:, None, None] for v in (teacher.input.mean, teacher.input.std))
    own = model((images / 255 - mean) / std)
    torch.testing.assert_close(teacher.logits(images).locations.mean(dim=(1, 2)), own, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(teacher.probabilities(images).sum(dim=3), torch.ones(2, 2, 3))
    assert "is its own output" in teacher.check(images)
    other = load_teacher("resnet10t", config, CPU, weights=str(path))
    assert other.description == teacher.description


def test_a_teacher_of_fixed_size_sees_the_whole_image_squeezed(tmp_path):
    model = timm_model("vit_tiny_patch16_224", num_classes=4)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    name, weights = "vit_tiny_patch16_224", str(tmp_path / "vit.safetensors")
    teacher = load_teacher(name, TeacherConfig(teacher=name, size=64), CPU, weights=weights)
    pixels, region = teacher.input.of(Image.new("RGB", (100, 40)))
    assert pixels.shape == (64, 64, 3)
    assert region == WHOLE_IMAGE
    assert teacher.probabilities(torch.from_numpy(pixels).permute(2, 0, 1)[None]).shape == (1, 4, 4, 4)
    assert "own top-1" in teacher.check(some_images())


@pytest.mark.parametrize("name", ["lvvit_t", "t2t_vit_14"])
def test_our_transformers_see_images_at_their_own_aspect_ratio_by_name_as_well(tmp_path, name):
    weights = tmp_path / "weights.safetensors"
    save_file(create_model(name, num_classes=4, img_size=224).get_submodule("backbone").state_dict(), weights)
    teacher = load_teacher(name, TeacherConfig(teacher=name, size=64), CPU, weights=str(weights))
    pixels, _ = teacher.input.of(Image.new("RGB", (128, 32)))
    assert pixels.shape == (32, 128, 3)
    assert teacher.probabilities(torch.from_numpy(pixels).permute(2, 0, 1)[None]).shape == (1, 2, 8, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "resnet11x"}, "no network 'resnet11x'"),
        ({"teacher": "lvvit_s", "weights": None}, "give a checkpoint file by --weights"),
        ({"weights": "nowhere.safetensors"}, r"nowhere\.safetensors"),
        ({"teacher": "resnet18"}, "the weights of resnet18 cannot be loaded"),
        ({"head": "tokens"}, "no trained head for its tokens"),
        ({"teacher": ["resnet10t", "resnet10t", "resnet10t"]}, "3 teachers, but 1 files"),
    ],
)
def test_teachers_that_do_not_exist(weights, changes, message):
    config = TeacherConfig(**{"teacher": "resnet10t", "weights": str(weights[0]), **changes})
    with pytest.raises(ValueError, match=message):
        load_teachers(config, ["x"] * 6, CPU)


def test_sight_keeps_area_and_aspect():
    for img_size, expected in [((500, 375), (512, 672)), ((64, 64), (576, 576)), ((3000, 10), (32, 9984))]:
        assert input(size=576).size_px(img_size) == expected
    pixels, region = input().of(Image.new("RGB", (200, 50)))
    assert pixels.shape == (32, 128, 3)
    assert region == WHOLE_IMAGE


def test_a_centre_crop_reports_its_true_region():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (75, 100, 3), dtype=np.uint8))
    pixels, region = input(crop_fraction=0.875).of(image)
    expected, view = EvalTransform((64, 64), crop_fraction=0.875)(image, np.random.default_rng(0))
    assert np.array_equal(pixels, expected)
    corners = view.to_source(np.array([[0.0, 0.0], [1.0, 1.0]]))
    np.testing.assert_allclose([region.left, region.top, region.right, region.bottom], corners.ravel())
    assert region.width == pytest.approx(0.875 * 0.75, abs=0.01)
    assert region.height == pytest.approx(0.875, abs=0.01)


class ByColour(Teacher):
    """Says for each cell how red, green and blue it is; exactly predictable."""

    num_classes = 3
    class_names = ("red", "green", "blue")

    def __init__(self, *, cell_px: int = 8, name: str = "colour", **changes) -> None:
        self.input = input(stride_px=cell_px, **changes)
        self.cell_px = cell_px
        self.description = {"name": name}

    def check(self, images):
        return "fine"

    def probabilities(self, images):
        colour = torch.nn.functional.avg_pool2d(images.float(), self.cell_px) + 1e-3
        return (colour / colour.sum(dim=1, keepdim=True)).permute(0, 2, 3, 1)


def test_an_ensemble_averages_over_the_finest_grid():
    coarse, fine = ByColour(cell_px=16), ByColour(cell_px=8)
    ensemble = Ensemble([coarse, fine])
    assert ensemble.input.stride_px == 16
    images = some_images((32, 64))
    probs = ensemble.probabilities(images)
    upsampled = torch.nn.functional.interpolate(
        coarse.probabilities(images).permute(0, 3, 1, 2), size=(4, 8), mode="bilinear"
    ).permute(0, 2, 3, 1)
    torch.testing.assert_close(probs, (upsampled + fine.probabilities(images)) / 2)
    torch.testing.assert_close(probs.sum(dim=3), torch.ones(2, 4, 8))


def test_members_of_another_size_get_the_images_resized():
    images = torch.zeros(1, 3, 32, 64, dtype=torch.uint8)
    images[:, 0, :, :32], images[:, 1, :, 32:] = 200, 200
    squeezing = ByColour(fixed_size_px=(24, 24))
    probs = Ensemble([ByColour(), squeezing]).probabilities(images)
    assert probs.shape == (1, 4, 8, 3)
    assert probs[0, :, :2, 0].min() > 0.95
    assert probs[0, :, 6:, 1].min() > 0.95


def test_flipping_turns_maps_back():
    images = some_images((16, 32))
    teacher = ByColour()
    torch.testing.assert_close(Ensemble([teacher], flip=True).probabilities(images), teacher.probabilities(images))

    class LooksLeft(ByColour):
        def probabilities(self, images):
            probs = super().probabilities(images)
            return torch.cat([probs[:, :, :1].expand(-1, -1, 2, -1), probs[:, :, 2:]], dim=2)

    probs = LooksLeft().probabilities(images)
    expected = (probs + LooksLeft().probabilities(images.flip(3)).flip(2)) / 2
    torch.testing.assert_close(Ensemble([LooksLeft()], flip=True).probabilities(images), expected)


def test_teachers_of_other_classes_are_not_averaged():
    other = ByColour()
    other.class_names = ("blue", "green", "red")
    with pytest.raises(ModelError, match="names or orders"):
        Ensemble([ByColour(), other])
    other.num_classes = 4
    with pytest.raises(ModelError, match="3 and of 4"):
        Ensemble([ByColour(), other])


def test_class_maps_sum_and_drop():
    probs = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    mapped = ClassMap(np.array([1, -1, 1, 0]), 3).apply(probs)
    torch.testing.assert_close(mapped, torch.tensor([[0.4, 0.4, 0.0]]) + 0.2 / 3)


def test_renormalised_probabilities_are_conditional_on_our_classes():
    class_map = ClassMap(np.array([1, -1, 1, 0, -1]), 3, outside="renormalise")
    far = 1e-4  # of the probability is on ours, then next to nothing, then all, then what no network should say
    probs = torch.tensor(
        [
            [0.1, 0.2, 0.3, 0.1, 0.3],
            [far, 1 - 3 * far, far, far, 0],
            [4e-4, 0.5, 4e-4, 4e-4, 0.4988],
            [0, 0.5, 0, 0, 0.5],
            [0.25, 0, 0.25, 0.5, 0],
        ]
    )
    expected = torch.tensor([[0.2, 0.8, 0], [0, 0, 0], [1 / 3, 2 / 3, 0], [0, 0, 0], [0.5, 0.5, 0]])
    torch.testing.assert_close(class_map.apply(probs), expected)
    assert class_map.apply(torch.tensor([[0.1, torch.nan, 0.3, 0.1, 0.5], [torch.nan] * 5]))[1].isnan().all()


def test_a_complete_class_map_is_the_same_whatever_becomes_of_what_is_outside():
    maps = [ClassMap(np.array([1, 0, 1]), 2, outside=outside) for outside in ("renormalise", "spread")]
    probs = torch.tensor([[0.1, 0.2, 0.3], [0.5, 0.5, 0.0]])
    assert maps[0].apply(probs).equal(maps[1].apply(probs))
    assert maps[0].description == maps[1].description


def test_members_and_mirror_images_are_averaged_before_what_is_outside_is_left_out():
    """Oracle: sum over members and mirror images of p(ours), divided by the same sum over all of ours."""

    class Fixed(ByColour):
        def __init__(self, left, right):
            super().__init__()
            self.answers = torch.tensor([left, right])  # of the two halves of an image

        def probabilities(self, images):
            return self.answers[None, None].expand(len(images), 1, 2, 3)

    a, b = Fixed([0.9, 0.05, 0.05], [0.2, 0.2, 0.6]), Fixed([0.1, 0.9, 0.0], [0.0, 0.0, 1.0])
    class_map = ClassMap(np.array([0, 1, -1]), 2, outside="renormalise")
    ours = torch.stack([a.answers, b.answers])[:, :, :2]
    images = some_images()
    for flip in (False, True):
        total = (ours + ours.flip(1) if flip else ours).sum(dim=0)
        got = Ensemble([a, b], flip=flip, class_map=class_map).probabilities(images)[0, 0]
        torch.testing.assert_close(got, total / total.sum(dim=1, keepdim=True))


def test_what_goes_nowhere_turns_no_ranking_upside_down():
    """.9 of the probability is of classes that the images don't have; the rest must not go to the least likely."""
    probs = torch.tensor([[0.06, 0.02, 0.01, 0.005, 0.005, 0.0, 0.9]])
    mapped = ClassMap(np.array([0, 1, 2, 3, 4, 5, -1]), 6).apply(probs)
    top = mapped.topk(5, dim=1)
    score_map = from_top(top.indices[None].numpy(), top.values[None].numpy(), num_classes=6)
    found = score_map.dense()[0, 0]
    np.testing.assert_allclose(found, probs[0, :6] + 0.15, atol=1e-6)
    assert (np.diff(found) <= 1e-7).all()


def test_every_pretrained_tag_without_classes_is_refused():
    """Oracle: the numbers of classes of the data sets that timm's classifiers were trained on."""
    data_sets = {1000, 11221, 11821, 19168, 21841, 21842, 21843, 115217}
    presets = {name: vars(get_pretrained_cfg(name)) for name in timm.list_pretrained()}
    refused = set()
    for name, preset in presets.items():
        try:
            check_classes(name, preset)
        except ModelError:
            refused.add(name)
    assert refused == {name for name, preset in presets.items() if preset["num_classes"] not in data_sets}
    assert {"vit_base_patch16_clip_224.openai", "vit_pe_core_tiny_patch16_384.fb"} < refused
    assert "vit_base_patch16_clip_224.openai_ft_in1k" not in refused


def test_networks_of_other_sources_that_were_trained_on_images_and_texts():
    """From a file, the hub or a folder there is no tag to know them by, but their width."""
    hub = {"architecture": "vit_base_patch16_clip_224", "num_classes": 512}
    with pytest.raises(ModelError, match="its 512 outputs are an embedding, not classes"):
        check_classes("hf-hub:someone/clip", hub)
    check_classes("hf-hub:someone/pets", hub | {"num_classes": 37, "tag": "openai"})
    check_classes("local-dir:mine", hub | {"label_names": [str(i) for i in range(512)]})
    check_classes("convnext_base", {"architecture": "convnext_base", "tag": "fb_in1k", "num_classes": 640})
    with pytest.raises(ModelError, match="its weights have no classifier"):
        check_classes("local-dir:backbone", {"architecture": "resnet18", "num_classes": 0})


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("vit_base_patch16_clip_224.openai", r"512 outputs are an embedding, not classes.*laion2b_ft_in12k_in1k"),
        ("vit_small_patch14_dinov2.lvd142m", "weights have no classifier"),
    ],
)
def test_networks_without_classes_label_and_predict_nothing(name, what, tmp_path, monkeypatch, capsys):
    """One line from every door, before anything is downloaded."""
    monkeypatch.chdir(tmp_path)
    for class_name in "ab":
        (tmp_path / "images" / class_name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / class_name / "1.png")
    for command in (["annotate", "images", "labels", "--teacher", name], ["eval", name, "--data", "images"]):
        assert main(command) == 2
        message = capsys.readouterr().err
        assert re.search(f"^tokenlabel {command[0]}: error: {name}: its {what}", message, re.MULTILINE)
    assert not (tmp_path / "labels").exists()
    with pytest.raises(ModelError, match=what):
        load_online_teacher(OnlineTeacherConfig(name=name), list("ab"), CPU)


def test_weights_beside_a_run_and_sizes_below_one_are_refused(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    config = TeacherConfig(teacher=str(tmp_path))
    with pytest.raises(ModelError, match="is a run and has weights of its own"):
        load_teacher(str(tmp_path), config, CPU, weights="some.safetensors")
    with pytest.raises(ModelError, match="size must be at least 1, got 0"):
        TeacherConfig(teacher="resnet10t", size=0)


def test_a_class_map_to_no_classes_is_refused():
    with pytest.raises(ConfigError, match="the images have no classes"):
        class_map_for("nowhere.csv", ["a", "b"], [], num_theirs=2)


def test_a_class_map_file(tmp_path):
    path = tmp_path / "map.csv"
    path.write_text("# the teacher's, ours\ntabby cat, cat\n1,cat\n\ndog\t1\n")
    classes = class_map_for(str(path), ["tabby cat", "tiger cat", "dog", "axe"], ["cat", "dog"], num_theirs=4)
    assert classes is not None
    assert classes.targets.tolist() == [0, 0, 1, -1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat,cat\nwolf,dog\n", r"map\.csv, line 2: 'wolf'"),
        ("cat,cat\ncat,dog\n", r"line 2: .* two classes"),
        ("cat\n", r"line 1: expected"),
        ("cat,cat\n", r"no class of the teacher goes to 1 of 2 classes \(dog\)"),
    ],
)
def test_class_map_files_that_are_wrong(tmp_path, text, message):
    path = tmp_path / "map.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        class_map_for(str(path), ["cat", "hound"], ["cat", "dog"], num_theirs=2)


def test_classes_are_compared_by_name():
    ours = ["cat", "dog"]
    assert class_map_for(None, ours, ours, num_theirs=2) is None
    assert class_map_for(None, [], ours, num_theirs=2) is None
    assert class_map_for("order", ["Katze", "Hund"], ours, num_theirs=2) is None
    by_name = class_map_for("names", ["axe", "dog", "cat"], ours, num_theirs=3)
    assert by_name is not None
    assert by_name.targets.tolist() == [-1, 1, 0]
    in_another_order = class_map_for(None, ["dog", "cat"], ours, num_theirs=2)
    assert in_another_order is not None
    assert in_another_order.targets.tolist() == [1, 0]
    with pytest.raises(
        ConfigError, match="class 0 is 'dog' to the teacher and 'cat' to the images; 1 names are common"
    ):
        class_map_for(None, ["dog", "cow"], ours, num_theirs=2)
    with pytest.raises(ConfigError, match="knows 1,000 classes, the images have 2"):
        class_map_for(None, [], ours, num_theirs=1000)
    with pytest.raises(ConfigError, match=r"of one class \(cat\).* list the paths alone"):
        class_map_for("names", ["axe", "dog", "cat"], ["cat"], num_theirs=3)
    with pytest.raises(ConfigError, match="no common order"):
        class_map_for("order", [], ours, num_theirs=1000)
