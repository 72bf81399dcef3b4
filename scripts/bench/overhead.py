"""What runner costs beside the training itself: starting, refusing, preparing, tracking, comparing, tokenising.

    python scripts/bench/overhead.py [--rounds N] [--jobs N] [--only PART,PART]

Parts: start, first_step, tracking, sweep, submit (needs a Slurm, not measured without --only), compare (and status),
tokens. Every row is measured anew, in processes of their own where a process is what is measured; medians over the
rounds. Seconds of CPU are those of this process and its children; other work on the machine changes them little.
Targets are those of the project's performance goals. What each further run of a sweep costs is in launch.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

TINY = ["model=tiny", "data.max_length=128", "train.sample_prompts=0"]
IMPORTS = "import torch, transformers, peft, safetensors; from transformers import AutoModelForCausalLM, AutoTokenizer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--only", default=",".join(name for name in PARTS if name != "submit"))
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
    from runner.cli import jobs as cli_jobs
    from runner.sweep.session import Session
    from runner.tracking.sweepdir import SweepDir

    for count in (jobs // 10, jobs):
        with tempfile.TemporaryDirectory() as folder:
            began, cpu = time.perf_counter(), time.process_time()
            words = ["-m", *TINY, "tracking=offline", f"seed=range({count})", f"outputs_dir={folder}"]
            with cli_jobs.composed(words) as (composer, made):
                composed = time.perf_counter() - began
                labels = [composer.label(job.overrides) for job in made]
                Session(composer, words).prepared(SweepDir(Path(folder) / "many"), made, labels)
            total, cpu = time.perf_counter() - began, time.process_time() - cpu
        measured = f"{composed:.1f} + {total - composed:.1f} s, {cpu:.1f} s of CPU"
        yield f"{count} runs composed and checked, and prepared", measured, limit(10, count)


def limit(seconds: float, jobs: int) -> str:
    """The target of so many runs; ``seconds``: of a thousand."""
    return f"≤ {seconds * jobs / 1000:g} s"


def submit(_: int, jobs: int) -> Iterator[tuple[str, str, str]]:
    """The whole command of a sweep on Slurm, whose jobs are held, and the one that cancels them all."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*TINY, "sweep=many", f"seed=range({jobs})", f"outputs_dir={folder}", "launcher=slurm"]
        words += ["launcher.array_parallelism=2", "+launcher.additional_parameters.hold=true"]
        wall, cpu = run([sys.executable, "-m", "runner", "-m", *words])
        cancelled = run([sys.executable, "-m", "runner", "cancel", "many", f"outputs_dir={folder}"])
    yield f"{jobs} runs submitted to Slurm, parent run in MLflow", f"{wall:.1f} s, {cpu:.1f} s of CPU", limit(40, jobs)
    measured = f"{cancelled[0]:.1f} s, {cancelled[1]:.1f} s of CPU"
    yield f"{jobs} waiting runs cancelled, each made in MLflow", measured, limit(40, jobs)


def compare(rounds: int, jobs: int) -> Iterator[tuple[str, str, str]]:
    """The verb on so many completed runs of one sweep, which differ in rank, learning rate and seed."""
    with tempfile.TemporaryDirectory() as folder:
        make_many(Path(folder), jobs)
        store, page = [f"uri={folder}/mlflow.db", "runner"], ["--html", f"{folder}/page.html"]
        ways = {
            "folders": ["many"],
            "folders, `--by seed`": ["many", "--by", "seed"],
            "folders, `--html`": ["many", *page],
            "MLflow's database": store,
            "MLflow's database, `--html`": [*store, *page],
            "MLflow's database, as no folder is called so": ["runner"],
        }
        for way, words in ways.items():
            command = [sys.executable, "-m", "runner", "compare", *words, f"outputs_dir={folder}"]
            yield f"`compare` of {jobs} runs from {way}", seconds_of(command, rounds), limit(2, jobs)
        for way, words in {"of the sweep": ["many"], "of all sweeps": []}.items():
            command = [sys.executable, "-m", "runner", "status", *words, f"outputs_dir={folder}"]
            yield f"`status` {way}, {jobs} runs", seconds_of(command, rounds), limit(1, jobs)


def seconds_of(command: list[str], rounds: int) -> str:
    """Medians of the seconds of a command."""
    wall, cpu = (statistics.median(column) for column in zip(*(run(command) for _ in range(rounds)), strict=True))
    return f"{wall:.2f} s, {cpu:.2f} s of CPU"


