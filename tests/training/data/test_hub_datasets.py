"""A data set of a Hub on the loopback interface: configuration, split and revision, downloaded and streamed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

datasets = pytest.importorskip("datasets")

README = b"""---
configs:
- config_name: en
  data_files: [{split: train, path: en.parquet}, {split: held, path: held.parquet}]
- config_name: de
  data_files: [{split: train, path: de.parquet}]
---
"""

# huggingface_hub reads its endpoint when it is imported, hence a process of its own.
PROGRAM = """
import json, sys
from sparse_hf_training.data import TextSource, load_text
out = []
for options in json.loads(sys.argv[1]):
    try:
        out.append([row["text"] for row in load_text(TextSource(path="me/corpus", **options))])
    except ValueError as error:
        out.append(str(error))
print(json.dumps(out))
"""


def _parquet(*texts: str) -> bytes:
    buffer = io.BytesIO()
    datasets.Dataset.from_dict({"text": list(texts)}).to_parquet(buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    """The address of a Hub with `me/corpus`: branch `main`, and tag `v1` with other text."""
    commits = {}
    for name, mark in (("main", "new"), ("v1", "old")):
        files = {"en.parquet": _parquet(f"{mark} one", f"{mark} two"), "de.parquet": _parquet(f"{mark} eins")}
        sha = hashlib.sha1(name.encode()).hexdigest()
        commits[sha] = commits[name] = (sha, {"README.md": README, "held.parquet": _parquet(f"{mark} held"), **files})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def _answer(self, code: int, data: bytes, **headers: str) -> None:
            start, status = 0, code
            if (wanted := self.headers.get("Range")) and code == 200:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                start, stop = int(first), int(last or len(data) - 1) + 1
                headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
                data, status = data[start:stop], 206
            self.send_response(status)
            for name, text in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name.replace("_", "-"), text)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def _serve(self) -> None:
            path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
            kind, _, rest = path.removeprefix("/api").removeprefix("/datasets/me/corpus/").partition("/")
            revision, _, name = rest.partition("/")
            if not path.removeprefix("/api").startswith("/datasets/me/corpus") or revision not in commits:
                return self._answer(404, b"{}", X_Error_Code="RevisionNotFound")
            sha, files = commits[revision]
            sizes = [
                {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for n, d in files.items()
            ]
            if kind == "tree":
                return self._answer(200, json.dumps([] if name else sizes).encode(), Content_Type="application/json")
            if kind == "revision":
                info = {"_id": "1", "id": "me/corpus", "sha": sha, "siblings": [{"rfilename": n} for n in files]}
                return self._answer(200, json.dumps(info).encode(), Content_Type="application/json")
            if name not in files:
                return self._answer(404, b"{}", X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            data = files[name]
            return self._answer(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=sha)

        do_GET = do_HEAD = _serve

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_configuration_split_and_revision(hub: str, tmp_path: Path) -> None:
    cases = [
        ({"name": "en"}, ["new one", "new two"]),
        ({"name": "en", "streaming": True}, ["new one", "new two"]),
        ({"name": "en", "streaming": True, "revision": "v1"}, ["old one", "old two"]),
        ({"name": "en", "split": "train[1:]", "revision": "v1"}, ["old two"]),
        ({"name": "en", "max_documents": 1}, ["new one"]),
        ({"name": "en", "split": "held"}, ["new held"]),
        ({"name": "de", "streaming": True}, ["new eins"]),
    ]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    settings = {
        "HF_ENDPOINT": hub,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
    }
    wrong = [{}, {"name": "en", "revision": "v9"}, {"name": "en", "split": "test"}]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([options for options, _ in cases] + wrong)],
        env={**kept, **settings},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert results[: len(cases)] == [texts for _, texts in cases]
    no_name, no_revision, no_split = results[len(cases) :]
    assert all("could not read 'me/corpus'" in message and "from the Hub" in message for message in results[-3:])
    assert "Config name is missing" in no_name and "'en', 'de'" in no_name
    assert "v9" in no_revision and "test" in no_split
