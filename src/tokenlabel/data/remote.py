"""Images in tar files behind URLs: the same images in the same order as from a disk, by way of a cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from tokenlabel.data.images import NO_TIME, ImageSource
from tokenlabel.data.tar_index import INDEX_NAME, TarIndex, last_starts, load_index, mark_of, save_index, scan_tars
from tokenlabel.data.tars import TarImages, refuse_parts
from tokenlabel.runtime.cache import cache_bytes, cached_index, exclusive, fetch, fetched_ahead, refuse_small_cache
from tokenlabel.runtime.errors import DataError, RemoteError
from tokenlabel.runtime.process import T, is_main_process, listed, say
from tokenlabel.runtime.remote import RemoteFile, digest_of, folder_urls, remote_files
from tokenlabel.runtime.urls import expanded, last_part


class RemoteTars(TarImages):
    """Images in tar files behind URLs. Reading the first image of a file downloads the whole file into the cache.

    `marks`: the checksum of one header in each file, from a published index; a file with another checksum is refused.
    `read` raises RemoteError for a file that cannot be downloaded.
    """

    def __init__(self, tars: Sequence[RemoteFile], index: TarIndex, marks: NDArray[np.int64] | None = None) -> None:
        super().__init__([], index)
        self.tars, self._marks, self.remarks = list(tars), marks, list[str]()

    @property
    def files(self) -> Mapping[int, RemoteFile]:
        """The file of each group."""
        return dict(enumerate(self.tars))

    def streamed(self) -> RemoteTars:
        """Return the same images: files are fetched whole as it is."""
        return self

    def stat(self, index: int) -> tuple[int, int]:
        """Return the bytes of the image, and NO_TIME for when it was modified: many servers do not say."""
        return int(self.index.places[index, 2]), NO_TIME

    def _path(self, tar: int) -> Path:
        return fetch(self.tars[tar], partial(self._check_indexed, tar))

    def _name(self, tar: int) -> str:
        return self.tars[tar].url

    def _check_indexed(self, tar: int, path: Path) -> None:
        """Raise DataError if the copy of a file is not the one that the published index describes."""
        start = last_starts(self.index.places, len(self.tars))[tar]
        if self._marks is not None and mark_of(path, start) != self._marks[tar]:
            raise DataError(
                f"{self._name(tar)}: is another than {INDEX_NAME} beside it was written for; write it again"
            )


def open_remote(url: str) -> RemoteTars:
    """Return the images of the tar files that a URL with braces or `*` stands for, or that are in its folder.

    What is in them says the index beside them (`tokenlabel index` writes it before they are copied there), else each
    is fetched once to see, and the cache remembers. Raises RemoteError and DataError.
    """
    urls = expanded(url)
    if len(urls) == 1 and ("*" in url or not _is_tar(url)):
        urls = [name for name in folder_urls(url, maxdepth=1) if _is_tar(name)]
        if not urls:
            raise DataError(
                f"{url}: no .tar files; images behind URLs are read from tar files (WebDataset), such as "
                "train-{000..127}.tar"
            )
        refuse_parts(url, [last_part(name) for name in urls])
    urls = sorted(dict.fromkeys(urls), key=lambda name: (last_part(name), name))
    files = remote_files(urls)
    images = _by_published_index(files) or RemoteTars(files, _looked_through(files))
    cache_bytes()  # raises for a limit that is no size; one that is too small is only a remark here
    try:
        refuse_small_cache(files, at_once=None, remedy="")
    except RemoteError as error:
        images.remarks = [f"read shard by shard, since they are more than the cache holds ({error})"]
    return images


def read_ahead(source: ImageSource, batches: Iterable[Sequence[tuple[int, int]]], results: Iterable[T]) -> Iterable[T]:
    """Yield the results of batches of (epoch, index), and download the files of later batches in the meantime."""
    files: Mapping[int, RemoteFile] = getattr(source, "files", None) or {}
    if not files:
        return results
    groups, reached = getattr(source, "groups"), 0  # noqa: B009  (no part of every source)

    def _taken() -> Iterator[T]:
        nonlocal reached
        with fetched_ahead(_first_uses(groups, files, batches), lambda: reached):
            for result in results:
                yield result
                reached += 1

    return _taken()


def _first_uses(
    groups: NDArray[np.int64], files: Mapping[int, RemoteFile], batches: Iterable[Sequence[tuple[int, int]]]
) -> Iterator[tuple[int, RemoteFile]]:
    """Yield the number of the batch that wants a file first in each epoch, and the file."""
    seen: dict[int, set[int]] = {}
    for number, batch in enumerate(batches):
        seen = {epoch: seen.get(epoch, set()) for epoch in {epoch for epoch, _ in batch}}
        for epoch, index in batch:
            group = int(groups[index])
            if group in files and group not in seen[epoch]:
                seen[epoch].add(group)
                yield number, files[group]


def _by_published_index(files: Sequence[RemoteFile]) -> RemoteTars | None:
    """Return images by the index that lies beside their files; None if there is none, or it is of other files."""
    folders = {file.url.rpartition("/")[0] for file in files}
    if len(folders) > 1 or "?" in files[0].url:
        return None
    url = f"{folders.pop()}/{INDEX_NAME}"
    try:
        (found,) = remote_files([url])
    except RemoteError:
        return None
    index, names, sizes, marks = load_index(fetch(found))
    if names == [last_part(file.url) for file in files] and sizes.tolist() == [file.num_bytes for file in files]:
        return RemoteTars(files, index, marks)
    if {*names} == {last_part(file.url) for file in files}:
        raise DataError(f"{url}: the tar files beside it have changed since; write it again, or delete it")
    return None


def _looked_through(files: Sequence[RemoteFile]) -> TarIndex:
    """Return what is in files, as the cache remembers it or by fetching each once."""
    digest = digest_of(files)
    path = cached_index(digest)
    with exclusive(f"{digest[:2]}.index.lock"):  # of several processes one looks
        if path.exists():
            return load_index(path)[0]
        folder = files[0].url.partition("?")[0].rpartition("/")[0]
        say(
            f"{folder}: no {INDEX_NAME} of {listed([last_part(file.url) for file in files])} there, so each is fetched "
            "once to see what is in it"
        )
        reached = 0
        with tqdm(total=len(files), unit="tar", disable=not is_main_process()) as bar:

            def _local(tar: int) -> Path:
                nonlocal reached
                reached = tar
                bar.update()
                return fetch(files[tar])

            with fetched_ahead(enumerate(files), lambda: reached):
                index = scan_tars([file.url for file in files], _local)
        none = np.zeros(0, np.int64)
        save_index(path, index, [file.url for file in files], none, none)
    return index


def _is_tar(url: str) -> bool:
    return url.partition("?")[0].lower().endswith(".tar")
