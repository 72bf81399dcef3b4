"""The skeleton of a template finds turns only in texts that it could have written."""

from __future__ import annotations

import pytest

from runner.data.skeleton import Skeleton, placeholders

SKELETON = Skeleton(["<u>", "</u><a>", "</a>\n"], [0, 1], [(3, 4), (7, 4)])
"""``<u>CONTENT</u><a>CONTENT</a>``; a turn begins behind its opening and ends with its closing."""
TALK = [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Ho</a>"}]


@pytest.mark.parametrize("question", [" Hi ", "Hi"])
def test_the_turns_of_a_text_whether_the_template_strips_or_not(question: str) -> None:
    text = f"<u>{question}</u><a>Ho</a></a>\n"
    spans = SKELETON.match(TALK, text)
    assert spans is not None
    turns = {number: text[start:end] for number, (start, end) in spans.items()}
    assert turns == {0: f"{question}</u>", 1: "Ho</a></a>"}


@pytest.mark.parametrize(
    "text", ["<x>Hi</u><a>Ho</a></a>\n", "<u>Hi</u><a>Ho</a></a>", "<u>Hey</u><a>Ho</a></a>\n", ""]
)
def test_a_text_that_differs_is_none_of_its_own(text: str) -> None:
    assert SKELETON.match(TALK, text) is None


def test_placeholders_occur_in_no_text() -> None:
    first, second = placeholders(("user", "assistant"))
    assert (first["role"], second["role"]) == ("user", "assistant")
    assert first["content"] != second["content"]
    assert all("\ue000" <= character <= "\uf8ff" or character.isdigit() for character in first["content"])
