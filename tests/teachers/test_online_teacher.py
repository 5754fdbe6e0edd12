"""The teacher in the step: it says what its network says of the images, in its own size and normalisation."""

from typing import Literal

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data.config import resolve_data_config
from torch.nn import functional as F

from tokenlabel.core.config import OnlineTeacherConfig
from tokenlabel.data.config import Interpolation
from tokenlabel.runtime.errors import ConfigError, ModelError
from tokenlabel.teachers.classmap import ClassMap
from tokenlabel.teachers.dense import ClassifierNetwork
from tokenlabel.teachers.ensemble import NetworkOnlineTeacher, load_online_teacher
from tokenlabel.teachers.input import TeacherInput
from tokenlabel.teachers.networks import NetworkTeacher

CPU = torch.device("cpu")
MEAN, STD = (0.2, 0.4, 0.6), (0.3, 0.2, 0.1)
CLASSES = tuple("abcdefg")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=len(CLASSES)).eval()
    torch.nn.init.normal_(model.get_parameter("fc.weight"), std=0.5)
    return model


def teacher(network, *, fixed_size_px=None, precision: Literal["fp32", "bf16"] = "fp32"):
    input = TeacherInput(
        size=64,
        stride_px=32,
        fixed_size_px=fixed_size_px,
        crop_fraction=None,
        interpolation=Interpolation.BICUBIC,
        mean=MEAN,
        std=STD,
    )
    dense = ClassifierNetwork(network, name="test_resnet").eval()
    return NetworkTeacher(dense, input, description={"name": "test_resnet"}, precision=precision)


def some_images(img_size=(64, 96)):
    return torch.randint(0, 256, (2, 3, *img_size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_it_says_what_the_network_says_of_normalised_images(network):
    images = some_images()
    of_images, of_locations = NetworkOnlineTeacher(teacher(network)).probabilities(images)
    seen = (images / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(of_images, network(seen).softmax(dim=1), atol=1e-5, rtol=1e-4)
    features = network.forward_features(seen)  # [2, D, 2, 3]
    for b in range(2):
        for i in range(of_locations.shape[1]):
            for j in range(of_locations.shape[2]):
                expected = network.fc(features[b, :, i, j]).softmax(dim=0)
                torch.testing.assert_close(of_locations[b, i, j], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("size", "fixed_size_px", "expected"),
    [(None, None, (64, 96)), (128, None, (96, 160)), (None, (32, 32), (32, 32)), (128, (64, 64), (64, 64))],
)
def test_images_are_resized_to_what_it_takes(network, size, fixed_size_px, expected):
    seen = []
    hook = network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[2:]))
    stem = network.get_submodule("conv1").register_forward_pre_hook(
        lambda _, inputs: seen.append(tuple(inputs[0].shape[2:]))
    )
    online = NetworkOnlineTeacher(teacher(network, fixed_size_px=fixed_size_px), size=size)
    online.probabilities(some_images())
    hook.remove()
    stem.remove()
    assert set(seen) == {expected}


def test_classes_are_mapped_and_distributions_stay_whole(network):
    class_map = ClassMap(np.array([0, 0, 1, 2, -1, -1, -1]), 3)
    mapped = NetworkOnlineTeacher(teacher(network), class_map=class_map).probabilities(some_images())
    plain = NetworkOnlineTeacher(teacher(network)).probabilities(some_images())
    for got, own in zip(mapped, plain, strict=True):
        nowhere = own[..., 4:].sum(dim=-1) / 3
        torch.testing.assert_close(got[..., 0], own[..., 0] + own[..., 1] + nowhere)
        torch.testing.assert_close(got.sum(dim=-1), torch.ones(got.shape[:-1]))


def test_what_is_outside_of_its_classes_is_left_out_or_spread(network, tmp_path):
    """By default probabilities are conditional on our classes, and a teacher that sees nothing of ours says nothing."""
    save_file(network.state_dict(), tmp_path / "teacher.safetensors")
    (tmp_path / "map.csv").write_text("0,a\n1,a\n2,b\n3,c\n")

    def load(**options):
        config = OnlineTeacherConfig(
            name="test_resnet",
            weights=str(tmp_path / "teacher.safetensors"),
            class_map=str(tmp_path / "map.csv"),
            **options,
        )
        loaded = load_online_teacher(config, list("abc"), CPU)
        assert loaded is not None
        return loaded

    online = load()
    said, own = (online.probabilities(some_images()), NetworkOnlineTeacher(online.teacher).probabilities(some_images()))
    for got, plain in zip(said, own, strict=True):
        ours = torch.stack([plain[..., :2].sum(dim=-1), plain[..., 2], plain[..., 3]], dim=-1)
        torch.testing.assert_close(got, ours / ours.sum(dim=-1, keepdim=True))
    spread = load(outside="spread").probabilities(some_images())[1]
    torch.testing.assert_close(spread[..., 1], own[1][..., 2] + own[1][..., 4:].sum(dim=-1) / 3)
    online.teacher.dense.get_parameter("backbone.fc.bias").data[6] += 100
    assert not any(of.any() for of in online.probabilities(some_images()))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_needs_no_gradients_and_answers_in_float32(network, precision):
    for said in NetworkOnlineTeacher(teacher(network, precision=precision)).probabilities(some_images()):
        assert not said.requires_grad
        assert not said.is_inference()
        assert said.dtype is torch.float32


def test_it_is_loaded_by_name_with_weights_from_a_file(network, tmp_path):
    path = tmp_path / "teacher.safetensors"
    save_file(network.state_dict(), path)
    config = OnlineTeacherConfig(name="test_resnet", weights=str(path))
    loaded = load_online_teacher(config, CLASSES, CPU)
    assert loaded is not None
    data = resolve_data_config({}, model=network)
    images = some_images((96, 96))
    seen = (images / 255 - torch.tensor(data["mean"])[:, None, None]) / torch.tensor(data["std"])[:, None, None]
    with torch.no_grad():
        expected = F.softmax(network(seen), dim=1)
    torch.testing.assert_close(loaded.probabilities(images)[0], expected, atol=1e-5, rtol=1e-4)


def test_a_teacher_of_other_classes_or_none_at_all_is_refused(network, tmp_path):
    path = tmp_path / "teacher.safetensors"
    save_file(network.state_dict(), path)
    with pytest.raises(ConfigError, match="7 classes, the images have 3"):
        load_online_teacher(OnlineTeacherConfig(name="test_resnet", weights=str(path)), list("abc"), CPU)
    with pytest.raises(ModelError, match="no network 'test_resnext_'"):
        load_online_teacher(OnlineTeacherConfig(name="test_resnext_"), list("abc"), CPU)
    assert load_online_teacher(OnlineTeacherConfig(), list("abc"), CPU) is None
