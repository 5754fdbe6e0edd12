"""A hub in small on this machine: what huggingface_hub asks of one to make, fill and read repositories."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN, USER = "hf_aTokenThatNobodyShallSee", "me"


class Hub(ThreadingHTTPServer):
    """`repos`: {"models/me/first": {"private": True, "files": {name: bytes}}}; writing takes TOKEN, and only USER's are
    there to be written."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, Any]] = {}
        self.connections: list[socket.socket] = []

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, repo: str) -> str:
        """Return the commit that a repository is at: of what it holds."""
        files = self.repos[repo]["files"]
        return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run a hub until the end of the block."""
    hub = Hub()
    thread = Thread(target=hub.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        for connection in hub.connections:  # clients keep them open for their next requests
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path == "/":
            return self._answer(200, b"")
        if found := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)(/revision/([^/]+))?", path):
            return self._about(found[1], revision=found[3])
        if (found := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)/tree/[^/]+", path)) and found[1] in self.server.repos:
            files = self.server.repos[found[1]]["files"].items()
            oids = {name: hashlib.sha1(data).hexdigest() for name, data in files}
            return self._json([{"type": "file", "path": n, "size": len(data), "oid": oids[n]} for n, data in files])
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            repo = f"{'datasets' if found[1] else 'models'}/{found[2]}"
            if repo in self.server.repos:
                data = self.server.repos[repo]["files"][found[3]]
                etag = hashlib.sha256(data).hexdigest()
                return self._answer(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": self.server.commit(repo)})
        return self._answer(404, b"{}")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, b'{"error": "Invalid username or password."}')
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            owner = asked.get("organization") or USER
            if owner != USER:
                return self._answer(403, b'{"error": "Forbidden"}')
            is_private = asked.get("private", asked.get("visibility") == "private")  # by version
            repo = f"{asked.get('type', 'model')}s/{owner}/{asked['name']}"
            self.server.repos.setdefault(repo, {"private": is_private, "files": {}})
            return self._json({"url": f"{self.server.url}/{repo.removeprefix('models/')}"})
        if found := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)/preupload/[^/]+", self.path.split("?")[0]):
            wanted = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                      for file in json.loads(body)["files"]]  # fmt: skip
            return self._json({"files": wanted})
        if found := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)/commit/[^/]+", self.path.split("?")[0]):
            for line in map(json.loads, body.splitlines()):
                files = self.server.repos[found[1]]["files"]
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del files[line["value"]["path"]]
            oid = self.server.commit(found[1])
            return self._json({"commitUrl": f"{self.server.url}/{found[1]}/commit/{oid}", "commitOid": oid})
        return self._json({})  # of the card's head, which is checked

    def _about(self, repo: str, *, revision: str | None) -> None:
        if repo not in self.server.repos:
            return self._answer(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        if revision not in (None, "main", self.server.commit(repo)):
            return self._answer(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
        about = self.server.repos[repo]
        names = [{"rfilename": name} for name in about["files"]]
        return self._json(
            {"id": repo.partition("/")[2], "sha": self.server.commit(repo), "private": about["private"],
             "siblings": names, "tags": [], "downloads": 0, "likes": 0}
        )  # fmt: skip

    def _json(self, content: Any) -> None:
        self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
