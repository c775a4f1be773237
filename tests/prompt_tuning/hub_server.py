"""A Hugging Face hub on the loopback interface: what its clients ask to load a data set."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
import hashlib
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer
import json
import threading
from typing import Any
from urllib.parse import unquote
from urllib.parse import urlsplit


#: Files by repository (``owner/name``), by revision, by path.
Repositories = Mapping[str, Mapping[str, Mapping[str, bytes]]]


@contextmanager
def hub_server(repositories: Repositories) -> Iterator[str]:
    """Serves data sets; gives the URL, for ``HF_ENDPOINT``."""
    handler = type("Handler", (_Handler,), {"repositories": repositories})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repositories: Repositories

    def do_GET(self) -> None:
        asked = unquote(urlsplit(self.path).path).partition("/datasets/")[2]
        owner, name, what, revision, path = [*asked.split("/", 4), "", "main", ""][:5]
        found = self.repositories.get(f"{owner}/{name}")
        if found is None:
            return self._refuse("RepoNotFound")
        commits = {_hash(known): known for known in found}
        files = found.get(commits.get(revision, revision))
        if files is None:
            return self._refuse("RevisionNotFound")
        commit = revision if revision in commits else _hash(revision)
        if what == "resolve":
            return self._file(files.get(path), commit)
        if what == "tree":
            return self._json([_entry(p, files[p]) for p in files if p.startswith(path)])
        return self._json({"id": f"{owner}/{name}", "sha": commit, "siblings": [], "tags": []})

    do_HEAD = do_GET

    def _file(self, content: bytes | None, commit: str) -> None:
        if content is None:
            return self._refuse("EntryNotFound")
        self._send(200, content, {"ETag": f'"{_hash(content)}"', "X-Repo-Commit": commit})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, code: str) -> None:
        self._send(404, b"", {"X-Error-Code": code})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None: ...


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "oid": _hash(content), "size": len(content)}


def _hash(content: str | bytes) -> str:
    data = content.encode() if isinstance(content, str) else content
    return hashlib.sha1(data).hexdigest()
