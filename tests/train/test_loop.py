"""The loop against references: transformers' own loss, PEFT, and torch's own AdamW in a plain loop."""

from __future__ import annotations

import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, composed
from fixtures import versions

from runner.errors import ConfigError, Preempted, TrainingError
from runner.models.kernels import compilation, varlen_attention
from runner.tracking.rundir import RunDir
from runner.train import build, inputs, loop
from runner.train.async_metrics import AsyncMetrics
from runner.train.checkpoint import Progress
from runner.train.options import Options
from runner.train.parts import Hooks, Parts

IN_STEP = tuple(
    f"/runner/{name}.py"
    for name in (
        "train/loop",
        "train/async_metrics",
        "train/distributed/wrap",
        "train/distributed/ranks",
        "train/optim",
        "tasks/task",
        "tasks/cross_entropy",
        "models/kernels/attention",
        "models/kernels/varlen_attention",
        "models/kernels/lora_linear",
    )
)
"""The modules through which a step goes."""
assert all(Path(loop.__file__).parents[2].joinpath(name[1:]).is_file() for name in IN_STEP)


class Recorded:
    """Hooks that keep what they are told."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.records: list[tuple[int, dict[str, float]]] = []
        self.saves: list[None] = []
        self.stop_at = stop_at

    def hooks(self) -> Hooks:
        return Hooks(
            record=lambda step, metrics: self.records.append((step, metrics)),
            evaluating=lambda *_: None,
            saving=lambda _: self.saves.append(None),
            check_stop=self._check,
            warm=lambda: None,
        )

    def _check(self) -> None:
        if self.stop_at is not None and len(self.of("train/loss")) >= self.stop_at:
            raise Preempted()

    def of(self, name: str) -> list[float]:
        return [metrics[name] for _, metrics in self.records if name in metrics]


def parts_of(folder: Path, *overrides: str) -> tuple[inputs.Inputs, Parts]:
    cfg = composed(*overrides)
    made = inputs.inputs(Options(cfg))
    folder.mkdir(parents=True, exist_ok=True)
    return made, build.parts(made, RunDir(folder))


def trained(folder: Path, *overrides: str) -> tuple[Parts, Recorded]:
    _, parts = parts_of(folder, *overrides)
    recorded = Recorded()
    loop.train(parts, Progress(), recorded.hooks())
    return parts, recorded


def plain_loop(model: Any, batches: list[dict[str, Any]], learning_rate: float, factors: list[float]) -> list[float]:
    """transformers' own loss and torch's own AdamW; nothing of ours."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    losses = []
    model.train()
    for batch, factor in zip(batches, factors, strict=True):
        labels = torch.full_like(batch["labels"], -100)
        labels[:, 1:] = batch["labels"][:, :-1]  # transformers shifts them itself
        loss = model(input_ids=batch["input_ids"], labels=labels, use_cache=False).loss
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * factor
        optimizer.step()
        optimizer.zero_grad()
    return losses


