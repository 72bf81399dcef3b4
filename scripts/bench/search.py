"""Which search finds the better learning rate, and for how many steps: random, tpe and asha beside each other.

    python scripts/bench/search.py FOLDER [--seeds N] [--kill] [override ...]

The same short fine-tuning each time; every search gets the same number of trials, and seeds 0 to N-1 (5). --kill ends
each search of seed 0 with SIGKILL half-way and issues it again. Overrides go to every search: launcher=slurm, say.
What FOLDER holds already is not done again.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from runner.tracking.metrics_log import last_values, read
from runner.tracking.state_file import DONE
from runner.tracking.sweepdir import SweepDir

KINDS = ("random", "tpe", "asha")
TRIALS, STEPS = 12, 12
TASK = [
    "optim.learning_rate=tag(log,interval(1e-6,1e-2))",
    f"train.max_steps={STEPS}", "train.save_steps=null", "train.per_device_batch_size=1", "train.sample_prompts=0",
    "data.max_length=48", "data.eval_rows=4",
]  # fmt: skip
OF_KIND = {
    "random": [],
    "tpe": ["search.startup_trials=4"],
    "asha": ["search.startup_trials=4", "search.min_steps=2", "search.reduction_factor=3", "train.eval_steps=2"],
}


@dataclass
class Found:
    """What one search came to."""

    best: float
    learning_rate: str
    steps: int
    """Of all its runs together."""
    seconds: float
    pruned: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--kill", action="store_true")
    words, overrides = parser.parse_known_args()
    found: dict[str, list[Found]] = {kind: [] for kind in KINDS}
    for seed in range(words.seeds):
        for kind in KINDS:
            one = search(kind, seed, words.folder.absolute(), overrides, kill=words.kill and seed == 0)
            found[kind].append(one)
            print(
                f"{kind:<7} seed {seed}: best {one.best:.4f} at {one.learning_rate}, {one.steps} steps, "
                f"{one.pruned} pruned, {one.seconds:.0f} s", flush=True,
            )  # fmt: skip
    print(f"\nmedians over {words.seeds} seeds of {TRIALS} trials, of {STEPS} steps each unless pruned")
    for kind, ones in found.items():
        middle = {name: statistics.median(getattr(one, name) for one in ones) for name in ("best", "steps", "seconds")}
        print(f"{kind:<7} best {middle['best']:.4f}  steps {middle['steps']:.0f}  seconds {middle['seconds']:.0f}")


def search(kind: str, seed: int, folder: Path, overrides: list[str], *, kill: bool) -> Found:
    """One search, brought to its end, in ``folder``/sweeps/KIND-SEED."""
    command = [
        sys.executable, "-m", "runner", "-m", f"search={kind}", f"search.trials={TRIALS}", f"search.seed={seed}",
        *OF_KIND[kind], *TASK, f"sweep={kind}-{seed}", f"outputs_dir={folder}", *overrides,
    ]  # fmt: skip
    sweep, began = SweepDir(folder / "sweeps" / f"{kind}-{seed}"), time.monotonic()
    with (folder / f"{kind}-{seed}.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        while kill and process.poll() is None:
            if ended(sweep) >= TRIALS // 2:
                process.kill()
                process.wait()
                print(f"{kind:<7} seed {seed}: killed after {ended(sweep)} runs, issued again", flush=True)
                process = subprocess.Popen(command, stdout=log, stderr=log)
                break
            time.sleep(0.2)
        if code := process.wait():
            raise SystemExit(f"{kind}-{seed} ended with code {code}: see {log.name}")
    assert ended(sweep) == TRIALS, f"{sweep.path} holds {ended(sweep)} runs that ended, and not {TRIALS}"
    states = [(rundir, rundir.read_state()) for rundir in sweep.rundirs()]
    values = {rundir: last_values(read(rundir))["eval/loss"] for rundir, state in states if state.status == "completed"}
    best = min(values, key=lambda rundir: values[rundir])
    rate = best.config.read_text().partition("learning_rate:")[2].split()[0]
    pruned = sum(state.status == "pruned" for _, state in states)
    return Found(values[best], rate, sum(state.step for _, state in states), time.monotonic() - began, pruned)


def ended(sweep: SweepDir) -> int:
    return sum(rundir.read_state().status in DONE for rundir in sweep.rundirs())


if __name__ == "__main__":
    main()
