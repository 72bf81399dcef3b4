"""The benchmark for a GPU, in small on a CPU: the first minutes on a GPU are not for its mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "gpu_sides.py"


@pytest.mark.slow
def test_our_side_trains(tmp_path: Path) -> None:
    words = [
        sys.executable,
        str(SCRIPT),
        "8b-lora",
        "ours-eager",
        str(tmp_path / "out.json"),
        "--steps",
        "2",
        "--small",
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["attention"] == "by_document"
    assert len(found["losses"]) == len(found["tokens"]) == len(found["times"]) == 2
    assert all(0 < loss < 10 for loss in found["losses"])
