"""The memory of a step: as it is told before anything is loaded, as it is counted, and as the process takes it."""

# ruff: noqa: F401 - fixtures are imported, then asked for by name

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import TINY, composed, no_hooks
from fixtures import versions
from fixtures.own_memory import CPU, nothing_from_others
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode

from runner.config.schema import Memory
from runner.data.batches import Shape
from runner.models.kernels import activation_checkpointing, buffers, lora_linear, varlen_attention
from runner.tasks import cross_entropy
from runner.tracking.rundir import RunDir
from runner.train import build, estimate, inputs, loop
from runner.train.checkpoint import Progress
from runner.train.memory import peak, usage
from runner.train.options import Options
from runner.train.parts import Hooks

LLAMA = transformers.LlamaConfig(
    vocab_size=512, hidden_size=256, intermediate_size=384, num_hidden_layers=12, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
SHAPE = Shape(rows=2, length=160, trained=90)


def test_a_ledger_counts_what_lives_and_forgets_what_is_gone() -> None:
    with peak.Ledger() as ledger:
        kept = torch.zeros(1000)
        for _ in range(3):
            torch.ones(1000).sum()
        view = kept[10:]
    assert view.nbytes < kept.nbytes
    assert 8000 <= ledger.peak <= 8100, "a block and one other at a time; a view is no second one"


def test_a_ledger_counts_one_device() -> None:
    with FakeTensorMode(), peak.Ledger(torch.device("cuda")) as ledger:
        kept = torch.zeros(1000, device="cuda"), torch.zeros(500)
    assert ledger.peak == kept[0].nbytes


@versions.fake_gpu
def test_inputs_of_layers_in_the_memory_of_the_cpu_take_none_of_the_gpu() -> None:
    def made(layers: int) -> Any:
        config = transformers.LlamaConfig(**{**LLAMA.to_dict(), "num_hidden_layers": layers})
        with torch.device("meta"):
            return transformers.LlamaForCausalLM(config)

    def bytes_of(layers: int, kept: Memory) -> int:
        """What a forward pass keeps; a backward pass of a GPU cannot be simulated without one."""
        model, gpu = made(layers), torch.device("cuda")
        activation_checkpointing.arrange(model, kept)
        with FakeTensorMode(), gpu, peak.Ledger(gpu) as ledger:
            weights = peak._enter_weights(model, gpu, ledger)
            ids = torch.zeros(SHAPE.rows, SHAPE.length, dtype=torch.int64)
            out = model.train()(input_ids=ids, use_cache=False, logits_to_keep=1)
            ledger._remove_freed()
            assert out.logits.requires_grad
            return ledger.live - weights

    inputs = 4 * SHAPE.rows * SHAPE.length * LLAMA.hidden_size
    assert bytes_of(4, "min") - bytes_of(2, "min") == 2 * inputs
    assert bytes_of(4, "offload") == bytes_of(2, "offload")


@pytest.mark.parametrize("kept", ["speed", "balanced", "min"])
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize(
    "way",
    [
        "by document",
        *(pytest.param(way, marks=pytest.mark.slow) for way in ("with a mask", "a second micro-batch", "in bfloat16")),
    ],
)
def test_a_rehearsal_estimates_the_memory_of_a_step(kind: str, kept: Memory, way: str) -> None:
    """Six and eight layers without content say what twelve with weights come to, within 2 %."""
    by_document, accumulates = way != "with a mask", way == "a second micro-batch"
    autocast = torch.bfloat16 if way == "in bfloat16" else None
    expected = peak.rehearsed(
        lambda layers: made(kind, layers, "meta"), 12, SHAPE, by_document=by_document, kept=kept, autocast=autocast,
        device=CPU, accumulates=accumulates,
    )  # fmt: skip
    real = counted(made(kind, 12, "cpu"), kept, by_document=by_document, accumulates=accumulates, autocast=autocast)
    reused = sum(storage.nbytes() for storage in buffers._BUFFERS.named.values())  # some MB, in no estimate
    assert -0.02 * expected < real - expected < 0.02 * expected + reused


def test_layers_that_train_different_parameters_are_all_simulated() -> None:
    def last_trained(layers: int, device: str) -> Any:
        model = made("full", layers, device).requires_grad_(False)
        model.model.layers[-1].requires_grad_(True)
        return model

    expected = peak.rehearsed(
        lambda layers: last_trained(layers, "meta"), 12, SHAPE, by_document=True, kept="speed", autocast=None,
        device=CPU, alike=False,
    )  # fmt: skip
    real = counted(last_trained(12, "cpu"), "speed")
    reused = sum(storage.nbytes() for storage in buffers._BUFFERS.named.values())
    assert -0.02 * expected < real - expected < 0.02 * expected + reused
    assert estimate._alike(made("lora", 3, "meta"))
    assert not estimate._alike(last_trained(3, "meta"))


def test_less_is_kept_for_less_memory() -> None:
    speed, balanced, least = (counted(made("lora", 12, "cpu"), kept) for kept in ("speed", "balanced", "min"))
    assert balanced < 0.8 * speed
    assert least < 0.5 * speed


def test_a_model_that_cannot_be_rehearsed_raises() -> None:
    class Looks(torch.nn.Module):
        config = LLAMA

    with pytest.raises(Exception, match="no list of decoder layers of one class"):
        peak.rehearsed(lambda _: Looks(), 6, SHAPE, by_document=True, kept="min", autocast=None, device=CPU)


def made(kind: str, layers: int, device: str) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**LLAMA.to_dict(), "num_hidden_layers": layers})
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config)
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"), low_cpu_mem_usage=device == "meta")
        lora_linear.fuse(model)
    return model


