import copy
import io
import os
import pickle
import struct
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from tokenlabel.core.batch import normalize_images
from tokenlabel.core.geometry import Box, View
from tokenlabel.core.scores import from_mask
from tokenlabel.data import decoding
from tokenlabel.data.batches import TokenLabelDataset, check_labels, collate, make_loader
from tokenlabel.data.decoding import ImageCheck, check_images, decode_image, decode_pixels
from tokenlabel.data.images import ImageFolder
from tokenlabel.data.listings import Strings
from tokenlabel.data.samplers import BatchSampler, EvalBatchSampler, shard_order
from tokenlabel.data.sources import open_images
from tokenlabel.data.workers import process_context
from tokenlabel.runtime.errors import DataError, ImageError

SIZE_PX = (6, 8)  # height, width


def encoded(pixels, image_format="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format, **options)
    return buffer.getvalue()


def noise(seed, shape=(*SIZE_PX, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@dataclass
class ImagesInMemory:
    """Ten images of two classes."""

    data: list[bytes] = field(default_factory=lambda: [encoded(noise(i)) for i in range(10)])
    class_names: list[str] = field(default_factory=lambda: ["cat", "dog"])

    @property
    def keys(self):
        return [f"{self.class_names[i % 2]}/{i}.png" for i in range(len(self.data))]

    @property
    def class_ids(self):
        return np.arange(len(self.data)) % 2

    def read(self, index):
        return self.data[index]

    def __len__(self):
        return len(self.data)


class LabelsInMemory(dict):
    """A label store with a score map for each key."""

    def __init__(self, keys, *, class_names=("cat", "dog"), num_classes=2):
        maps = {key: from_mask(np.full((2, 3), i % 2), num_classes=2) for i, key in enumerate(keys)}
        super().__init__(maps)
        self.manifest = SimpleNamespace(num_classes=num_classes, class_names=class_names)


def random_shade(image, rng):
    """Darken by a random amount: a transform whose pixels and view tell which random numbers it got."""
    pixels = np.asarray(image) // rng.integers(1, 9, dtype=np.uint8)
    return pixels, View.crop(Box(right=rng.uniform(0.1, 1)))


def dataset(seed=0, store=None):
    return TokenLabelDataset(ImagesInMemory(), random_shade, seed=seed, store=store)


def write(path, data=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(noise(0)) if data is None else data)


class TestImageFolder:
    def test_the_class_is_the_first_folder_and_the_key_the_whole_path(self, tmp_path):
        for path in ("dog/b.png", "cat/2020/may/x.JPEG", "cat/a.jpg", "cat/a.notes.txt", "ant/1.GIF"):
            write(tmp_path / path)
        source = open_images(tmp_path)
        assert source.class_names == ["ant", "cat", "dog"]
        assert list(source.keys) == ["ant/1.GIF", "cat/2020/may/x.JPEG", "cat/a.jpg", "dog/b.png"]
        assert source.class_ids.tolist() == [0, 1, 1, 2]
        assert source.read(3) == (tmp_path / "dog/b.png").read_bytes()

    def test_names_that_differ_only_after_their_first_dot_are_two_images(self, tmp_path):
        write(tmp_path / "cat/a.b.jpg")
        write(tmp_path / "cat/a.c.jpg")
        write(tmp_path / "cat/a.b.png")
        assert list(open_images(str(tmp_path)).keys) == ["cat/a.b.jpg", "cat/a.b.png", "cat/a.c.jpg"]

    def test_hidden_files_are_skipped_and_links_followed(self, tmp_path):
        write(tmp_path / "elsewhere/cat/a.png")
        write(tmp_path / "root/dog/._b.png")
        write(tmp_path / "root/dog/b.png")
        write(tmp_path / "root/.cache/c.png")
        (tmp_path / "root/cat").symlink_to(tmp_path / "elsewhere/cat")
        assert list(open_images(tmp_path / "root").keys) == ["cat/a.png", "dog/b.png"]

    def test_a_missing_folder_is_an_error_that_names_it(self, tmp_path):
        with pytest.raises(DataError, match="nowhere: no such folder"):
            ImageFolder(tmp_path / "nowhere")

    def test_an_empty_folder_is_an_error(self, tmp_path):
        with pytest.raises(DataError, match="expected one folder a class"):
            ImageFolder(tmp_path)

    def test_images_outside_of_class_folders_are_an_error_that_names_some(self, tmp_path):
        for path in ("cat/a.png", "b.png", "c.png", "d.png", "e.png"):
            write(tmp_path / path)
        with pytest.raises(DataError, match=r"4 images \(b.png, c.png, d.png, \.\.\.\) outside"):
            ImageFolder(tmp_path)

    def test_a_class_folder_without_images_is_an_error_that_names_it(self, tmp_path):
        write(tmp_path / "cat/a.png")
        write(tmp_path / "dog/words.txt")
        with pytest.raises(DataError, match=r"1 class folder \(dog\) without images"):
            ImageFolder(tmp_path)

    def test_a_file_that_vanished_is_an_error_that_names_it(self, tmp_path):
        write(tmp_path / "cat/a.png")
        source = ImageFolder(tmp_path)
        (tmp_path / "cat/a.png").unlink()
        with pytest.raises(ImageError, match=r"cat/a\.png: cannot be read"):
            source.read(0)

    def test_a_million_images_pickle_as_text(self):
        keys = [f"n{i % 1000:08d}/n{i:016d}.JPEG" for i in range(5000)]
        strings = Strings(keys)
        assert len(pickle.dumps(strings)) < sum(map(len, keys)) + 9 * len(keys)
        assert list(pickle.loads(pickle.dumps(strings))) == keys


@given(st.lists(st.text(), max_size=8), st.integers(-9, 9), st.integers(-9, 9))
def test_strings_are_a_sequence_like_a_list(texts, start, stop):
    strings = Strings(texts)
    assert list(strings) == texts
    assert strings[start:stop] == texts[start:stop]
    assert [strings[i] for i in range(-len(texts), len(texts))] == texts * 2
    with pytest.raises(IndexError):
        strings[len(texts)]


class TestDecode:
    def test_a_png_decodes_to_its_pixels(self):
        np.testing.assert_array_equal(np.asarray(decode_image(encoded(noise(1)), "a.png")), noise(1))

    def test_greys_palettes_and_transparency_become_rgb(self):
        grey = noise(2, SIZE_PX)
        deep = (grey.astype(np.uint16) << 8) + 77
        with_alpha = np.dstack([noise(1), noise(3, SIZE_PX)])
        palette = io.BytesIO()
        Image.fromarray(noise(1)).quantize(8).save(palette, "PNG", transparency=bytes(range(8)))
        expected = np.repeat(grey[..., None], 3, axis=2)
        np.testing.assert_array_equal(np.asarray(decode_image(encoded(grey), "grey")), expected)
        np.testing.assert_array_equal(np.asarray(decode_image(encoded(deep), "16 bit")), expected)
        np.testing.assert_array_equal(np.asarray(decode_image(encoded(with_alpha), "alpha")), noise(1))
        assert decode_image(palette.getvalue(), "palette").mode == "RGB"

    def test_wide_greys_keep_their_upper_byte_and_pixels_of_32_bits_are_refused(self):
        grey = noise(2, SIZE_PX)
        wide = (grey.astype(np.uint16) << 8) + 77
        expected = np.repeat(grey[..., None], 3, axis=2)
        pgm = b"P5 8 6 65535\n" + wide.astype(">u2").tobytes()
        for data in (pgm, encoded(wide, "TIFF")):
            np.testing.assert_array_equal(decode_pixels(data, "16 bit"), expected)
        for pixels in (grey.astype(np.float32) / 255, grey.astype(np.int32)):
            with pytest.raises(ImageError, match=r"a\.tif: does not decode .* have 32 bits"):
                decode_pixels(encoded(pixels, "TIFF"), "a.tif")

    @pytest.mark.parametrize("image_format", ["GIF", "WEBP"])
    def test_the_first_picture_of_an_animation_counts(self, image_format):
        few_colours = noise(1) // 64 * 64
        pictures = [Image.fromarray(few_colours), Image.fromarray(255 - few_colours)]
        buffer = io.BytesIO()
        pictures[0].save(buffer, image_format, save_all=True, append_images=pictures[1:], lossless=True)
        np.testing.assert_array_equal(decode_pixels(buffer.getvalue(), "a.gif"), few_colours)

    @pytest.mark.parametrize("data", [b"", b"not an image", encoded(noise(0))[:60], encoded(noise(0), "JPEG")[:-40]])
    def test_broken_data_is_an_error_that_names_the_image(self, data):
        with pytest.raises(ImageError, match=r"cat/7\.png: does not decode"):
            decode_image(data, "cat/7.png")


class TestDecodePixels:
    PHOTO = np.asarray(Image.fromarray(noise(4, (5, 7, 3))).resize((37, 29), Image.Resampling.BICUBIC))

    @pytest.mark.parametrize("fast", [True, False], ids=["simplejpeg", "Pillow alone"])
    @pytest.mark.parametrize("kind", ["jpeg", "grey jpeg", "cmyk jpeg", "png"])
    def test_the_pixels_are_those_of_decode_image(self, kind, fast, monkeypatch):
        if not fast:
            monkeypatch.setattr(decoding, "simplejpeg", None)
        buffer = io.BytesIO()
        mode, image_format = {"grey jpeg": ("L", "JPEG"), "cmyk jpeg": ("CMYK", "JPEG"), "png": ("RGB", "PNG")}.get(
            kind, ("RGB", "JPEG")
        )
        Image.fromarray(self.PHOTO).convert(mode).save(buffer, image_format)
        pixels = decode_pixels(buffer.getvalue(), "a.jpg")
        expected = np.asarray(decode_image(buffer.getvalue(), "a.jpg"))
        assert np.abs(pixels.astype(int) - expected).max() <= 1
        assert pixels.flags.writeable

    @pytest.mark.parametrize("fast", [True, False], ids=["simplejpeg", "Pillow alone"])
    def test_an_image_that_would_fill_the_memory_is_not_decoded(self, fast, monkeypatch):
        if not fast:
            monkeypatch.setattr(decoding, "simplejpeg", None)
        photo = encoded(self.PHOTO, "JPEG")
        size = photo.index(b"\xff\xc0") + 5  # height and width in the header of the frame
        with pytest.raises(ImageError, match=r"a\.jpg: .*4290250000 pixels"):
            decode_pixels(photo[:size] + struct.pack(">HH", 65500, 65500) + photo[size + 4 :], "a.jpg")

    @pytest.mark.parametrize("data", [b"", encoded(PHOTO, "JPEG")[:-100], b"\xff\xd8\xff nonsense"])
    def test_broken_data_is_an_error_that_names_the_image(self, data):
        with pytest.raises(ImageError, match=r"cat/7\.jpg: does not decode"):
            decode_pixels(data, "cat/7.jpg")


class TestCheckImages:
    BROKEN = (b"", b"words", encoded(noise(0))[:90], encoded(noise(0), "JPEG")[:-20])

    def source(self):
        source = ImagesInMemory()
        source.data[2:6] = self.BROKEN
        return source

    @pytest.mark.parametrize("check", [ImageCheck.AUTO, ImageCheck.DECODE, ImageCheck.ENDS])
    def test_broken_images_are_counted_and_named(self, check):
        with pytest.raises(DataError, match=r"4 images \(cat/2.png, dog/3.png, cat/4.png, \.\.\.\).*of 10"):
            check_images(self.source(), check=check)

    @pytest.mark.parametrize("check", [ImageCheck.AUTO, ImageCheck.DECODE, ImageCheck.ENDS])
    def test_broken_images_are_left_out_when_told_to(self, check):
        kept = check_images(self.source(), skip_broken=True, check=check)
        assert list(kept.keys) == [f"{'cat' if i % 2 == 0 else 'dog'}/{i}.png" for i in (0, 1, 6, 7, 8, 9)]
        assert kept.class_ids.tolist() == [0, 1, 0, 1, 0, 1]
        assert kept.class_names == ["cat", "dog"]
        assert kept.read(2) == ImagesInMemory().read(6)

    def test_sound_images_are_the_source_itself(self):
        source = ImagesInMemory()
        assert check_images(source) is source
        source.data[0] = encoded(noise(0), "JPEG") + b"trailing bytes"
        source.data[1] = encoded(noise(0), "BMP")
        assert check_images(source, check=ImageCheck.ENDS) is source

    def test_nothing_is_read_when_images_are_trusted(self):
        source = self.source()
        assert check_images(source, check=ImageCheck.NONE) is source

    def test_skipping_every_image_is_an_error(self):
        with pytest.raises(DataError, match="1 image "):
            check_images(ImagesInMemory(data=[b"words"]), skip_broken=True)


class TestCheckLabels:
    def test_labels_of_all_images_pass(self):
        source = ImagesInMemory()
        check_labels(source, LabelsInMemory(source.keys))
        check_labels(source, LabelsInMemory(source.keys, class_names=None))

    def test_images_without_label_are_counted_and_named(self):
        source = ImagesInMemory()
        with pytest.raises(DataError, match=r"8 of 10 images .*cat/2.png, dog/3.png, cat/4.png, \.\.\."):
            check_labels(source, LabelsInMemory(source.keys[:2]))

    def test_another_number_of_classes_is_an_error(self):
        source = ImagesInMemory()
        with pytest.raises(DataError, match="1,000 classes, the images have 2"):
            check_labels(source, LabelsInMemory(source.keys, num_classes=1000))

    def test_other_class_names_are_an_error(self):
        source = ImagesInMemory()
        with pytest.raises(DataError, match="class 1 is 'cow' to the labels and 'dog' to the images"):
            check_labels(source, LabelsInMemory(source.keys, class_names=("cat", "cow")))


class TestDataset:
    def test_a_sample_has_everything_that_its_tokens_labels_need(self):
        source = ImagesInMemory()
        store = LabelsInMemory(source.keys)
        sample = dataset(store=store)[0, 3]
        assert (sample.key, sample.class_id, sample.num_classes) == ("dog/3.png", 1, 2)
        assert sample.score_map is store["dog/3.png"]
        assert sample.image.shape == (3, *SIZE_PX)

    def test_it_says_what_tokens_learn_and_refuses_the_same_classes_in_another_order(self):
        keys = ImagesInMemory().keys
        assert dataset(store=LabelsInMemory(keys)).num_token_classes == 2
        others = LabelsInMemory(keys, class_names=("ant", "bee", "fly"), num_classes=3)
        assert (dataset(store=others).num_classes, dataset(store=others).num_token_classes) == (2, 3)
        with pytest.raises(DataError, match="dog"):
            dataset(store=LabelsInMemory(keys, class_names=("dog", "cat")))

    def test_a_sample_is_a_function_of_seed_epoch_and_index(self):
        def right(seed, epoch, index):
            return dataset(seed)[epoch, index].view.matrix[0, 0]

        assert right(0, 4, 3) == right(0, 4, 3)
        others = [right(1, 4, 3), right(0, 5, 3), right(0, 4, 2), right(4, 0, 3), right(0, 3, 4)]
        assert len({right(0, 4, 3), *others}) == 6

    def test_a_broken_image_is_an_error_that_names_it(self):
        source = ImagesInMemory()
        source.data[4] = b"words"
        broken = TokenLabelDataset(source, random_shade, seed=0)
        with pytest.raises(ImageError, match=r"cat/4\.png"):
            broken[0, 4]

    def test_a_batch_reads_its_images_then_its_labels_and_its_samples_are_the_same_one_by_one(self):
        reads, source = [], ImagesInMemory()

        class Labels(LabelsInMemory):
            def __getitem__(self, key):
                reads.append(key)
                return super().__getitem__(key)

        def transform(image, rng):
            reads.append("image")
            return random_shade(image, rng)

        noted = TokenLabelDataset(source, transform, seed=0, store=Labels(source.keys))
        together = noted.__getitems__([(3, 1), (4, 0)])
        assert reads == ["image", "image", source.keys[1], source.keys[0]]
        for sample, alone in zip(together, (noted[3, 1], noted[4, 0]), strict=True):
            assert torch.equal(sample.image, alone.image)
            assert np.array_equal(sample.view.frames, alone.view.frames)
            assert sample.score_map is alone.score_map
            assert (sample.key, sample.class_id) == (alone.key, alone.class_id)


class TestCollate:
    def test_a_batch_stacks_its_samples(self):
        data = dataset(store=LabelsInMemory(ImagesInMemory().keys))
        samples = [data[0, i] for i in (1, 5, 2)]
        batch = collate(samples)
        assert batch.images.shape == (3, 3, *SIZE_PX)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        for i, sample in enumerate(samples):
            assert torch.equal(batch.images[i], sample.image)
            np.testing.assert_allclose(batch.views[i], sample.view.frames, atol=1e-7)
        assert batch.class_ids.tolist() == [1, 1, 0]
        assert batch.keys == ["dog/1.png", "dog/5.png", "cat/2.png"]
        assert batch.num_classes == 2
        assert batch.score_maps is not None
        assert batch.score_maps.num_classes == 2

    def test_class_targets_of_images_without_a_class_have_weight_0(self):
        batch = collate([replace(dataset()[0, i], has_class=i != 1) for i in range(3)])
        assert batch.class_targets().dense()[:, 0].tolist() == [[1, 0], [0, 0], [1, 0]]
        assert batch.class_targets().weight.flatten().tolist() == [1, 0, 1]
        assert replace(batch, num_classes=0).class_targets().weight.flatten().tolist() == [1, 0, 1]

    def test_without_a_store_there_are_no_score_maps(self):
        assert collate([dataset()[0, 0]]).score_maps is None

    def test_a_batch_of_which_only_some_have_score_maps_is_refused(self):
        store = LabelsInMemory(ImagesInMemory().keys)
        with pytest.raises(DataError, match="1 of the 2 samples"):
            collate([dataset(store=store)[0, 0], dataset()[0, 1]])

    def test_moving_a_batch_keeps_everything(self):
        batch = collate([dataset(store=LabelsInMemory(ImagesInMemory().keys))[0, i] for i in range(3)])
        moved = batch.to(torch.device("cpu"))
        assert torch.equal(moved.images, batch.images)
        assert torch.equal(moved.views, batch.views)
        assert (moved.keys, moved.num_classes) == (batch.keys, batch.num_classes)

    @pytest.mark.parametrize("labelled", [True, False])
    def test_sending_a_batch_keeps_everything(self, labelled):
        store = LabelsInMemory(ImagesInMemory().keys) if labelled else None
        batch = collate([dataset(store=store)[0, i] for i in range(3)])
        sent = pickle.loads(pickle.dumps(batch))
        assert (sent.keys, sent.num_classes) == (batch.keys, batch.num_classes)
        assert sent.images.is_contiguous(memory_format=torch.channels_last)
        for name in ("images", "class_ids", "views"):
            assert torch.equal(getattr(sent, name), getattr(batch, name))
        assert (sent.score_maps is not None) == labelled
        if batch.score_maps is not None:
            for name in ("classes", "codes", "probs", "sizes", "regions"):
                assert torch.equal(getattr(sent.score_maps, name), getattr(batch.score_maps, name))
            assert sent.score_maps.num_classes == batch.score_maps.num_classes
            assert sent.score_maps.kind is batch.score_maps.kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalised_images_equal_the_formula(dtype):
    batch = torch.from_numpy(noise(0, (2, *SIZE_PX, 3))).permute(0, 3, 1, 2)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    result = normalize_images(batch, mean=mean, std=std, dtype=dtype)
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    expected = np.empty(batch.shape)
    for b, c, y, x in np.ndindex(*batch.shape):
        expected[b, c, y, x] = (batch[b, c, y, x].item() / 255 - mean[c]) / std[c]
    np.testing.assert_allclose(result.float(), expected, atol=1e-5 if dtype == torch.float32 else 0.02)


def steps(num_images, batch_size, num_steps, **options):
    return list(BatchSampler(num_images=num_images, batch_size=batch_size, num_steps=num_steps, **options))


SIZES = {"num_images": st.integers(1, 30), "batch_size": st.integers(1, 40), "seed": st.integers(0, 5)}


class TestBatchSampler:
    @given(**SIZES)
    def test_an_epoch_shows_no_image_twice_and_drops_only_what_fills_no_batch(self, num_images, batch_size, seed):
        sampler = BatchSampler(num_images=num_images, batch_size=batch_size, seed=seed, num_steps=20)
        shown = [pair for batch in sampler for pair in batch]
        assert len(set(shown)) == len(shown) == 20 * batch_size
        assert all(0 <= index < num_images for _, index in shown)
        in_epoch_0 = sum(epoch == 0 for epoch, _ in shown)
        if batch_size <= num_images:
            whole = num_images - num_images % batch_size
            assert in_epoch_0 == min(whole, len(shown))
            assert all(len({epoch for epoch, _ in batch}) == 1 for batch in sampler)
        else:  # small data: permutations follow on each other without a gap
            assert in_epoch_0 == num_images
            times_shown = np.bincount([index for _, index in shown], minlength=num_images)
            assert times_shown.max() - times_shown.min() <= 1

    @given(**SIZES, start_step=st.integers(0, 25))
    def test_a_resumed_run_sees_what_the_unbroken_one_would(self, num_images, batch_size, seed, start_step):
        unbroken = steps(num_images, batch_size, 20, seed=seed)
        resumed = steps(num_images, batch_size, 20, seed=seed, start_step=start_step)
        assert resumed == unbroken[start_step:]

    @given(num_images=st.integers(1, 30), share=st.integers(1, 8), world_size=st.integers(1, 4))
    def test_the_ranks_side_by_side_are_the_batch_of_one(self, num_images, share, world_size):
        batch_size = share * world_size
        alone = steps(num_images, batch_size, 9, seed=3)
        ranks = [
            steps(num_images, batch_size, 9, seed=3, rank=rank, world_size=world_size) for rank in range(world_size)
        ]
        assert [[*chain(*parts)] for parts in zip(*ranks, strict=True)] == alone

    def test_epochs_and_seeds_have_orders_of_their_own(self):
        epochs = [tuple(index for _, index in batch) for batch in steps(20, 20, 4, seed=0)]
        assert len({*epochs, tuple(index for _, index in steps(20, 20, 1, seed=1)[0])}) == 5

    def test_its_length_is_what_it_yields(self):
        sampler = BatchSampler(num_images=10, batch_size=4, seed=0, start_step=3, num_steps=8)
        assert len(sampler) == len(list(sampler)) == 5
        assert len(BatchSampler(num_images=10, batch_size=4, seed=0, start_step=9, num_steps=8)) == 0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_size": 6, "world_size": 4}, "6 images does not divide among 4 processes"),
            ({"num_images": 0}, "num_images must be at least 1"),
            ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ],
    )
    def test_impossible_sizes_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            BatchSampler(**{"num_images": 10, "batch_size": 4, "seed": 0, "num_steps": 1, **options})


class TestShardOrder:
    @given(
        groups=st.lists(st.integers(0, 5), max_size=40),
        window=st.integers(1, 8),
        seed=st.integers(0, 9),
        epoch=st.integers(0, 9),
    )
    def test_it_is_a_permutation_and_a_function_of_its_arguments(self, groups, window, seed, epoch):
        order = shard_order(np.array(groups, np.int64), seed=seed, epoch=epoch, window=window)
        assert sorted(order.tolist()) == list(range(len(groups)))
        again = shard_order(np.array(groups, np.int64), seed=seed, epoch=epoch, window=window)
        np.testing.assert_array_equal(order, again)

    @pytest.mark.parametrize("window", [1, 3, 10])
    def test_only_a_window_of_files_is_in_use_at_a_time_and_it_is_mixed(self, window):
        groups = np.repeat(np.arange(50), 40)  # 50 files of 40 images
        order = shard_order(groups, seed=0, epoch=0, window=window)
        stretches = groups[order].reshape(50, 40)
        in_use = [len(set(stretch)) for stretch in stretches.tolist()]
        assert max(in_use) <= window + 3
        assert np.median(in_use) >= window
        first = {group: int(np.flatnonzero(groups[order] == group)[0]) for group in range(50)}
        assert sorted(first, key=first.__getitem__) != list(range(50))  # files come in random order, too

    def test_a_window_of_all_files_mixes_everything(self):
        groups = np.repeat(np.arange(4), 2000)
        where = np.argsort(shard_order(groups, seed=0, epoch=0, window=9)) / 8000
        np.testing.assert_allclose(where.reshape(4, 2000).mean(axis=1), 0.5, atol=0.03)

    def test_epochs_and_seeds_have_orders_of_their_own(self):
        groups = np.repeat(np.arange(4), 9)
        orders = {tuple(shard_order(groups, seed=s, epoch=e, window=2)) for s in range(3) for e in range(3)}
        assert len(orders) == 9

    def test_a_window_of_nothing_is_refused(self):
        with pytest.raises(ValueError, match="window must be at least 1, got 0"):
            shard_order(np.zeros(3, np.int64), seed=0, epoch=0, window=0)


@given(num_images=st.integers(5, 40), batch_size=st.integers(2, 9), world_size=st.integers(1, 5))
def test_evaluation_shows_every_image_once_over_all_ranks_in_as_many_batches(num_images, batch_size, world_size):
    shown, num_batches = [], set()
    for rank in range(world_size):
        sampler = EvalBatchSampler(num_images=num_images, batch_size=batch_size, rank=rank, world_size=world_size)
        batches = list(sampler)
        assert len(sampler) == len(batches)
        assert all(1 <= len(batch) <= batch_size for batch in batches)
        num_batches.add(len(batches))
        shown += [pair for batch in batches for pair in batch]
    assert shown == [(0, index) for index in range(num_images)]
    assert len(num_batches) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 1, "world_size": 2}, "batch_size must be at least 2, got 1"),
        ({"num_images": 2, "world_size": 3}, "2 images don't give each of 3 processes one"),
    ],
)
def test_impossible_sizes_of_evaluation_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EvalBatchSampler(**{"num_images": 10, "batch_size": 4, **options})


