"""Malformed JSON is refused with the line of the fault, in a list as in lines."""

from __future__ import annotations

import pytest
from fixtures.data_files import local, write

from runner.errors import DataError


@pytest.mark.parametrize(
    ("name", "content", "message", "remedy"),
    [
        ("x.jsonl", '{"a": 1}\n{"a": 2\n', r"x\.jsonl:2: malformed JSON: .*column 8", "correct that line"),
        ("x.jsonl", '[\n{"a": 1}\n]', r"x\.jsonl:1: malformed JSON", "rename the file to .json:"),
        ("x.json", '[{"a": 1},\n {"a": }]', r"x\.json:2: malformed JSON", "correct that line"),
        ("x.json", '{"a": 1}\n{"a": 2}\n', r"x\.json:2: malformed JSON: Extra data", "rename the file to .jsonl:"),
        ("x.jsonl", '{"a": 1}\n{"a": {"b": 1, "b": 2}}', r"x\.jsonl:2: the key 'b' occurs twice", "correct that line"),
        ("x.json", '[{"a": 1},\n {"b\\"": "b",\n "a": 1, "a": 2}]', r"x\.json:3: the key 'a' occurs twice", "correct"),
        ("x.jsonl", '{"a": 1}\n{"a": ' + "9" * 5000 + "}", r"x\.jsonl:2: a number has too many digits", "as a text"),
        ("x.json", '[{"a": 1},\n{"a": ' + "9" * 5000 + "}]", r"x\.json:2: a number has too many digits", "as a text"),
        ("x.jsonl", '{"a": 1}\n{"a": ' + "[" * 9000 + "]" * 9000 + "}", r"x\.jsonl:2: .* nested too deep", "less deep"),
        (
            "x.json",
            '[{"a": [1]},\n{"a": ' + "[" * 9000 + "]" * 9000 + "}]",
            r"x\.json:2: .* nested too deep",
            "less deep",
        ),
    ],
)
def test_malformed_json_is_named_by_its_line(tmp_path, name, content, message, remedy):
    source = local(write(tmp_path / name, content))
    with pytest.raises(DataError, match=message) as caught:
        list(source.train)
    assert remedy in caught.value.faults[0].remedy
