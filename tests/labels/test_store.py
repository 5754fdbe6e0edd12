from __future__ import annotations

import json
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from tokenlabel.core.align import align
from tokenlabel.core.batch import collate_score_maps
from tokenlabel.core.geometry import View, stack_views
from tokenlabel.core.scores import ScoreMap, from_probabilities, from_top
from tokenlabel.labels.encoding import Encoding, pack
from tokenlabel.labels.manifest import Failure, Manifest, read_manifest, update_failures, write_manifest
from tokenlabel.labels.shards import Fingerprint, key_hash, open_shard, write_shard
from tokenlabel.labels.store import LabelStore, _starts_by_first_bits
from tokenlabel.labels.writer import LabelStoreWriter, merge_stores, remove_leftovers
from tokenlabel.runtime.errors import StoreError

NUM_MUTATIONS = int(os.environ.get("TOKENLABEL_MUTATIONS", "10000"))


def a_map(seed: int, *, num_classes: int = 10, topk: int = 3) -> ScoreMap:
    probs = np.random.default_rng(seed).dirichlet(np.ones(num_classes), size=(3, 4))
    return from_probabilities(probs, topk)


def a_manifest(**changes) -> Manifest:
    return Manifest(**{"num_classes": 10, "topk": 3, "encoding": Encoding.RAW, **changes})


def key_of(i: int) -> str:
    return f"train/class {i % 3}/bild ü {i}.a.jpg"


def write(folder, numbers, manifest=None, **options) -> None:
    with LabelStoreWriter(folder, manifest or a_manifest(), **options) as writer:
        for i in numbers:
            writer.add(key_of(i), a_map(i))


def same(one: ScoreMap, other: ScoreMap) -> bool:
    return np.array_equal(one.class_ids, other.class_ids) and np.abs(one.probs - other.probs).max() < 1e-4


def holds(store: LabelStore, numbers) -> bool:
    return len(store) == len(list(numbers)) and all(same(store[key_of(i)], a_map(i)) for i in numbers)


def test_what_was_written_is_read(tmp_path):
    write(tmp_path / "labels", range(20), max_shard_bytes=500)
    store = LabelStore(tmp_path / "labels")
    assert len(store.shards) > 3
    assert holds(store, range(20))
    assert sorted(store.keys()) == sorted(key_of(i) for i in range(20))
    assert key_of(3) in store
    assert "train/class 0/bild ü 0.b.jpg" not in store
    assert store.missing([key_of(25), key_of(1), key_of(26)]) == [key_of(25), key_of(26)]
    assert store.num_bytes() == sum(p.stat().st_size for p in (tmp_path / "labels").glob("*.safetensors"))


def test_shards_are_ordinary_safetensors_files(tmp_path):
    write(tmp_path / "labels", range(3))
    (path,) = (tmp_path / "labels").glob("*.safetensors")
    tensors = load_file(path)
    assert {name: tensor.dtype for name, tensor in tensors.items()} == dict.fromkeys(
        ("index", "keys", "payload"), np.uint8
    )
    assert tensors["index"].shape == (3, 32)


def test_writing_goes_on_where_it_stopped(tmp_path):
    write(tmp_path / "labels", range(5))
    write(tmp_path / "labels", range(5, 9))
    assert holds(LabelStore(tmp_path / "labels"), range(9))


@pytest.mark.parametrize("error", [KeyboardInterrupt, StoreError])
def test_a_writer_that_is_stopped_keeps_what_it_was_given(tmp_path, error):
    def be_stopped():
        with LabelStoreWriter(tmp_path / "labels", a_manifest()) as writer:
            writer.add(key_of(0), a_map(0))
            if error is StoreError:
                writer.add(key_of(1), a_map(1, num_classes=12))
            raise KeyboardInterrupt

    with pytest.raises(error):
        be_stopped()
    assert holds(LabelStore(tmp_path / "labels"), range(1))


def test_shards_close_after_a_while(tmp_path):
    with LabelStoreWriter(tmp_path / "labels", a_manifest(), max_shard_s=0.0) as writer:
        writer.add(key_of(0), a_map(0))
        assert len(LabelStore(tmp_path / "labels")) == 1


def test_file_names_that_are_no_utf8(tmp_path):
    key = os.fsdecode(b"train/\xff\xfe.jpg")
    with LabelStoreWriter(tmp_path / "labels", a_manifest()) as writer:
        writer.add(key, a_map(1))
    store = LabelStore(tmp_path / "labels")
    assert list(store.keys()) == [key]
    assert same(store[key], a_map(1))


