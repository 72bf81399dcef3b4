"""The words behind a verb."""

# ruff: noqa: F401 - fixtures are imported, then asked for by name

from __future__ import annotations

import pytest
from fixtures.run_folders import _in_a_new_folder

from runner.cli import args
from runner.errors import ConfigError


def test_words_of_a_verb():
    found = args.read(["a", "--rank=2", "-f", "lora.r=8"], "help", flags=("-f",), valued=("--rank",))
    assert found
    assert (found.words, found.options) == (["a", "lora.r=8"], {"--rank": "2", "-f": ""})
    with pytest.raises(ConfigError, match="needs a value"):
        args.read(["--rank"], "help", valued=("--rank",))
