"""A hub in the small: an HTTP server with the requests that huggingface_hub makes for a model."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_right"


@dataclass
class Hub:
    """files: of each repository, content by path. private: its visibility. seen: the requests."""

    address: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)

    def commit_of(self, name: str) -> str:
        return hashlib.sha1(repr(sorted(self.files[name].items())).encode()).hexdigest()


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        store = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        path = self._seen()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid username or password."}, status=401)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        name, _, action = path.removeprefix("/api/models/").partition("/preupload/")
        if action:
            names = [each["path"] for each in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            return self._answer({"files": modes})
        name, _, action = path.removeprefix("/api/models/").partition("/commit/")
        if not action:
            return self._answer({"error": path}, status=404)
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                value = entry["value"]
                self.store.files[name][value["path"]] = base64.b64decode(value["content"])
        commit = self.store.commit_of(name)
        address = f"{self.store.address}/{name}/commit/{commit}"
        return self._answer({"commitUrl": address, "commitOid": commit})

    def _create(self, asked: dict[str, Any]) -> None:
        name = (
            f"{asked['organization']}/{asked['name']}"
            if asked.get("organization")
            else asked["name"]
        )
        address = {"url": f"{self.store.address}/{name}"}
        if name in self.store.files:
            return self._answer(address, status=409)
        self.store.files[name] = {}
        self.store.private[name] = asked.get("private", asked.get("visibility") == "private")
        return self._answer(address)

    def do_GET(self) -> None:
        path = self._seen()
        if path.startswith("/api/models/"):
            owner, name, *rest = path.removeprefix("/api/models/").split("/")
            name, (action, revision) = f"{owner}/{name}", rest or ("revision", "main")
            if name not in self.store.files:
                return self._missing("RepoNotFound")
            files, commit = self.store.files[name], self.store.commit_of(name)
            if revision not in ("main", commit):
                return self._missing("RevisionNotFound")
            if action == "tree":
                return self._answer(
                    [
                        {"type": "file", "path": each, "size": len(content), "oid": _tag(content)}
                        for each, content in files.items()
                    ]
                )
            names = [{"rfilename": each} for each in files]
            return self._answer({"id": name, "sha": commit, "siblings": names})
        name, _, rest = path[1:].partition("/resolve/")
        content = self.store.files[name][rest.partition("/")[2]]
        more = {"X-Repo-Commit": self.store.commit_of(name), "ETag": _tag(content)}
        return self._send(content, more)

    do_HEAD = do_GET

    def _seen(self) -> str:
        path = self.path.partition("?")[0]
        self.store.seen.append(f"{self.command} {path}")
        return path

    def _missing(self, code: str) -> None:
        self._answer({"error": code}, status=404, more={"X-Error-Code": code})

    def _answer(
        self, values: Any, *, status: int = 200, more: dict[str, str] | None = None
    ) -> None:
        self._send(json.dumps(values).encode(), more or {}, status=status)

    def _send(self, content: bytes, more: dict[str, str], *, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **more}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _tag(content: bytes) -> str:
    return f'"{hashlib.sha1(content).hexdigest()}"'
