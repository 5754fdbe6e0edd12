"""Masks as people have them: which values are which classes, which files are masks, and what nothing teaches."""

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from annotation_ranks import CPU
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from segment_cases import BACKBONE, write_image

from tokenlabel.cli import main
from tokenlabel.data.masks import decode_mask
from tokenlabel.data.sources import open_images
from tokenlabel.evaluation.masks import MaskFolder
from tokenlabel.labels.store import LabelStore
from tokenlabel.models import create_model
from tokenlabel.runtime.errors import DataError, ModelError
from tokenlabel.segmentation import pairs as pairs_module
from tokenlabel.segmentation.layouts import open_pairs
from tokenlabel.segmentation.pairs import IGNORED, ImageMaskPairs, numbered_classes
from tokenlabel.segmentation.recipe import Layout, SegmentDataConfig
from tokenlabel.teachers.annotation import annotate
from tokenlabel.teachers.options import AnnotateConfig
from tokenlabel.training.checkpoint import TrainState, save_checkpoint
from tokenlabel.training.recipe import DataConfig, ModelConfig, OptimConfig, Recipe


def write_mask(path: Path, values: Any, dtype: Any = np.uint8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype)).save(path)


def write_pairs(root: Path, *masks: Any, dtype: Any = np.uint8) -> None:
    """Write images and masks 0, 1, ... in root/images and root/masks, in folders of their own."""
    for number, values in enumerate(masks):
        write_image(root / f"images/{number}/a.jpg", np.shape(values))
        write_mask(root / f"masks/{number}/a.png", values, dtype)


def two_folders(root: Path, names: list[str], **changes: Any) -> ImageMaskPairs:
    folders = {"train": str(root / "images"), "masks": str(root / "masks")}
    config = SegmentDataConfig(layout=Layout.FOLDERS, class_names=tuple(names), **folders, **changes)
    pairs = open_pairs(config, "train")
    assert pairs is not None
    return pairs


