from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokenlabel.cli import main
from tokenlabel.data import tars as tars_module
from tokenlabel.data.decoding import ImageCheck, check_images, decode_image
from tokenlabel.data.images import ImageFolder, ImageSubset, describe, has_classes
from tokenlabel.data.sources import ListedImages, open_images
from tokenlabel.data.tar_index import INDEX_NAME
from tokenlabel.data.tars import TarImages, write_index
from tokenlabel.runtime.errors import DataError, ImageError

CLASSES = ("ape", "bee", "cat")


def encoded(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def files():
    """Seven images of three classes, by path."""
    return {f"{CLASSES[i % 3]}/{i}.{'long' * (30 * i)}.png": encoded(i) for i in range(7)}


def test_tar_files_hold_the_same_images_as_the_folder_they_were_made_of(tmp_path, files):
    short = {f"{name[:40]}.png": data for name, data in files.items()}
    for name, data in short.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(data)
    names = list(short)
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "b.tar", {f"./{name}": short[name] for name in names[:3]})
    write_tar(tmp_path / "tars" / "a.tar", {name: short[name] for name in names[3:]} | {"readme.md": b""})
    folder, tars = ImageFolder(tmp_path / "folder"), open_images(tmp_path / "tars")
    assert isinstance(tars, TarImages)
    tars = pickle.loads(pickle.dumps(tars))
    assert list(tars.keys) == list(folder.keys)
    assert tars.class_names == folder.class_names
    assert tars.class_ids.tolist() == folder.class_ids.tolist()
    assert len(tars) == len(folder)
    assert [tars.read(i) for i in range(7)] == [folder.read(i) for i in range(7)]


def test_names_longer_than_tar_headers_hold(tmp_path, files):
    tars = open_images(write_tar(tmp_path / "x.tar", files))
    assert list(tars.keys) == sorted(files)
    assert all(tars.read(i) == files[key] for i, key in enumerate(tars.keys))
    assert isinstance(decode_image(tars.read(0), "x"), Image.Image)


def test_webdataset_tells_classes_by_number(tmp_path):
    files = {f"00{i}.jpg": encoded(i) for i in range(3)} | {f"00{i}.cls": b"%d\n" % (2 - i) for i in range(3)}
    source = open_images(write_tar(tmp_path / "x.tar", files))
    assert source.class_names == ["0", "1", "2"]
    assert source.class_ids.tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"readme.md": b""}, "no images"),
        ({"a.jpg": b"", "b.jpg": b"", "b.cls": b"1"}, r"1 of 2 images have no \.cls file \(a\.jpg"),
        ({"a.jpg": b"", "a.cls": b"cat"}, r"x\.tar: a\.cls: expected the number of a class, 0 or above, got b'cat'"),
        ({"a.jpg": b"", "cat/b.jpg": b""}, "1 of 2 images have neither a .cls file nor a folder"),
    ],
)
def test_tar_files_that_cannot_be_used(tmp_path, files, message):
    with pytest.raises(DataError, match=message):
        open_images(write_tar(tmp_path / "x.tar", files))


def test_tar_files_and_lists_need_no_classes(tmp_path):
    source = open_images(write_tar(tmp_path / "x.tar", {"a.jpg": b"", "b.jpg": b""}))
    assert (source.class_names, list(source.keys)) == ([], ["a.jpg", "b.jpg"])
    (tmp_path / "list.csv").write_text("path,label\na.jpg,cat\nb.jpg,\nc.jpg,ant\n")
    source = open_images(tmp_path / "list.csv")
    assert (source.class_names, source.class_ids.tolist()) == (["ant", "cat"], [1, 0, 0])
    assert has_classes(source).tolist() == [True, False, True]
    assert describe(source, "list").startswith("list: 3 images, 2 of them of 2 classes (ant, cat), 1 without a class")
    assert not has_classes(open_images(tmp_path / "list.csv", classes=False)).any()


