"""What a mixture of many rows costs before training: peak memory, tokens a second and core, and the second run.

    python scripts/bench/data.py [ROWS ...] [override ...]

For each number of ROWS (100000 1000000) two files of generated conversations are written to a temporary folder on disk,
nine tenths to `talk` and one tenth to `code`. Three fresh processes then prepare the data of a run as training does:
one with an empty cache, one with the same weights, and one with other weights, which tokenises nothing.
Memory is VmHWM, the most of any process; of it, what a run of 1,000 rows needs is Python, torch and transformers. Pages
of mapped files count, too, which the system takes back where memory is scarce: the most without them (RssAnon, looked
at every few milliseconds) is shown as well. Also says how far the shares of the trained tokens are from the weights,
over 1,000 steps.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS, WEIGHT, OTHER = 1000, 0.3, 0.1


def main(words: list[str]) -> None:
    counts = [int(word) for word in words if word.isdigit()] or [100_000, 1_000_000]
    overrides = [word for word in words if not word.isdigit()]
    print("     rows run             wall s   CPU s       tokens tokens/s/core peak MiB  own MiB shares")
    for rows in (1000, *counts):
        with tempfile.TemporaryDirectory(dir="/tmp") as folder:
            write(Path(folder), rows)
            for what, weight in (("empty cache", WEIGHT), ("cached", WEIGHT), ("other weights", OTHER)):
                measured = in_new_process(Path(folder), weight, overrides)
                rate = f"{measured['tokens'] / measured['cpu']:,.0f}" if what == "empty cache" else ""
                cells = [f"{rows:>9,}", f"{what:<14}", f"{measured['wall']:>7.1f}", f"{measured['cpu']:>7.1f}"]
                cells += [f"{measured['tokens']:>12,}", f"{rate:>13}", f"{measured['peak_mib']:>8.0f}"]
                cells.append(f"{measured['own_mib']:>8.0f}")
                print(*cells, measured["shares"], flush=True)


def write(folder: Path, rows: int) -> None:
    """Two files of conversations of random words; no two rows are equal."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(5000)]
    for name, count in (("talk", rows * 9 // 10), ("code", rows // 10)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for number in range(count):
                texts = [" ".join(draw.choices(words, k=draw.randint(5, 25))) for _ in range(2)]
                turns = [
                    {"role": "user", "content": f"{number} {texts[0]}"},
                    {"role": "assistant", "content": texts[1]},
                ]
                file.write(json.dumps({"messages": turns}) + "\n")


def in_new_process(folder: Path, weight: float, overrides: list[str]) -> dict[str, Any]:
    env = {**os.environ, "RUNNER_CACHE": str(folder / "cache")}
    command = [sys.executable, __file__, "--prepare", str(folder), str(weight), *overrides]
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, env=env, stdout=output)
        most = 0
        while process.poll() is None:
            most = max(most, own_kib(process.pid))
            time.sleep(0.01)
        if process.returncode:
            raise SystemExit(process.returncode)
        output.seek(0)
        measured = json.loads(output.read().splitlines()[-1])
    return {**measured, "wall": time.monotonic() - began, "own_mib": most / 1024}


def own_kib(pid: int) -> int:
    """The memory of a process that is no page of a file, now; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def prepare(folder: Path, weight: str, overrides: list[str]) -> None:
    """Prepare the data as a run does, and print what it took as JSON."""
    from runner.cli import jobs
    from runner.models import architecture, tokenizer_files
    from runner.train import inputs
    from runner.train.options import Options

    settings = [
        "model=tiny", "data=mix", f"data.sources.talk.path={folder}/talk.jsonl", f"train.max_steps={STEPS}",
        f"data.sources.code.path={folder}/code.jsonl", f"data.sources.code.weight={weight}", "data.max_length=512",
        "data.max_repeats=1000", "data.train_rows=null", *overrides,
    ]  # fmt: skip
    with jobs.composed(settings) as (_, found):
        options = Options(dict(found[0].cfg))
    source = architecture.resolve(options.model)
    splits, batches, _ = inputs.load_data(options.on(source), source, tokenizer_files.load(source))
    packs, position = batches.order._packs, batches.order.packs_before(STEPS)
    counts = zip(packs.streams, packs.taken(position), strict=True)
    taken = {stream.name: stream.sum_before(count, stream.sizes) for stream, count in counts}
    parts = [(name, count / sum(taken.values()), splits.weights[name]) for name, count in taken.items()]
    shares = ", ".join(f"{name} {share:.3%} of {weight:.1%}" for name, share, weight in parts)
    use = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({
        "cpu": sum(each.ru_utime + each.ru_stime for each in use), "shares": shares,
        "peak_mib": max(each.ru_maxrss for each in use) / 1024,
        "tokens": splits.report.train_tokens + splits.report.eval_tokens,
    }))  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--prepare"]:
        prepare(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        main(sys.argv[1:])