class TestFiles:
    @pytest.mark.parametrize(
        ("array", "kind"),
        [
            (np.array([[0, 1]], np.uint8), "PNG"),
            (np.array([[False, True]]), "PNG"),
            (np.array([[0, 1]], np.uint16), "PNG"),
            (np.array([[0, 1]], np.int32), "TIFF"),
            (np.array([[0, 1]], np.float32), "TIFF"),
            (np.array([[0, 1]], np.uint8), "BMP"),
        ],
    )
    def test_whole_numbers_of_any_depth_are_read(self, array, kind):
        Image.fromarray(array).save(buffer := io.BytesIO(), kind)
        assert decode_mask(buffer.getvalue(), "mask").tolist() == [[0, 1]]

    @pytest.mark.parametrize(
        ("mode", "kind", "message"),
        [
            ("L", "JPEG", "is a JPEG, which rounds the numbers of classes; save masks as PNG"),
            ("RGB", "WEBP", "is a WEBP, which rounds the numbers of classes; save masks as PNG"),
            ("RGB", "PNG", r"has 3 channels; a mask has one channel .* turn its 1 colours \(RGB\) into numbers"),
            ("LA", "PNG", "has 2 channels"),
            ("F", "TIFF", "holds fractions"),
        ],
    )
    def test_what_holds_no_class_numbers_is_refused(self, mode, kind, message):
        Image.new(mode, (3, 2), 0.5 if mode == "F" else 1).save(buffer := io.BytesIO(), kind)
        with pytest.raises(DataError, match=f"m.png: {message}"):
            decode_mask(buffer.getvalue(), "m.png")

    @settings(max_examples=60, deadline=None)
    @given(most=st.integers(1, 65_535), is_plain=st.booleans(), seed=st.integers(0, 99))
    def test_a_pgm_holds_the_numbers_that_stand_in_it(self, most, is_plain, seed):
        values = np.random.default_rng(seed).integers(0, most + 1, (3, 5))
        data = f"P{2 if is_plain else 5}\n5 3\n{most}\n".encode()
        kind = np.uint8 if most < 256 else ">u2"
        data += " ".join(map(str, values.ravel())).encode() if is_plain else values.astype(kind).tobytes()
        assert decode_mask(data, "0.pgm").tolist() == values.tolist()

    @pytest.mark.parametrize("bits", [1, 2, 4, 8])
    def test_a_grey_png_holds_the_numbers_that_stand_in_it(self, bits):
        values = np.arange(48).reshape(6, 8) % 2**bits

        def chunk(name: bytes, content: bytes) -> bytes:
            return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

        rows = b"".join(
            b"\0" + int("".join(f"{value:0{bits}b}" for value in row), 2).to_bytes(bits) for row in values.tolist()
        )
        header = struct.pack(">IIBBBBB", 8, 6, bits, 0, 0, 0, 0)
        chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        assert decode_mask(b"\x89PNG\r\n\x1a\n" + chunks, "0.png").tolist() == values.tolist()

    def test_a_mask_with_a_tag_of_its_own_is_turned_as_images_are(self):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(np.array([[0, 1, 2]], np.uint8)).save(buffer := io.BytesIO(), "PNG", exif=exif)
        assert decode_mask(buffer.getvalue(), "mask").tolist() == [[0], [1], [2]]

    def test_masks_are_found_by_the_name_of_their_image(self, tmp_path, capsys):
        for name in (
            "a.jpg",
            "b.jpg",
            "c.jpg",
            "d.jpg",
            "deep/e.f.jpg",
            "deep/h.jpg",
            "twice.jpg",
            "twice.webp",
            "._a.jpg",
        ):
            write_image(tmp_path / "images" / name, (2, 2))
        for name in ("@eaDir/a.jpg", "__MACOSX/a.png", ".trash/a.png"):
            write_image(tmp_path / "images" / name, (2, 2))
        names = ["a.png", "b.PNG", "c.tif", "d.jpg.png", "deep/e.f.png", "deep/h_mask.png"]
        names += ["twice.png", "old/g.png", "._a.png"]
        for name in names:
            write_mask(tmp_path / "masks" / name, [[0, 1], [1, 0]])
        (tmp_path / "masks/deep").rename(tmp_path / "elsewhere")
        (tmp_path / "masks/deep").symlink_to("../elsewhere")
        pairs = two_folders(tmp_path, ["road", "tree"])
        assert list(pairs.mask_names) == [*names[:6], "twice.png", "twice.png"]
        said = capsys.readouterr().err
        assert "several images have the same mask, and count each: twice.png" in said
        assert "masks: 1 masks belong to no image and are skipped (old/g.png)" in said
        pairs.check()
        for name in ("c.jpg", "d.jpg", "deep/e.f.jpg", "deep/h.jpg"):
            assert MaskFolder(tmp_path / "masks", num_classes=2)[name].codes.shape == (2, 2, 1)

    def test_masks_beside_their_images(self, tmp_path, capsys):
        for number in range(2):
            write_image(tmp_path / f"both/{number}.jpg", (2, 2))
            write_mask(tmp_path / f"both/{number}_seg.png", [[0, 1], [1, 0]])
        config = SegmentDataConfig(
            layout=Layout.FOLDERS,
            train=str(tmp_path / "both"),
            masks=str(tmp_path / "both"),
            class_names=("road", "tree"),
        )
        pairs = open_pairs(config, "train")
        assert pairs is not None
        assert list(zip(pairs.keys, pairs.mask_names, strict=True)) == [("0.jpg", "0_seg.png"), ("1.jpg", "1_seg.png")]
        assert "belong to no image" not in capsys.readouterr().err

    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
    def test_equal_channels_are_those_of_a_grey_mask(self, mode):
        grey = Image.fromarray(np.array([[0, 1, 255]], np.uint8))
        grey.convert(mode).save(buffer := io.BytesIO(), "PNG")
        assert decode_mask(buffer.getvalue(), "mask").tolist() == [[0, 1, 255]]

    def test_what_does_not_fit_is_counted(self, tmp_path):
        write_pairs(tmp_path, *[[[0, 1]]] * 5)
        for number in range(1, 5):
            write_mask(tmp_path / f"masks/{number}/a.png", [[0, 1, 0]])
        message = r"1/a.png: has 1 x 3 .*, its image .* 1 x 2; .* \(and 3 more of 5 pairs: 2/a.jpg, 3/a.jpg, 4/a.jpg\)"
        with pytest.raises(DataError, match=message):
            two_folders(tmp_path, ["road", "tree"]).check()
        for number in range(4):
            (tmp_path / f"masks/{number}/a.png").rename(tmp_path / f"masks/{number}/a_other.png")
        message = r"4 of 5 images have no mask there \(0/a.jpg, .*, \.\.\.\); expected 0/a.png .*, found 0/a_other"
        with pytest.raises(DataError, match=message):
            two_folders(tmp_path, ["road", "tree"])

    def test_photographs_that_a_tag_turns_have_upright_masks(self, tmp_path, capsys):
        exif = Image.Exif()
        exif[0x0112] = 6
        (tmp_path / "images").mkdir()
        stored = np.repeat(np.arange(8, dtype=np.uint8)[None], 4, axis=0) * 30  # 4 x 8, darker to the left
        Image.fromarray(stored).save(tmp_path / "images/a.png", exif=exif)
        write_mask(tmp_path / "masks/a.png", (np.arange(8)[:, None] > 3).repeat(4, axis=1))
        pairs = two_folders(tmp_path, ["dark", "light"])
        pairs.check()
        assert "tag turns 1 of 1 checked images; their masks are assumed to be upright" in capsys.readouterr().err
        pixels, ids = pairs.read(0)
        assert ((pixels[..., 0] > 100) == ids).all()
        write_mask(tmp_path / "masks/a.png", np.arange(8)[None].repeat(4, axis=0) > 3)
        with pytest.raises(DataError, match=r"a\.png stores its pixels \(4 x 8.* turned to 8 x 4 by .*EXIF 6"):
            pairs.check()

    def test_palettes_that_differ_are_said(self, tmp_path, capsys):
        write_pairs(tmp_path, [[0, 1]], [[0, 1]])
        for number, red in enumerate((200, 100)):
            image = Image.fromarray(np.array([[0, 1]], np.uint8))
            image.putpalette([0, 0, 0, red, 0, 0])
            image.save(tmp_path / f"masks/{number}/a.png")
        two_folders(tmp_path, ["road", "tree"]).check()
        assert "1 is #c80000 in 0/a.png and #640000 in 1/a.png" in capsys.readouterr().err


