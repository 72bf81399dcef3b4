"""The verb ``plan``: dry run. Computes everything as training does, but loads and trains no weights."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from runner import log_handlers, streams, terminal
from runner.cli import jobs
from runner.cli.args import Verb
from runner.data.packing import IGNORED
from runner.errors import visible
from runner.train import run_summary

VERB = Verb(
    "plan [overrides]",
    """Dry run: parameters, memory against the device, rows, tokens, packing, steps and time of the run with these
overrides, and one sample as the model sees it, with the trained tokens marked. Nothing is trained.
Exit code 2 if the run would be refused: no rows to train on, rows too long, not enough memory.

    python -m runner plan
    python -m runner plan quant=4bit model=llama model.path=/models/llama
    python -m runner plan data=local data.path=my.jsonl data/format=alpaca train.num_train_epochs=3""",
)

GIB = 2**30


@streams.piped()
def main(argv: list[str]) -> int:
    """The verb; returns the exit code."""
    from runner.launch import prepare
    from runner.tracking import resume

    with jobs.composed(argv) as (composer, composed):
        configurations = [resume.configuration(job.cfg, job.overrides) for job in composed]
        launchers = prepare.by_launcher(configurations)
        for launcher, _ in launchers:
            launcher.check()
        labels = [composer.label(job.overrides) for job in composed] if len(composed) > 1 else [""]
        show(zip(labels, configurations, strict=True))
        for launcher, numbers in launchers:
            print(launcher.plan(len(numbers)))
    return 0


def show(runs: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Print the plan of each run under its label; a sample that several runs share is printed once.

    Raises:
        ConfigError, DataError: a run would be refused.
    """
    terminal.loading("torch and transformers")
    log_handlers.quiet_libraries()
    from runner.train import build, estimate, inputs
    from runner.train.options import Options

    shown = ""
    for label, cfg in runs:
        run_inputs = build.resolve_micro_batch_size(inputs.inputs(Options(cfg)))
        expected = estimate.expect(run_inputs)
        rows = [
            *_model_rows(run_inputs, expected),
            *_data_rows(run_inputs),
            *_teacher_rows(run_inputs, expected),
            *run_inputs.notes,
            *_time_rows(run_inputs, expected),
        ]
        terminal.table(f"plan  {label}".strip(), ["", ""], [list(row) for row in rows])
        if (text := _marked(run_inputs)) != shown:
            shown = text
            mark = "underlined" if _styled() else "in ⟦…⟧"
            print(f"one row of the first batch, trained tokens {mark}:\n\n{text}\n")
        estimate.check_fits(expected)


def _model_rows(run_inputs: Any, expected: Any) -> list[tuple[str, str]]:
    counts, memory = expected.counts, expected.memory
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations and logits": memory.activations,
        "libraries and buffers": memory.libraries,
    }
    shown = ", ".join(f"{name} {'unknown' if size is None else f'{size / GIB:.2f}'}" for name, size in parts.items())
    free = f"{expected.free_bytes / GIB:.1f} free of {expected.total_bytes / GIB:.1f} on {run_inputs.device}"
    needed = f"unknown: {expected.unknown}" if expected.unknown else f"about {memory.total / GIB:.1f}"
    return [
        (
            "model",
            f"{run_inputs.source.name}{run_inputs.source.changes}, {counts['total'] / 1e6:.1f} M parameters, "
            f"weights in {counts['stored']}",
        ),
        (
            "trained",
            f"{counts['trainable'] / 1e6:.2f} M ({counts['trainable'] / counts['total']:.2%})"
            + (f", {counts['about_experts']}" if counts["about_experts"] else ""),
        ),
        *([("average", run_summary.AVERAGED.format(average))] if (average := run_inputs.options.average) else []),
        ("memory, GiB", f"{needed} ({free})\n{shown}"),
    ]


def _teacher_rows(run_inputs: Any, expected: Any) -> list[tuple[str, str]]:
    from runner.models.dtypes import dtype_for
    from runner.train import teacher_cache, throughput
    from runner.train.estimate import ASSUMED_UTILISATION

    if (teacher := run_inputs.teacher) is None:
        return []
    needs = expected.teacher
    text = f"{teacher.text}\n{needs.parameters / 1e6:.1f} M parameters, weights in {needs.stored}"
    text += f", {needs.weights / GIB:.2f} GiB"
    if teacher.spec.top_k is not None:
        rows, tokens, count = teacher_cache.missing(run_inputs)
        peak = throughput.peak_flops(run_inputs.device, dtype_for(teacher.source.dtype, run_inputs.device))
        seconds = tokens * needs.flops_per_token / (peak * ASSUMED_UTILISATION)
        left = f"{rows} of {count} to compute, about {terminal.duration(max(seconds, 1))}" if rows else "all cached"
        text += f"\nonce before training, for the rows that are visited: {left}"
    return [("teacher", text)]


