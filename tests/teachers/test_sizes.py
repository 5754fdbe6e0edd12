"""Which size `annotate` proposes: that at which whole images are of the class of the network's own crops."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from tokenlabel.data.config import Interpolation
from tokenlabel.data.sources import open_images
from tokenlabel.models.load import LoadedModel
from tokenlabel.runtime.errors import ModelError
from tokenlabel.teachers.dense import DenseLogits, DenseNetwork
from tokenlabel.teachers.input import TeacherInput, input_of
from tokenlabel.teachers.networks import NetworkTeacher
from tokenlabel.teachers.todo import proposed_size

CPU = torch.device("cpu")


class Larger(DenseNetwork):
    """Names class 1 of its crops, and of whole images that it sees at a side of `needed` or more; class 0 of others."""

    num_classes, answers_with = 2, "classifier"

    def __init__(self, needed: int, largest: int = 1000) -> None:
        super().__init__()
        self.needed, self.largest = needed, largest

    def grid_for(self, img_size):
        return img_size[0] // 8, img_size[1] // 8

    def forward(self, images):
        if images.shape[2] > self.largest:
            raise ValueError("too large")
        rows, columns = self.grid_for((images.shape[2], images.shape[3]))
        found = int(images.shape[2] * images.shape[3] >= self.needed**2)
        locations = torch.eye(2)[found].expand(len(images), rows, columns, 2)
        return DenseLogits(torch.eye(2)[1].expand(len(images), 2), locations)


@pytest.fixture
def source(tmp_path):
    for i in range(6):
        Image.new("RGB", (60, 60), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "6.png").write_bytes(b"broken")
    return open_images(tmp_path)


def teacher(network: DenseNetwork, *, chosen: bool = False) -> NetworkTeacher:
    input = TeacherInput(
        size=64,
        stride_px=8,
        fixed_size_px=None,
        crop_fraction=None,
        interpolation=Interpolation.BILINEAR,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    crop = None if chosen else replace(input, crop_fraction=0.875)
    larger = NetworkTeacher(network, input, description={"name": "larger"})
    larger.evaluated_on = crop
    return larger


def test_a_larger_size_is_proposed_where_it_agrees_better(source):
    line = proposed_size(teacher(Larger(80)), source, range(7), CPU)
    assert line is not None
    assert line.startswith("larger: of 6 whole images at 64 px it names the class of its own crop in 0, at 80 px in 6")
    assert "--size 80," in line
    assert "1.6 times the work" in line


@pytest.mark.parametrize(
    "of",
    [
        teacher(Larger(64)),  # agrees as it is
        teacher(Larger(200)),  # no size does
        teacher(Larger(80), chosen=True),
        teacher(Larger(80, largest=72)),
    ],
)
def test_nothing_is_proposed_otherwise(source, of):
    assert proposed_size(of, source, range(7), CPU) is None


def test_a_few_images_say_nothing(source):
    assert proposed_size(teacher(Larger(80)), source, range(3), CPU) is None


def test_a_network_of_one_size_that_is_not_square_sees_images_at_that_size():
    class Fixed(Larger):
        def grid_for(self, img_size):
            if img_size != (64, 32):
                raise ValueError(f"takes 64 x 32 pixels, not {img_size}")
            return 8, 4

    model = SimpleNamespace(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    found = LoadedModel(name="fixed", model=model, class_names=("a", "b"), img_size=(64, 32))
    assert input_of(found, Fixed(64), size=None, crop="none").size_px((100, 100)) == (64, 32)
    with pytest.raises(ModelError, match="takes 64 x 32 pixels, not"):
        input_of(found, Fixed(64), size=64, crop="none")