class TestValues:
    @pytest.mark.parametrize(
        ("values", "names", "message", "mended"),
        [
            ([0, 255], ["cat", "dog"], "hold 0, 255 alone, of which 255 does not count: only 'cat' would be learnt",
             {"class_values": (0, 255)}),
            ([0, 128, 255], ["a", "b", "c"], "the value 128, which is no class; 3 classes have the values 0-2, 255",
             {"class_values": (0, 128, 255)}),
            ([1, 2], ["a", "b"], "holds the value 2, which is no class", {"class_values": (1, 2)}),
            ([0, 1, 2], ["a", "b"], "holds the value 2, which is no class",
             {"class_values": (1, 2), "ignore_index": 0}),
            ([0, 1, 2, 255], ["a", "b"], "holds the value 2, which is no class",
             {"class_values": (1, 2), "ignore_index": (0, 255)}),
            ([0, 1, 65535], ["a", "b"], "holds the value 65535, which is no class; 2 classes have the values 0-1, 255; "
             "if 65535 is none, set --data.ignore-index 65535", {"ignore_index": 65535}),
            ([0, 5000], ["a", "b"], "holds the value 5000, which is no class", {"class_values": (0, 5000)}),
        ],
    )  # fmt: skip
    def test_values_that_mean_something_else_are_refused_with_what_to_say(
        self, values, names, message, mended, tmp_path, monkeypatch, capsys
    ):
        monkeypatch.chdir(tmp_path)
        write_pairs(tmp_path, [values], [values], dtype=np.uint16)
        recipe = ["segment", "train", "--recipe", "segment_ade20k_lvvit_s", "--out", "run"]
        on_cpu = ["--device", "cpu", "--sync-batchnorm", "false"]
        folders = ["--data.train", "images", "--data.masks", "masks", "--data.layout", "folders"]
        words = [f"--data.{name}={str(value).replace(' ', '').replace('(', '[').replace(')', ']')}"
                 for name, value in mended.items()]  # fmt: skip
        assert main([*recipe, *on_cpu, *folders, f"--data.class_names=[{','.join(names)}]"]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert "2 masks" in said
        for word in words:
            assert word.replace("_", "-") in said.replace("--data.ignore-index ", "--data.ignore-index=")
        pairs = two_folders(tmp_path, names, **mended)
        capsys.readouterr()
        pairs.check()
        ids = [class_id for class_id in pairs.read(0)[1][0].tolist() if class_id != IGNORED]
        assert ids == list(range(len(names)))
        assert capsys.readouterr().err == ""

    def test_a_class_that_no_mask_holds_is_said(self, tmp_path, monkeypatch, capsys):
        write_pairs(tmp_path, *[[[0, 255]]] * 4)
        two_folders(tmp_path, ["road", "dog"], ignore_index=255).check()
        said = "masks: none of 4 masks holds 1 of 2 classes (dog); 50% of the pixels are 255 and do not count"
        assert said in capsys.readouterr().err
        two_folders(tmp_path, ["road", "dog"]).check(to_train=False)
        assert said in capsys.readouterr().err
        write_mask(tmp_path / "masks/0/a.png", [[2, 0]])
        two_folders(tmp_path, ["road", "dog", "tree"]).check()
        told = capsys.readouterr().err
        assert "holds 1 of 3 classes (dog)" in told
        assert "if these are the classes in order, set --data.class-values=[0,2,255]" in told
        monkeypatch.setattr(pairs_module, "DECODE_ALL_UP_TO", 2)
        monkeypatch.setattr(pairs_module, "_NUM_CHECKED", 3)
        two_folders(tmp_path, ["road", "dog", "tree"]).check()  # of many, some are looked at
        assert "none of 3 masks holds 1 of 3 classes (dog)" in capsys.readouterr().err

    def test_masks_without_any_class_are_refused(self, tmp_path):
        write_pairs(tmp_path, [[255, 255]])
        with pytest.raises(DataError, match="no pixel of 1 masks counts: all are 255"):
            two_folders(tmp_path, ["road"]).check(to_train=False)

    def test_settings_that_contradict_themselves_are_refused(self):
        contradictions: list[tuple[dict[str, Any], str]] = [
            ({"values": (0, 1, 2)}, "class_values holds 3 values of 2 classes"),
            ({"values": (1, 1)}, "expected different values"),
            ({"values": (0, 70_000)}, "from 0 to 65,535"),
            ({"ignored": (1,)}, "ignore_index 1 is the value of a class"),
            ({"values": (0, 255), "background": "sky"}, "expected different values"),
        ]
        for changes, message in contradictions:
            with pytest.raises(DataError, match=message):
                numbered_classes(["a", "b"], **changes)
        with pytest.raises(ValueError, match=r"data\.layout voc has its own values"):
            SegmentDataConfig(layout=Layout.VOC, root="x", ignore_index=3)


def test_figures_name_the_classes_that_no_mask_holds_and_predict_passes_over_leavings(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path, *[np.zeros((24, 24))] * 2)
    for name in ("._a.jpg", "@eaDir/a.jpg"):
        (tmp_path / "images/0" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "images/0" / name).write_bytes(b"left behind")
    folders = {"train": "images", "masks": "masks", "val": "images", "val_masks": "masks"}
    recipe = {
        "data": {"layout": "folders", "class_names": ["road", "dog"], "num_workers": 0, **folders},
        "model": {"name": "lvvit_t", "img_size": [24, 24], "options": BACKBONE, "head": "fcn", "neck_width": 16,
                  "head_width": 8},
        "optim": {"lr": 1e-3, "lr_batch_size": 2},
        "num_steps": 1,
        "batch_size": 2,
    }  # fmt: skip
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["segment", "train", "--recipe", "recipe.yaml", "--out", "run", "--device", "cpu"]) == 0
    told = capsys.readouterr()
    assert told.err.count("masks: none of 2 masks holds 1 of 2 classes (dog)") == 2
    assert json.loads(told.out.splitlines()[-1])["absent_classes"] == ["dog"]
    assert main(["segment", "eval", "run", "--device", "cpu", "--output", "run/eval.json"]) == 0
    assert "no mask holds 1 of 2 classes (dog): mIoU is the mean over " in capsys.readouterr().err
    assert main(["report", "run", "--output", "report.html"]) == 0
    assert "mIoU leaves out what no mask holds (dog)" in Path("report.html").read_text()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save("turned.jpg", exif=exif)
    assert main(["segment", "predict", "run", "turned.jpg", "--out", "told", "--device", "cpu"]) == 0
    with Image.open("told/masks/turned.png") as mask, Image.open("told/overlays/turned.png") as overlay:
        assert mask.size == overlay.size == (20, 30)
    for _ in range(2):  # what was written below the images is no image of theirs
        assert main(["segment", "predict", "run", "images", "--out", "images/told", "--device", "cpu"]) == 0
    assert sorted(
        path.relative_to("images/told/masks").as_posix() for path in Path("images/told/masks").rglob("*.png")
    ) == ["0/a.png", "1/a.png"]


