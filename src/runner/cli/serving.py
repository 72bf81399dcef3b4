"""Serve a trained model with OpenAI's API: by vLLM where it is installed, else by transformers' own server."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from runner import terminal
from runner.cli import local_server
from runner.cli.local_server import HOST, Server
from runner.errors import ConfigError, Fault
from runner.train.trained_model import Trained

FIRST_PORT = 8000
START_S = 900.0
"""Maximum time until the server answers: it loads the model, and vLLM compiles it."""
NEEDED = ("fastapi", "uvicorn", "openai")
"""Packages of ``transformers serve``."""


def engine(*, on_gpu: bool) -> str:
    """``vllm`` or ``transformers``, whichever can serve here.

    Raises:
        ConfigError: neither is installed; the remedy names the packages.
    """
    if on_gpu and find_spec("vllm"):
        return "vllm"
    missing = [name for name in NEEDED if not find_spec(name)]
    if find_spec("transformers.cli") is None or find_spec("transformers.cli.serve") is None:
        remedy = "uv sync --upgrade-package transformers" + (", or uv pip install vllm" if on_gpu else "")
        raise ConfigError(Fault("--serve", "this version of transformers has no server (added in 5.0)", remedy))
    if missing:
        remedy = "uv sync --extra serve" + (", or uv pip install vllm" if on_gpu else "")
        raise ConfigError(Fault("--serve", f"needs {' and '.join(missing)}, which is not installed", remedy))
    return "transformers"


def serve(run: Trained, port: int | None) -> int:
    """Serve the model of a run until Ctrl-C; returns the exit code.

    An adapter is merged into its base model in a temporary folder, in full precision, and checked like an export.

    Raises:
        ConfigError: no server is installed, or the port is in use.
        TrainingError: merging changed the logits.
        TrackingError: the server did not start.
    """
    import torch

    from runner.train import trained_model

    if run.reads_images:
        problem = "serves models that read text alone, and the model of this run reads images"
        raise ConfigError(Fault("--serve", problem, "export it with --merged, and serve the folder with vLLM"))
    on_gpu = torch.cuda.is_available()
    chosen, name = engine(on_gpu=on_gpu), model_name(run)
    with local_server.port(port, FIRST_PORT) as number, tempfile.TemporaryDirectory(prefix="runner-") as folder:
        trained_model.quiet()
        _write(run, Path(folder, name))
        server = Server(
            "vLLM" if chosen == "vllm" else "transformers serve",
            command(chosen, name, number, on_gpu=on_gpu),
            {**os.environ, "HF_HUB_OFFLINE": "1"},
            number,
            START_S,
        )
        return local_server.run(server, Path(folder), lambda: _show(run, server, name))


def model_name(run: Trained) -> str:
    """The name of the model in requests; also the folder that the server loads, without ``@`` and ``:``."""
    manifest = run.rundir.read_manifest()
    name = str(manifest.get("label") or manifest.get("name") or run.rundir.path.name)
    return re.sub(r"[^\w.=-]+", "-", name).strip("-.")[:80] or "model"


def command(chosen: str, name: str, port: int, *, on_gpu: bool) -> list[str]:
    """The command that serves the folder ``name``; bfloat16 weights are computed in float32 on a CPU."""
    place = ["--host", HOST, "--port", str(port)]
    if chosen == "vllm":
        return [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", f"./{name}",
                "--served-model-name", name, *place]  # fmt: skip
    start = "from transformers.cli.transformers import app; app()"  # its main() asks the network for updates
    return [sys.executable, "-P", "-c", start, "serve", name, *place, *([] if on_gpu else ["--dtype", "float32"])]


def request(run: Trained, address: str, name: str) -> list[str]:
    """A curl command that asks the served model."""
    asked = {"messages": [{"role": "user", "content": "Hello!"}]} if run.is_chat else {"prompt": "Once upon a time"}
    path = "chat/completions" if run.is_chat else "completions"
    body = json.dumps({"model": name, **asked, "max_tokens": 64})
    return ["curl", f"{address}/v1/{path}", "-H", "Content-Type: application/json", "-d", body]


def _write(run: Trained, folder: Path) -> None:
    """The whole model: merged, or the folder of the run itself."""
    if not run.is_adapter:
        folder.symlink_to(run.rundir.model.absolute(), target_is_directory=True)
        return
    from runner.train import merge

    print("merging the adapter into the base model …", file=sys.stderr, flush=True)
    folder.mkdir()
    for key, note in merge.write(run, folder, None).notes().items():
        terminal.print_line(f"{key:<8} {note}")


def _show(run: Trained, server: Server, name: str) -> None:
    lines: Sequence[str] = (
        f"serve    {server.address}/v1  ({server.name}; model {name})",
        f"try      {shlex.join(request(run, server.address, name))}",
    )
    for line in lines:
        print(line, flush=True)
    if run.is_chat and run.cfg["data"].get("system_prompt"):
        print("note     send the system prompt of the run (data.system_prompt) as the first message", flush=True)
