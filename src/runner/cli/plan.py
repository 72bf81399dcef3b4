"""The verb ``plan``: what a run would be. Everything is computed as in training; no weight is loaded or trained."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from runner import terminal
from runner.cli import jobs
from runner.data.packing import IGNORED
from runner.train import report

HELP = """python -m runner plan [overrides]

What the run of these overrides would be: parameters, memory against the device, rows, tokens and how well they are
packed, steps and time, and one sample as the model sees it, with the trained tokens marked. Nothing is trained.
Exit code 2 where the run would be refused: nothing to train on, rows too long, a model that cannot fit.

    python -m runner plan
    python -m runner plan quant=4bit model=llama model.path=/models/llama
    python -m runner plan data=local data.path=my.jsonl data/format=alpaca train.num_train_epochs=3
"""

GIB = 2**30


def main(argv: list[str]) -> int:
    """What the run would be, without training it."""
    from runner.launch import prepare
    from runner.tracking import resume

    if {"-h", "--help"} & set(argv):
        with terminal.piped():
            print(HELP)
        return 0
    with jobs.composed(argv) as (composer, found):
        configurations = [resume.configuration(job.cfg, job.overrides) for job in found]
        launchers = prepare.by_launcher(configurations)
        for launcher, _ in launchers:
            launcher.check()
        labels = [composer.label(job.overrides) for job in found] if len(found) > 1 else [""]
        show(zip(labels, configurations, strict=True))
        for launcher, numbers in launchers:
            print(launcher.plan(len(numbers)))
    return 0


def show(runs: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Print the plan of each run, under its label; of a row that several begin with, the text once.

    Raises:
        ConfigError, DataError: a run would be refused.
    """
    terminal.loading("torch and transformers")
    terminal.quiet_libraries()
    from runner.train import build, estimate, inputs

    shown = ""
    for label, cfg in runs:
        made = build.resolve_micro_batch_size(cfg, inputs.inputs(cfg))
        told = estimate.expect(cfg, made)
        rows = [*_model_rows(made, told), *_data_rows(cfg, made), *_time_rows(cfg, made, told)]
        terminal.table(f"plan  {label}".strip(), ["", ""], [list(row) for row in rows])
        if (text := _marked(made)) != shown:
            shown = text
            manner = "underlined" if _styled() else "in ⟦…⟧"
            print(f"one row of the first batch, with what is trained {manner}:\n\n{text}\n")
        estimate.check_fits(told)


def _model_rows(made: Any, expected: Any) -> list[tuple[str, str]]:
    counts, memory = expected.counts, expected.memory
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations and logits": memory.activations,
        "libraries and buffers": memory.libraries,
    }
    shown = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    free = f"{expected.free_bytes / GIB:.1f} free of {expected.total_bytes / GIB:.1f} on {made.device}"
    return [
        ("model", f"{made.source.name}, {counts['total'] / 1e6:.1f} M parameters"),
        ("trained", f"{counts['trainable'] / 1e6:.2f} M ({counts['trainable'] / counts['total']:.2%})"),
        ("memory, GiB", f"about {memory.total / GIB:.1f} ({free})\n{shown}"),
    ]


def _data_rows(cfg: Mapping[str, Any], made: Any) -> list[tuple[str, str]]:
    counts, layout = made.splits.report, "packed" if cfg["data"]["packing"] else "padded at most"
    left_out = {
        "duplicates": counts.duplicates,
        "too long, dropped": counts.dropped,
        "nothing to train": counts.masked_out,
        "prompts of the held-out set, dropped": counts.leaked,
    }
    said = ", ".join(f"{count} {what}" for what, count in left_out.items() if count) or "none left out"
    said += f"; {report.truncated(cfg, counts)}" if counts.truncated else ""
    trained = counts.train_trained_tokens / counts.train_tokens
    return [
        ("data", f"{made.splits.name}: {counts.rows_read} rows read; {said}"),
        (
            "training",
            f"{counts.train_rows} rows{_limited(cfg, 'train_rows')}, {counts.train_tokens} tokens, "
            f"{trained:.0%} of them trained",
        ),
        ("held out", f"{counts.eval_rows} rows{_limited(cfg, 'eval_rows')}, {counts.eval_tokens} tokens"),
        ("batches", f"{layout}, {made.batches.efficiency:.1%} of their slots are used"),
    ]


def _limited(cfg: Mapping[str, Any], key: str) -> str:
    limit = cfg["data"][key]
    return f" (a sample: data.{key}={limit})" if limit is not None else ""


def _time_rows(cfg: Mapping[str, Any], made: Any, expected: Any) -> list[tuple[str, str]]:
    from runner.train import build
    from runner.train.estimate import ASSUMED_UTILISATION, training_seconds

    tokens = made.batches.tokens_at(made.total_steps)
    seconds, peak = training_seconds(made, expected)
    choice = build.resolve_compile(cfg, made, expected)
    compiles = [("compile", f"no: {choice.reason}" if choice.reason else "each layer")] if choice.settled else []
    return [
        (
            "steps",
            f"{made.total_steps}, {tokens} tokens, {made.batches.epoch(made.total_steps):.2f} epochs{made.cut}",
        ),
        (
            "time",
            f"about {terminal.duration(max(seconds, 1))} of training at {ASSUMED_UTILISATION:.0%} of "
            f"{peak / 1e12:.2f} TFLOP/s",
        ),
        *compiles,
    ]


def _marked(made: Any, limit: int = 300) -> str:
    """The first row of the first step as text, with the spans that are learnt marked."""
    batch = made.batches.step(0)[0]
    ids, labels = batch["input_ids"][0].tolist()[:limit], batch["labels"][0].tolist()[:limit]
    while len(ids) > 1 and ids[-1] == ids[-2] == made.tokenizer.pad_token_id:
        ids.pop()
    trained = [False, *(label != IGNORED for label in labels[:-1])]  # labels are shifted: they name the next token
    text, start = "", 0
    for at in range(1, len(ids) + 1):
        if at == len(ids) or trained[at] != trained[start]:
            piece = made.tokenizer.decode(ids[start:at])
            text += _mark(piece) if trained[start] else piece
            start = at
    return text + (" …" if len(ids) == limit else "")


def _mark(text: str) -> str:
    return f"\033[4m{text}\033[0m" if _styled() else f"⟦{text}⟧"


def _styled() -> bool:
    return sys.stdout.isatty()
