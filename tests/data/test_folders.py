"""What ordinary folders, tar files and lists hold, as a user runs into it: relative paths, the command line."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokenlabel.cli import main
from tokenlabel.data.decoding import check_images
from tokenlabel.data.images import ImageSubset, describe
from tokenlabel.data.sources import open_aloud, open_images
from tokenlabel.data.tars import refuse_parts
from tokenlabel.runtime.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def png(seed=0):
    buffer = io.BytesIO()
    Image.fromarray(PIXELS + np.uint8(seed)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lay(*paths, data=None):
    """Write files, images unless something else is given."""
    for seed, path in enumerate(paths):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(png(seed) if data is None else data)


def pack(path, members):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def skipped(source):
    return getattr(source, "skipped", {})


def complaint(capsys, *arguments):
    assert main([*arguments]) == 2
    return capsys.readouterr().err


def train_complaint(capsys, images):
    return complaint(capsys, "train", "--recipe", "small_data", "--out", "run", "--data.train", images)


class TestTheLine:
    @pytest.fixture(autouse=True)
    def photos(self):
        lay(*(f"images/train/{name}/{i}.png" for name in ("ant", "bee") for i in range(4)))
        lay(*(f"images/train/ant/{i}.HEIC" for i in range(12)), data=b"ftypheic")
        lay("images/train/ant/.DS_Store", "images/train/bee/Thumbs.db", "images/train/bee/README", data=b"x")

    def test_verbs_say_what_they_opened_and_what_they_skipped(self, capsys):
        lay(*(f"masks/{name}/{i}.png" for name in ("ant", "bee") for i in range(4)), data=mask_png())
        line = (
            "images/train: 8 images of 2 classes (ant, bee); skipped 15 files: 12 .heic (not read: convert them), "
            "1 .db, 1 hidden, 1 without an extension\n"
        )
        for arguments, status in (
            (["annotate", "images/train", "labels", "--teacher", "masks:masks", "--device", "cpu"], 0),
            (["inspect", "labels", "--images", "images/train"], 0),
            (["import-labels", "nowhere", "other", "--images", "images/train", "--num-classes", "2"], 2),
        ):
            assert main(arguments) == status
            out, err = capsys.readouterr()
            assert err.count(line) == 1
            assert "skipped" not in out

    def test_tar_files_and_their_index_say_the_same(self, capsys):
        members = {f"./{name}/{i}.png": png(i) for name in ("ant", "bee") for i in range(2)}
        pack("tars/a.tar", members | {"ant/._0.png": b"", "__MACOSX/ant/._1.png": b"", "ant/0.heic": b""})
        lay("tars/._a.tar", data=b"left by macOS")
        line = "2 classes (ant, bee); skipped 3 files: 1 .heic (not read: convert them), 1 hidden, 1 in __MACOSX\n"
        open_aloud("tars")
        assert capsys.readouterr().err.endswith(line)
        assert main(["index", "tars"]) == 0
        assert capsys.readouterr().err == f"tars: 4 images of {line}"
        open_aloud("tars")
        assert capsys.readouterr().err == f"tars: 4 images of {line}"

    def test_subsets_and_lists(self):
        some = ImageSubset(open_images("images/train"), np.array([0, 1, 5]))
        line = describe(some, "x")
        assert line.startswith("x: 3 images of 2 classes (ant, bee); skipped 20 files: 12 .heic (not")
        assert "5 left out" in line
        Path("list.csv").write_text(
            "images/train/ant/1.png,1\nimages/train/ant/2.png,1\nimages/train/ant/3.png,3\nb.heic,1\n"
        )
        assert describe(open_images("list.csv"), "x") == (
            "x: 3 images of 2 classes (1, 3); no image of 2 classes (0, 2): numbers are class ids, from 0; skipped "
            "1 file: 1 .heic (not read: convert them)"
        )

    def test_broken_images_that_are_left_out_are_counted(self, capsys):
        lay("images/train/ant/9.png", data=b"")
        check_images(open_images("images/train"), skip_broken=True)
        assert "1 of 9 images do not decode, and are left out: ant/9.png" in capsys.readouterr().err


def mask_png():
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


class TestWhatIsPassedOver:
    def test_leavings_at_any_depth(self):
        lay("images/ant/1.png", "images/bee/deep/2.png")
        lay(
            "images/ant/._1.png", "images/bee/deep/@eaDir/2.png/SYNOPHOTO_THUMB_M.jpg", "images/__MACOSX/ant/1.png",
            "images/bee/deep/.thumbnails/2.png", "images/lost+found/3.png", "images/ant/.ipynb_checkpoints/1.png",
            "images/ant/$RECYCLE.BIN/1.png", "images/ant/#recycle/1.png", "images/.hidden/1.png",
            "images/ant/Thumbnails/1.png", "images/bee/#snapshot/1.png",
        )  # fmt: skip
        source = open_images("images")
        assert list(source.keys) == ["ant/1.png", "bee/deep/2.png"]
        assert skipped(source) == {
            "hidden": 1, "@eaDir/": 1, "__MACOSX/": 1, ".thumbnails/": 1, "lost+found/": 1, ".ipynb_checkpoints/": 1,
            "$RECYCLE.BIN/": 1, "#recycle/": 1, ".hidden/": 1, "Thumbnails/": 1, "#snapshot/": 1,
        }  # fmt: skip
        assert "; skipped 1 file and 10 folders: 1 #recycle/, 1 #snapshot/" in describe(source, "images")
        lay("classes/thumbs/1.png", "classes/fists/1.png")
        assert open_images("classes").class_names == ["fists", "thumbs"]

    def test_links_are_followed_and_nothing_is_read_twice(self):
        lay(*(f"images/{name}/{i}.png" for name in ("ant", "bee") for i in range(6)))
        lay("elsewhere/cat/1.png", "elsewhere/more/7.png", "one.png")
        Path("images/ant/up").symlink_to("..")
        Path("images/ant/above").symlink_to("../..")
        Path("images/bee/self").symlink_to(".")
        Path("images/cat").symlink_to(Path("elsewhere/cat").resolve())
        Path("images/ant/more").symlink_to("../../elsewhere/more")
        Path("images/ant/again").symlink_to("../../elsewhere/more")
        Path("images/bee/one.png").symlink_to("../../one.png")
        Path("images/bee/gone.png").symlink_to("../nothing.png")
        source = open_images("images")
        assert len(source) == 12 + 1 + 1 + 1
        assert [key for key in source.keys if not key[4].isdecimal()][-1] == "bee/one.png"
        assert skipped(source) == {
            "linked to a folder above": 3, "linked to a folder that was read": 1, "linked to nothing": 1
        }  # fmt: skip

    def test_links_that_lead_in_a_circle(self):
        lay("images/ant/1.png", "images/bee/1.png", "a/2.png", "b/3.png")
        Path("images/ant/a").symlink_to("../../a")
        Path("a/b").symlink_to("../b")
        Path("b/a").symlink_to("../a")
        assert list(open_images("images").keys) == ["ant/1.png", "ant/a/2.png", "ant/a/b/3.png", "bee/1.png"]

    @pytest.mark.parametrize("link", ["images/cow", "images/bee/ants"])
    def test_one_folder_in_two_classes_is_refused(self, link):
        lay("images/ant/1.png", "images/bee/1.png")
        Path(link).symlink_to(Path("images/ant").resolve())
        with pytest.raises(DataError, match=r"are one folder, by a link; an image has one class"):
            open_images("images")

    def test_masks_beside_their_images(self):
        lay("images/benign/a (1).png", "images/benign/a (1)_mask.png", "images/benign/a (1)_mask_1.png")
        lay("images/benign/b.jpg", "images/benign/b_thumb.jpg", "images/benign/b_superpixels.png")
        lay("images/normal/x.jpg", "images/normal/x.seg.png", "images/normal/y.b.png", "images/normal/z_mask.png")
        source = open_images("images")
        assert list(source.keys) == [
            "benign/a (1).png",
            "benign/b.jpg",
            "normal/x.jpg",
            "normal/y.b.png",
            "normal/z_mask.png",
        ]
        assert skipped(source) == {"named as masks or thumbnails of images beside them": 5}

    def test_what_a_class_folder_holds_instead_of_images_is_said(self, capsys):
        lay("images/ant/1.png")
        lay("images/bee/1.heic", "images/bee/2.heic", data=b"x")
        message = train_complaint(capsys, "images")
        assert "1 class folder (bee) without images" in message
        assert "skipped 2 files: 2 .heic (not read: convert them)" in message

    def test_a_pipe_with_the_name_of_an_image_is_not_waited_for(self):
        lay("images/ant/1.png", "images/bee/1.png")
        os.mkfifo("images/ant/2.png")
        assert len(open_images("images")) == 2


class TestFoldersThatAreNoClasses:
    @pytest.mark.parametrize(
        ("paths", "given", "meant"),
        [
            (("images/train/ant/1.png", "images/val/ant/1.png"), "images", "images/train"),
            (("images/Training/ant/1.png", "images/Test/ant/1.png"), "images", "images/Training"),
            (("d/seg_train/ant/1.png", "d/seg_test/ant/1.png", "d/other/1.png"), "d", "d/seg_train"),
            (("images/train2017/ant/1.png", "images/validation/bee/1.png"), "./images", "images/train2017"),
            (("images/train/ant/1.png", "images/train/bee/1.png"), "images", "images/train"),
            (("data/images/ant/1.png", "data/images/bee/1.png"), "data", "data/images"),
            (("pets/pets/ant/1.png", "pets/pets/bee/1.png", "pets/__MACOSX/pets/._1.png"), "pets", "pets/pets"),
            (("d/imagenet_train/ant/1.png", "d/imagenet_val/ant/1.png"), "d", "d/imagenet_train"),
            (("d/cifar-test/ant/1.png", "d/cifar-train/ant/1.png"), "d", "d/cifar-train"),
            (("d/training/ant/1.png", "d/evaluation/ant/1.png"), "d", "d/training"),
            (("d/trainval/ant/1.png", "d/test/ant/1.png"), "d", "d/trainval"),
            (("d/labeled/ant/1.png", "d/unlabeled/2.png"), "d", "d/labeled"),
            (("d/nette/train/ant/1.png", "d/nette/val/ant/1.png"), "d", "d/nette/train"),
        ],
    )
    def test_the_path_that_was_meant(self, paths, given, meant, capsys):
        lay(*paths)
        message = train_complaint(capsys, given)
        assert f"; name {meant} (" in message
        assert "if they are classes, rename them" in message
        assert message.count("\n") == 1

    def test_val_images_among_the_classes(self, capsys):
        lay("i/ant/1.png", "i/bee/1.png", "i/val/ant/2.png", "i/val/bee/2.png")
        assert "i: val: parts of a data set, no classes; move it out from among" in train_complaint(capsys, "i")

    def test_masks_among_the_classes(self, capsys):
        lay("i/ant/1.png", "i/bee/1.png", "i/masks/ant/1.png", "i/masks/bee/1.png")
        assert "i: masks holds ant, bee, as the folder beside it is called" in train_complaint(capsys, "i")

    def test_names_that_classes_seldom_have_are_said(self):
        lay("i/ant/1.png", "i/bee/1.png", "i/test/1.png")
        line = describe(open_images("i"), "i")
        assert line.endswith("taken for classes, as any folder: test; move away what is none")
        lay("one/ants/ant/1.png", "one/ants/bee/1.png")
        line = describe(open_images("one"), "one")
        assert line.endswith("this folder holds ant, bee: if these are the classes, name one/ants")

    def test_parts_without_class_folders(self, capsys):
        lay("images/train/1.png", "images/val/1.png")
        assert "images lie in no class folders: put each into a folder named after its class" in train_complaint(
            capsys, "images"
        )

    @pytest.mark.parametrize("truth", ["masks", "annotations", "SegmentationClass"])
    def test_images_beside_their_masks(self, truth, capsys):
        lay("d/images/1.png", f"d/{truth}/1.png")
        assert f"images, {truth} are images and what was drawn" in train_complaint(
            capsys, "d"
        ) or "segment train" in train_complaint(capsys, "d")

    @pytest.mark.parametrize("paths", [("d/all/ant/1.png", "d/all/bee/1.png"), ("d/photos/1.png",)])
    def test_a_single_class_is_nothing_to_learn(self, paths, capsys):
        lay(*paths)
        message = train_complaint(capsys, "d")
        assert "one class only" in message or "; name d/" in message
        assert not Path("run/checkpoints").exists()

    def test_a_list_without_classes_is_nothing_to_learn(self, capsys):
        lay("1.png", "2.png")
        lay("list.txt", data=b"1.png\n2.png\n")
        assert "its images have no classes" in train_complaint(capsys, "list.txt")

    @pytest.mark.parametrize(
        "paths",
        [
            ("v/bus/1.png", "v/train/1.png", "v/car/1.png"),
            ("v/ant/2020/1.png", "v/bee/2020/1.png"),
            ("v/images/1.png", "v/texts/1.png"),
            ("v/test/1.png", "v/control/1.png"),
            ("v/a/1.png", "v/A/1.png"),
        ],
    )
    def test_classes_that_are_ones(self, paths):
        lay(*paths)
        assert len(open_images("v").class_names) == len({path.split("/")[1] for path in paths})

    def test_what_the_classes_may_be_instead_is_said(self):
        lay(*(f"pacs/{style}/{name}/1.png" for style in ("art", "photo") for name in ("dog", "cat")))
        line = describe(open_images("pacs"), "pacs")
        assert line.endswith(
            "(art, photo); each of these folders holds cat, dog: if these are the classes, name pacs/art"
        )

    def test_images_in_no_class_folder_name_the_folder_above(self, capsys):
        lay("images/ant/1.png", "images/ant/2.png")
        source = open_images("images/ant")
        assert (source.class_names, list(source.keys)) == ([], ["1.png", "2.png"])
        assert "or name the folder above if ant is a class" in train_complaint(capsys, "images/ant")
        lay("images/ant/old/3.png")
        with pytest.raises(DataError, match=r"2 images .* outside of any class folder.* list the paths alone"):
            open_images("images/ant")
        assert list(open_images("images/ant", classes=False).keys) == ["1.png", "2.png", "old/3.png"]

    def test_classes_that_look_the_same(self):
        lay("images/caf\u00e9/1.png", "images/cafe\u0301/1.png")
        with pytest.raises(DataError, match=r"two classes look the same, 'cafe\\u0301' and 'caf\\xe9'"):
            open_images("images")

    @pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.parquet"])
    def test_files_of_other_kinds(self, name):
        lay(name, data=b"x")
        with pytest.raises(DataError, match=r"expected a folder of images, a \.tar file \(not compressed\) or a list"):
            open_images(name)


class TestTarFiles:
    @pytest.mark.parametrize(
        "names",
        [
            ("train/ant/1.png", "train/bee/1.png"),
            ("./train/ant/1.png", "./val/bee/1.png"),
            ("images/ant/1.png", "images/bee/1.png"),
        ],
    )
    def test_packed_one_folder_too_high(self, names, capsys):
        pack("x.tar", {name: png() for name in names})
        first = names[0].removeprefix("./").split("/")[0]
        assert f"pack what lies in it: tar -C {first} -cf NAME.tar ." in train_complaint(capsys, "x.tar")

    def test_tar_files_of_two_parts(self, capsys):
        for name in ("imagenet1k-train-000", "imagenet1k-validation-000"):
            pack(f"tars/{name}.tar", {f"{name}.png": png(), f"{name}.cls": b"1"})
        assert "tar files of several parts" in train_complaint(capsys, "tars")
        assert "tar files of several parts" in complaint(capsys, "index", "tars")
        refuse_parts("tars", ["train-unlabelled-0.tar", "train-unlabelled-1.tar", "more.tar"])  # one part

    @pytest.mark.parametrize(
        ("names", "images"),
        [
            (("x.png", "x.seg.png", "x.depth.png"), ["x.png"]),
            (("a/x.jpg", "a/x.Instance.PNG"), ["a/x.jpg"]),
            (("x.png", "x.second.png"), ["x.png"]),
            (("x.input.jpg",), ["x.input.jpg"]),
            (("x.image.png", "x.seg.png", "x.mask.png"), ["x.image.png"]),
        ],
    )
    def test_a_sample_has_one_image(self, names, images):
        stem = names[0].split(".")[0]
        source = open_images(pack("x.tar", {name: png() for name in names} | {f"{stem}.cls": b"3"}))
        assert list(source.keys) == images
        assert source.class_ids.tolist() == [3]
        assert sum(skipped(source).values()) == len(names) - 1

    @pytest.mark.parametrize("names", [("x.left.jpg", "x.right.jpg"), ("x.jpg", "x.png")])
    def test_a_sample_of_several_images_is_refused(self, names):
        pack("x.tar", {name: png() for name in names} | {"x.cls": b"1"})
        with pytest.raises(DataError, match=r"the sample x has 2 images \(x\..*\), and nothing says which"):
            open_images("x.tar")

    @pytest.mark.parametrize(
        ("members", "message"),
        [
            ({"x.jpg": b"", "x.cls": b"-1"}, "expected the number of a class, 0 or above"),
            ({"x.jpg": b"", "x.cls": b"1.5"}, "expected the number of a class"),
            ({"x.jpg": b"", "x.coarse.cls": b"1", "x.fine.cls": b"2"}, "x has two classes in .cls files, 1 and 2"),
            (
                {"x.jpg": b"", "a/y.jpg": b"", "x.json": b"{}"},
                r"neither a \.cls file nor a folder .*\(x\.jpg\); skipped 1 file: 1 \.json",
            ),
            ({"n01.tar": b""}, r"no images .*skipped 1 file: 1 \.tar"),
        ],
    )
    def test_refused_in_a_line(self, members, message):
        with pytest.raises(DataError, match=message):
            open_images(pack("x.tar", members))

    def test_masks_beside_the_images_of_class_folders(self):
        names = ("ant/1.png", "ant/1.seg.png", "bee/2.png", "bee/2.b.png")
        source = open_images(pack("x.tar", {name: png() for name in names}))
        assert list(source.keys) == ["ant/1.png", "bee/2.b.png", "bee/2.png"]

    def test_links_in_tar_files_are_counted(self):
        pack("x.tar", {"ant/1.png": png(), "bee/1.png": png()})
        with tarfile.open("x.tar", "a") as tar:
            link = tarfile.TarInfo("bee/2.png")
            link.type, link.linkname = tarfile.SYMTYPE, "1.png"
            tar.addfile(link)
        assert skipped(open_images("x.tar")) == {"links or special": 1}


class TestLists:
    def keys_and_classes(self, data, name="list.csv"):
        Path(name).write_bytes(data)
        source = open_images(name)
        names = source.class_names
        return {key: names[i] if names else None for key, i in zip(source.keys, source.class_ids, strict=True)}

    @pytest.mark.parametrize(
        "data",
        [
            b"\xef\xbb\xbfa.png,cat\r\nx/b.png,great white\r\n",
            b'"a.png","cat"\n"x/b.png","great white"\n',
            b"path,label\na.png,cat\nx/b.png,great white\n",
            b"\xef\xbb\xbfDatei;Klasse\r\na.png;cat\r\nx/b.png;great white\r\n",
            "File\tClass\r\na.png\tcat\r\nx/b.png\tgreat white\r\n".encode("utf-16"),
            b"sep=;\r\na.png;cat;;\r\nx/b.png;great white;;\r\n",
            b"label,filename\ncat,a.png\ngreat white,x/b.png\n",
            b"cat,a.png\ngreat white,x/b.png\n",
            b",path,label\n0,a.png,cat\n1,x/b.png,great white\n",
            b"image,mask,split,category\na.png,a_m.png,train,cat\nx/b.png,b_m.png,train,great white\n",
            b"a.png,cat\rx\\b.png,great white\r".replace(b"x\\", b"x/"),
            b".\\a.png,cat\r\nx\\b.png,great white\r\n",
            b"./a.png\tcat\n./x/b.png\tgreat white\n",
            b"# made by hand\n\na.png,cat\n\n,,\nx/b.png,great white\n",
        ],
    )
    def test_as_spreadsheets_and_scripts_write_them(self, data):
        assert self.keys_and_classes(data) == {"a.png": "cat", "x/b.png": "great white"}

    def test_classes_with_commas_and_quotes(self):
        data = b'path,label\n"a, b.png","shark, ""white"""\nc.png,cat\n'
        assert self.keys_and_classes(data) == {"a, b.png": 'shark, "white"', "c.png": "cat"}

    def test_paths_alone_with_a_heading_and_with_commas(self):
        assert self.keys_and_classes(b"path\na b.png\nc.png\n") == {"a b.png": None, "c.png": None}
        lay("a,b.png")
        assert self.keys_and_classes(b"a,b.png\nc,d.png\n") == {"a,b.png": None, "c,d.png": None}

    def test_numbers_as_pandas_writes_them(self):
        assert self.keys_and_classes(b"path,label\na.png,10.0\nb.png,2.0\n") == {"a.png": "10", "b.png": "2"}

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"a.png,-1\nb.png,0\n", "-1 is no class"),
            (b"a.png,1.0\nb.png,nan\n", "nan is no class among numbers"),
            (b"a.png,01440764\nb.png,1\n", "01440764 is no class"),
            (b"path,label\na.png,train\nb.png,val\n", "says train, val; write a list of each part"),
            (b"a.png,train\nb.png,val\n", "train, val are parts of a data set"),
            (b"path,label,split\na.png,cat,train\nb.png,cat,test\n", "its column split says test, train"),
            (b"path,label,class\na.png,1,cat\n", "line 1: which columns are path and class"),
            (b"0,a.png,cat\n", "line 1: .*more columns need a first line"),
            (b"path,label\na.png,cat\nb,dog\n", r"line 3: expected the path of an image .*got 'b,dog'"),
            (b'a.png,cat\n"b.png,dog\n', "cannot be read as CSV"),
            (b"id,label\n0001,cat\n", r"line 1: no column \(id,label\) holds paths of images, which end in"),
            (b"path,label\na.png,cat\na.png,dog\n", r"a.png is listed with 2 classes \(cat, dog\)"),
            (b"a.heic,cat\nb.heic,dog\n", "lists no images .*2 .heic"),
        ],
    )
    def test_refused_in_a_line(self, data, message):
        with pytest.raises(DataError, match=message) as error:
            self.keys_and_classes(data)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("data", "expected"),
        [
            (b"path,label\na.png,caf\xe9\nb.png,dog\n", {"a.png": "caf\u00e9", "b.png": "dog"}),
            (b"img.path,cls\na.png,cat\nb.png,dog\n", {"a.png": "cat", "b.png": "dog"}),
            (b"path,label\na.heic,cat\nb.png,dog\n", {"b.png": "dog"}),
            (b"path,label,x\na.png,cat,1\na.png,cat,2\nb.png,dog,3\n", {"a.png": "cat", "b.png": "dog"}),
        ],
    )
    def test_other_letters_headings_and_lines_for_each_object(self, data, expected):
        assert self.keys_and_classes(data) == expected

    def test_what_was_assumed_of_letters_is_said(self):
        lay("b\udce9.png")
        data = "a\u00e9.png,ant\n".encode("cp1252") + b"b\xe9.png,bee\n"
        assert self.keys_and_classes(data) == {"a\u00e9.png": "ant", "b\udce9.png": "bee"}
        assert "not UTF-8, read as Windows-1252: a\u00e9.png" in describe(open_images("list.csv"), "list.csv")

    def test_files_that_are_not_there(self, capsys):
        lay("lists/list.csv", data=b"path,label\nimages/a.png,cat\nimages/b.png,dog\n")
        message = train_complaint(capsys, "lists/list.csv")
        assert "path from column path, class from label" in message
        assert (
            "no such files as it lists (images/a.png, images/b.png); paths are relative to the list's folder" in message
        )
        lay("lists/images/a.png")
        open_aloud("lists/list.csv")
        assert "of 2 files that were looked for, 1 are absent (images/b.png)" in capsys.readouterr().err


