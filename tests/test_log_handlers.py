"""train.log and the terminal: which messages go where, without secrets and control characters."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

import pytest

from runner import PACKAGE, log_handlers, terminal

TOKEN = "hf_" + "a1B2" * 6


def test_control_characters_are_escaped_on_the_terminal_and_in_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with log_handlers.logging_to(tmp_path / "train.log"):
        terminal.print_line("a\x1b[31mb")
        terminal.table("t\x1b", ["c"], [["d\x1b[0m"]])
        logging.getLogger("runner").warning("w\x1b[1m")
        terminal.header({"data": "h\x1b"})
    printed = capsys.readouterr()
    for text in (printed.out + printed.err, (tmp_path / "train.log").read_text()):
        assert "\x1b" not in text
        assert all(escaped in text for escaped in ("a\\x1b[31mb", "d\\x1b[0m", "w\\x1b[1m", "h\\x1b"))


def test_no_secret_gets_into_the_log_or_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", "Xy7" * 9)
    log = logging.getLogger("runner")
    with log_handlers.logging_to(tmp_path / "train.log"):
        log.info("took %s", TOKEN)
        logging.getLogger("somebody").warning("GET http://me:pass@host/x")
        try:
            raise ValueError(f"bad header {os.environ['HF_TOKEN']}")
        except ValueError as error:
            log.error("it failed", exc_info=error)
        terminal.print_line(f"next     {TOKEN}")
    out, err = capfd.readouterr()
    written = (tmp_path / "train.log").read_text()
    for text in (written, err, out):
        assert "***" in text
        assert TOKEN not in text
        assert os.environ["HF_TOKEN"] not in text
    assert "me:pass" not in written
    assert "ValueError: bad header" in written
    assert "ValueError: bad header" in err, "a traceback that is asked for is shown"


def test_the_terminal_shows_our_own_warnings_only_and_the_log_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Also in a checkout whose folder is called runner, with the libraries inside."""
    libraries = tmp_path / "runner" / ".venv" / "lib" / "torch"
    with log_handlers.logging_to(tmp_path / "train.log"):
        warnings.warn_explicit("of a library", UserWarning, str(libraries / "nn.py"), 1)
        warnings.warn_explicit("of ours: a colon", UserWarning, str(PACKAGE / "train" / "loop.py"), 2)
        logging.getLogger("library").warning("a message of a library")
        logging.getLogger("runner.train").info("a message of ours")
        logging.getLogger("runner").info("for the log alone", extra={"quiet": True})
    assert capsys.readouterr().err.splitlines() == ["warning: of ours: a colon", "a message of ours"]
    written = (tmp_path / "train.log").read_text()
    assert all(text in written for text in ("of a library", "of ours", "a message of a library", "for the log alone"))


def test_the_loggers_are_as_before_afterwards(tmp_path: Path):
    root, ours = logging.getLogger(), logging.getLogger("runner")
    before = root.level, ours.level, list(root.handlers)
    with pytest.raises(OSError), log_handlers.logging_to(tmp_path / "train.log", speaks=False):
        raise OSError
    assert (root.level, ours.level, list(root.handlers)) == before


def test_a_full_disk_loses_lines_of_the_log_and_nothing_else(capsys: pytest.CaptureFixture[str]):
    with log_handlers.logging_to(Path("/dev/full")):
        logging.getLogger("runner").info("still shown")
    assert capsys.readouterr().err == "still shown\n"


@pytest.mark.parametrize(("asked", "level"), [("info", logging.INFO), ("", logging.WARNING)])
def test_the_messages_of_transformers_that_are_asked_for_are_in_the_log(
    asked: str, level: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_info()  # as transformers does with this variable when it is imported
    monkeypatch.setenv(log_handlers.VERBOSITY, asked)
    try:
        with log_handlers.logging_to(tmp_path / "train.log"):
            log_handlers.quiet_libraries()
            assert transformers_logging.get_verbosity() == level
            transformers_logging.get_logger("transformers.some").info("loading a file")
        assert ("loading a file" in (tmp_path / "train.log").read_text()) == bool(asked)
        assert "loading" not in capsys.readouterr().err
    finally:
        transformers_logging.set_verbosity(before)
