"""Texts in flat arrays."""

from __future__ import annotations

from runner.data.texts import Texts


def test_texts_come_back_as_they_were() -> None:
    given = ["", "größer", "\ud800 alone", '{"columns": {"answer": 1}}']
    texts = Texts.of(given)
    assert [texts[row] for row in range(len(texts))] == given
    assert len(Texts.of([])) == 0


def test_the_columns_of_all_texts() -> None:
    assert Texts.of(['{"columns": {"a": 1, "b": 2}}', '{"columns": {"c": 3, "a": 4}}']).columns == ("a", "b", "c")
