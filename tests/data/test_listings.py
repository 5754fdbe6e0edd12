"""What is kept of large folders and lists: the next process finds the same, and never what is no longer true."""

from __future__ import annotations

import os
import time
from functools import partial

import numpy as np
import pytest

from tokenlabel.data import sources
from tokenlabel.data.images import ImageFolder, describe
from tokenlabel.data.listings import Strings
from tokenlabel.data.sources import open_images


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Images of two classes, unchanged for an hour; twenty are many."""
    monkeypatch.setattr("tokenlabel.data.images.MANY_IMAGES", 20)
    monkeypatch.setenv("TOKENLABEL_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "images"
    for name in ("ant", "bee"):
        (root / name).mkdir(parents=True)
        for i in range(10):
            (root / name / f"{i}.jpg").write_bytes(b"")
    (root / "bee" / "notes.txt").write_text("")
    settle(root)
    return root


def settle(root):
    """Let the last change of all folders have been an hour ago."""
    for path in (root, *(path for path in root.iterdir() if path.is_dir())):
        os.utime(path, (time.time() - 3600, path.stat().st_mtime - 3600))


def found(source):
    return [*source.keys], source.class_ids.tolist(), source.class_names, describe(source, "there")


@pytest.fixture
def read(monkeypatch):
    """Which folders were read: with what is kept, none."""
    seen = []
    listed = sources.list_images
    for module in ("images", "sources"):
        monkeypatch.setattr(f"tokenlabel.data.{module}.list_images", lambda root: (seen.append(root), listed(root))[1])
    return seen


@pytest.mark.parametrize("kind", [ImageFolder, partial(ImageFolder, classes=False)], ids=["classes", "plain"])
def test_a_folder_is_listed_once_and_found_the_same(folder, read, kind):
    first, second = found(kind(folder)), found(kind(folder))
    assert len(read) == 1
    assert second == first
    assert "1 .txt" in first[-1]


@pytest.mark.parametrize("change", ["new", "gone", "renamed", "class"])
def test_a_folder_that_changed_is_listed_again(folder, tmp_path, monkeypatch, change):
    before = found(open_images(folder))
    image = folder / "ant" / "7.jpg"
    if change == "new":
        (folder / "bee" / "new.jpg").write_bytes(b"")
    elif change == "gone":
        image.unlink()
    elif change == "renamed":
        image.rename(image.with_name("z.jpg"))
    else:
        (folder / "cat").mkdir()
        image.rename(folder / "cat" / "7.jpg")
    after = found(open_images(folder))
    assert after != before
    monkeypatch.setenv("TOKENLABEL_CACHE", str(tmp_path / "other"))
    assert after == found(open_images(folder))


def test_a_folder_that_is_changing_or_holds_links_is_not_kept(folder, read, tmp_path):
    (folder / "ant" / "young.jpg").write_bytes(b"")  # a moment ago: one more may come within the clock's tick
    open_images(folder)
    open_images(folder)
    assert len(read) == 2
    (folder / "ant" / "link.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    settle(folder)
    before = found(open_images(folder))
    (tmp_path / "elsewhere.jpg").write_bytes(b"")  # no folder among the images has changed
    assert len(found(open_images(folder))[0]) == len(before[0]) + 1


def test_a_list_is_read_once_and_again_when_it_says_otherwise(folder, monkeypatch):
    path = folder.parent / "list.tsv"
    lines = [f"images/{key}\t{key[:3]}\n" for key in open_images(folder).keys]
    path.write_text("".join(lines))
    before = found(open_images(path))
    with monkeypatch.context() as context:
        context.setattr(sources, "_entries", None)
        assert found(open_images(path)) == before
    path.write_text("".join([*lines[:-1], lines[-1].replace("\tbee", "\tant")]))  # as long as it was
    assert found(open_images(path))[1] != before[1]


def test_without_a_cache_that_can_be_written_all_is_as_ever(folder, monkeypatch):
    before = found(open_images(folder))
    monkeypatch.setenv("TOKENLABEL_CACHE", "/dev/null/cache")
    assert found(open_images(folder)) == before


def test_a_damaged_cache_costs_a_listing_and_no_more(folder, tmp_path):
    before = found(open_images(folder))
    for path in (tmp_path / "cache").rglob("*.npz"):
        path.write_bytes(path.read_bytes()[:1000])
    assert found(open_images(folder)) == before


@pytest.mark.parametrize("strings", [[], [""], ["a", "", "bc", "é", "\udcff"]])
def test_strings_are_those_that_were_packed(strings):
    packed = Strings(strings).packed()
    assert packed.tolist().count(0) == len(strings)
    assert [*Strings.unpacked(packed)] == strings
    np.testing.assert_array_equal(Strings.unpacked(packed).packed(), packed)
