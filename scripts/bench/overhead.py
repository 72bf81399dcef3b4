"""What runner costs beside the training itself: starting, refusing, preparing, tracking, tokenising.

    python scripts/bench/overhead.py [--rounds N] [--jobs N] [--only start,first_step,tracking,sweep,tokens]

Every row is measured anew, in processes of their own where a process is what is measured; medians over the rounds.
Targets are those of the project's performance goals. What each further run of a sweep costs is in launch.py.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TINY = ["model=tiny", "data.max_length=128", "train.sample_prompts=0"]
IMPORTS = "import torch, transformers, peft, safetensors; from transformers import AutoModelForCausalLM, AutoTokenizer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--only", default=",".join(PARTS))
    words = parser.parse_args()
    wanted = words.only.split(",")
    if unknown := [name for name in wanted if name not in PARTS]:
        parser.error(f"--only {unknown[0]}: no such part; they are {', '.join(PARTS)}")
    print("| what | measured | target |\n|---|---|---|")
    for name in wanted:
        for what, measured, target in PARTS[name](words.rounds, words.jobs):
            print(f"| {what} | {measured} | {target} |", flush=True)


def start(rounds: int, _: int) -> Iterator[tuple[str, str, str]]:
    """Command lines that train nothing: wall and CPU seconds."""
    for command, code in (("--help", 0), ("--cfg job", 0), ("quant=4bits", 2)):
        seconds = [run([sys.executable, "-m", "runner", *command.split()], code) for _ in range(rounds)]
        wall, cpu = (statistics.median(column) for column in zip(*seconds, strict=True))
        yield f"`python -m runner {command}`", f"{wall:.2f} s, {cpu:.2f} s of CPU", "< 1 s"


def first_step(rounds: int, _: int) -> Iterator[tuple[str, str, str]]:
    """From the command to the first optimizer step, of which the libraries' own imports are no cost of runner's."""
    imports = statistics.median(run([sys.executable, "-c", IMPORTS])[0] for _ in range(rounds))
    yield "importing torch, transformers and peft by themselves", f"{imports:.2f} s", ""
    for model in ("tiny", "smollm2"):
        gaps = [until_first_step(model) for _ in range(rounds)]
        total = statistics.median(gaps)
        yield (
            f"command → first step, model={model}",
            f"{total:.2f} s, less the imports {total - imports:.2f} s",
            "< 1 s",
        )


def until_first_step(model: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        rundir, began = Path(folder) / "run", time.time()
        words = [*TINY, f"model={model}", "data.eval_rows=1", "train.max_steps=1", "train.per_device_batch_size=1"]
        run([sys.executable, "-m", "runner", *words, f"hydra.run.dir={rundir}", f"outputs_dir={folder}"])
        return next(r["time"] - began for r in records(rundir) if "train/loss" in r)


def tracking(rounds: int, _: int) -> Iterator[tuple[str, str, str]]:
    """Seconds of a step with MLflow and without, in turns."""
    steps: dict[str, list[float]] = {"mlflow": [], "offline": []}
    for _ in range(rounds):
        for option, found in steps.items():
            with tempfile.TemporaryDirectory() as folder:
                rundir = Path(folder) / "run"
                words = [*TINY, f"tracking={option}", "train.max_steps=200", "train.save_steps=null"]
                run([sys.executable, "-m", "runner", *words, f"hydra.run.dir={rundir}", f"outputs_dir={folder}"])
                times = [r["time"] for r in records(rundir) if "train/loss" in r]
                found.append((times[-1] - times[20]) / (len(times) - 21))
    on, off = (statistics.median(found) for found in steps.values())
    what = "a step with MLflow, against one without (a tiny model: MLflow's process shares the cores)"
    yield what, f"{on * 1e3:.2f} ms, {off * 1e3:.2f} ms: {on / off - 1:+.1%}", "≤ 0.5 % of a step of 100 ms"


def sweep(_: int, jobs: int) -> Iterator[tuple[str, str, str]]:
    """Composing, checking and preparing the runs of a sweep, without MLflow and Slurm."""
    from runner import cli, prepare

    for count in (jobs // 10, jobs):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            words = ["-m", *TINY, "tracking=offline", f"seed=range({count})"]
            with cli.composed(words) as (_composer, made):
                composed = time.perf_counter() - began
                for number, job in enumerate(made):
                    prepare.prepare(dict(job.cfg), Path(folder) / str(number), [], words)
            total = time.perf_counter() - began
        yield f"{count} runs composed, checked and prepared", f"{composed:.1f} + {total - composed:.1f} s", "< 60 s"


def tokens(rounds: int, _: int) -> Iterator[tuple[str, str, str]]:
    """All rows of the default data set, read, deduplicated, tokenised, packed and written."""
    code = (
        "import time\nfrom runner import build, cli\n"
        f"with cli.composed({['data.train_rows=null', 'tracking=offline']!r}) as (_, jobs):\n"
        "    cfg = dict(jobs[0].cfg)\n"
        "build.inputs({**cfg, 'data': {**cfg['data'], 'train_rows': 1}})\n"  # imports, and the model's conversion
        "began = time.process_time()\nmade = build.inputs(cfg)\nseconds = time.process_time() - began\n"
        "report = made.splits.report\nprint((report.train_tokens + report.eval_tokens) / seconds)"
    )
    rates = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "RUNNER_CACHE": folder, "TOKENIZERS_PARALLELISM": "false"}
            done = subprocess.run(
                [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
            )
            rates.append(float(done.stdout.split()[-1]))
    rate = statistics.median(rates)
    yield "tokens tokenised and packed, a core", f"{rate:,.0f} a second", "≥ 200,000"


def run(command: list[str], code: int = 0) -> tuple[float, float]:
    """(wall, CPU) seconds of a process and its children, which has to end with this exit code."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != code:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - began, cpu


def records(rundir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (rundir / "metrics.jsonl").read_text().splitlines()]


Part = Callable[[int, int], Iterator[tuple[str, str, str]]]
PARTS: dict[str, Part] = {part.__name__: part for part in (start, first_step, tracking, sweep, tokens)}

if __name__ == "__main__":
    main()
