"""YAML files of many runs: the text is that of ``yaml.dump``, and what they have in common is written once."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import pytest
import yaml

from runner.config import shared_yaml


class Colour(StrEnum):
    RED = "red"


TREES: list[dict[Any, Any]] = [
    {},
    {"a": {}},
    {"a": []},
    {"a": None},
    {"a": 1, "b": 1.0, "c": True, "d": "1", "e": "true", "f": ""},
    {"hydra": {"run": {"dir": "x" * 90}, "help": "two\nlines\n", "list": [1, [2, {"deep": None}]], 3: "number"}},
    {"only": {"nested": {"deeper": {"words": "word " * 40}}}},
    {"a: b": {"key with ': '": 1, "#": 2}, "x": "ü\u2028"},
]


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_the_text_is_that_of_the_whole_tree(tree: dict[Any, Any]) -> None:
    whole = yaml.dump(tree, Dumper=yaml.CSafeDumper, default_flow_style=False, allow_unicode=True, sort_keys=False)
    assert shared_yaml.dump(tree, yaml.CSafeDumper) == whole


def test_equal_values_of_other_types_have_other_texts() -> None:
    texts = [shared_yaml.dump({"a": value, "b": 0}, yaml.CSafeDumper) for value in (1, True, 1.0, "1")]
    assert len(set(texts)) == 4


def test_a_value_of_another_type_is_written_by_the_dumper() -> None:
    class Dumper(yaml.CSafeDumper):
        pass

    Dumper.add_representer(Colour, lambda dumper, value: dumper.represent_str(value.value))
    assert shared_yaml.dump({"a": Colour.RED, "b": 1}, Dumper) == "a: red\nb: 1\n"


def test_what_trees_have_in_common_is_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    written, original = [], yaml.dump

    def counted(tree: Any, *args: Any, **kwargs: Any) -> Any:
        written.append(tree)
        return original(tree, *args, **kwargs)

    monkeypatch.setattr(yaml, "dump", counted)
    for seed in range(5):
        shared_yaml.dump({"model of this test": {"path": "x"}, "seed of this test": seed}, yaml.CSafeDumper)
    assert len(written) == 1 + 5
