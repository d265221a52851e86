"""A Hugging Face Hub in a thread: what downloads and uploads of model repositories need of it.

Files whose name ends in ``.safetensors`` are in LFS, as on the Hub: another server has them, which
downloads are redirected to, and they are uploaded on their own before the commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Repository:
    """Commits, by their number of 40 hexadecimal digits, and the branches that point to them."""

    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False

    def commit(self, files: Files, branch: str = "main") -> str:
        """Add or replace files on a branch; returns the commit."""
        parent = self.branches.get(branch, "")
        content = {**self.commits.get(parent, {}), **files}
        number = hashlib.sha1(f"{parent} {sorted(files)} {len(self.commits)}".encode()).hexdigest()
        self.commits[number] = content
        self.branches[branch] = number
        return number

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)


class HubServer:
    """Serves on 127.0.0.1 inside ``with``.

    Attributes:
        repositories: by id, "user/model".
        sent: how many times the body of each file was sent, whole or in part.
        authorization: the authorization headers of uploads.
        failure: the HTTP status that answers everything, unless it is 0.
        cut: bytes of a file's body after which the connection is lost, unless it is negative.
        missing: bytes that a file's body is shorter than announced beforehand.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.sent: Counter[str] = Counter()
        self.authorization: set[str] = set()
        self.large: dict[str, bytes] = {}
        self.failure = 0
        self.cut = -1
        self.missing = 0

    def __enter__(self) -> HubServer:
        self._running = [self._start(), self._start()]
        self.url, self.large_url = (
            f"http://127.0.0.1:{http.server_address[1]}" for http, _ in self._running
        )
        return self

    def __exit__(self, *error: object) -> None:
        for http, thread in self._running:
            http.shutdown()
            http.server_close()
            thread.join()

    def _start(self) -> tuple[_Server, threading.Thread]:
        http = _Server(("127.0.0.1", 0), _Handler)
        http.hub = self
        thread = threading.Thread(
            target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        thread.start()
        return http, thread

    def add(self, name: str) -> Repository:
        return self.repositories.setdefault(name, Repository())


class _Server(ThreadingTCPServer):
    """(Python's HTTP server would look its own name up, which can take long.)"""

    daemon_threads = True
    hub: HubServer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.hub.failure:
            self._refuse(self.hub.failure)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*match.groups())
        elif match := re.fullmatch(r"/large/([0-9a-f]{64})/(.+)", path):
            self._send_file(match[2], self.hub.large[match[1]], {})
        else:
            self._refuse(404)

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.authorization.add(self.headers.get("Authorization", ""))
        if self.hub.failure:
            self._refuse(self.hub.failure)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._answer_json({"errors": [], "warnings": []})
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/[^/]+", path):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if _is_large(name) else "regular" for name in names}
            files = [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]
            self._answer_json({"files": files})
        elif re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.hub.large_url}/large/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self._answer_json({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            self._commit(match[1], match[2], [json.loads(line) for line in body.splitlines()])
        else:
            self._refuse(404)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        number = hashlib.sha256(body).hexdigest()
        if self.path != f"/large/{number}":
            return self._refuse(400)
        self.hub.large[number] = body
        self._answer(200, {})

    # -- downloads -------------------------------------------------------------------------

    def _resolve(self, name: str, revision: str, file: str) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self._refuse(401, "RepoNotFound")  # as it answers those without a token
        commit = repository.resolve(revision)
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        headers = {"X-Repo-Commit": commit}
        if file not in repository.commits[commit]:
            return self._refuse(404, "EntryNotFound", headers)
        body = repository.commits[commit][file]
        if not _is_large(file):
            return self._send_file(file, body, headers)
        number = hashlib.sha256(body).hexdigest()
        self.hub.large[number] = body
        headers["X-Linked-Etag"] = f'"{number}"'
        headers["X-Linked-Size"] = str(len(body))
        headers["Location"] = f"{self.hub.large_url}/large/{number}/{file}"
        self._answer(302, headers)

    def _send_file(self, name: str, body: bytes, headers: dict[str, str]) -> None:
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', **headers}
        if self.command == "HEAD":
            return self._answer(200, headers, body)
        self.hub.sent[name] += 1
        body, start, status = body[: len(body) - self.hub.missing], 0, 200
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start, status = int(wanted[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        if self.hub.cut < 0:
            return self._answer(status, headers, body[start:])
        self._answer(status, headers, body[start:], sent=max(0, self.hub.cut - start))
        self.close_connection = True

    # -- uploads ---------------------------------------------------------------------------

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization'] or 'someone'}/{wanted['name']}"
        status = 409 if name in self.hub.repositories else 200
        if status == 200:
            private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            self.hub.add(name).private = private
        self._answer_json({"url": f"{self.hub.url}/{name}", "name": name, "id": "0"}, status)

    def _commit(self, name: str, branch: str, operations: list[dict[str, Any]]) -> None:
        files = {}
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        number = self.hub.repositories[name].commit(files, branch)
        url = f"{self.hub.url}/{name}/commit/{number}"
        self._answer_json({"success": True, "commitUrl": url, "commitOid": number})

    # -- answers ---------------------------------------------------------------------------

    def _answer(
        self, status: int, headers: dict[str, str], body: bytes = b"", sent: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if sent is None else body[:sent])

    def _answer_json(self, value: object, status: int = 200) -> None:
        self._answer(status, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _refuse(self, status: int, code: str = "", headers: dict[str, str] | None = None) -> None:
        self._answer(status, {"X-Error-Code": code, **(headers or {})} if code else {})


def _is_large(name: str) -> bool:
    return name.endswith(".safetensors")