def test_damaged_tar_files(tmp_path, files):
    path = write_tar(tmp_path / "x.tar", files)
    source = open_images(path)
    with pytest.raises(DataError, match=r"there twice \(also in"):
        TarImages([path, path])
    (tmp_path / "y.tar").write_bytes(b"no tar file at all" * 100)
    with pytest.raises(DataError, match=r"y\.tar: cannot be read as a tar file"):
        open_images(tmp_path / "y.tar")
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(ImageError, match="cut short"):
        source.read(len(source) - 1)
    path.unlink()
    with pytest.raises(ImageError, match="cannot be read"):
        pickle.loads(pickle.dumps(source)).read(0)


class TestIndex:
    @pytest.fixture
    def tars(self, tmp_path, files):
        names = list(files)
        write_tar(tmp_path / "a.tar", {name: files[name] for name in names[:4]})
        write_tar(tmp_path / "b.tar", {name: files[name] for name in names[4:]})
        return tmp_path

    def test_it_opens_the_same_images_without_a_look_at_the_members(self, tars, files, monkeypatch):
        scanned = open_images(tars)
        assert write_index(tars) == tars / INDEX_NAME
        monkeypatch.setattr("tokenlabel.data.tars.scan_tars", None)
        indexed = pickle.loads(pickle.dumps(open_images(tars)))
        assert isinstance(indexed, TarImages)
        assert list(indexed.keys) == list(scanned.keys)
        assert indexed.class_names == scanned.class_names
        assert indexed.class_ids.tolist() == scanned.class_ids.tolist()
        assert [indexed.read(i) for i in range(len(indexed))] == [files[key] for key in indexed.keys]

    @pytest.mark.parametrize("change", ["another file", "another size", "another order"])
    def test_it_is_refused_where_the_tar_files_have_changed(self, tars, files, change):
        write_index(tars)
        if change == "another file":
            (tars / "a.tar").rename(tars / "c.tar")
        elif change == "another size":
            write_tar(tars / "b.tar", files)
        else:
            same_size = sorted(list(files)[:4], reverse=True)
            write_tar(tars / "a.tar", {name: files[name] for name in same_size})
        with pytest.raises(DataError, match=r"index\.npz: the tar files beside it have changed"):
            open_images(tars)

    def test_the_command_line_writes_it(self, tars, capsys):
        assert main(["index", str(tars)]) == 0
        assert capsys.readouterr().out.strip() == str(tars / INDEX_NAME)
        assert len(open_images(tars)) == 7

    def test_damaged_and_empty(self, tars, tmp_path):
        for damaged in (b"PK nonsense", b"", b"PK\x03\x04 cut short"):
            (tars / INDEX_NAME).write_bytes(damaged)
            with pytest.raises(DataError, match=r"cannot be read as an index"):
                open_images(tars)
        (tmp_path / "nothing").mkdir()
        with pytest.raises(DataError, match="no tar files to index"):
            write_index(tmp_path / "nothing")


def test_tar_files_know_the_group_of_each_image_and_stream_the_same_bytes(tmp_path, files):
    names = list(files)
    write_tar(tmp_path / "a.tar", {name: files[name] for name in names[::2]})
    write_tar(tmp_path / "b.tar", {name: files[name] for name in names[1::2]})
    source = open_images(tmp_path)
    assert isinstance(source, TarImages)
    assert [int(group) for group in source.groups] == [names.index(key) % 2 for key in source.keys]
    some = ImageSubset(source, np.array([4, 1, 6]))
    assert some.groups is not None
    assert some.groups.tolist() == source.groups[[4, 1, 6]].tolist()
    for streamed, plain in ((source.streamed(), source), (some.streamed(), some)):
        assert list(streamed.keys) == list(plain.keys)
        assert [streamed.read(i) for i in range(len(plain))] == [plain.read(i) for i in range(len(plain))]


def test_broken_images_in_tar_files_are_found_wherever_they_lie(tmp_path, files):
    names = list(files)
    broken = {**files, names[3]: b"words", names[6]: b""}
    write_tar(tmp_path / "a.tar", {name: broken[name] for name in names[::2]})
    write_tar(tmp_path / "b.tar", {name: broken[name] for name in names[1::2]})
    sound = check_images(open_images(tmp_path), skip_broken=True, check=ImageCheck.DECODE)
    assert list(sound.keys) == sorted(set(names) - {names[3], names[6]})
    assert [sound.read(i) for i in range(5)] == [files[key] for key in sound.keys]