def make_many(folder: Path, jobs: int) -> None:
    """A sweep called ``many`` below ``folder``, and MLflow's database: one run is trained, the others are copies of it
    with another configuration and other numbers.
    """
    from runner.tracking.sweepdir import SweepDir

    words = [*TINY, "train.max_steps=20", "train.eval_steps=5", "train.save_steps=null", "sweep=many", "seed=0"]
    run([sys.executable, "-m", "runner", "-m", *words, f"outputs_dir={folder}"])
    sweep, draw = SweepDir(folder / "sweeps" / "many"), random.Random(0)
    (first,) = sweep.rundirs()
    shutil.rmtree(first.checkpoints)
    shutil.rmtree(first.model)
    manifest, found = first.read_manifest(), sweep.read()["jobs"]
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        for number in range(1, jobs):
            values = {"seed": number % 4, "r": 2 ** draw.randint(1, 6), "learning_rate": 10 ** draw.uniform(-5, -2)}
            label = ",".join(f"{key}={value}" for key, value in values.items())
            copy, identity = sweep.path / f"{number:04d}-copy", uuid.uuid4().hex
            shutil.copytree(first.path, copy)
            lines = [f"{key}: {value}" for key, value in values.items()]
            (copy / "config.yaml").write_text(changed_config((copy / "config.yaml").read_text(), lines))
            factor = draw.uniform(0.7, 1.3)
            numbers = [{k: v if k in ("step", "time") else v * factor for k, v in r.items()} for r in records(copy)]
            (copy / "metrics.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in numbers))
            told = {"label": label, "name": label, "mlflow": {**manifest["mlflow"], "run_id": identity}}
            (copy / "manifest.json").write_text(json.dumps({**manifest, "id": identity, **told}))
            found[identity] = {"folder": copy.name, "label": label}
            copy_in_mlflow(database, manifest["mlflow"]["run_id"], identity, values, factor)
        database.commit()
    sweep.update(jobs=found)


def changed_config(text: str, lines: list[str]) -> str:
    """The YAML with these ``key: value`` in place of what stands behind the same keys, at any depth."""
    keys = {line.partition(":")[0]: line for line in lines}

    def changed(line: str) -> str:
        key = line.strip().partition(":")[0]
        return line[: len(line) - len(line.lstrip())] + keys[key] if key in keys else line

    return "\n".join(changed(line) for line in text.splitlines())


def copy_in_mlflow(database: sqlite3.Connection, of: str, identity: str, values: dict[str, Any], factor: float) -> None:
    """A run of the database once more, under another id, with these parameters and its metrics times ``factor``."""
    for table in ("runs", "params", "tags", "metrics", "latest_metrics"):
        cursor = database.execute(f"SELECT * FROM {table} WHERE run_uuid = ?", [of])
        names = [column[0] for column in cursor.description]
        rows = [dict(zip(names, row, strict=True)) for row in cursor]
        for row in rows:
            row["run_uuid"] = identity
            if table == "params":
                row["value"] = str(values.get(row["key"].rpartition(".")[2], row["value"]))
            elif "metrics" in table:
                row["value"] *= factor
        marks = ",".join("?" * len(names))
        database.executemany(f"INSERT INTO {table} VALUES ({marks})", [tuple(row.values()) for row in rows])


def tokens(rounds: int, _: int) -> Iterator[tuple[str, str, str]]:
    """All rows of the default data set, read, deduplicated, tokenised, packed and written."""
    code = (
        "import time\nfrom runner.cli import jobs\nfrom runner.train import inputs\n"
        "from runner.train.options import Options\n"
        f"with jobs.composed({['data.train_rows=null', 'tracking=offline']!r}) as (_, found):\n"
        "    cfg = dict(found[0].cfg)\n"
        # This imports, and converts the model.
        "inputs.inputs(Options({**cfg, 'data': {**cfg['data'], 'train_rows': 1}}))\n"
        "began = time.process_time()\nmade = inputs.inputs(Options(cfg))\nseconds = time.process_time() - began\n"
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
PARTS: dict[str, Part] = {part.__name__: part for part in (start, first_step, tracking, sweep, submit, compare, tokens)}

if __name__ == "__main__":
    main()
