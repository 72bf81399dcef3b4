"""Models from a Hub, played by a server of this machine."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.model_folders import folder, source
from transformers import AutoModelForCausalLM

from runner.models.sources import ModelSource

COMMIT = "0123456789abcdef0123456789abcdef01234567"


# The Hub --------------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """What the Hub answers about one model, ``tests/tiny``, and about a few that cannot be had."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        if "tests/gated" in path:
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if "tests/tiny" not in path:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if "nosuch" in path:
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = sorted(file for file in self.folder.iterdir() if file.is_file())
        if "/resolve/" in path:
            content = (self.folder / path.rpartition("/")[2]).read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            return self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        if "/tree/" in path:
            listed = [
                {
                    "type": "file",
                    "path": f.name,
                    "size": f.stat().st_size,
                    "oid": hashlib.sha1(f.read_bytes()).hexdigest(),
                }
                for f in files
            ]
            return self.answer(200, json.dumps(listed).encode(), {})
        known = {"id": "tests/tiny", "sha": COMMIT, "siblings": [{"rfilename": f.name} for f in files]}
        return self.answer(200, json.dumps(known).encode(), {})

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def hub_url(folder: Path) -> Iterator[str]:
    (folder / "pytorch_model.bin").write_bytes(b"never asked for")
    (folder / "consolidated.safetensors").write_bytes(b"nor this")
    with serving(folder) as url:
        yield url


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of a Hub whose model lies in this folder."""
    handler = type("ThisHub", (Hub,), {"folder": folder, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    assert not [path for path in handler.asked if path.endswith((".bin", "consolidated.safetensors"))]


END = "----"
FETCH = f"""
import sys
from runner.models import architecture, pretrained, sources, tokenizer_files
from runner.models.quantization import none
from runner.errors import ConfigError
for word in sys.argv[2:]:
    name, _, revision = word.partition("@")
    try:
        source = architecture.resolve(sources.pretrained(
            path=name, revision=revision or None, dtype="float32", attention="auto", trust_remote_code=False))
        tokenizer_files.load(source)
        print(source.path, source.revision)
        if sys.argv[1] == "weights":
            import torch
            model = pretrained.load(source, none.none(), "cpu")
            print(float(model(input_ids=torch.arange(20)[None]).logits.detach().double().sum()))
            print(model.name_or_path, model.config._commit_hash)
    except ConfigError as error:
        print(error)
    print({END!r})
"""


def fetch(home: Path, *models: str, weights: bool = False, **environment: str) -> list[str]:
    """What a process of its own prints that fetches each ``NAME[@REVISION]``."""
    env = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", **environment}
    words = ["weights" if weights else "", *models]
    done = subprocess.run([sys.executable, "-c", FETCH, *words], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_the_small_files_of_a_hub_model_are_enough_to_plan(hub_url: str, tmp_path: Path) -> None:
    online = fetch(tmp_path / "home", "tests/tiny", HF_ENDPOINT=hub_url)
    assert online[0] == f"tests/tiny {COMMIT}"
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    gone = fetch(tmp_path / "home", "tests/tiny", HF_ENDPOINT="http://127.0.0.1:9")
    assert gone[0] == online[0]


@pytest.mark.slow
def test_a_hub_model_is_fetched_and_then_found_offline(source: ModelSource, hub_url: str, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(source.path)
    expected = float(plain(input_ids=torch.arange(20)[None]).logits.detach().double().sum())
    online = fetch(tmp_path / "home", "tests/tiny@main", weights=True, HF_ENDPOINT=hub_url)
    assert float(online[1]) == pytest.approx(expected, abs=1e-3)
    assert online[2] == f"tests/tiny {COMMIT}"
    offline = fetch(tmp_path / "home", "tests/tiny@main", weights=True, HF_HUB_OFFLINE="1")
    assert offline[:3] == online[:3]


REFUSED = {
    "tests/gated": (
        "model.path=tests/gated: is a gated repository and your token has no access", "accept the licence", "HF_TOKEN",
        "model.path=DIR",
    ),
    "tests/nothing": ("no such model on the Hub, or it is private", "HF_TOKEN"),
    "tests/tiny@nosuch": ("model.revision=nosuch: no such revision of tests/tiny",),
}  # fmt: skip


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one process, which takes long to start, says of each model of ``REFUSED``."""
    with serving(tmp_path_factory.mktemp("nothing")) as url:
        lines = fetch(tmp_path_factory.mktemp("home"), *REFUSED, HF_ENDPOINT=url)
    return dict(zip(REFUSED, "\n".join(lines).split(END), strict=False))


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_hub_refuses(refusals: dict[str, str], name: str) -> None:
    assert all(part in refusals[name] for part in REFUSED[name]), refusals[name]


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached"),
        pytest.param({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set", marks=pytest.mark.slow),
    ],
)
def test_an_unreachable_hub_is_an_error_within_seconds(tmp_path: Path, environment: dict[str, str], said: str) -> None:
    lines = fetch(tmp_path, "some/model", **environment)
    text = "\n".join(lines)
    assert said in text
    assert "model.path=DIR" in text


@pytest.mark.slow
def test_hub_without_safetensors(hub_url: str, folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    lines = fetch(tmp_path / "home", "tests/tiny", weights=True, HF_ENDPOINT=hub_url)
    assert "has no weights (model.safetensors)" in "\n".join(lines)