def test_several_folders_are_one_store(tmp_path):
    write(tmp_path / "a", range(4))
    write(tmp_path / "b", range(4, 7))
    store = LabelStore(tmp_path / "a", tmp_path / "b")
    assert holds(store, range(7))
    assert holds(pickle.loads(pickle.dumps(store)), range(7))


def test_folders_of_different_labels_are_not_one_store(tmp_path):
    write(tmp_path / "a", range(2), a_manifest(teacher={"name": "one"}))
    write(tmp_path / "b", range(2, 3), a_manifest(teacher={"name": "two"}))
    with pytest.raises(StoreError, match=r"teacher\.name"):
        LabelStore(tmp_path / "a", tmp_path / "b")


def test_one_writer_takes_no_key_twice(tmp_path):
    with LabelStoreWriter(tmp_path / "c", a_manifest()) as writer:
        writer.add("x", a_map(0))
        with pytest.raises(StoreError, match="x was given twice"):
            writer.add("x", a_map(0))


def add(folder, maps: dict[str, int], **options) -> None:
    """Add maps by the seeds that they are drawn from, as one file."""
    with LabelStoreWriter(folder, a_manifest(), **options) as writer:
        for key, seed in maps.items():
            writer.add(key, a_map(seed))


def test_equal_records_of_a_key_are_one(tmp_path, capsys):
    add(tmp_path / "a", {"x": 1, "y": 2})
    add(tmp_path / "a", {"y": 2, "z": 3})
    add(tmp_path / "b", {"x": 1})
    store = LabelStore(tmp_path / "a", tmp_path / "b", duplicates="refuse")
    assert (len(store), store.num_superseded, sorted(store.keys())) == (3, 2, ["x", "y", "z"])
    assert {store.key_at(i) for i in range(3)} == {"x", "y", "z"}
    assert all(same(store[key], a_map(seed)) for key, seed in {"x": 1, "y": 2, "z": 3}.items())
    assert capsys.readouterr().err == ""


def test_of_different_records_the_first_file_by_name_counts_and_a_line_says_so(tmp_path, capsys):
    for folder, seed in {"a": 1, "b": 2, "c": 3}.items():
        add(tmp_path / folder, {"x": seed, "y": seed, f"only {folder}": seed})
    names = {path.name: seed for f, seed in zip("abc", (1, 2, 3), strict=True) for path in (tmp_path / f).glob("*s")}
    folders = [tmp_path / f for f in "cab"]
    store = LabelStore(*folders)
    assert len(store) == len(list(store.keys())) == 5
    assert capsys.readouterr().err.splitlines() == [
        f"{' + '.join(map(str, folders))}: 2 images have different labels in several files (x, y); "
        "that of the first file by name counts"
    ]
    assert same(store["x"], a_map(names[min(names)]))
    sent = pickle.loads(pickle.dumps(store))
    assert same(sent["x"], store["x"])
    assert capsys.readouterr().err == ""  # said once, and not by data workers
    with pytest.raises(StoreError, match=r"2 images have different labels in several files \(x, y\); remove"):
        LabelStore(*folders, duplicates="refuse")
    with pytest.raises(ValueError, match="expected first or refuse, got 'last'"):
        LabelStore(*folders, duplicates="last")


def test_labels_of_a_higher_generation_count(tmp_path, capsys):
    add(tmp_path, {"x": 1, "y": 2})
    add(tmp_path, {"y": 3}, generation=2, again="b")
    add(tmp_path, {"x": 4, "y": 4}, generation=1, again="a")
    store = LabelStore(tmp_path, duplicates="refuse")
    assert same(store["x"], a_map(4))
    assert same(store["y"], a_map(3))
    assert [store.generation(key) for key in ("x", "y", "z")] == [1, 2, None]
    assert store.answers("a") == {"x", "y"}
    assert capsys.readouterr().err == ""


def test_a_record_that_is_labelled_anew_to_the_same_keeps_the_older_file(tmp_path):
    add(tmp_path, {"x": 1})
    add(tmp_path, {"x": 1}, generation=1)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert (len(LabelStore(tmp_path)), LabelStore(tmp_path).generation("x")) == (1, 1)


