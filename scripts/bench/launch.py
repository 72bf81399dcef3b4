"""What each further run of a local sweep costs: from one run's end to the next one's first step.

    OMP_NUM_THREADS=1 python scripts/bench/launch.py [JOBS] [override ...]

A queue of JOBS (5) tiny runs, one at a time. Every number is seconds, read off the clock in the run folders and in
the queue's own processes: the model is timed by itself, for it is loaded for each run whatever launches it. The last
line is what the process of a run has computed until its first step, which other work on the machine changes little.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runner.cli import jobs as cli_jobs
from runner.launch.local import launcher as local
from runner.tracking import manifest, metrics_log
from runner.tracking.rundir import RunDir

TINY = ["model=tiny", "tracking=offline", "data.max_length=128", "train.max_steps=3", "train.sample_prompts=0"]


def main(jobs: int, overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rundirs = [prepared(Path(folder) / str(seed), [*TINY, f"seed={seed}", *overrides]) for seed in range(jobs)]
        launcher = local.Local(parallel=1, threads=None)
        local.work = timed(local.work)
        assert launcher.launch(rundirs, None) == [0] * jobs
        marks = [marks_of(rundir) for rundir in rundirs]
    spans: dict[str, list[float]] = {}
    for before, now in itertools.pairwise(marks):
        for name, (begin, end) in {
            "end of the last → its process is gone": (before["end"], before["gone"]),
            "gone → the next is forked": (before["gone"], now["forked"]),
            "forked → data and tokenizer": (now["forked"], now["inputs"]),
            "data → the model is asked for": (now["inputs"], now["model begins"]),
            "the model is loaded": (now["model begins"], now["model"]),
            "model → training begins": (now["model"], now["training"]),
            "training → evaluated": (now["training"], now["evaluated"]),
            "evaluated → first step": (now["evaluated"], now["first step"]),
        }.items():
            spans.setdefault(name, []).append(end - begin)
        loading = now["model"] - now["model begins"]
        spans.setdefault("end → first step, less the model", []).append(now["first step"] - before["end"] - loading)
        cpu = now["cpu of step"] - now["cpu of model"] + now["cpu of model begins"]
        spans.setdefault("CPU of a run until then, less the model", []).append(cpu)
    for name, seconds in spans.items():
        print(f"{name:<40} median {statistics.median(seconds):6.3f}  most {max(seconds):6.3f}")


def prepared(folder: Path, overrides: list[str]) -> RunDir:
    with cli_jobs.composed(overrides) as (_, found):
        return manifest.create(dict(found[0].cfg), folder, [], overrides)


def timed(work: Callable[..., int]) -> Callable[..., int]:
    """The same work, with marks of the clock beside the run's records."""

    def marked(rundir: RunDir, mirrored: bool) -> int:
        from runner.train import build, inputs, loop

        def mark(name: str) -> None:
            with (rundir.path / "marks").open("a") as handle:
                handle.write(f"{time.time()} {name}\n{time.process_time()} cpu of {name}\n")

        def between(module: Any, function: str, before: str | None, after: str | None) -> None:
            original = getattr(module, function)

            def wrapped(*args: Any, **kwargs: Any) -> Any:
                if before:
                    mark(before)
                result = original(*args, **kwargs)
                if after:
                    mark(after)
                return result

            setattr(module, function, wrapped)

        mark("forked")
        between(inputs, "inputs", None, "inputs")
        between(build, "load_model", "model begins", "model")
        between(loop, "train", "training", None)
        between(loop, "optimizer_step", None, "step")
        code = work(rundir, mirrored=mirrored)
        mark("gone")
        return code

    return marked


def marks_of(rundir: RunDir) -> dict[str, float]:
    lines = (line.split(" ", 1) for line in (rundir.path / "marks").read_text().splitlines())
    found = {name: float(when) for when, name in reversed(list(lines))}  # of several steps, the first
    records = metrics_log.read(rundir)
    found["evaluated"] = next(r["time"] for r in records if "eval/loss" in r)
    found["first step"] = next(r["time"] for r in records if "train/loss" in r)
    return {**found, "end": rundir.read_state().updated}


if __name__ == "__main__":
    words = sys.argv[1:]
    count = int(words.pop(0)) if words and words[0].isdigit() else 5
    main(count, words)