class TestTeacherAndTruth:
    @pytest.fixture(autouse=True)
    def images(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for class_name in ("cat", "dog"):
            write_image(tmp_path / "images" / class_name / "1.jpg", (2, 2))

    def masks(self, cat: Any, dog: Any, dtype: Any = np.uint8) -> None:
        write_mask(Path("masks/cat/1.png"), cat, dtype)
        write_mask(Path("masks/dog/1.png"), dog, dtype)

    def test_masks_of_0_and_255_of_two_classes_are_refused(self, capsys):
        self.masks([[0, 255], [0, 0]], [[255, 0], [0, 0]])
        words = ["annotate", "images", "labels", "--teacher", "masks:masks", "--device", "cpu"]
        assert main(words) == 2
        message = "only 'cat' (0) would be seen, never dog; write class ids into the masks, or say --ignore-index 255"
        assert message in capsys.readouterr().err
        assert main([*words, "--ignore_index", "255"]) == 0
        assert "no mask holds 1 of 2 classes (dog)" in capsys.readouterr().err
        assert main(["inspect", "labels", "--images", "images", "--masks", "masks"]) == 2
        assert main(["inspect", "labels", "--images", "images", "--masks", "masks", "--ignore-index", "255"]) == 0

    def test_ids_of_no_class_are_refused_with_what_to_say(self, capsys):
        self.masks([[0, 7], [7, 0]], [[1, 1], [7, 1]])
        assert main(["annotate", "images", "labels", "--teacher", "masks:masks", "--device", "cpu"]) == 2
        said = capsys.readouterr().err
        assert "1.png: holds 7, which is no id of 2 classes (0 = cat to 1 = dog) nor of none (255)" in said
        assert "--ignore-index sets the id of none" in said

    def test_another_id_stands_for_nothing(self):
        self.masks([[0, 11], [11, 0]], [[1, 1], [11, 1]])
        annotate("images", "labels", AnnotateConfig(teacher="masks:masks", ignore_index=11), device=CPU)
        assert LabelStore("labels")["dog/1.jpg"].probs[..., 0].tolist() == [[1, 1], [0, 1]]
        with pytest.raises(ModelError, match="--ignore-index is for masks"):
            annotate("images", "other", AnnotateConfig(teacher="resnet18", ignore_index=11), device=CPU)
        with pytest.raises(ValueError, match="--ignore-index 1 is one of the 2 classes"):
            annotate("images", "other", AnnotateConfig(teacher="masks:masks", ignore_index=1), device=CPU)

    def test_masks_of_no_image_and_of_another_shape_are_named(self, capsys):
        self.masks([[0, 1, 0, 1]], [[1, 0], [0, 1]])
        write_mask(Path("masks/cat/2.png"), [[0]])
        annotate("images", "labels", AnnotateConfig(teacher="masks:masks"), device=CPU)
        said = capsys.readouterr().err
        assert "masks: 1 masks belong to no image and are skipped (cat/2.png)" in said
        assert "masks: 1 of 2 masks that were looked at have another aspect ratio than their image (cat/1.jpg)" in said

    def test_masks_need_classes_to_stand_for_of_the_images_or_listed_beside_them(self):
        Path("images/dog/1.jpg").rename("images/1.jpg")
        Path("images/cat/1.jpg").rename("images/2.jpg")
        Path("images/dog").rmdir()
        Path("images/cat").rmdir()
        write_mask(Path("masks/1.png"), [[0, 1], [1, 0]])
        with pytest.raises(ModelError, match="these images have none; list the classes of the masks in classes"):
            annotate("images", "labels", AnnotateConfig(teacher="masks:masks"), device=CPU)
        with pytest.raises(ValueError, match="nowhere: no such folder of masks"):
            annotate("images", "labels", AnnotateConfig(teacher="masks:nowhere"), device=CPU)
        Path("classes.txt").write_text("road\nsky\n")
        annotate("images", "labels", AnnotateConfig(teacher="masks:masks"), device=CPU)
        store = LabelStore("labels")
        assert store.manifest.class_names == ("road", "sky")
        assert store["1.jpg"].palette[store["1.jpg"].codes[..., 0]].tolist() == [[0, 1], [1, 0]]

    def test_more_than_255_classes(self, capsys):
        Path("many.txt").write_text("images/cat/1.jpg 255\nimages/dog/1.jpg 259\n")  # classes 0 to 259
        for name, number in (("cat", 255), ("dog", 259)):
            write_mask(Path("masks/images") / name / "1.png", [[number, 65535], [65535, 65535]], np.uint16)
        annotate("many.txt", "labels", AnnotateConfig(teacher="masks:masks"), device=CPU)
        score_map = LabelStore("labels")["images/cat/1.jpg"]
        assert (score_map.palette.tolist(), score_map.probs[..., 0].tolist()) == ([255], [[1, 0], [0, 0]])
        assert "no mask holds 258 of 260 classes (0, 1, 2, ...)" in capsys.readouterr().err
        source = open_images("many.txt")
        masks = MaskFolder(Path("masks"), num_classes=260, source=source)
        assert masks["images/dog/1.jpg"].palette.tolist() == [259]
        for name in ("cat", "dog"):
            write_mask(Path("masks/images") / name / "1.png", [[3, 255], [255, 3]])
        masks.check(source.class_names)
        assert "masks: 255 is the class '255' of 260, nothing is 65535" in capsys.readouterr().err

    def test_a_class_map_leads_from_ids_of_16_bits(self):
        self.masks([[30_000, 255], [7, 30_000]], [[40_000, 40_000], [0, 65_535]], np.uint16)
        Path("map.csv").write_text("30000,cat\n40000,dog\n")
        annotate("images", "labels", AnnotateConfig(teacher="masks:masks", class_map="map.csv"), device=CPU)
        assert LabelStore("labels")["cat/1.jpg"].probs[..., 0].tolist() == [[1, 0], [0, 1]]
        assert LabelStore("labels")["dog/1.jpg"].palette.tolist() == [1]
        for rule in ("names", "order"):
            with pytest.raises(ModelError, match=f"--class-map {rule}: masks hold ids, not names; give a file"):
                annotate("images", "more", AnnotateConfig(teacher="masks:masks", class_map=rule), device=CPU)

    def test_tokens_are_held_against_masks_of_any_id_for_nothing(self, capsys):
        recipe = Recipe(
            data=DataConfig(train="nowhere", val="images", labels="nowhere"),
            model=ModelConfig(name="test_resnet", img_size=(64, 64)),
            optim=OptimConfig(lr=0.1, lr_batch_size=1),
            epochs=1,
            batch_size=1,
        )
        model = create_model("test_resnet", num_classes=2, img_size=(64, 64))
        trained = TrainState(model, torch.optim.SGD(model.parameters()), None)
        save_checkpoint(Path("run"), 7, trained, recipe=recipe, class_names=["cat", "dog"])
        self.masks([[0, 9], [9, 0]], [[0, 9], [0, 0]])
        words = ["eval", "run", "--masks", "masks", "--device", "cpu", "--num-workers", "0"]
        assert main(words) == 2
        assert "1.png" in capsys.readouterr().err
        assert main([*words, "--ignore-index", "9"]) == 0
        told = capsys.readouterr()
        assert "token_miou" in told.out
        assert "no token shows 1 classes (dog): token_miou leaves them out" in told.err
        Path("masks/dog/1.png").unlink()
        assert main([*words, "--ignore-index", "9"]) == 2
        message = "masks: 1 of 2 images have no mask there (dog/1.jpg); expected dog/1.png for dog/1.jpg"
        assert message in capsys.readouterr().err