@pytest.mark.parametrize("num_hashes", [2**64, 2])
def test_any_number_of_records_a_key(tmp_path_factory, monkeypatch, capsys, num_hashes):
    """Against a model in few words; with two hashes for all keys, records of a key lie between others."""
    hash_of = key_hash
    for module in ("shards", "store"):
        monkeypatch.setattr(f"tokenlabel.labels.{module}.key_hash", lambda name: hash_of(name) % num_hashes)
    rng = random.Random(0)
    keys = ["", *(f"{i % 3}/{'ü' * (i % 4)}{i}" for i in range(12))]
    for _ in range(12):
        folder = tmp_path_factory.mktemp("labels")
        for _ in range(rng.randrange(1, 6)):
            maps = {key: rng.randrange(3) for key in rng.sample(keys, rng.randrange(1, 8))}
            add(folder, maps, generation=rng.randrange(3))
        files = {path.name: open_shard(path)[0] for path in folder.glob("*.safetensors")}
        rows = [(-shard.generation, name, row) for name, shard in files.items() for row in range(shard.num_records)]
        counting: dict[bytes, tuple[int, str, int]] = {}
        contested = set()
        for place in sorted(rows):
            name = files[place[1]].key(place[2])
            first = counting.setdefault(name, place)
            if first[0] == place[0] and files[first[1]].read(first[2]) != files[place[1]].read(place[2]):
                contested.add(name)
        store = LabelStore(folder)
        said = capsys.readouterr().err
        assert f"{len(contested)} image" in said if contested else said == ""
        assert store.num_superseded == len(rows) - len(counting)
        assert sorted(map(os.fsencode, store.keys())) == sorted(counting)
        for name, (generation, file, row) in counting.items():
            assert store.generation(os.fsdecode(name)) == -generation
            assert store.packed(os.fsdecode(name)) == files[file].read(row)


def test_a_store_in_another_process_stays_as_it_was_opened(tmp_path):
    write(tmp_path / "labels", range(3))
    opened = LabelStore(tmp_path / "labels")
    sent = pickle.dumps(opened)
    add(tmp_path / "labels", {key_of(0): 7, key_of(5): 5}, generation=1)
    assert holds(pickle.loads(sent), range(3))
    (old, *_) = pickle.loads(sent).shards
    old.path.unlink()
    with pytest.raises(StoreError, match=rf"{old.path.name}: was removed while the store was open"):
        pickle.loads(sent)
    with pytest.raises(StoreError, match=rf"{old.path.name}: was removed while the store was open"):
        opened[key_of(1)]


def test_a_folder_given_twice_is_one(tmp_path, monkeypatch):
    write(tmp_path / "labels", range(3))
    monkeypatch.chdir(tmp_path)
    store = LabelStore("labels", "./labels", tmp_path / "labels", duplicates="refuse")
    assert (len(store.folders), len(store.shards), store.num_superseded) == (1, 1, 0)


def test_what_is_no_store_says_what_may_be_meant(tmp_path):
    write(tmp_path / "labels" / "train", range(1))
    write(tmp_path / "labels" / "val", range(1))
    folder = tmp_path / "labels" / "train"
    (shard,) = folder.glob("*.safetensors")
    with pytest.raises(StoreError, match=r"has no manifest\.json\), but has some in it \(train, val\); name those"):
        LabelStore(tmp_path / "labels")
    for path in (shard, folder / "manifest.json"):
        with pytest.raises(StoreError, match=rf"{path.name}: is a file, .* did you mean {folder}\?"):
            LabelStore(path)
        with pytest.raises(StoreError, match=rf"{path.name}: is a file, .* did you mean {folder}\?"):
            LabelStoreWriter(path, a_manifest())
    (folder / "manifest.json").unlink()
    for use in (lambda: LabelStore(folder), lambda: LabelStoreWriter(folder, a_manifest())):
        with pytest.raises(StoreError, match=r"holds \.safetensors files, but no manifest\.json; restore a copy"):
            use()
    (folder / "manifest.json").write_bytes(b"")
    with pytest.raises(StoreError, match=r"manifest\.json: is not JSON .*; restore a copy"):
        LabelStore(folder)


def test_two_that_make_a_store_at_once_agree_on_what_it_holds(tmp_path, monkeypatch):
    def slowly(folder, manifest):
        time.sleep(0.05)
        write_manifest(folder, manifest)

    monkeypatch.setattr("tokenlabel.labels.writer.write_manifest", slowly)

    def make(name):
        try:
            return LabelStoreWriter(tmp_path / "labels", a_manifest(teacher={"name": name})).manifest.teacher
        except StoreError as error:
            return str(error)

    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(make, ["one", "one", "two"]))
    teacher = read_manifest(tmp_path / "labels").teacher
    assert all(other == teacher or "holds other labels" in other for other in made)
    assert {"holds other labels" in other for other in made} == {True, False}


def test_failures_are_written_only_where_they_change(tmp_path):
    write(tmp_path, range(1))
    before = (tmp_path / "manifest.json").stat()
    update_failures(tmp_path, [])
    assert (tmp_path / "manifest.json").stat().st_ino == before.st_ino
    update_failures(tmp_path, [Failure("a", "1"), Failure("b", "1")])
    update_failures(tmp_path, [Failure("c", "2"), Failure("b", "2")], others=lambda key: key in "ab")
    assert read_manifest(tmp_path).failures == (Failure("a", "1"), Failure("c", "2"), Failure("b", "2"))


