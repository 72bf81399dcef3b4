"""Environment variables that are changed for a moment."""

from __future__ import annotations

import os

import pytest

from runner import environment_variables

NAME = "RUNNER_TEST_VARIABLE"


@pytest.mark.parametrize("before", [None, "", "mine"])
@pytest.mark.parametrize("value", [None, "1"])
def test_a_variable_is_as_before_the_block(
    before: str | None, value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(NAME, raising=False)
    if before is not None:
        monkeypatch.setenv(NAME, before)
    with environment_variables.kept(NAME, value):
        assert os.environ.get(NAME) == (before if value is None else value)
        os.environ[NAME] = "changed inside"
    assert os.environ.get(NAME) == before
    with environment_variables.kept(NAME, value):
        os.environ.pop(NAME, None)
    assert os.environ.get(NAME) == before
