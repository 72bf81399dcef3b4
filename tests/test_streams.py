"""What reaches a terminal, and what happens when nothing can reach it."""

from __future__ import annotations

import io
import os
import pty
import select
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from runner import streams, terminal
from runner.errors import ReaderLeft, RunnerError, visible

EVIL = "a\x1b[31m\x1b]0;title\x07\x9b2J\x7f\r\u202eb\udcff"
SHOWN = r"a\x1b[31m\x1b]0;title\x07\x9b2J\x7f\r\u202eb\udcff"


def test_control_characters_are_escaped_and_text_stays() -> None:
    assert visible(EVIL) == SHOWN
    assert visible("tab\tline\nété 中文 → 🙂 שלום") == "tab\tline\nété 中文 → 🙂 שלום"


def test_only_our_own_styles_reach_the_stream() -> None:
    below = io.StringIO()
    print(streams.styled(EVIL, "31"), file=streams.Output(below))  # type: ignore[type-var]
    assert below.getvalue() == f"\x1b[31m{SHOWN}\x1b[0m\n"


def test_tables_escape_their_cells_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    below = Terminal()
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "stdout", streams.Output(below))
    terminal.table(EVIL, ["name"], [[EVIL]])
    assert below.getvalue().count(SHOWN) == 2
    assert "\x1b]0" not in below.getvalue()


def test_what_an_encoding_lacks_is_escaped() -> None:
    raw = io.BytesIO()
    output = streams.Output(io.TextIOWrapper(raw, encoding="ascii"))
    print("→ é", file=output)  # type: ignore[type-var]
    output.flush()
    assert raw.getvalue() == b"\\u2192 \\xe9\n"


@pytest.mark.parametrize("refusal", [RunnerError, ReaderLeft])
def test_text_that_cannot_be_written_is_dropped_unless_it_is_the_result(
    refusal: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "w") as full, os.fdopen(write, "w") as pipe:
        output = streams.Output(full if refusal is RunnerError else pipe)
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(refusal), streams.piped():
            print("x", flush=True)
        print("y" * 100000, flush=True)
        output.close()
        monkeypatch.undo()


@pytest.mark.parametrize("kind", ["pipe", "terminal", "stopped terminal"])
def test_a_run_does_not_wait_for_who_does_not_read(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.pipe() if kind == "pipe" else pty.openpty()
    if kind == "stopped terminal":
        termios.tcflow(theirs, termios.TCOOFF)
    monkeypatch.setattr(streams, "PATIENCE_S", 0.01)
    with os.fdopen(theirs, "w") as below:
        monkeypatch.setattr(sys, "stdout", streams.Output(below))
        with streams.unblocked():
            for _ in range(100):
                print("x" * 1000)
            if kind == "stopped terminal":
                termios.tcflow(theirs, termios.TCOON)
            while select.select([ours], [], [], 0.1)[0]:
                os.read(ours, 65536)
            print("the reader is back")
            print("the end\x1b")
            shown = b""
            while b"the end" not in shown:
                shown += os.read(ours, 1024)
            assert (
                shown.replace(b"\r", b"")
                .strip()
                .startswith(b"[text is missing here: this output was blocked]\nthe reader is back\nthe end")
            )
            assert os.get_blocking(theirs)  # others share it
        monkeypatch.undo()
    os.close(ours)


def test_text_follows_a_stream_that_is_redirected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.pipe()
    with os.fdopen(theirs, "w") as below, (tmp_path / "log").open("w+") as file:
        monkeypatch.setattr(sys, "stdout", streams.Output(below))
        with streams.unblocked():
            print("to the pipe")
            os.dup2(file.fileno(), below.fileno())
            print("to the file", flush=True)
            assert os.read(ours, 1024) == b"to the pipe\n"
            assert os.read(ours, 1024) == b"", "nothing holds the pipe open"
        assert (tmp_path / "log").read_text() == "to the file\n"
        monkeypatch.undo()
    os.close(ours)


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["status"], ["plan", "--help"], ["sync", "--help"]])
def test_a_command_that_only_prints_ends_quietly_when_its_reader_has_left(tmp_path: Path, words: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "runner", *words]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_full_disk_behind_the_result_is_an_error(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "runner", "--version"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: stdout: cannot be written: No space left on device")


def test_a_name_with_escape_sequences_reaches_no_terminal(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "runner", "status", "no\x1b]0;title\x07such"]
    done = subprocess.run(command, stdout=theirs, stderr=theirs, cwd=tmp_path, check=False)
    shown = os.read(ours, 65536)
    assert done.returncode == 2
    assert rb"no\x1b]0;title\x07such" in shown
    assert b"\x1b]0" not in shown
