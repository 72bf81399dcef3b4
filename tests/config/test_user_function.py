"""Functions that a key names: found, checked without running them, and loaded."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import pytest
from fixtures.data_formats import EXCHANGE, custom, own

from runner.config import code_files, user_function
from runner.errors import ConfigError


def source_text(function: str) -> str:
    return user_function.source_text(function, ())


def test_a_function_of_ones_own_from_a_file(own):
    row = {"q": "Two and two?", "a": "Four."}
    assert custom(f"{own}:to_messages")(row) == EXCHANGE
    assert custom(f"{own}:to_text")(row) == "Two and two?"
    assert "def to_messages" in source_text(f"{own}:to_messages")


def test_a_function_of_ones_own_from_a_module(own, monkeypatch):
    monkeypatch.syspath_prepend(own.parent)
    assert custom("rows:to_messages")({"q": "Two and two?", "a": "Four."}) == EXCHANGE


BESIDE = {
    "rows_of_mine.py": "import wording_of_mine\nfrom parts_of_mine.inner import dot\n"
    "from plain_of_mine.deep.mark import mark\n"
    "def to_text(row):\n    return wording_of_mine.told(row) + dot + mark\n",
    "wording_of_mine.py": "import json\ndef told(row):\n    import phrases_of_mine\n    return phrases_of_mine.first\n",
    "phrases_of_mine.py": "import rows_of_mine\nfirst = 'A phrase'\n",
    "plain_of_mine/deep/mark.py": "mark = ''\n",
    "json/not_that_one.py": "",
    "parts_of_mine/__init__.py": "",
    "parts_of_mine/inner.py": "from .outer import dot\n",
    "parts_of_mine/outer.py": "dot = '.'\n",
    "unrelated.py": "no Python (\n",
}


def test_what_a_file_imports_from_its_own_folder_belongs_to_the_function(tmp_path):
    for name, text in BESIDE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    file = tmp_path / "rows_of_mine.py"
    found = [name for name, _ in code_files.files([file])]
    assert found == sorted(BESIDE.keys() - {"unrelated.py", "json/not_that_one.py"})
    assert custom(f"{file}:to_text")({}) == "A phrase."
    before = source_text(f"{file}:to_text")
    (tmp_path / "unrelated.py").write_text("other")
    assert source_text(f"{file}:to_text") == before
    (tmp_path / "parts_of_mine/outer.py").write_text("dot = '!'")
    assert source_text(f"{file}:to_text") != before
    (tmp_path / "parts_of_mine/outer.py").write_bytes("# coding: latin-1\ndot = 'é'".encode("latin-1"))
    assert source_text(f"{file}:to_text") != before


def test_the_text_of_a_function_without_imports_is_that_of_its_file(own):
    assert source_text(f"{own}:to_text") == own.read_text()


def test_functions_that_cannot_be_had(own):
    broken = own.with_name("broken.py")
    broken.write_text("def f(:\n")
    for function, problem in {
        "rows": "must be path/to/file.py:name or package.module:name",
        f"{own.parent}/none.py:f": "no such file or module",
        "no.such.module:f": "no such file or module",
        f"{own}:to_mesages": "did you mean 'to_messages'?",
        f"{broken}:f": "is not Python",
    }.items():
        with pytest.raises(ConfigError) as caught:
            custom(function)
        shown = function.replace(f"{own.parent}/", "") if "none" not in function else function
        assert str(caught.value).startswith(f"data.format.function={shown}: ")
        assert problem in str(caught.value)


def test_a_file_that_fails_when_it_is_run(own):
    own.with_name("raises.py").write_text("import no_such_package\ndef f(row): return ''\n")
    with pytest.raises(ConfigError, match="cannot be imported: ModuleNotFoundError"):
        custom(f"{own.parent}/raises.py:f")({})
    with pytest.raises(ConfigError, match="defines no function 'number'"):
        custom(f"{own}:number")({})


def test_a_file_may_be_in_the_encoding_that_it_declares_and_in_no_other(tmp_path):
    file = tmp_path / "latin.py"
    file.write_bytes("# coding: latin-1\ndef f(row):\n    return 'é'\n".encode("latin-1"))
    assert custom(f"{file}:f")({}) == "é"
    assert "def f" in source_text(f"{file}:f")
    undeclared = tmp_path / "undeclared.py"
    undeclared.write_bytes(b"def f(row):\n    return '\xe9'\n")
    with pytest.raises(ConfigError, match=r"data\.format\.function=undeclared\.py:f: is not Python"):
        custom(f"{undeclared}:f")
