"""Images and labels behind URLs, from servers that the tests start: HTTP, and S3 by moto."""

from __future__ import annotations

import http.server
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hub_server import TOKEN, running_hub
from PIL import Image

from tokenlabel.cli import main
from tokenlabel.core.scores import from_mask
from tokenlabel.data.remote import RemoteTars
from tokenlabel.data.sources import open_images
from tokenlabel.data.tars import write_index
from tokenlabel.labels.manifest import Manifest
from tokenlabel.labels.store import LabelStore
from tokenlabel.labels.writer import LabelStoreWriter
from tokenlabel.runtime import cache
from tokenlabel.runtime.errors import DataError, RemoteError, StoreError
from tokenlabel.runtime.urls import as_url, expanded, without_secrets

pytest.importorskip("aiohttp")

NUM_TARS, NUM_IMAGES = 4, 5  # in each tar file


class Server:
    """An HTTP server of a folder: what it was asked for, and what it does wrong."""

    def __init__(self, folder: Path) -> None:
        self.requests: list[str] = []
        self.cut_off: dict[str, int] = {}  # how often a file is to break off
        self.stalls: set[str] = set()
        self.status: dict[str, int] = {}
        self.ended = threading.Event()
        server = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                name = self.path.rpartition("/")[2]
                server.requests.append(name)
                if name in server.status:
                    self.send_error(server.status[name])
                elif name in server.stalls:
                    server.ended.wait(20)
                elif server.cut_off.get(name, 0):
                    server.cut_off[name] -= 1
                    data = Path(self.translate_path(self.path)).read_bytes()
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data[: len(data) // 2])
                else:
                    super().do_GET()

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()

    def count(self, name: str) -> int:
        return self.requests.count(name)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENLABEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TOKENLABEL_TIMEOUT", "5")


@pytest.fixture
def folder(tmp_path):
    """Four tar files of five images each, of two classes, whose keys lie across the files, and labels of them."""
    folder = tmp_path / "served" / "images"
    folder.mkdir(parents=True)
    for number in range(NUM_TARS):
        with tarfile.open(folder / f"part-{number:03}.tar", "w") as tar:
            for i in range(NUM_IMAGES):
                buffer = io.BytesIO()
                pixels = np.random.default_rng((number, i)).integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(buffer, "PNG")
                member = tarfile.TarInfo(f"{('ant', 'bee')[i % 2]}/{i}{number}.png")
                member.size = len(buffer.getvalue())
                tar.addfile(member, io.BytesIO(buffer.getvalue()))
    return folder


@pytest.fixture
def labels(folder):
    """A store of labels of the images, beside them."""
    manifest = Manifest(num_classes=2, topk=1, class_names=("ant", "bee"))
    with LabelStoreWriter(folder.parent / "labels", manifest) as writer:
        for key in open_images(folder).keys:
            writer.add(key, from_mask(np.array([[0, 1]]), num_classes=2))
    return folder.parent / "labels"


@pytest.fixture
def server(folder):
    server = Server(folder.parent)
    yield server
    server.close()


@pytest.fixture(scope="module")
def s3():
    """An S3 server; yields the environment of those who ask it."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stderr=subprocess.DEVNULL
    )
    for _ in range(600):
        with socket.socket() as trial:
            if trial.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield {
        "FSSPEC_S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    process.terminate()
    process.wait()


def run(*arguments: str, cwd: Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tokenlabel", *arguments],
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
    )


def contents(source) -> list[tuple[str, int, bytes]]:
    return [(key, int(source.class_ids[i]), source.read(i)) for i, key in enumerate(source.keys)]


class TestNames:
    def test_braces_stand_for_names(self):
        assert expanded("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
        assert expanded("{a,b}/{1..2}") == ["a/1", "a/2", "b/1", "b/2"]
        assert expanded("plain.tar") == ["plain.tar"]
        with pytest.raises(RemoteError, match=r"\{3\.\.1\} is no range"):
            expanded("{3..1}.tar")

    @pytest.mark.parametrize(
        "name", ["data/train", "/data/train", "C:/data", "masks:DIR", "a:b", "./s3:/x", "https:/x"]
    )
    def test_paths_are_no_urls(self, name):
        assert as_url(name) is None

    def test_a_url_survives_a_path(self):
        assert as_url("S3://bucket/a") == as_url(Path("s3://bucket/a")) == "s3://bucket/a"

    @pytest.mark.parametrize("name", ["file:///data/train", Path("file:///data/train")])
    def test_a_file_url_is_refused_with_the_path_that_it_means(self, name):
        with pytest.raises(RemoteError, match=r"^file:///data/train: .* give it as a path, /data/train$"):
            open_images(name)

    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("https://me:word@host:80/p-{0..1}.tar?X-Amz-Signature=a/b", "https://host:80/p-{0..1}.tar"),
            ("(http:/host/a?sig=b'c): gone", "(http://host/a): gone"),
            ("['s3://key:word@bucket/a', 'http://b?c']", "['s3://bucket/a', 'http://b']"),
            ("hf:/me/run@v1: is it hf://me/run@v2?", "hf://me/run@v1: is it hf://me/run@v2?"),
            ("masks:/data/what?", "masks:/data/what?"),
            ("sftp:/me:word@host/a.tar", "sftp://host/a.tar"),  # as `Path` leaves it
            ({"a": ["http://b?c", 1], "d": None}, {"a": ["http://b", 1], "d": None}),
        ],
    )
    def test_others_see_urls_without_secrets_and_with_both_slashes(self, text, shown):
        assert without_secrets(text) == shown

    def test_braces_name_tar_files_of_a_disk_as_well(self, folder):
        assert contents(open_images(f"{folder}/part-{{000..003}}.tar")) == contents(open_images(folder))


class TestOverHttp:
    @pytest.mark.parametrize("name", ["images/part-{000..003}.tar", "images", "images/"])
    def test_images_are_those_of_the_disk_in_the_same_order(self, server, folder, name):
        source = open_images(f"{server.url}/{name}")
        assert isinstance(source, RemoteTars)
        assert contents(source) == contents(open_images(folder))
        assert source.class_names == ["ant", "bee"]
        assert [source.groups[i] for i in range(len(source))] == [int(key[5]) for key in source.keys]

    def test_each_file_is_fetched_once_and_looked_through_once(self, server):
        names = [f"part-{number:03}.tar" for number in range(NUM_TARS)]
        contents(open_images(f"{server.url}/images/part-{{000..003}}.tar"))
        contents(open_images(f"{server.url}/images/part-{{000..003}}.tar"))
        assert [server.count(name) for name in names] == [1] * NUM_TARS

    def test_no_line_shows_the_signature_of_a_url(self, server, tmp_path, capsys):
        name = "images/part-00{0..1}.tar?X-Amz-Signature=SECRET"
        teacher = ["--teacher", f"masks:{tmp_path}", "--size=4"]
        assert main(["annotate", f"{server.url}/{name}", str(tmp_path / "labels"), *teacher]) == 2
        said = "".join(capsys.readouterr())
        assert "/images: no tokenlabel-index.npz of part-000.tar, part-001.tar there" in said
        assert "/images/part-00{0..1}.tar: 10 images of 2 classes" in said
        assert "SECRET" not in said
        assert main(["annotate", f"{server.url}/no{name}", str(tmp_path / "labels"), *teacher]) == 2
        said = "".join(capsys.readouterr())
        assert "/noimages/part-000.tar: no such file" in said
        assert "SECRET" not in said

    def test_an_index_beside_the_files_spares_looking_into_them(self, server, folder):
        write_index(folder)
        source = open_images(f"{server.url}/images/part-{{000..003}}.tar")
        assert not [name for name in server.requests if name.endswith(".tar")]
        assert contents(source) == contents(open_images(folder))

    def test_an_index_of_other_files_is_refused_when_they_come(self, server, folder):
        write_index(folder)
        path = folder / "part-001.tar"
        path.write_bytes(path.read_bytes().replace(b"ant/", b"elk/").replace(b"bee/", b"yak/"))
        source = open_images(f"{server.url}/images/part-{{000..003}}.tar")
        with pytest.raises(DataError, match=r"part-001\.tar: is another than tokenlabel-index\.npz"):
            contents(source)

    def test_a_file_that_was_replaced_is_fetched_again(self, server, folder):
        url = f"{server.url}/images/part-000.tar"
        before = contents(open_images(url))
        path = folder / "part-000.tar"
        path.write_bytes((folder / "part-001.tar").read_bytes())
        os.utime(path, (1e9, 1e9))  # another version, of another time
        assert contents(open_images(url)) != before
        assert contents(open_images(url)) == contents(open_images(path))

    def test_the_least_recently_used_files_leave_a_full_cache(self, server, folder, tmp_path, monkeypatch):
        write_index(folder)
        size = (folder / "part-000.tar").stat().st_size
        monkeypatch.setenv("TOKENLABEL_CACHE_SIZE", f"{2 * size + size // 2}")  # of all tar files the same
        source = open_images(f"{server.url}/images/part-{{000..003}}.tar")
        assert isinstance(source, RemoteTars)
        order = np.argsort(source.groups, kind="stable")
        assert [source.read(int(i)) for i in order] == [open_images(folder).read(int(i)) for i in order]
        cached = sorted(path.name.partition("-")[2] for path in (tmp_path / "cache" / "files").iterdir())
        assert [name for name in cached if name.endswith(".tar")] == ["part-002.tar", "part-003.tar"]

    def test_a_file_that_breaks_off_is_fetched_again_and_then_named(self, server):
        server.cut_off["part-000.tar"] = 2
        assert len(contents(open_images(f"{server.url}/images/part-000.tar"))) == NUM_IMAGES
        server.cut_off["part-001.tar"] = 99
        with pytest.raises(RemoteError, match=r"part-001\.tar: cannot be had .*\(tried 3 times\)$"):
            open_images(f"{server.url}/images/part-001.tar")

    def test_a_run_is_that_from_the_disk_and_goes_on_as_that(self, server, folder, tmp_path, monkeypatch):
        """In a cache that holds three of the four tar files and what is fetched ahead of them, with a data worker."""
        write_index(folder)
        small = str(int(6.5 * (folder / "part-000.tar").stat().st_size))

        monkeypatch.setenv("TOKENLABEL_CACHE_SIZE", small)
        monkeypatch.chdir(tmp_path)

        def weights(out: str, images: str, *, workers: int) -> dict[str, bytes]:
            options = (
                *("--recipe", "demo_token_labels", "--out", out, "--data.train", images, "--num-steps=12"),
                *(f"--data.num-workers={workers}", "--batch-size=4", "--loss.beta=0", "--data.tar-window=2"),
                *("--device=cpu", "--checkpoint.every-epochs=1", "--checkpoint.keep=5"),
            )
            assert main(["train", *options]) == 0
            newest = max((tmp_path / out / "checkpoints").iterdir())
            return {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}

        url = f"{server.url}/images/part-{{000..003}}.tar"
        on_disk = weights("disk", "served/images", workers=0)
        assert weights("cloud", url, workers=1) == on_disk
        shutil.copytree(tmp_path / "disk", tmp_path / "continued")
        first, *others = sorted((tmp_path / "continued" / "checkpoints").iterdir())
        for other in others:
            shutil.rmtree(other)
        assert first.name.lstrip("0") == "5"
        assert weights("continued", url, workers=0) == on_disk

    def test_a_cache_too_small_for_random_reading_is_refused(self, server, folder, tmp_path, monkeypatch, capsys):
        write_index(folder)
        monkeypatch.setenv("TOKENLABEL_CACHE_SIZE", "20KB")
        monkeypatch.chdir(tmp_path)
        images = f"--data.train={server.url}/images/part-{{000..003}}.tar"
        assert main(["train", "--recipe", "demo_token_labels", "--out", "run", "--loss.beta=0", images]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert re.search(r"4 files of .* the cache may hold 20 KB; --data\.tar-window 8 reads them a few", line), line
        monkeypatch.setenv("TOKENLABEL_CACHE_SIZE", "lots")  # is not taken for a small one
        with pytest.raises(RemoteError, match="lots: expected a size such as 500GB"):
            open_images(f"{server.url}/images/part-000.tar")

    def test_a_store_is_pulled_once(self, server, folder, labels):
        store = LabelStore(f"{server.url}/labels")
        assert set(store) == set(open_images(folder).keys)
        before = len(server.requests)
        assert set(LabelStore(f"{server.url}/labels")) == set(store)
        assert not [name for name in server.requests[before:] if name.endswith(".safetensors")]
        with pytest.raises(StoreError, match="are written to a folder of this machine"):
            LabelStoreWriter(f"{server.url}/labels", store.manifest)

    def test_a_folder_that_leaves_the_cache_is_never_seen_in_part(self, server, folder, labels, monkeypatch):
        store = LabelStore(f"{server.url}/labels")
        for descriptor in cache._held.values():  # as when the process that read it has ended
            os.close(descriptor)
        monkeypatch.setattr(cache, "_held", {})
        with monkeypatch.context() as killed:
            killed.setattr(cache.shutil, "rmtree", lambda *_, **__: None)  # before it removed anything
            killed.setenv("TOKENLABEL_CACHE_SIZE", "100")
            cache._make_room(100, "more")
        assert not store.folders[0].exists()
        assert set(LabelStore(f"{server.url}/labels")) == set(store)

    def test_a_folder_that_is_being_fetched_is_not_taken_for_an_abandoned_one(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TOKENLABEL_CACHE", str(tmp_path / "cache"))
        unfinished = tmp_path / "cache" / "folders" / ".labels"
        unfinished.mkdir(parents=True)
        with cache._room(10, "labels", unfinished) as moved:
            for path in (unfinished, *(tmp_path / "cache" / "files").iterdir()):
                os.utime(path, (1e9, 1e9))  # a file of hours
            moved()
            cache._make_room(10, "others")
            assert unfinished.exists()
            assert len([*(tmp_path / "cache" / "files").iterdir()]) == 1
        assert not [*(tmp_path / "cache" / "files").iterdir()]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("images/part-{000..009}.tar", r"images/part-00[4-9]\.tar: no such file"),
        ("nothing/", r"nothing: no such files"),
        ("labels.zip", r"labels\.zip"),
        ("images/locked.tar", r"locked\.tar: no credentials for it"),
        ("images/slow.tar", r"slow\.tar: its server said nothing for 0\.5 s \(tried 3 times\)"),
    ],
)
def test_what_cannot_be_had_is_named_in_one_line(server, folder, tmp_path, monkeypatch, capsys, name, said):
    for other in ("locked", "slow"):
        (folder / f"{other}.tar").write_bytes(b"x")
    server.status["locked.tar"] = 403
    server.stalls.add("slow.tar")
    monkeypatch.setenv("TOKENLABEL_TIMEOUT", "0.5")
    monkeypatch.chdir(tmp_path)
    assert main(["annotate", f"{server.url}/{name}", "labels", "--teacher", "resnet18"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(f"tokenlabel annotate: error: http://127[^ ]*{said}.*", line), line
    assert not (tmp_path / "labels").exists()


def test_images_in_a_data_set_of_the_hub(folder, labels, tmp_path):
    with running_hub() as hub:
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        hub.repos["datasets/me/photos"] = {"private": True, "files": files}
        environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
        ask = partial(run, cwd=tmp_path, environment=environment)
        for name in ("photos/part-{000..003}.tar", "photos"):
            done = ask("inspect", str(labels), "--images", f"hf://datasets/me/{name}", "--json")
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout)["num_judged"] == 20
        done = ask("inspect", str(labels), "--images", "hf://datasets/me/nothing/a.tar")
        assert done.returncode == 2
        assert "hf://datasets/me/nothing/a.tar: no such file" in done.stderr.splitlines()[-1]


class TestS3:
    @pytest.fixture
    def bucket(self, s3, folder, monkeypatch):
        import s3fs

        for name, value in s3.items():
            monkeypatch.setenv(name, value)
        filesystem = s3fs.S3FileSystem(endpoint_url=s3["FSSPEC_S3_ENDPOINT_URL"], skip_instance_cache=True)
        name = f"bucket-{os.urandom(4).hex()}"
        filesystem.mkdir(name)
        filesystem.put(str(folder), f"{name}/images", recursive=True)
        return name

    def test_images_and_labels_in_a_bucket(self, s3, bucket, labels, tmp_path):
        import s3fs

        filesystem = s3fs.S3FileSystem(endpoint_url=s3["FSSPEC_S3_ENDPOINT_URL"], skip_instance_cache=True)
        filesystem.put(str(labels), f"{bucket}/labels", recursive=True)
        for name in ("images/part-{000..003}.tar", "images/*.tar", "images"):
            images = f"s3://{bucket}/{name}"
            done = run("inspect", f"s3://{bucket}/labels", "--images", images, "--json", cwd=tmp_path, environment=s3)
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout)["num_judged"] == 20
            assert f"{images}: 20 images of 2 classes (ant, bee)" in done.stderr

    @pytest.mark.parametrize(
        ("changed", "name", "said"),
        [
            ({}, "images/part-009.tar", "part-009.tar: no such file"),
            ({"AWS_ACCESS_KEY_ID": "", "AWS_EC2_METADATA_DISABLED": "true"}, "images/part-000.tar", "no credentials"),
            (
                {"FSSPEC_S3_ENDPOINT_URL": "http://127.0.0.1:9", "TOKENLABEL_TIMEOUT": "0.5"},
                "images/part-000.tar",
                "(tried 3 times)",
            ),
        ],
    )
    def test_what_cannot_be_had_is_named_in_one_line(self, s3, bucket, labels, tmp_path, changed, name, said):
        done = run(
            "inspect", str(labels), "--images", f"s3://{bucket}/{name}", cwd=tmp_path, environment={**s3, **changed}
        )
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"tokenlabel inspect: error: s3://{bucket}/{name}: ")
        assert said in line
