"""A Hugging Face Hub on the loopback interface: repositories with branches and commits, LFS uploads, one valid token.

huggingface_hub reads its endpoint when it is imported, so programs that talk to this hub run in processes of their own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

TOKEN = "hf_local"


@dataclass(kw_only=True)
class Repo:
    """Branches point to commits; a commit is all its files."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        content = b"".join(name.encode() + data for name, data in sorted(files.items()))
        sha = hashlib.sha1(content + str(len(self.commits)).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


class LocalHub:
    """The server and what it holds."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"


class _Answer(Exception):
    """An answer that ends the request."""

    def __init__(self, code: int, value: Any, **headers: str) -> None:
        self.code, self.value, self.headers = code, value, headers


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: LocalHub, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *args: Any) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().strip(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, code: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, text in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _serve(self) -> None:
        body = self._body()
        try:
            self._route(urllib.parse.unquote(urllib.parse.urlparse(self.path).path), body)
        except _Answer as answer:
            if isinstance(answer.value, bytes):
                self._send(answer.code, answer.value, answer.headers)
            else:
                headers = {"Content-Type": "application/json", **answer.headers}
                self._send(answer.code, json.dumps(answer.value).encode(), headers)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _serve

    def _route(self, path: str, body: bytes) -> None:
        if self.command == "PUT" and path.startswith("/lfs/"):
            self.hub.blobs[path.removeprefix("/lfs/")] = body
            raise _Answer(200, {})
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", TOKEN) and path != "/lfs-verify":
            raise _Answer(401, {"error": "Invalid credentials in Authorization header"})
        for pattern, answer in _ROUTES:
            if match := re.fullmatch(pattern, path):
                answer(self, body, *match.groups())
        raise _Answer(404, {"error": f"unhandled {path}"})

    def _repo(self, repo_id: str) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and self.headers.get("Authorization") is None):
            code = 401 if self.headers.get("Authorization") is None else 404
            raise _Answer(code, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return repo

    def _commit_of(self, repo: Repo, revision: str) -> str:
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            raise _Answer(404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound")
        return sha

    def verify(self, body: bytes) -> None:
        raise _Answer(200, {})

    def whoami(self, body: bytes) -> None:
        access = {"type": "access_token", "accessToken": {"role": "write", "displayName": "local"}}
        raise _Answer(200, {"type": "user", "name": "me", "orgs": [], "auth": access})

    def validate_yaml(self, body: bytes) -> None:
        raise _Answer(200, {"errors": [], "warnings": []})

    def create(self, body: bytes) -> None:
        request = json.loads(body)
        repo_id = f"{request.get('organization') or 'me'}/{request['name']}"
        if repo_id in self.hub.repos:
            raise _Answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo_id}"})
        private = request.get("visibility") == "private" or bool(request.get("private"))
        repo = self.hub.repos[repo_id] = Repo(private=private)
        repo.commit("main", {".gitattributes": b""})
        raise _Answer(200, {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id})

    def branch(self, body: bytes, repo_id: str, name: str) -> None:
        repo = self._repo(repo_id)
        if name in repo.branches:
            raise _Answer(409, {"error": "Reference already exists"})
        repo.branches[name] = self._commit_of(repo, json.loads(body or b"{}").get("startingPoint") or "main")
        raise _Answer(200, {})

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        self._commit_of(self._repo(repo_id), revision)
        modes = [
            (f["path"], "lfs" if f["path"].endswith(".safetensors") else "regular") for f in json.loads(body)["files"]
        ]
        raise _Answer(200, {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes]})

    def lfs_batch(self, body: bytes, repo_id: str) -> None:
        verify = {"href": f"{self.hub.url}/lfs-verify", "header": {}}
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}", "header": {}}, "verify": verify}}
            for o in json.loads(body)["objects"]
        ]
        raise _Answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, body: bytes, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id)
        files = dict(repo.commits[self._commit_of(repo, revision)])
        for entry in map(json.loads, body.splitlines()):
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        sha = repo.commit(revision, files)
        raise _Answer(200, {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}", "commitOid": sha, "success": True})

    def info(self, body: bytes, repo_id: str, revision: str | None = None) -> None:
        repo = self._repo(repo_id)
        sha = self._commit_of(repo, revision or "main")
        siblings = [{"rfilename": name} for name in repo.commits[sha]]
        counts = {"tags": [], "downloads": 0, "likes": 0, "private": repo.private}
        raise _Answer(200, {"_id": "1", "id": repo_id, "modelId": repo_id, "sha": sha, "siblings": siblings, **counts})

    def tree(self, body: bytes, repo_id: str, revision: str, folder: str) -> None:
        repo = self._repo(repo_id)
        files = repo.commits[self._commit_of(repo, revision)].items()
        entries = [
            {"type": "file", "path": n, "size": len(d), "oid": _sha(d)} for n, d in files if n.startswith(folder)
        ]
        raise _Answer(200, entries)

    def resolve(self, body: bytes, repo_id: str, revision: str, name: str) -> None:
        repo = self._repo(repo_id)
        sha = self._commit_of(repo, revision)
        if name not in repo.commits[sha]:
            raise _Answer(404, {"error": "no such file"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        data = repo.commits[sha][name]
        raise _Answer(200, data, ETag=f'"{_sha(data)}"', X_Repo_Commit=sha)


_REPO = r"([^/]+/[^/]+?)"
_ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"/lfs-verify", _Handler.verify),
    (r"/api/whoami-v2", _Handler.whoami),
    (r"/api/validate-yaml", _Handler.validate_yaml),
    (r"/api/repos/create", _Handler.create),
    (rf"/api/models/{_REPO}/branch/(.+)", _Handler.branch),
    (rf"/api/models/{_REPO}/preupload/(.+)", _Handler.preupload),
    (rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (rf"/api/models/{_REPO}/commit/(.+)", _Handler.commit),
    (rf"/api/models/{_REPO}/tree/([^/]+)/?(.*)", _Handler.tree),
    (rf"/api/models/{_REPO}(?:/revision/(.+))?", _Handler.info),
    (rf"/{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
]


def _sha(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture(scope="session")
def local_hub() -> Iterator[LocalHub]:
    hub = LocalHub()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


RunOnHub = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def run_on_hub(local_hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> RunOnHub:
    """Runs a program against the hub, in a process with a cache of its own, and returns how it ended."""

    def run(program: str, *args: str, token: str = TOKEN, home: Path | None = None, **env: str) -> Any:
        folder = tmp_path_factory.mktemp("process")
        script = folder / "program.py"
        script.write_text(program)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        settings = {
            "HF_ENDPOINT": local_hub.url,
            "HF_TOKEN": token,
            "HF_HOME": str(home or folder / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, str(script), *args]
        return subprocess.run(
            command, cwd=folder, env={**kept, **settings, **env}, capture_output=True, text=True, timeout=300
        )

    return run
