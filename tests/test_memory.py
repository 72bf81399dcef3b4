"""The memory of a step: as it is told before anything is loaded, as it is counted, and as the process takes it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from runner import documents, fused, loss, memory, recompute
from runner.packing import Shape

LLAMA = transformers.LlamaConfig(
    vocab_size=512, hidden_size=256, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
SHAPE = Shape(rows=2, length=160, trained=90)
CPU = torch.device("cpu")


def test_memory_of_this_process_and_machine() -> None:
    before = memory.peak_rss()
    block = torch.ones(64 * 2**20)  # 256 MiB
    if not torch.cuda.is_available():
        assert memory.metrics()["memory/peak_rss_gib"] * memory.GIB >= before
    assert memory.peak_rss() >= block.nbytes
    assert memory.held_already(CPU) >= block.nbytes
    total, free = memory.of_device(CPU)
    assert 0 < free < total


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_memory_of_a_gpu() -> None:
    torch.cuda.reset_peak_memory_stats()
    block = torch.ones(2**20, device="cuda")
    metrics = memory.metrics()
    assert block.nbytes / memory.GIB <= metrics["memory/peak_allocated_gib"] <= metrics["memory/peak_reserved_gib"]
    total, free = memory.of_device(torch.device("cuda"))
    assert free < total


def test_a_ledger_counts_what_lives_and_forgets_what_is_gone() -> None:
    with memory.Ledger() as ledger:
        kept = torch.zeros(1000)
        for _ in range(3):
            torch.ones(1000).sum()
        view = kept[10:]
    assert view.nbytes < kept.nbytes
    assert 8000 <= ledger.peak <= 8100, "a block and one other at a time; a view is no second one"


@pytest.mark.parametrize("kept", ["speed", "balanced", "min"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_rehearsal_foretells_what_a_step_makes(kind: str, kept: recompute.Memory) -> None:
    """Two and three layers without content say what six layers with weights come to, within 2 %."""
    expected = memory.rehearsed(
        lambda layers: made(kind, layers, "meta"), SHAPE, by_document=True, kept=kept, autocast=None, device=CPU
    )
    assert abs(expected - counted(made(kind, None, "cpu"), kept)) < 0.02 * expected


def test_less_is_kept_for_less_memory() -> None:
    speed, balanced, least = (counted(made("lora", None, "cpu"), kept) for kept in ("speed", "balanced", "min"))
    assert balanced < 0.8 * speed
    assert least < 0.5 * speed


@pytest.mark.parametrize("kept", ["speed", "balanced", "min"])
def test_the_formula_is_near_where_nothing_can_be_rehearsed(kept: recompute.Memory) -> None:
    real = counted(made("lora", None, "cpu"), kept)
    told = memory.by_formula(LLAMA, SHAPE, kept=kept, dtype_bytes=4, full=False)
    assert 0.7 < told / real < 2


def test_what_cannot_be_rehearsed_says_so() -> None:
    class Looks(torch.nn.Module):
        config = LLAMA

    with pytest.raises(Exception, match="no list of equal layers"):
        memory.rehearsed(lambda _: Looks(), SHAPE, by_document=True, kept="min", autocast=None, device=CPU)


def test_shards_hold_a_share_and_two_layers() -> None:
    whole = memory.MemoryEstimate(weights=1000, gradients=100, optimizer=200, activations=50, libraries=7)
    assert whole.total == 1357
    assert whole.in_shards(4, layers=10) == memory.MemoryEstimate(450, 35, 50, 50, 7)


def made(kind: str, layers: int | None, device: str) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**LLAMA.to_dict(), **({"num_hidden_layers": layers} if layers else {})})
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config)
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"), low_cpu_mem_usage=device == "meta")
        fused.fuse(model)
    return model


def counted(model: Any, kept: recompute.Memory) -> int:
    """Bytes of a real step above weights and gradients."""
    assert documents.install(model, SHAPE.length) == ""
    recompute.arrange(model, kept)
    ids = torch.zeros(1, SHAPE.tokens, dtype=torch.int64)
    ends = torch.tensor([0, SHAPE.length, SHAPE.tokens], dtype=torch.int32)
    asked = {"input_ids": ids, "position_ids": ids, **documents.arguments(ends, SHAPE.length)}
    positions = torch.arange(SHAPE.trained)
    with memory.Ledger() as ledger:
        for parameter in model.parameters():
            ledger.enter(parameter)
        weights = ledger.live
        loss.rehearsal(model.train(), asked, positions).backward()
    return ledger.peak - weights - sum(p.nbytes for p in model.parameters() if p.requires_grad)


TRAIN = """
import json, sys
from pathlib import Path
import torch
from runner import build, cli, memory, train
from runner.checkpoint import Progress
from runner.rundir import RunDir
memory.return_what_is_freed()
with cli.composed(sys.argv[1:]) as (_, jobs):
    cfg = dict(jobs[0].cfg)
made = build.inputs(cfg)
expected = build.expect(cfg, made).memory.total
parts = build.parts(cfg, made, RunDir(Path("run")))
heaviest = parts.batches.heaviest()
parts.batches.step = lambda i: [heaviest]
hooks = train.Hooks(*[lambda *_: None] * 5)
for _ in range(2):
    train.optimizer_step(parts, Progress(), hooks)
print(json.dumps([expected, memory.peak_rss()]))
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA's libraries alone take gigabytes of a process")
@pytest.mark.parametrize(
    "changes", ["", "train.per_device_batch_size=4 train.memory=min", "quant=4bit train.memory=balanced", "lora=none"]
)
def test_a_process_takes_what_was_told(changes: str, cache: object) -> None:
    """Within 10 %, on the real model and rows."""
    command = [sys.executable, "-c", TRAIN, "train.max_steps=3", "tracking=offline", *changes.split()]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    expected, real = json.loads(done.stdout.splitlines()[-1])
    assert 0.9 < expected / real < 1.1, f"{expected / memory.GIB:.2f} GiB expected, {real / memory.GIB:.2f} seen"
