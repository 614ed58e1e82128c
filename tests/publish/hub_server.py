"""A hub on loopback that speaks what huggingface_hub asks for: repositories, LFS uploads, commits, downloads.

Kept from the real one: large files go to another origin by signed addresses, a commit names what was uploaded before,
`resolve` answers with the commit and an ETag. Not here: Xet, multi-part uploads, gated repositories, pull requests.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE_BYTES = 10_000
TOKEN = "hf_test_token"


@dataclass
class Repository:
    """Commits, oldest first: id -> {path: (bytes, is large)}."""

    private: bool
    commits: dict[str, dict[str, tuple[bytes, bool]]] = field(default_factory=dict)

    def add(self, files: dict[str, tuple[bytes, bool]]) -> str:
        identity = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[identity] = files
        return identity

    @property
    def head(self) -> str:
        return [*self.commits][-1]


class Hub:
    """The server. `requests` has (method, path) of each; `fail` is asked before each and may give a status."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.fail: Callable[[str, str], int | None] = lambda _method, _path: None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _any(self) -> None:
                hub._handle(self)

            do_GET = do_HEAD = do_PUT = do_POST = _any  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def sent(self, start: int = 0) -> list[str]:
        """Addresses that files were put to, from the request `start` on."""
        return [path for method, path in self.requests[start:] if method == "PUT"]

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        data = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        if handler.headers.get("Transfer-Encoding") == "chunked":
            while size := int(handler.rfile.readline(), 16):
                data += handler.rfile.read(size)
                handler.rfile.readline()
            handler.rfile.readline()
        self.requests.append((handler.command, handler.path))
        status = self.fail(handler.command, handler.path)
        if status:
            self._send(handler, status, b"{}", {})
            return
        path = unquote(urlsplit(handler.path).path)
        signed = path.startswith("/signed/")
        if not signed and handler.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(handler, 401, b'{"error": "no token"}', {})
            return
        assert not (signed and handler.headers.get("Authorization")), "a token went to a signed address"
        status, body, headers = self._answer(handler, path, data)
        self._send(handler, status, body, headers)

    def _send(self, handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        if "Content-Length" not in headers:
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)

    def _answer(self, handler: BaseHTTPRequestHandler, path: str, data: bytes) -> tuple[int, bytes, dict[str, str]]:
        parts = path.strip("/").split("/")
        if parts[0] == "signed":
            return self._large(handler, parts[1], data)
        if path == "/api/repos/create":
            wanted = json.loads(data)
            name = f"{wanted['organization']}/{wanted['name']}"
            if name not in self.repositories:
                self.repositories[name] = Repository(wanted.get("visibility") == "private")
                self.repositories[name].add({".gitattributes": (b"* filter=lfs\n", False)})
            return _json({"url": f"{self.url}/{name}"})
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(data))
        name = "/".join(parts[2:4]) if parts[0] == "api" else "/".join(parts[:2])
        repository = self.repositories.get(name)
        if repository is None:
            return 404, b'{"error": "no such repository"}', {"X-Error-Code": "RepoNotFound"}
        if parts[0] != "api":
            return self._resolve(handler, repository, parts[3], "/".join(parts[4:]))
        if len(parts) > 4 and parts[4] == "preupload":
            return _json({"files": [self._mode(item) for item in json.loads(data)["files"]]})
        if len(parts) > 4 and parts[4] == "commit":
            return self._commit(repository, name, data)
        return self._info(repository, name, parts[5] if len(parts) > 5 else "main")

    def _mode(self, item: dict[str, Any]) -> dict[str, Any]:
        large = item["size"] >= LARGE_BYTES or item["path"].endswith((".gguf", ".safetensors"))
        return {"path": item["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    def _batch(self, wanted: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
        assert wanted["operation"] == "upload"
        objects = []
        for item in wanted["objects"]:
            entry: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.large:
                entry["actions"] = {"upload": {"href": f"http://localhost:{self.port}/signed/{item['oid']}"}}
            objects.append(entry)
        return _json({"transfer": "basic", "objects": objects})

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def _large(self, handler: BaseHTTPRequestHandler, oid: str, data: bytes) -> tuple[int, bytes, dict[str, str]]:
        if handler.command == "PUT":
            if hashlib.sha256(data).hexdigest() != oid:
                return 400, b"not these bytes", {}
            self.large[oid] = data
            return 200, b"", {}
        return _ranged(handler, self.large[oid], {"ETag": f'"{oid}"'})

    def _commit(self, repository: Repository, name: str, data: bytes) -> tuple[int, bytes, dict[str, str]]:
        lines = [json.loads(line) for line in data.splitlines()]
        files = dict(repository.commits[repository.head])
        for line in lines:
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit") not in (None, repository.head):
                return 412, b'{"error": "the branch has moved"}', {}
            if line["key"] == "file":
                files[value["path"]] = (base64.b64decode(value["content"]), False)
            if line["key"] == "lfsFile":
                files[value["path"]] = (self.large[value["oid"]], True)
            if line["key"] == "deletedFile":
                del files[value["path"]]
        identity = repository.add(files)
        return _json({"commitUrl": f"{self.url}/{name}/commit/{identity}", "commitOid": identity})

    def _info(self, repository: Repository, name: str, revision: str) -> tuple[int, bytes, dict[str, str]]:
        identity = repository.head if revision == "main" else revision
        if identity not in repository.commits:
            return 404, b'{"error": "no such revision"}', {"X-Error-Code": "RevisionNotFound"}
        siblings = []
        for path, (content, large) in sorted(repository.commits[identity].items()):
            entry: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": "0" * 40}
            if large:
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
            siblings.append(entry)
        return _json({"id": name, "sha": identity, "siblings": siblings, "private": repository.private})

    def _resolve(
        self, handler: BaseHTTPRequestHandler, repository: Repository, revision: str, path: str
    ) -> tuple[int, bytes, dict[str, str]]:
        identity = repository.head if revision == "main" else revision
        known = repository.commits.get(identity, {}).get(path)
        if known is None:
            return 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": identity}
        content, large = known
        sha256 = hashlib.sha256(content).hexdigest()
        headers = {"X-Repo-Commit": identity, "ETag": f'"{sha256[:40]}"'}
        if large:
            headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
            return 302, b"", {**headers, "Location": f"http://localhost:{self.port}/signed/{sha256}"}
        return _ranged(handler, content, headers)


def _ranged(
    handler: BaseHTTPRequestHandler, content: bytes, headers: dict[str, str]
) -> tuple[int, bytes, dict[str, str]]:
    wanted = handler.headers.get("Range", "")
    if wanted.startswith("bytes=") and handler.command == "GET":
        start = int(wanted.removeprefix("bytes=").partition("-")[0])
        end = len(content) - 1
        return 206, content[start:], {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"}
    return 200, content, {**headers, "Content-Length": str(len(content))}


def _json(data: Any) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps(data).encode(), {"Content-Type": "application/json"}