def test_merging_writes_only_what_counts(tmp_path, capsys):
    add(tmp_path / "a", {"x": 1, "y": 2, "z": 3})
    add(tmp_path / "a", {"y": 4}, generation=2, again="list")
    image = Fingerprint(5, 6, 7)
    with LabelStoreWriter(tmp_path / "b", a_manifest()) as writer:
        writer.add("v", a_map(5), image)
        writer.add("w", a_map(6))
    add(tmp_path / "b", {"y": 9})
    merged = merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert (len(merged), merged.num_superseded, sorted(merged.keys())) == (5, 0, ["v", "w", "x", "y", "z"])
    assert same(merged["y"], a_map(4))
    assert merged.generation("y") == 2  # it counts beside older copies of it, too
    assert same(LabelStore(tmp_path / "c", tmp_path / "b")["y"], a_map(4))
    assert (merged.image("v"), merged.image("w"), merged.image("q")) == (image, Fingerprint(), None)
    add(tmp_path / "a", {"x": 8}, generation=3)
    again = merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert same(again["x"], a_map(8))
    add(tmp_path / "d", {"v": 0})
    capsys.readouterr()
    with pytest.raises(StoreError, match=r"1 image has different labels in several files \(v\)"):
        merge_stores([tmp_path / "b", tmp_path / "d"], tmp_path / "e", duplicates="refuse")
    assert not (tmp_path / "e").exists()
    assert len(merge_stores([tmp_path / "b", tmp_path / "d"], tmp_path / "e")) == 3
    assert capsys.readouterr().err.count("different labels") == 1


def test_a_store_is_not_merged_into_itself(tmp_path, monkeypatch):
    write(tmp_path / "a", range(3))
    write(tmp_path / "b", range(3, 5))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match=r"a: is the store that is to be copied; choose another folder"):
        merge_stores(["./a", "a"], tmp_path / "a")
    with pytest.raises(StoreError, match=r"lies in the store b; choose a folder outside of it"):
        merge_stores(["a", "b"], "b/merged")
    assert holds(merge_stores(["a", "b"], "a"), range(5))  # that continues it


def test_a_key_outside_of_the_keys_is_an_altered_index(tmp_path):
    write(tmp_path, range(1))
    (path,) = tmp_path.glob("*.safetensors")
    data = path.read_bytes()
    (header_bytes,) = struct.unpack_from("<Q", data)
    index = bytearray(data[8 + header_bytes : 40 + header_bytes])
    struct.pack_into("<I", index, 20, 1 << 31)
    header = data[8 : 8 + header_bytes].replace(
        str(crc32(data[8 + header_bytes : 40 + header_bytes])).encode(), str(crc32(index)).encode()
    )
    path.write_bytes(struct.pack("<Q", len(header)) + header + index + data[40 + header_bytes :])
    with pytest.raises(StoreError, match="a key lies outside"):
        LabelStore(tmp_path)


def test_keys_of_equal_hash_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("tokenlabel.labels.shards.key_hash", lambda name: 7)
    monkeypatch.setattr("tokenlabel.labels.store.key_hash", lambda name: 7)
    write(tmp_path / "labels", range(3), max_shard_bytes=1)
    store = LabelStore(tmp_path / "labels")
    assert holds(store, range(3))
    assert key_of(4) not in store


@settings(max_examples=50, deadline=None)
@given(hashes=st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 20) | st.integers(2**64 - 20, 2**64 - 1)))
def test_hashes_are_found_by_their_first_bits(hashes):
    ordered = sorted(hashes)
    shift, starts = _starts_by_first_bits(np.array(ordered, np.uint64))
    for wanted in {*ordered, 0, 2**63, 2**64 - 1}:
        among = range(starts[wanted >> shift], starts[(wanted >> shift) + 1])
        assert [i for i in among if ordered[i] == wanted] == [i for i, h in enumerate(ordered) if h == wanted]


def test_missing_labels_say_what_to_do(tmp_path):
    write(tmp_path / "labels", range(1))
    with pytest.raises(StoreError, match=r"labels: holds no label of 'cat\.jpg'; `tokenlabel annotate`"):
        LabelStore(tmp_path / "labels")["cat.jpg"]
    with pytest.raises(StoreError, match=r"nowhere: no label store"):
        LabelStore(tmp_path / "nowhere")