def _data_rows(run_inputs: Any) -> list[tuple[str, str]]:
    options, counts = run_inputs.options, run_inputs.splits.report
    layout = "packed" if options.data.packing else "padded"
    left_out = {
        f"left out by data.where={options.data.where}": counts.filtered,
        "left out by the format": counts.left_out,
        "duplicates": counts.duplicates,
        "without trained tokens": counts.masked_out,
        "with a prompt of the held-out set, dropped": counts.leaked,
    }
    lost = f"\n{counts.reasoning_lost} answers not trained: the chat template leaves out their reasoning"
    text = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count) or "none left out"
    text += f"; {run_summary.too_long(options, counts)}" if counts.truncated or counts.dropped else ""
    trained = f"{counts.train_trained_tokens / counts.train_tokens:.0%} of them trained"
    batches = f"{layout}, {run_inputs.batches.efficiency:.1%} of the token slots are used"
    if (answers := run_inputs.batches.answers) is not None and answers.of_prompts:
        trained = "all of prompts"
        batches = f"{answers.per_row} answers to each prompt, of at most {answers.most_tokens} tokens"
    first = "the first " * run_inputs.splits.is_streamed
    return [
        ("data", f"{run_inputs.splits.name}: {first}{counts.rows_read} rows read; {text}"),
        (
            "training",
            f"{counts.train_rows} rows{_limited('train_rows', options.data.train_rows)}, {counts.train_tokens} tokens, "
            + trained
            + (lost if counts.reasoning_lost else ""),
        ),
        (
            "held out",
            f"{counts.eval_rows} rows{_limited('eval_rows', options.data.eval_rows)}, {counts.eval_tokens} tokens"
            + "".join(f"\nwarning: {few}" for few in run_summary.few_held_out(run_inputs.splits)),
        ),
        *([("sets", "\n".join(sets))] if (sets := list(run_summary.of_parts(run_inputs))) else []),
        ("batches", batches),
    ]


def _limited(key: str, limit: int | None) -> str:
    return f" (a sample: data.{key}={limit})" if limit is not None else ""


def _time_rows(run_inputs: Any, expected: Any) -> list[tuple[str, str]]:
    from runner.models.dtypes import dtype_for, slow_gpu
    from runner.train import build
    from runner.train.estimate import ASSUMED_UTILISATION, training_seconds

    tokens, device = run_inputs.batches.tokens_at(run_inputs.total_steps), run_inputs.device
    seconds, peak = training_seconds(run_inputs, expected)
    choice = build.resolve_compile(run_inputs, expected)
    compiles = [("compile", f"no: {choice.reason}" if choice.reason else "each layer")] if choice.settled else []
    steps, at_most = run_inputs.total_steps, "at most " if run_inputs.batches.answers else ""
    epochs = run_inputs.batches.order.epoch(steps)
    return [
        ("steps", f"{steps}, {at_most}{tokens} tokens, {epochs:.2f} epochs{run_inputs.cut}"),
        (
            "time",
            f"about {terminal.duration(max(seconds, 1))} of training at {ASSUMED_UTILISATION:.0%} of "
            f"{peak / 1e12:.2f} TFLOP/s{slow_gpu(dtype_for(run_inputs.source.dtype, device), device)}",
        ),
        *compiles,
    ]


def _marked(run_inputs: Any, limit: int = 300) -> str:
    """The first row of the first step as text, with the trained spans marked."""
    batch = run_inputs.batches.step(0)[0]
    ids, labels = batch["input_ids"][0].tolist()[:limit], batch["labels"][0].tolist()[:limit]
    while len(ids) > 1 and ids[-1] == ids[-2] == run_inputs.tokenizer.pad_token_id:
        ids.pop()
    trained = [False, *(label != IGNORED for label in labels[:-1])]  # labels are shifted by one: each is the next token
    text, start = "", 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or trained[end] != trained[start]:
            piece = visible(run_inputs.tokenizer.decode(ids[start:end]))
            text += _mark(piece) if trained[start] else piece
            start = end
    return text + (" …" if len(ids) == limit else "")


def _mark(text: str) -> str:
    return streams.styled(text, "4") if _styled() else f"⟦{text}⟧"


def _styled() -> bool:
    return sys.stdout.isatty()
