"""Let ``mlflow.pyfunc.load_model("runs:/ID/model")`` load the model of a run, where MLflow has its files."""

from __future__ import annotations

from typing import Any

from runner.data import vision
from runner.models import architecture, loftq_base, quantized_files
from runner.tracking.mlflow import pyfunc_model
from runner.tracking.rundir import RunDir
from runner.train.inputs import Inputs


def write(rundir: RunDir, inputs: Inputs) -> None:
    """Add MLflow's files to the folder ``model`` of the run: some 15 KB, whatever the size of the model.

    Not for models that such a program cannot load: it has texts alone, runs no code of the model, reads no packed
    weights, and has no base that was quantized anew.
    """
    if obstacle(rundir, inputs):
        return
    task, head = inputs.options.task, inputs.options.task.head
    config: dict[str, Any] = {"is_chat": task.chats, "problem": head.problem if head else None}
    packages = ["peft"] if (rundir.model / "adapter_config.json").is_file() else []
    if quantization := loftq_base.library_options(rundir.model):
        config["quantization"], packages = quantization, [*packages, "bitsandbytes"]
    signed = pyfunc_model.signature(head.outputs if head else (), takes_pairs=head is not None and task.unit == 2)
    pyfunc_model.write(rundir.model, signed, config, packages, str(rundir.read_manifest().get("signature")))


def obstacle(rundir: RunDir, inputs: Inputs) -> str:
    """Why MLflow cannot load the model; empty if it can."""
    if vision.of(inputs.tokenizer) is not None:
        return "the model reads images"
    if inputs.source.trust_remote_code:
        return "the model has code of its own"
    if loftq_base.iterations_of(rundir.model) > 1:
        return "the base of the adapter was quantized anew"
    stored = quantized_files.dequantized_from(architecture.read(inputs.source))
    return f"the files of the base are in {stored}" if stored else ""
