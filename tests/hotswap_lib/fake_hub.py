"""A Hugging Face Hub on the loopback interface: as much of its HTTP API as a download needs."""

from __future__ import annotations

import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.hf_api
import pytest


@dataclass
class FakeHub:
    """One repository, ``team/bot``, with commits that tests push.

    Attributes:
        commits: commit → path → content.
        main: the commit of the default branch.
        downloads: paths whose content was sent, in order.
        push_after_resolving: pushed as soon as a client has resolved the default branch.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    main: str = ""
    downloads: list[str] = field(default_factory=list)
    push_after_resolving: Mapping[str, bytes] | None = None

    def push(self, files: Mapping[str, bytes]) -> str:
        """Add a commit to the default branch; returns its id."""
        content = json.dumps({path: file.hex() for path, file in files.items()})
        self.main = hashlib.sha1(content.encode()).hexdigest()
        self.commits[self.main] = dict(files)
        return self.main

    def push_folder(
        self, folder: Path, *, prefix: str = "", more: Mapping[str, bytes] | None = None
    ) -> str:
        """Push the files of a folder, under a prefix, and others by name."""
        files = {f"{prefix}{path.name}": path.read_bytes() for path in folder.iterdir()}
        return self.push({**files, **(more or {})})

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """The status, headers and body for a path."""
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            parts = parts[2:]
        if parts[:2] != ["team", "bot"] or not self.main:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        action, revision, *rest = parts[2:]
        commit = self.main if revision == "main" else revision
        if commit not in self.commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if action == "revision":
            if self.push_after_resolving is not None:
                self.push(self.push_after_resolving)
            return 200, {}, json.dumps({"id": "team/bot", "sha": commit}).encode()
        files = self.commits[commit]
        if action == "tree":
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}
                for name, content in files.items()
            ]
            return 200, {}, json.dumps(tree).encode()
        content = files.get("/".join(rest), b"")
        if "/".join(rest) not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{_etag(content)}"'}, content


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(send_body=True)

        def do_HEAD(self) -> None:
            self._answer(send_body=False)

        def _answer(self, *, send_body: bool) -> None:
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
            status, headers, body = hub.answer(path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if send_body:
                self.wfile.write(body)
                if "/resolve/" in path and status == 200:
                    hub.downloads.append(path.split("/resolve/")[1].partition("/")[2])

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@contextmanager
def running() -> Iterator[FakeHub]:
    """A Hub that huggingface_hub talks to until the context ends."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    constants = huggingface_hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", endpoint)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + template)
        patch.setattr(huggingface_hub.hf_api.api, "endpoint", endpoint)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        try:
            yield hub
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
