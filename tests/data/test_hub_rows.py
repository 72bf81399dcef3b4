"""Data sets of the Hub that cannot be had."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from typing import ClassVar

import datasets
import pytest
from fixtures import pictures

from runner.data import hub_rows


class _Answers(http.server.BaseHTTPRequestHandler):
    """A Hub that refuses each dataset in the way its name asks for."""

    CODES: ClassVar = {
        "gated": (403, "GatedRepo"),
        "missing": (401, "RepoNotFound"),
        "branch": (404, "RevisionNotFound"),
    }

    def do_GET(self) -> None:
        status, code = next(answer for word, answer in self.CODES.items() if word in self.path)
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def refusing_hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def ask_hub(endpoint: str, *paths: str) -> list[str]:
    """What `data=hub` says of each of them in a process of its own, online, against the given Hub."""
    code = (
        "from runner.data import sources\n"
        f"for path in {paths!r}:\n"
        "    try: sources.hub(path=path, name=None, split='train', eval_split=None, revision=None)\n"
        "    except Exception as error: print(type(error).__name__, error, sep='\\n', end='\\n\\n')"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    return done.stdout.strip().split("\n\n")


def test_each_refusal_of_the_hub_has_a_remedy(refusing_hub):
    gated, missing, branch = ask_hub(refusing_hub, "some/gated", "some/missing", "some/branch")
    assert gated.startswith("DataError\ndata.path=some/gated: is a gated dataset and your token has no access")
    assert "hf auth login" in gated
    assert "no such dataset on the Hub, or it is private" in missing
    assert "has no such revision" in branch


def test_an_unreachable_hub_is_an_error_within_seconds():
    (said,) = ask_hub("http://127.0.0.1:9", "some/thing")
    assert "the Hub cannot be reached" in said
    assert "HF_HUB_OFFLINE=1" in said


def test_images_stay_as_the_files_have_them(tmp_path):
    content = pictures.square(tmp_path / "a.png", "red").read_bytes()
    given = datasets.Dataset.from_dict({"image": [{"bytes": content}], "images": [[{"bytes": content}]], "text": ["x"]})
    typed = given.cast_column("image", datasets.Image()).cast_column("images", datasets.Sequence(datasets.Image()))
    for rows in (typed, typed.to_iterable_dataset()):
        ((_, row),) = hub_rows.rows_of(hub_rows.undecoded(rows), "some/images", "train")
        assert row == {"image": {"bytes": content}, "images": [{"bytes": content}], "text": "x"}