class CountingImages:
    """A source whose classes are counted when asked for."""

    keys, class_names, asked = ["a", "b", "c"], ["x", "y"], 0

    @property
    def class_ids(self):
        self.asked += 1
        return np.array([0, 1, 1])

    def read(self, index):
        return b""

    def __len__(self):
        return 3


def test_the_classes_of_a_subset_are_looked_up_once():
    source = CountingImages()
    subset = ImageSubset(source, np.array([2, 0]))
    asked = source.asked
    assert [int(subset.class_ids[i]) for i in (0, 1, 0, 1)] == [1, 0, 1, 0]
    assert source.asked == asked


def test_names_of_any_bytes_go_through_every_verb(capsys):
    """Names that are not UTF-8, with line breaks, quotes and HTML, and long ones."""
    classes = (os.fsdecode(b"\xe9t\xe9"), 'b<b>\n#"%')
    for class_id, name in enumerate(classes):
        for i in range(4):
            stem = os.fsdecode(b"caf\xe9 %d" % i) + ("\n\t'\"&" if i else "x" * 180)
            lay(f"images/{name}/{stem}.png")
            buffer = io.BytesIO()
            Image.fromarray(np.full((8, 8), 1 - class_id, np.uint8)).save(buffer, "PNG")
            lay(f"masks/{name}/{stem}.png", data=buffer.getvalue())
    model = "{patch_size: 4, depth: 2, width: 16, num_heads: 2, stem_width: 8}"
    train = {
        "data.train": "images", "data.val": "images", "data.labels": "labels", "data.num_workers": "0", "epochs": "1",
        "batch_size": "4", "model.name": "lvvit_t", "model.img_size": "[8,8]", "model.options": model,
        "optim.warmup_epochs": "0", "optim.lr_batch_size": "4", "precision": "fp32",
    }  # fmt: skip
    for arguments in (
        ["annotate", "images", "labels", "--teacher", "masks:masks"],
        ["inspect", "labels", "--images", "images", "--pictures", "pictures.html"],
        ["train", "--recipe", "small_data", "--out", "run", *(f"--{name}={value}" for name, value in train.items())],
        ["eval", "run", "--per-class", "--num-workers", "0"],
        ["report", "run", "--output", "report.html"],
    ):
        assert main([*arguments, *(["--device", "cpu"] if arguments[0] in ("annotate", "train", "eval") else [])]) == 0
        said = capsys.readouterr().err
        assert (r"images: 8 images of 2 classes (b<b>?#" in said) == (arguments[0] != "report")  # opens none
    for page in ("pictures.html", "report.html"):
        text = Path(page).read_text(encoding="utf-8")
        assert r"caf\udce9 1" in text
        assert "b<b>" not in text
