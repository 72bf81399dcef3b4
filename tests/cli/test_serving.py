"""generate --serve: a real server of a real run, asked over HTTP, and ended."""

# ruff: noqa: F401 - fixtures are imported, then asked for by name

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import urllib.request

import psutil
import pytest
from fixtures.trained_runs import _there, asked_plainly, said, trained
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from runner.cli import serving
from runner.errors import ConfigError


def test_the_command_of_each_engine():
    assert serving.command("vllm", "a", 8000, on_gpu=True)[-8:] == [
        "--model", "./a", "--served-model-name", "a", "--host", "127.0.0.1", "--port", "8000",
    ]  # fmt: skip
    assert serving.command("transformers", "a", 1, on_gpu=True)[-6:] == [
        "serve", "a", "--host", "127.0.0.1", "--port", "1",
    ]  # fmt: skip
    on_cpu = serving.command("transformers", "a", 1, on_gpu=False)
    assert on_cpu[-2:] == ["--dtype", "float32"], "bfloat16 may be very slow on a CPU"


def test_a_missing_server_is_refused_with_what_installs_it(monkeypatch: pytest.MonkeyPatch):
    installed = {"fastapi", "uvicorn", "transformers.cli", "transformers.cli.serve"}
    monkeypatch.setattr(serving, "find_spec", lambda name: name if name in installed else None)
    with pytest.raises(ConfigError, match=r"needs openai, which is not installed\n.*uv sync --extra serve$"):
        serving.engine(on_gpu=False)
    installed |= {"openai", "vllm"}
    assert [serving.engine(on_gpu=on_gpu) for on_gpu in (True, False)] == ["vllm", "transformers"]
    installed -= {"vllm", "transformers.cli"}
    with pytest.raises(ConfigError, match=r"has no server .added in 5.0.\n.*uv pip install vllm$"):
        serving.engine(on_gpu=True)


def test_what_a_request_decides_is_refused(capsys: pytest.CaptureFixture[str]):
    trained("first")
    code, _, err = said(capsys, "generate", "first", "Hello!", "--serve", "--temperature", "1", "--seed", "2")
    assert code == 2
    for option in ("PROMPT=Hello!", "--temperature", "--seed"):
        assert f"{option}: has no effect with --serve" in err
    code, _, err = said(capsys, "generate", "first", "Hello!", "--port", "8000")
    assert (code, "--port: has no effect without --serve" in err) == (2, True)


@pytest.mark.slow
def test_a_served_adapter_answers_like_plain_peft_until_ctrl_c():
    run = trained("first")
    model = AutoPeftModelForCausalLM.from_pretrained(run.model)
    expected = asked_plainly(model, AutoTokenizer.from_pretrained(run.model), "Hello!", 8)
    command = [sys.executable, "-m", "runner", "generate", "first", "--serve"]
    proc = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert proc.stdout
    try:
        lines = [proc.stdout.readline() for _ in range(4)]
        assert lines[2].startswith("serve    http://127.0.0.1:"), (lines, proc.stderr and proc.stderr.read())
        curl = shlex.split(lines[3].removeprefix("try "))
        assert curl[0] == "curl"
        body = {**json.loads(curl[-1]), "max_tokens": 8, "temperature": 0}
        request = urllib.request.Request(curl[1], json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            said_there = json.load(answer)["choices"][0]["message"]["content"]
        assert said_there.strip() == expected
        family = psutil.Process(proc.pid).children(recursive=True)
        assert family
        proc.send_signal(signal.SIGINT)
        assert proc.wait() == 0
        assert not [member for member in family if member.is_running()]
    finally:
        proc.kill()
        proc.communicate()
