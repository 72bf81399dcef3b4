"""Which format a row looks like: what each format declares, and nothing that is listed elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from runner.config import bind
from runner.data import row_shape

TURNS = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]
SPEAKERS = [{"from": "human", "value": "Two and two?"}, {"from": "gpt", "value": "Four."}]


def test_every_format_but_custom_declares_its_rows() -> None:
    formats = {path.stem for path in (bind.config_dir() / "data/format").glob("*.yaml")}
    assert row_shape._companions().keys() == formats - {"custom"}


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"talk": TURNS}, "messages"),
        ({"talk": SPEAKERS}, "sharegpt"),
        ({"text": "the same, rendered", "messages": TURNS}, "messages"),
        ({"instruction": "?", "output": "!", "text": "the same, rendered"}, "alpaca"),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "prompt_completion"),
        ({"chosen": TURNS, "rejected": TURNS}, "preference"),
        ({"prompt": "?", "completion": "!", "chosen": "!", "rejected": ""}, "preference"),
        ({"text": 3}, None),
        ({"messages": []}, None),
        ({}, None),
    ],
)
def test_the_format_that_uses_most_keys_of_the_row(row: dict[str, Any], name: str | None) -> None:
    assert row_shape.looks_like(row) == name


def test_a_new_format_is_known_by_its_yaml_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in conf/data/format that uses alpaca with other keys: the keys of the file count."""
    shutil.copytree(bind.config_dir() / "data/format", tmp_path / "data/format")
    text = (tmp_path / "data/format/alpaca.yaml").read_text()
    text = text.replace("instruction: instruction", "instruction: question").replace("output: output", "output: reply")
    (tmp_path / "data/format/quiz.yaml").write_text(text)
    monkeypatch.setattr(bind, "config_dir", lambda: tmp_path)
    row_shape._companions.cache_clear()
    try:
        assert row_shape.looks_like({"question": "?", "reply": "!"}) == "quiz"
    finally:
        row_shape._companions.cache_clear()
