"""Messages quote data and names: what they quote can neither steer the terminal nor flood it."""

from __future__ import annotations

import logging

from runner import log_handlers, terminal
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


def test_the_terminal_and_the_log_show_them_likewise(tmp_path, capsys):
    with log_handlers.logging_to(tmp_path / "train.log"):
        terminal.say("a\x1b[31mb")
        terminal.table("t\x1b", ["c"], [["d\x1b[0m"]])
        logging.getLogger("runner").warning("w\x1b[1m")
        terminal.header({"data": "h\x1b"})
    printed = capsys.readouterr()
    for text in (printed.out + printed.err, (tmp_path / "train.log").read_text()):
        assert "\x1b" not in text
        assert all(escaped in text for escaped in ("a\\x1b[31mb", "d\\x1b[0m", "w\\x1b[1m", "h\\x1b"))
