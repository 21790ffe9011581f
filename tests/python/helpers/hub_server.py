"""A server on this machine that answers huggingface_hub as the hub would."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_OF_THE_LIBRARY = "/api/agent-harnesses"


class Hub:
    """Repositories, each with one commit, and what was asked for.

    Attributes:
        url: for HF_ENDPOINT.
        requests: (method, path) of everything that was asked for, in order, but for a list that
            huggingface_hub asks for once per process, in whichever test is the first.
        gated: repositories whose files are refused.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[tuple[str, str]] = []
        self.gated: set[str] = set()
        self._folders: dict[str, Path] = {}

    def add(self, repo: str, folder: Path) -> None:
        self._folders[repo] = folder

    def files(self, repo: str) -> dict[str, bytes] | None:
        if repo not in self._folders:
            return None
        folder = self._folders[repo]
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    @staticmethod
    def commit(repo: str) -> str:
        return hashlib.sha1(repo.encode()).hexdigest()

    def downloaded(self) -> list[str]:
        """Paths in repositories that were fetched, without those that were only looked at."""
        paths = [path for method, path in self.requests if method == "GET"]
        return sorted(
            path.split("/resolve/")[1].split("/", 1)[1] for path in paths if "/resolve/" in path
        )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path != _OF_THE_LIBRARY:
            self.hub.requests.append((self.command, path))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            repo, kind, revision = match.groups()
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo, revision, kind = match[1], match[2], "file"
        else:
            return self._send(404)
        files = self.hub.files(repo)
        if files is None:
            return self._send(401, error="RepoNotFound")  # as the hub does for private ones
        if repo in self.hub.gated:
            return self._send(403, error="GatedRepo")
        if revision not in (None, "main", "v1", self.hub.commit(repo)):
            return self._send(404, error="RevisionNotFound")
        if kind == "file":
            return self._send_file(repo, files, match[3])
        entries: list[dict[str, Any]] = [
            {
                **{"type": "file", "path": name, "oid": _blob(data)},  # in a tree
                **{"rfilename": name, "blobId": _blob(data)},  # among siblings
                "size": len(data),
            }
            for name, data in files.items()
        ]
        if kind == "tree":
            return self._send(200, json.dumps(entries).encode())
        info = {"id": repo, "sha": self.hub.commit(repo), "siblings": entries}
        return self._send(200, json.dumps(info).encode())

    def _send_file(self, repo: str, files: dict[str, bytes], name: str) -> None:
        if name not in files:
            return self._send(404, error="EntryNotFound")
        data = files[name]
        headers = {"ETag": f'"{_blob(data)}"', "X-Repo-Commit": self.hub.commit(repo)}
        return self._send(200, data, headers)

    def _send(
        self, status: int, data: bytes = b"", headers: dict[str, str] | None = None, error: str = ""
    ) -> None:
        self.send_response(status)
        if error:
            self.send_header("X-Error-Code", error)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


def _blob(data: bytes) -> str:
    """Git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Run a server while the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    server.RequestHandlerClass = type("Handler", (_Handler,), {"hub": hub})
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
