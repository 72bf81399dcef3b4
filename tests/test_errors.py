"""Messages quote data and names: what they quote can neither steer the terminal nor flood it."""

from __future__ import annotations

from runner.errors import LONGEST, Fault, quoted, visible


def test_control_characters_are_shown_not_sent():
    assert visible("\x1b[31mred\x07 \x9b \u202e \ud83d\r") == "\\x1b[31mred\\x07 \\x9b \\u202e \\ud83d\\r"
    plain = "two\nlines\tand — 好的, 👩\u200d🚀, e\u0301"
    assert visible(plain) == plain


def test_a_fault_shows_what_it_quotes():
    fault = Fault("data.path", "no such \x1b[2J file", "not \x1b]0;title\x07", "a\x1bb")
    assert str(fault) == "data.path=a\\x1bb: no such \\x1b[2J file\n    → not \\x1b]0;title\\x07"
    assert len(str(Fault("", "x" * 10**6))) == LONGEST
    assert quoted("a" * 100, 10) == "'aaaaaaaaa…'"
    assert (quoted("a\nb"), quoted(0.5), quoted(None)) == ("'a\\nb'", "0.5", "None")