def test_maps_of_other_classes_are_refused(tmp_path):
    with LabelStoreWriter(tmp_path / "labels", a_manifest()) as writer:
        with pytest.raises(StoreError, match="cat: a map of"):
            writer.add("cat", a_map(0, num_classes=12))
        with pytest.raises(StoreError, match="cat: a map of"):
            writer.add("cat", a_map(0, topk=4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probs": np.array([[[0.8, np.nan]]], np.float32)}, "1 of 2 scores are not finite"),
        ({"probs": np.array([[[0.8, -0.1]]], np.float32)}, r"smallest of -0\.1"),
        ({"probs": np.array([[[0.8, 0.9]]], np.float32)}, r"largest sum of 1\.7"),
        ({"codes": np.array([[[1, 1]]], np.uint8)}, "names the same class twice"),
        ({"codes": np.array([[[0, 2]]], np.uint8)}, "indices into a palette of 2; got uint8 from 0 to 2"),
        ({"palette": np.array([7, 3])}, r"ascending class ids .* got \[7, 3\]"),
        ({"palette": np.array([3, 10])}, r"class ids from 0 to 9; got \[3, 10\]"),
    ],
)
@pytest.mark.parametrize("encoding", Encoding)
def test_values_that_a_map_must_not_have_are_not_written(tmp_path, encoding, change, message):
    codes, probs = np.array([[[0, 1]]], np.uint8), np.array([[[0.8, 0.1]]], np.float32)
    right = ScoreMap(np.array([3, 7]), codes, probs, num_classes=10)
    with LabelStoreWriter(tmp_path / "labels", a_manifest(encoding=encoding)) as writer:
        writer.add("ant", right)
        with pytest.raises(ValueError, match=f"^cat: .*{message}"):
            writer.add("cat", replace(right, **change))
    assert list(LabelStore(tmp_path / "labels")) == ["ant"]


@pytest.mark.parametrize(
    "changes", [{"num_classes": 12}, {"topk": 2}, {"class_names": tuple("abcdefghij")}, {"teacher": {"name": "other"}}]
)
def test_a_store_takes_no_labels_of_another_kind(tmp_path, changes):
    write(tmp_path / "labels", range(1))
    with pytest.raises(StoreError, match="choose another folder"):
        LabelStoreWriter(tmp_path / "labels", a_manifest(**changes))
    assert holds(LabelStore(tmp_path / "labels"), range(1))


def test_labels_in_an_encoding_of_another_version_are_named(tmp_path):
    with LabelStoreWriter(tmp_path, Manifest(num_classes=2, topk=1)):
        pass
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"compact"', '"lzma"'))
    with pytest.raises(StoreError, match=r"manifest\.json: labels in encoding 'lzma', .*reads raw and compact"):
        LabelStore(tmp_path)


def test_other_peoples_folders_are_left_alone(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"precious")
    with pytest.raises(StoreError, match="not empty and no label store"):
        LabelStoreWriter(tmp_path, a_manifest())
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    writer = LabelStoreWriter(tmp_path / "labels", a_manifest())
    writer.add(key_of(0), a_map(0))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left on device"), writer:
        writer.flush()
    assert not list((tmp_path / "labels").glob("*.tmp"))
    assert len(LabelStore(tmp_path / "labels")) == 0


def test_manifest(tmp_path):
    manifest = a_manifest(
        class_names=tuple("abcdefghij"), teacher={"name": "t", "sizes": (1, 2)}, preprocessing={"size": 5}
    )
    write(tmp_path / "labels", range(1), manifest)
    assert read_manifest(tmp_path / "labels") == manifest
    failures = [Failure("x.jpg", "does not decode")]
    update_failures(tmp_path / "labels", failures)
    assert LabelStore(tmp_path / "labels").manifest.failures == tuple(failures)
    write(tmp_path / "labels", range(1, 2), manifest)  # failures don't make it another store


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("format_version", 2, "reads 1"),
        ("num_classes", "10", "expected int"),
        ("num_classes", 1, "2 classes"),
        ("class_names", ["a"], "1 class names"),
        ("encoding", "gzip", "gzip"),
        ("failures", [{"key": "x"}], "reason"),
    ],
)
def test_a_broken_manifest_is_one_clear_error(tmp_path, entry, value, message):
    write(tmp_path / "labels", range(1))
    path = tmp_path / "labels" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {entry: value}))
    with pytest.raises(StoreError, match=rf"manifest\.json.*{message}"):
        LabelStore(tmp_path / "labels")


def test_a_manifest_that_is_not_json(tmp_path):
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(StoreError, match="not JSON"):
        LabelStore(tmp_path)