@pytest.mark.parametrize("index", [10, -11, (0, 99)])
def test_an_index_beyond_the_images_says_how_many_there_are(index):
    with pytest.raises(IndexError, match="the data set has 10 images"):
        dataset()[index]
    assert sum(1 for _ in dataset()) == 10  # as Python's own loops end


class TestLoader:
    def sampler(self, start_step=0):
        return BatchSampler(num_images=10, batch_size=4, seed=1, num_steps=5, start_step=start_step)

    def test_batches_are_the_same_whatever_the_number_of_workers(self):
        data = dataset(seed=1, store=LabelsInMemory(ImagesInMemory().keys))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            alone = list(make_loader(data, self.sampler(), num_workers=0))
            several = list(make_loader(data, self.sampler(), num_workers=2, prefetch=1))
        assert len(alone) == len(several) == 5
        for ours, theirs in zip(alone, several, strict=True):
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.views, theirs.views)
            assert torch.equal(ours.score_maps.probs, theirs.score_maps.probs)
            assert ours.keys == theirs.keys

    def test_batches_stay_as_they_are_while_workers_go_on(self):
        data = dataset(seed=1)
        sampler = BatchSampler(num_images=10, batch_size=4, seed=1, num_steps=20)
        alone = list(make_loader(data, sampler, num_workers=0))
        loader = make_loader(data, sampler, num_workers=2, prefetch=1)
        begun = [batch for batch, _ in zip(loader, range(3), strict=False)]  # left, and begun again
        for kept in (begun, list(loader)):
            for ours, theirs in zip(alone, kept, strict=False):
                assert torch.equal(ours.images, theirs.images)
                assert theirs.images.is_contiguous(memory_format=torch.channels_last)
        assert len(begun) == 3

    def test_workers_of_a_plain_loader_hear_of_each_epoch(self):
        images = dataset(seed=1)
        loader = DataLoader(
            images, batch_size=5, num_workers=1, persistent_workers=True, multiprocessing_context=process_context()
        )
        for epoch in (0, 2, 0):
            images.set_epoch(epoch)
            shown = torch.cat([batch.images for batch in loader])
            assert torch.equal(shown, torch.stack([images[epoch, i].image for i in range(10)]))

    def test_a_copy_has_an_epoch_of_its_own_that_workers_share(self):
        images = dataset()
        images.set_epoch(3)
        copies = (copy.deepcopy(images), pickle.loads(pickle.dumps(images)))
        images.set_epoch(1)
        for other in copies:
            assert other._clock.is_shared()
            assert torch.equal(other[4].image, images[3, 4].image)

    def test_it_leaves_the_global_random_state_alone(self):
        before = torch.get_rng_state()
        next(iter(make_loader(dataset(), self.sampler(), num_workers=0)))
        assert torch.equal(torch.get_rng_state(), before)

    def test_impossible_numbers_are_refused(self):
        with pytest.raises(ValueError, match="num_workers must be at least 0"):
            make_loader(dataset(), self.sampler(), num_workers=-1)

    @pytest.mark.parametrize(("ending", "status"), [("raise SystemExit(3)", 3), ("os.kill(os.getpid(), 9)", -9)])
    def test_workers_end_with_the_main_process_however_it_ends(self, ending, status):
        script = f"""if __name__ == "__main__":
            import multiprocessing, os, sys
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            from test_data import BatchSampler, dataset, make_loader
            sampler = BatchSampler(num_images=10, batch_size=4, seed=1, num_steps=99)
            batches = iter(make_loader(dataset(), sampler, num_workers=1))
            next(batches)
            print(multiprocessing.active_children()[0].pid, flush=True)
            {ending}"""
        main_process = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, timeout=60, check=False)
        assert main_process.returncode == status
        worker = int(main_process.stdout)
        deadline = time.monotonic() + 20
        while _runs(worker) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _runs(worker)


def _runs(process_id):
    try:
        os.kill(process_id, 0)
        return "State:\tZ" not in Path(f"/proc/{process_id}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False
