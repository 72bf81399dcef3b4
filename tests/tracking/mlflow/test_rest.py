"""MLflow's REST API without MLflow: credentials, and the reason why a server does not answer."""

from __future__ import annotations

import base64
import http.server
import json
import socket
import threading
from collections.abc import Iterator

import pytest

from runner.errors import TrackingError
from runner.tracking.mlflow import rest


@pytest.fixture
def server() -> Iterator[tuple[str, list[tuple[str, str, bytes]]]]:
    """Address of a server that answers each request with its path; and its requests: (path, authorization, body)."""
    requests: list[tuple[str, str, bytes]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            requests.append((self.path, self.headers.get("Authorization", ""), body))
            self.send_response(401 if "refused" in self.path else 200)
            self.end_headers()
            self.wfile.write(b"no" if "text" in self.path else json.dumps({"path": self.path}).encode())

        do_GET = do_POST = answer  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"127.0.0.1:{listening.server_port}", requests
        listening.shutdown()
        thread.join()


def test_credentials_of_the_address_come_before_those_of_the_environment(
    server: tuple[str, list[tuple[str, str, bytes]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, requests = server
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t0ken")
    assert rest.ask(f"http://{address}/", "runs/get?run_id=1") == {"path": "/api/2.0/mlflow/runs/get?run_id=1"}
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    rest.ask(f"http://{address}", "runs/search", {"max_results": 1})
    rest.ask(f"http://you:p%40ss@{address}", "runs/search", {})
    basic = [f"Basic {base64.b64encode(text).decode()}" for text in (b"me:secret", b"you:p@ss")]
    assert [authorization for _, authorization, _ in requests] == ["Bearer t0ken", *basic]
    assert [body for _, _, body in requests] == [b"", b'{"max_results": 1}', b"{}"]


def test_an_error_of_the_server_has_a_remedy_and_no_credentials(
    server: tuple[str, list[tuple[str, str, bytes]]],
) -> None:
    with pytest.raises(TrackingError, match="HTTP error 401") as caught:
        rest.ask(f"http://you:secret@{server[0]}", "refused")
    assert "set MLFLOW_TRACKING_USERNAME" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_the_reason_of_a_server_that_does_not_answer(server: tuple[str, list[tuple[str, str, bytes]]]) -> None:
    assert rest.silence(f"http://{server[0]}") == ""
    assert rest.silence(f"http://{server[0]}/text") == "it is not an MLflow server"
    assert rest.silence(f"http://{server[0]}/refused").startswith("HTTP error 401")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert rest.silence(f"http://127.0.0.1:{unused.getsockname()[1]}") == "Connection refused"


def test_the_reason_is_found_below_other_errors() -> None:
    inner = ConnectionRefusedError(111, "Connection refused")
    outer = RuntimeError("retries exceeded", ValueError(inner))
    assert rest.reason_of(outer) == "Connection refused"
    assert rest.reason_of(RuntimeError(TimeoutError())) == "timed out"
    assert rest.reason_of(RuntimeError("something else")) == ""
    circle = RuntimeError("a")
    circle.args = (circle,)
    assert rest.reason_of(circle) == ""