def test_a_record_moved_to_another_key_is_refused(tmp_path):
    """The checksum is over key and record: a record cannot be passed off as another image's."""
    write(tmp_path / "labels", range(2))
    (path,) = (tmp_path / "labels").glob("*.safetensors")
    data = bytearray(path.read_bytes())
    length = len(data)
    payload = load_file(path)["payload"]
    size = len(payload) // 2
    data[length - 2 * size : length - size], data[length - size :] = (bytes(payload[size:]), bytes(payload[:size]))
    path.write_bytes(bytes(data))
    with pytest.raises(StoreError, match="was altered"):
        LabelStore(tmp_path / "labels")[key_of(0)]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return the bytes with one thing done to them that happens to files, or that a stranger would try."""
    at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    # Most of a file is payload: look at the header, where the structure is, as often as at the rest.
    if rng.random() < 0.5:
        at, end = sorted(rng.randrange(min(700, len(data))) for _ in range(2))
    match rng.randrange(7):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + data[end:]
        case 2:
            return data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:]
        case 3:
            return data[:at] + bytes(end - at) + data[end:]
        case 4:
            return data[:at] + rng.choice([b"0", b"9", b"-", b"[", b'"', b"1e9"]) + data[at + 1 :]
        case _:
            changed = bytearray(data)
            for _ in range(rng.randrange(1, 4)):
                changed[rng.randrange(at, len(data)) if at < len(data) else 0] ^= 1 << rng.randrange(8)
            return bytes(changed)


@pytest.fixture
def memory_path(tmp_path):
    """A folder in memory, where there is one: ten thousand files are written to it."""
    shared_memory = Path("/dev/shm")
    if not shared_memory.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared_memory) as folder:
        yield Path(folder)


def read_or_none(store: LabelStore, key: str) -> ScoreMap | None:
    """Read a label; None for a StoreError, the only error that a broken file may lead to."""
    try:
        return store[key]
    except StoreError:
        return None


@pytest.mark.parametrize("encoding", [Encoding.RAW, Encoding.COMPACT])
def test_a_mutated_shard_gives_the_right_maps_or_a_clear_error(memory_path, encoding):
    folder = memory_path / "labels"
    originals = {key_of(i): a_map(i) for i in range(3)}
    image = Fingerprint(1, 2, 3)
    with LabelStoreWriter(folder, a_manifest(encoding=encoding)) as writer:
        for key, score_map in originals.items():
            writer.add(key, score_map, image)
    right = {key: LabelStore(folder)[key] for key in originals}
    (path,) = folder.glob("*.safetensors")
    data = path.read_bytes()
    rng = random.Random(0)
    num_read = 0
    for _ in range(NUM_MUTATIONS // 2):
        path.write_bytes(mutated(data, rng))
        try:
            store = LabelStore(folder)
        except StoreError as error:
            assert path.name in str(error)  # noqa: PT017
            continue
        with suppress(StoreError):
            assert {store.image(key) for key in originals} <= {image, Fingerprint(), None}
        for key in originals:
            read = read_or_none(store, key)
            if read is not None:
                num_read += 1
                assert np.array_equal(read.class_ids, right[key].class_ids)
                assert np.array_equal(read.probs, right[key].probs)
    assert 0 < num_read < 1.5 * NUM_MUTATIONS // 2


def forged(data: bytes, rng: random.Random) -> bytes:
    """Return a label file with changed bytes in index, keys or records, and all checksums made anew."""
    (header_bytes,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + header_bytes])
    index, keys, payload = (
        bytearray(data[8 + header_bytes :][slice(*header[name]["data_offsets"])])
        for name in ("index", "keys", "payload")
    )
    for _ in range(rng.randrange(1, 4)):
        part = rng.choice([index, keys, payload, payload])
        part[rng.randrange(len(part))] = rng.choice([0, 1, 127, 255, rng.randrange(256)])
    for row in range(0, len(index), 32):
        _, start, length, key_start, key_length, _, _ = struct.unpack_from("<QQIIHHI", index, row)
        key, record = keys[key_start : key_start + key_length], payload[start : start + length]
        struct.pack_into("<I", index, row + 28, crc32(record, crc32(key)))
    header["__metadata__"] |= {"index_crc32": str(crc32(index)), "keys_crc32": str(crc32(keys))}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + index + keys + payload


@pytest.mark.parametrize("encoding", [Encoding.RAW, Encoding.COMPACT])
def test_a_forged_shard_gives_maps_within_bounds_or_a_clear_error(memory_path, encoding):
    """What has right checksums may say anything, but not lead outside of its classes and cells."""
    folder = memory_path / "labels"
    write(folder, range(3), a_manifest(encoding=encoding))
    (path,) = folder.glob("*.safetensors")
    data = path.read_bytes()
    rng = random.Random(0)
    num_read = 0
    for _ in range(NUM_MUTATIONS // 10):
        path.write_bytes(forged(data, rng))
        try:
            store = LabelStore(folder)
        except StoreError:  # a key that lies outside of the keys
            continue
        for key in map(key_of, range(3)):
            read = read_or_none(store, key) if key in store else None
            if read is not None:
                num_read += 1
                assert read.codes.shape == read.probs.shape
                assert 0 <= read.class_ids.min() <= read.class_ids.max() < 10
                assert np.isfinite(read.probs).all()
    assert NUM_MUTATIONS // 10 < num_read < 3 * NUM_MUTATIONS // 10


def test_reading_from_many_threads(tmp_path):
    write(tmp_path / "labels", range(40), max_shard_bytes=1000)
    store = LabelStore(tmp_path / "labels")
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda i: same(store[key_of(i % 40)], a_map(i % 40)), range(400)))


WRITE_FOREVER = """
import sys
from test_store import a_manifest, a_map, key_of
from tokenlabel.labels.writer import LabelStoreWriter
folder, start, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with LabelStoreWriter(folder, a_manifest(), max_shard_bytes=800) as writer:
    for i in range(start, 4000, step):
        writer.add(key_of(i), a_map(i))
        print(i, flush=True)