def test_more_tar_files_than_a_process_keeps_open(tmp_path, monkeypatch):
    monkeypatch.setattr("tokenlabel.data.tars._NUM_OPEN", 2)
    for i in range(5):
        write_tar(tmp_path / f"{i}.tar", {f"ape/{i}.png": encoded(i)})
    source = open_images(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    for _ in range(2):
        assert [source.read(i) for i in range(5)] == [encoded(i) for i in range(5)]
    if before:
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


@pytest.mark.parametrize(
    ("text", "keys", "class_names", "class_ids"),
    [
        ("b.png\tcat\na b.png\tape\n", ["b.png", "a b.png"], ["ape", "cat"], [1, 0]),
        ("# val\nx/a.JPEG 65\nx/b.JPEG 2\n", ["x/a.JPEG", "x/b.JPEG"], [str(i) for i in range(66)], [65, 2]),
        ("a.png,cat\n\nb.png, cat \n", ["a.png", "b.png"], ["cat"], [0, 0]),
        ("a b.png\nc.png\n", ["a b.png", "c.png"], [], [0, 0]),
        (f"{'w' * 300},b.png\nx,c.png\n", ["b.png", "c.png"], ["w" * 300, "x"], [0, 1]),  # no file has such a name
    ],
)
def test_lists(tmp_path, text, keys, class_names, class_ids):
    (tmp_path / "list.txt").write_text(text)
    source = pickle.loads(pickle.dumps(open_images(tmp_path / "list.txt")))
    assert isinstance(source, ListedImages)
    assert list(source.keys) == keys
    assert source.class_names == class_names
    assert source.class_ids.tolist() == class_ids
    (tmp_path / keys[0]).parent.mkdir(exist_ok=True)
    (tmp_path / keys[0]).write_bytes(b"data")
    assert source.read(0) == b"data"
    with pytest.raises(ImageError, match="cannot be read"):
        source.read(1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no images"),
        ("a.png 1\na.png 2\n", r"a\.png is listed with 2 classes \(1, 2\)"),
        ("a.png 1\n\t2\n", r"line 2: expected the path"),
        ("a.png great white shark\n", r"line 1: expected .*a tab between"),
        (f"a.png,{'w' * 200_000}\n", r"list\.txt: cannot be read as a list \(field larger"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        open_images(tmp_path / "list.txt")


@pytest.mark.parametrize("name", ["ape/1.png", "1.png"])
def test_tar_files_beside_images_are_refused(tmp_path, name):
    """Neither may silently hide the other."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(encoded(0))
    write_tar(tmp_path / "extra.tar", {"c/0.png": encoded(1)})
    with pytest.raises(DataError, match=rf"holds tar files \(extra\.tar\) and images \({name}\)"):
        open_images(tmp_path)


def test_an_open_tar_file_is_held_while_it_is_read(tmp_path, monkeypatch):
    """Another thread may make it the one too many meanwhile."""
    for i in range(2):
        write_tar(tmp_path / f"{i}.tar", {f"ape/{i}.png": encoded(i)})
    monkeypatch.setattr(tars_module, "_NUM_OPEN", 1)
    source, pread = open_images(tmp_path), os.pread

    def interrupted(descriptor, length, start):
        monkeypatch.setattr(os, "pread", pread)
        assert source.read(1) == encoded(1)  # closes the other's file, if nobody holds it
        return pread(descriptor, length, start)

    monkeypatch.setattr(os, "pread", interrupted)
    assert source.read(0) == encoded(0)


def test_folders_are_opened_as_ever(tmp_path, files):
    (tmp_path / "ape").mkdir()
    (tmp_path / "ape" / "1.png").write_bytes(encoded(1))
    assert isinstance(open_images(tmp_path), ImageFolder)
    with pytest.raises(DataError):
        open_images(tmp_path / "nowhere")