def counted(
    model: Any,
    kept: Memory,
    *,
    by_document: bool = True,
    accumulates: bool = False,
    autocast: torch.dtype | None = None,
) -> int:
    """Bytes of a real step above weights and gradients."""
    if by_document:
        assert varlen_attention.install(model, SHAPE.length, autocast) == ""
        ids = torch.zeros(1, SHAPE.tokens, dtype=torch.int64)
        ends = torch.tensor([0, SHAPE.length, SHAPE.tokens], dtype=torch.int32)
        asked = {"input_ids": ids, "position_ids": ids, **varlen_attention.arguments(ends, SHAPE.length)}
    else:
        ids = torch.zeros(SHAPE.rows, SHAPE.length, dtype=torch.int64)
        mask = torch.zeros(SHAPE.rows, 1, SHAPE.length, SHAPE.length)
        asked = {"input_ids": ids, "position_ids": ids, "attention_mask": mask}
    activation_checkpointing.arrange(model, kept)
    positions = torch.arange(SHAPE.trained if by_document else SHAPE.trained // SHAPE.rows)
    with peak.Ledger() as ledger:
        for parameter in model.parameters():
            ledger.enter(parameter)
        weights = ledger.live
        for tensor in asked.values():
            if isinstance(tensor, torch.Tensor):
                ledger.enter(tensor)
        for _ in range(1 + accumulates):
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                total = cross_entropy.rehearsal(model.train(), asked, positions)
            total.backward()
            del total
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return ledger.peak - weights - gradients


TRAIN = """
from runner.train.memory import heap
heap.restart()
import json, sys
from pathlib import Path
import torch
from runner.cli import jobs
from runner.train import build, estimate, inputs, loop
from runner.train.checkpoint import Progress
from runner.train.memory import usage
from runner.train.options import Options
from runner.train.parts import Hooks
from runner.tracking.rundir import RunDir
with jobs.composed(sys.argv[1:]) as (_, found):
    cfg = dict(found[0].cfg)
made = inputs.inputs(Options(cfg))
told = estimate.expect(made).memory.total
parts = build.parts(made, RunDir(Path("run")))
every = [parts.batches.step(number)[0] for number in range(40)]
heaviest = max(every, key=lambda batch: (batch['tokens'], batch['trained']))
parts.batches.step = lambda i: [heaviest]
hooks = Hooks(*[lambda *_: None] * 5)
for _ in range(2):
    loop.optimizer_step(parts, Progress(), hooks)
print(json.dumps([told, usage.peak_of_process()]))
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA's libraries alone take gigabytes of a process")
@pytest.mark.parametrize("changes", ["", "quant=4bit train.memory=balanced", "lora=none"])
def test_a_process_needs_the_estimated_memory(changes: str, cache: object) -> None:
    """Within 10 %, on the real model and rows."""
    command = [sys.executable, "-c", TRAIN, "train.max_steps=3", "tracking=offline", *changes.split()]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    expected, real = json.loads(done.stdout.splitlines()[-1])
    assert 0.9 < expected / real < 1.1, f"{expected / usage.GIB:.2f} GiB expected, {real / usage.GIB:.2f} seen"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "options",
    [
        "lora=lora",
        "lora=lora train.memory=balanced",
        "lora=lora train.memory=min",
        "lora=lora quant=4bit",
        "lora=none model.dtype=bfloat16",
        "lora=none",
    ],
)
def test_a_gpu_needs_the_estimated_memory(options: str, cache: Path, tmp_path: Path) -> None:
    shape = ("model.hidden_size=1024", "model.intermediate_size=4096", "model.layers=10", "model.heads=8")
    rows = ("data.max_length=2048", "data.train_rows=400", "train.per_device_batch_size=4", "train.max_steps=4")
    cfg = composed(*TINY, *shape, *rows, "compile=none", *options.split())
    made = inputs.inputs(Options(cfg))
    told = estimate.expect(made).memory
    parts = build.parts(made, RunDir(tmp_path))
    torch.cuda.reset_peak_memory_stats()
    progress = Progress()
    for _ in range(3):
        loop.optimizer_step(parts, progress, no_hooks())
    peak = torch.cuda.max_memory_allocated()
    print(f"{options}: {peak / (told.total - told.libraries):.3f} of what was foretold")
    assert peak == pytest.approx(told.total - told.libraries, rel=0.1)
