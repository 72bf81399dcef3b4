"""The files of the user's own code, found without an import."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.config import code_files
from runner.errors import ConfigError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(*paths: str) -> list[str]:
    return [name for name, _ in code_files.files([Path(path).absolute() for path in paths])]


def test_a_file_brings_what_it_imports_from_beside_it(here: Path) -> None:
    Path("helping.py").write_text("import further\nRATE = 0.5\n")
    Path("further.py").write_text("import json\n")
    Path("unrelated.py").write_text("no Python (\n")
    Path("single.py").write_text("from helping import RATE\n")
    assert names("single.py") == ["further.py", "helping.py", "single.py"]


def test_the_digest_is_that_of_the_copy_and_changes_with_any_file(here: Path) -> None:
    Path("lab/parts").mkdir(parents=True)
    for file in ("lab/__init__.py", "lab/parts/rate.py"):
        Path(file).write_text("RATE = 0.5\n")
    digest = code_files.digest([Path("lab").absolute()])
    code_files.copy([Path("lab").absolute()], Path("run/code"))
    assert names("run/code/lab") == ["lab/__init__.py", "lab/parts/rate.py"]
    assert code_files.digest([Path("run/code/lab").absolute()]) == digest
    Path("run/code/lab/parts/rate.py").write_text("RATE = 0.6\n")
    assert code_files.digest([Path("run/code/lab").absolute()]) != digest


def test_options_are_the_public_functions_with_their_defaults(here: Path) -> None:
    Path("lab.py").write_text(
        "raise RuntimeError('imported')\n"
        "def mine(groups, *, rate, eps=1e-8, scale=2 * 3): ...\n"
        "def _helper(*, x): ...\n"
    )
    assert code_files.options(["lab.py"]) == {"mine": {"_target_": "lab.mine", "rate": "???", "eps": 1e-8}}
    assert code_files.options(["nothing.py"]) == {}


@pytest.mark.parametrize(
    ("entry", "problem"),
    [("", "no such file"), ("nothing.py", "no such file"), ("rows.txt", "not a Python file"), ("json.py", "rename it"),
     ("empty", "without Python files"), ("no_such_package", "installed package")],
)  # fmt: skip
def test_entries_that_name_no_code(here: Path, entry: str, problem: str) -> None:
    Path("rows.txt").write_text("")
    Path("json.py").write_text("")
    Path("empty").mkdir()
    with pytest.raises(ConfigError, match=problem):
        code_files.locate(entry)
