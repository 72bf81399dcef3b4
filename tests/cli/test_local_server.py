"""A server of another program: its port, what happens until it answers, and its end. With real programs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import until

from runner.cli import local_server
from runner.cli.local_server import HOST, Server
from runner.errors import ConfigError, TrackingError

HEALTHY = """
import http.server, sys
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Healthy).serve_forever()
"""


def server(program: str) -> Server:
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    return Server("ours", [sys.executable, "-c", program, str(port)], os.environ, port)


def test_a_server_is_shown_once_it_answers_and_ends_with_a_signal(tmp_path: Path) -> None:
    healthy = server(HEALTHY)

    def show() -> None:
        assert local_server.why_taken(healthy.port) == "is in use by another program"
        os.kill(os.getpid(), signal.SIGTERM)

    assert local_server.run(healthy, tmp_path, show) == 0
    assert local_server.why_taken(healthy.port) == ""


def test_a_server_that_does_not_start_is_explained_by_its_output(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"ours ended with code 3:\n    no such store") as error:
        local_server.run(server("print('no such store'); raise SystemExit(3)"), tmp_path, lambda: pytest.fail("shown"))
    assert "see the server's output above" in str(error.value)


def test_the_port_is_the_one_that_was_chosen_or_the_first_free_one(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        taken = other.getsockname()[1]
        said = rf"--port={taken}: is in use by another program\n    → --port \d+ is"
        with pytest.raises(ConfigError, match=said), local_server.port(taken, 5000):
            pass
        with pytest.raises(ConfigError, match=said):
            local_server.refuse_taken(taken)
        with local_server.port(None, taken) as free:
            assert free > taken
            assert capsys.readouterr().err == f"port {taken} is in use; using {free}\n"
    with local_server.port(free, 5000) as again:
        assert again == free


def test_a_port_is_given_to_one_process_even_before_its_server_listens() -> None:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        first = probe.getsockname()[1]
    with local_server.port(None, first) as one:
        with local_server.port(None, first) as other:
            assert other > one
        with pytest.raises(ConfigError, match="is in use"), local_server.port(one, 5000):
            pass
    with local_server.port(one, 5000) as again:
        assert again == one


def test_a_port_that_another_program_has_taken_meanwhile_is_not_shown_as_ours(tmp_path: Path) -> None:
    ours = server("import time; time.sleep(0.5); raise SystemExit('Address already in use')")
    with subprocess.Popen([sys.executable, "-c", HEALTHY, str(ours.port)], stderr=subprocess.DEVNULL) as other:
        until(lambda: local_server.why_taken(ours.port))
        with pytest.raises(TrackingError, match="Address already in use"):
            local_server.run(ours, tmp_path, lambda: pytest.fail("shown"))
        other.kill()
