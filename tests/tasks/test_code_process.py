"""The process in which an answer is tested: its limits, and what it cannot reach."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from runner.tasks import code_process


def output(code: str, seconds: int = 5) -> str:
    given = f"{seconds} {2**30} token\n{code}"
    done = subprocess.run([sys.executable, "-I", code_process.__file__], input=given, capture_output=True, text=True)
    return done.stdout


def test_code_without_an_error_gives_the_token() -> None:
    assert output("print('something else')") == "token"
    assert output("raise ValueError") == output("this is no Python") == ""


def test_endless_code_ends() -> None:
    assert output("while True: pass", seconds=1) == ""


def test_there_is_no_network_where_the_system_can_take_it_away() -> None:
    leave = "import ctypes; libc = ctypes.CDLL(None); exit(bool(libc.unshare(0x50000000) and libc.unshare(0x40000000)))"
    if subprocess.run([sys.executable, "-c", leave]).returncode:
        pytest.skip("this system lets no process leave the network")
    with socket.create_server(("127.0.0.1", 0)) as server:
        ask = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)"
        assert output(ask) == ""
