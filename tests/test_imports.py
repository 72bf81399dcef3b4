"""Imports without the garbage collector."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from runner import imports


@pytest.mark.parametrize("is_enabled", [True, False])
def test_the_collector_pauses_and_is_as_it_was_whatever_happens(is_enabled: bool):
    before = gc.isenabled()
    try:
        gc.enable() if is_enabled else gc.disable()
        with imports.uncollected():
            assert not gc.isenabled()
        with pytest.raises(ModuleNotFoundError), imports.uncollected():
            __import__("no_such_module")
        assert gc.isenabled() == is_enabled
    finally:
        gc.enable() if before else gc.disable()


def test_what_many_imports_leave_is_never_visited_again():
    few, many = (
        f"""
import gc, sys
from runner import imports
before = gc.get_freeze_count()  # Python 3.12 begins with some
with imports.uncollected():
    for number in range({count}):
        sys.modules[f"new{{number}}"] = sys
print(gc.get_freeze_count() - before)
"""
        for count in (imports.MANY - 1, imports.MANY)
    )
    frozen = [
        int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for code in (few, many)
    ]
    assert frozen[0] == 0 < frozen[1]


def test_what_creates_many_objects_is_seldom_interrupted_by_the_collector():
    began: list[int] = []

    def note(phase: str, _: dict[str, int]) -> None:
        began.extend([1] * (phase == "start"))

    before = gc.get_threshold()
    gc.callbacks.append(note)
    try:
        with imports.seldom_collected():
            kept = [[] for _ in range(40_000)]
            collections = len(began)
        assert (len(kept), collections) == (40_000, 0)
        assert gc.get_threshold() == before
        gc.set_threshold(0)
        with imports.seldom_collected():
            assert gc.get_threshold()[0] == 0, "switched off, it stays so"
    finally:
        gc.callbacks.remove(note)
        gc.set_threshold(*before)