def plain_model(made: inputs.Inputs, parts: Parts) -> Any:
    """The same base and the same initial adapter, through transformers and PEFT alone."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(made.source.path, **versions.FLOAT32)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    ours = {name: p for name, p in parts.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(ours.pop(name))
    assert not ours
    return model


@pytest.mark.slow
def test_twenty_steps_on_the_real_model_equal_a_plain_loop(tmp_path: Path, cache: Path):
    made, parts = parts_of(
        tmp_path, "model.dtype=float32", "data.packing=false", "data.max_length=64", "data.train_rows=60",
        "data.eval_rows=2", "train.max_steps=20", "train.per_device_batch_size=1", "optim.learning_rate=1e-3",
        "optim.weight_decay=0.0", "train.max_grad_norm=1.0", "tracking=offline", "lora.r=8",
    )  # fmt: skip
    batches = [parts.batches.step(step)[0] for step in range(20)]
    factors = [parts.schedule(step, 20) for step in range(20)]
    expected = plain_loop(plain_model(made, parts), batches, 1e-3, factors)
    recorded = Recorded()
    loop.train(parts, Progress(), recorded.hooks())
    assert recorded.of("train/loss") == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0]


def test_four_rows_one_at_a_time_equal_four_rows_at_once(tmp_path: Path, cache: Path):
    common = (*TINY, "train.max_steps=4", "data.packing=false", "optim.learning_rate=1e-2")
    _, one = trained(tmp_path, *common, "train.per_device_batch_size=1", "train.gradient_accumulation_steps=4")
    _, four = trained(tmp_path, *common, "train.per_device_batch_size=4", "train.gradient_accumulation_steps=1")
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        assert one.of(name) == pytest.approx(four.of(name), abs=1e-5), name


@pytest.mark.slow
def test_packed_rows_have_the_losses_of_their_documents_on_the_real_model(tmp_path: Path, cache: Path):
    common = (
        "model.dtype=float32",
        "data.max_length=256",
        "data.train_rows=40",
        "data.eval_rows=6",
        "tracking=offline",
    )
    _, packed = parts_of(tmp_path, *common, "data.packing=true")
    _, alone = parts_of(tmp_path, *common, "data.packing=false", "train.per_device_batch_size=1")
    packed.model.eval()
    with torch.no_grad():
        by_document = {
            tuple(batch["input_ids"][0, : batch["tokens"]].tolist()): packed.task.loss(packed.model, batch)
            for batch in alone.evaluation.one_pass()
        }
        checked = 0
        for batch in packed.evaluation.one_pass():
            expected = dict.fromkeys(("loss", "count"), 0.0)
            for row, positions in zip(batch["input_ids"], batch["position_ids"], strict=True):
                for document in documents_in(row, positions):
                    for name in expected:
                        expected[name] += float(by_document[document][name]) if document in by_document else 0.0
                    checked += document in by_document
            sums = packed.task.loss(packed.model, batch)
            assert float(sums["count"]) == expected["count"]
            assert float(sums["loss"] / sums["count"]) == pytest.approx(expected["loss"] / expected["count"], abs=1e-4)
    assert checked == len(by_document)


def documents_in(row: torch.Tensor, positions: torch.Tensor) -> list[tuple[int, ...]]:
    starts = [*(positions == 0).nonzero().flatten().tolist(), len(row)]
    return [tuple(row[a:b].tolist()) for a, b in itertools.pairwise(starts)]


def test_the_records_are_complete_and_the_loss_falls(tmp_path: Path, cache: Path):
    parts, recorded = trained(tmp_path, *TINY, "train.max_steps=12", "optim.learning_rate=5e-2", "train.eval_steps=6")
    assert [step for step, metrics in recorded.records if "train/loss" in metrics] == list(range(1, 13))
    assert [step for step, metrics in recorded.records if "eval/loss" in metrics] == [0, 6, 12]
    last = dict(recorded.records[-2][1])
    for name in ("train/grad_norm", "train/learning_rate", "train/tokens", "train/epoch", "train/step_seconds",
                 "train/tokens_per_second", "train/data_wait_fraction", "memory/peak_rss_gib"):  # fmt: skip
        assert math.isfinite(last[name]), name
    assert last["train/tokens"] == parts.batches.tokens_at(12)
    assert recorded.of("eval/loss")[-1] < 0.97 * recorded.of("eval/loss")[0]
    assert recorded.of("eval/perplexity")[0] == pytest.approx(math.exp(recorded.of("eval/loss")[0]))


def test_logging_every_third_step_averages_over_the_window(tmp_path: Path, cache: Path):
    _, every = trained(tmp_path / "a", *TINY, "train.max_steps=6", "train.logging_steps=1", "data.packing=false")
    _, third = trained(tmp_path / "b", *TINY, "train.max_steps=6", "train.logging_steps=3", "data.packing=false")
    assert [step for step, metrics in third.records if "train/loss" in metrics] == [3, 6]
    first = every.of("train/loss")[:3]
    assert min(first) <= third.of("train/loss")[0] <= max(first)


def test_a_stop_saves_and_the_rest_is_the_same_run(tmp_path: Path, cache: Path):
    options = (*TINY, "train.max_steps=8", "lora.lora_dropout=0.2", "train.eval_steps=3",
               "train.gradient_accumulation_steps=2", "train.save_steps=null", "train.logging_steps=3")  # fmt: skip
    whole, uninterrupted = trained(tmp_path / "whole", *options)
    _, parts = parts_of(tmp_path / "halves", *options)
    first = Recorded(stop_at=1)
    with pytest.raises(Preempted):
        loop.train(parts, Progress(), first.hooks())
    _, parts = parts_of(tmp_path / "halves", *options)
    progress = parts.checkpoints.restore(parts.model, parts.optimizer)
    assert progress.step == 3
    second = Recorded()
    loop.train(parts, progress, second.hooks())
    names = ("train/loss", "eval/loss", "train/grad_norm", "train/tokens")
    for name in names:
        assert first.of(name) + second.of(name) == uninterrupted.of(name), name
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_stop_where_nothing_is_new_saves_nothing(tmp_path: Path, cache: Path):
    """A checkpoint written anew is at risk for nothing: none after a save at the same step, none before the first."""
    _, parts = parts_of(tmp_path, *TINY, "train.max_steps=6", "train.save_steps=2", "train.eval_steps=3")
    recorded = Recorded(stop_at=2)
    with pytest.raises(Preempted):
        loop.train(parts, Progress(), recorded.hooks())
    assert len(recorded.saves) == 1
    assert [path.name for path in parts.checkpoints.folder.iterdir()] == ["step-000002"]

    _, parts = parts_of(tmp_path / "other", *TINY, "train.max_steps=6", "train.save_steps=2")
    recorded = Recorded(stop_at=0)
    with pytest.raises(Preempted):
        loop.train(parts, Progress(), recorded.hooks())
    assert recorded.saves == []


def test_a_loss_that_is_no_number_stops_and_names_the_batch(tmp_path: Path, cache: Path):
    _, parts = parts_of(tmp_path, *TINY, "train.max_steps=3")
    weight = next(p for name, p in parts.model.named_parameters() if p.requires_grad and "lora_B" in name)
    with torch.no_grad():
        weight.fill_(float("nan"))
    parts = replace(parts, settings=replace(parts.settings, eval_steps=None))
    with pytest.raises(TrainingError, match="at step 1") as caught:
        loop.optimizer_step(parts, Progress(), Recorded().hooks())
    assert "<|im_start|>" in str(caught.value)
    assert json.dumps(str(caught.value))
    assert "checkpoint" not in str(caught.value), "there is none"
    (parts.checkpoints.folder / "step-000001").mkdir(parents=True)
    with pytest.raises(TrainingError, match="the last checkpoint is valid"):
        loop.check_finite(parts, 2, math.nan, 1.0)


def test_attention_by_document_is_refused_where_it_would_compute_something_else(tmp_path: Path, cache: Path):
    cfg = composed(*TINY, "model.attention=by_document")
    made = inputs.inputs(Options(cfg))
    assert varlen_attention.uses(build.parts(made, RunDir(tmp_path)).model)
    model = build.load_model(made)
    model.config._attn_implementation_internal = "eager"
    with pytest.raises(ConfigError, match=r"model\.attention=by_document: .* has its own attention implementation"):
        build.resolve_attention(made.source, model, None, made.batches)
    source = replace(made.source, attention="sdpa")
    assert build.resolve_attention(source, model, None, made.batches) == [made.batches]


@pytest.mark.parametrize("packing", ["true", "false"])
def test_a_step_asks_the_device_for_nothing(tmp_path: Path, cache: Path, packing: str, monkeypatch: pytest.MonkeyPatch):
    """What makes Python wait for a GPU: reading a tensor's value. All that is read is what earlier steps came to."""
    _, parts = parts_of(tmp_path, *TINY, f"data.packing={packing}", "train.gradient_accumulation_steps=2")
    parts = replace(parts, async_metrics=AsyncMetrics(lag=2))
    recorded, progress, read = Recorded(), Progress(), []
    for name in ("item", "tolist", "__float__", "__int__", "__bool__", "nonzero"):
        real = getattr(torch.Tensor, name)

        def counted(tensor: torch.Tensor, *args: Any, name: str = name, real: Any = real, **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_code
            if caller.co_filename.endswith(IN_STEP):
                read.append((Path(caller.co_filename).name, caller.co_name, name))
            return real(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    for _ in range(5):
        loop.optimizer_step(parts, progress, recorded.hooks())
    of_device = [where for where in read if where[:2] != ("varlen_attention.py", "_spans")]  # a kernel of the CPU alone
    assert of_device == [("async_metrics.py", "due", "tolist")] * 3, "five steps, the last two still on their way"
    assert [step for step, _ in recorded.records] == [1, 2, 3]
    loop.catch_up(parts, progress, recorded.hooks())
    assert [step for step, _ in recorded.records] == [1, 2, 3, 4, 5]
    assert progress.trained_tokens > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "options",
    [
        "compile=none",
        "compile=none quant=4bit",
        "compile=none quant=8bit",
        "compile=none train.memory=balanced",
        "compile=none train.memory=min",
        "compile=none lora=none model.dtype=bfloat16",
        "compile=none lora=none",
        "compile=none data.packing=false",
        "compile=regional compile.fullgraph=true",
        "compile=regional compile.fullgraph=true quant=4bit",
        "compile=regional compile.fullgraph=true train.memory=balanced",
        "compile=regional compile.fullgraph=true lora=none",
    ],
)
def test_a_step_never_waits_for_a_gpu(options: str, tmp_path: Path, cache: Path):
    """What CUDA itself counts as waiting is an error, once the first steps have compiled and allocated."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    common = (*TINY, "model.hidden_size=128", "train.gradient_accumulation_steps=2", "train.max_steps=12")
    _, parts = parts_of(tmp_path, *common, *options.split())
    assert varlen_attention.uses(parts.model), "or attention is not what it should be on this GPU"
    recorded, progress = Recorded(), Progress()
    for _ in range(4):
        loop.optimizer_step(parts, progress, recorded.hooks())
    warm = compilation.graphs()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6):
            loop.optimizer_step(parts, progress, recorded.hooks())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    loop.catch_up(parts, progress, recorded.hooks())
    assert [step for step, _ in recorded.records] == list(range(1, 11))
    assert all(math.isfinite(loss) for loss in recorded.of("train/loss"))
    if "regional" in options and "data.packing=false" not in options:
        assert (compilation.graphs(), compilation.graph_breaks()) == (warm, [])


def test_what_is_read_late_is_what_would_be_read_at_once(tmp_path: Path, cache: Path):
    options = (*TINY, "train.max_steps=7", "train.logging_steps=2", "train.save_steps=3", "train.eval_steps=4")
    _, at_once = trained(tmp_path / "a", *options)
    _, parts = parts_of(tmp_path / "b", *options)
    late, progress = Recorded(), Progress()
    loop.train(replace(parts, async_metrics=AsyncMetrics(lag=2)), progress, late.hooks())
    for name in ("train/loss", "train/grad_norm", "train/learning_rate", "train/tokens", "train/epoch", "eval/loss"):
        assert late.of(name) == at_once.of(name), name
    assert [step for step, _ in late.records] == [step for step, _ in at_once.records]


def test_a_loss_that_is_no_number_is_never_saved(tmp_path: Path, cache: Path):
    """It is found two steps later on a GPU, and before every checkpoint."""
    _, parts = parts_of(tmp_path, *TINY, "train.max_steps=3", "train.save_steps=1", "data.eval_rows=2")
    parts = replace(parts, async_metrics=AsyncMetrics(lag=2))
    weight = next(p for name, p in parts.model.named_parameters() if p.requires_grad and "lora_B" in name)
    with torch.no_grad():
        weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="at step 1"):
        loop.train(parts, Progress(evaluated=True), Recorded().hooks())
    parts.checkpoints.finish()
    assert not list(tmp_path.glob("checkpoints/step-*"))


def test_seeds_of_steps_differ():
    assert len({loop.derived_seed(seed, step) for seed in range(20) for step in range(50)}) == 1000