"""


def start_writer(folder, start: int, step: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WRITE_FOREVER, str(folder), str(start), str(step)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent,
    )


def numbers_in(store: LabelStore) -> set[int]:
    return {int(key.split()[-1].removesuffix(".a.jpg")) for key in store.keys()}  # noqa: SIM118  (not a dict)


def test_readers_never_see_half_a_file_and_kills_cost_only_the_open_one(tmp_path):
    """Two processes write while this one reads; they are killed at random, three times."""
    rng = random.Random(0)
    folder = tmp_path / "labels"
    LabelStoreWriter(folder, a_manifest())
    start, there = 0, set()
    for _ in range(3):
        writers = [start_writer(folder, start + i, 2) for i in range(2)]
        for writer in writers:
            assert writer.stdout is not None
            writer.stdout.readline()  # it is at work
        until = time.monotonic() + rng.uniform(0.05, 0.4)
        while time.monotonic() < until:
            store = LabelStore(folder)
            for i in rng.sample(sorted(numbers_in(store)), min(5, len(store))):
                assert same(store[key_of(i)], a_map(i))
        told = []
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            told.append([int(line) for line in writer.communicate()[0].split()])
        there = numbers_in(LabelStore(folder))
        for numbers in told:
            assert len([i for i in numbers if i not in there]) <= 10, "more than the open file is gone"
        start = max(there, default=-1) + 2
        start += start % 2
    assert len(there) > 50
    assert holds(LabelStore(folder), sorted(there))


def test_leftovers_of_killed_writers_are_cleared_away(tmp_path):
    write(tmp_path, range(1))
    old, new = tmp_path / ".a.safetensors.1.tmp", tmp_path / ".b.safetensors.2.tmp"
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    os.utime(old, (0, 0))
    assert holds(LabelStore(tmp_path), range(1))
    remove_leftovers(tmp_path)
    assert not old.exists()
    assert new.exists()


def test_a_shard_of_too_long_a_key_is_refused(tmp_path):
    with pytest.raises(StoreError, match="65535 bytes"):
        write_shard(tmp_path, [("k" * 70_000, b"")])


def test_the_hash_is_that_of_the_format():
    """As `b2sum -l 64` prints it: other programs find keys by it."""
    assert key_hash(b"train/n01440764/n01440764_10026.JPEG") == int.from_bytes(
        bytes.fromhex("630095175699276e"), "little"
    )


def test_reading_labels_takes_no_torch():
    code = "import sys, tokenlabel.labels.store; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_stores_are_merged_into_one(tmp_path):
    write(tmp_path / "a", range(3), a_manifest(failures=(Failure(key_of(4), "broken"), Failure("x", "broken"))))
    write(tmp_path / "b", range(3, 6), max_shard_bytes=1)
    merged = merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert holds(merged, range(6))
    assert len(merged.shards) == 1
    assert merged.manifest.failures == (Failure("x", "broken"),)
    again = merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert len(again.shards) == 1
    compact = merge_stores([tmp_path / "c"], tmp_path / "d", tolerance=0)
    assert compact.manifest.encoding is Encoding.COMPACT
    assert all(np.abs(compact[key].dense() - merged[key].dense()).max() < 1 / 500 for key in merged.keys())  # noqa: SIM118
    with pytest.raises(StoreError, match="holds labels in encoding compact"):
        merge_stores([tmp_path / "c"], tmp_path / "d", encoding=Encoding.RAW)
    with pytest.raises(StoreError, match="holds labels of tolerance 0; choose another folder"):
        merge_stores([tmp_path / "c"], tmp_path / "d", tolerance=0.1)
    with pytest.raises(ValueError, match="--tolerance is of compact records; leave --encoding out"):
        merge_stores([tmp_path / "c"], tmp_path / "e", encoding=Encoding.RAW, tolerance=0.1)
    coarse = merge_stores([tmp_path / "c"], tmp_path / "e", tolerance=0.1)
    assert coarse.num_bytes() < compact.num_bytes()
    write(tmp_path / "f", [6])
    larger = merge_stores([tmp_path / "f"], tmp_path / "e", encoding=Encoding.COMPACT)
    assert larger.packed(key_of(6)) == pack(a_map(6), Encoding.COMPACT, tolerance=0.1), "as the output's others"


def test_a_store_is_continued_in_its_own_encoding(tmp_path):
    write(tmp_path, range(1), a_manifest(encoding=Encoding.COMPACT))
    write(tmp_path, range(1, 2), a_manifest(encoding=Encoding.RAW, tolerance=0.1))
    assert LabelStore(tmp_path).packed(key_of(1)) == pack(a_map(1), Encoding.COMPACT)


def test_cells_keep_their_best_entry_where_an_empty_one_would_say_nothing(tmp_path):
    """Classes of .004 each are not worth their bytes; in a store whose empty cells are even they go."""
    ids, probs = np.arange(3)[None, None], np.full((1, 1, 3), 0.004)
    for nowhere, num_kept in (("spread evenly", 0), ("renormalise", 1)):
        manifest = a_manifest(encoding=Encoding.COMPACT, teacher={"class_map": {"nowhere": nowhere}})
        with LabelStoreWriter(tmp_path / nowhere, manifest) as writer:
            writer.add("a", from_top(ids, probs, num_classes=10))
        assert np.count_nonzero(LabelStore(tmp_path / nowhere)["a"].probs) == num_kept


@pytest.mark.parametrize("encoding", [*Encoding])
def test_a_cell_of_which_nothing_is_known_stays_so(tmp_path, encoding):
    codes, probs = np.zeros((1, 2, 1), np.uint8), np.array([[[1.0], [0.0]]], np.float32)
    unknown = ScoreMap(np.array([3]), codes, probs, num_classes=10)
    even = replace(unknown, empty_is_even=True)
    net = {"teacher": {"name": "net"}}
    for name, changes, kept in (("own", {}, False), ("even", {"empty_is_even": True}, True), ("net", net, True)):
        manifest = a_manifest(encoding=encoding, **changes)
        with LabelStoreWriter(tmp_path / name, manifest) as writer:
            writer.add("a", even if kept else unknown)
            with pytest.raises(StoreError, match=f"b: empty_is_even is {not kept} of this map .* {kept} of the store"):
                writer.add("b", unknown if kept else even)
        store = LabelStore(tmp_path / name)
        assert store["a"].empty_is_even == kept
        targets = align(collate_score_maps([store["a"]]), stack_views([View.identity()]), (1, 2), samples=1)
        assert targets.weight.tolist() == [[1.0, float(kept)]]
    with pytest.raises(StoreError, match="empty_is_even is False there, True here"):
        LabelStoreWriter(tmp_path / "own", a_manifest(encoding=encoding, empty_is_even=True))
    content = json.loads((tmp_path / "own" / "manifest.json").read_text())
    del content["empty_is_even"]  # an earlier version's, which took them for even ones
    (tmp_path / "own" / "manifest.json").write_text(json.dumps(content))
    assert LabelStore(tmp_path / "own")["a"].empty_is_even


def test_a_network_is_known_by_its_weights_however_its_path_is_spelt(tmp_path):
    def made_by(name, weights="blake2b:1"):
        return a_manifest(teacher={"members": [{"name": name, "weights": weights}], "flip": False})

    write(tmp_path / "labels", range(1), made_by("runs/teacher"))
    write(tmp_path / "labels", range(1, 2), made_by("/home/me/runs/teacher/"))
    with pytest.raises(StoreError, match="runs/teacher here, another one of the same name"):
        write(tmp_path / "labels", range(2, 3), made_by("runs/teacher", "blake2b:2"))
    assert holds(LabelStore(tmp_path / "labels"), range(2))


def test_a_kill_before_the_first_manifest_does_not_spoil_the_folder(tmp_path):
    (tmp_path / ".manifest.json.123.tmp").write_text("{")
    write(tmp_path, range(1))
    assert holds(LabelStore(tmp_path), range(1))
