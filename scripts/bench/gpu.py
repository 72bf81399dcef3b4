"""Tokens per second, utilisation and memory on one GPU: runner and TRL on the same tokens, from the same weights.

    python scripts/bench/gpu.py [CASE ...] [--sides A,B] [--rounds N] [--steps N] [--rows N] [--deadline S] [--out DIR]
    python scripts/bench/gpu.py --smoke      every case and side in small, on a CPU too: its numbers mean nothing

Cases: `1b-full`, `8b-lora`, `8b-qlora` (rows of 4096 tokens, Llama's shapes, random weights made on the device: nothing
is downloaded), `short` (8b-lora on documents as short as Alpaca's), `small` (SmolLM2-135M, which waits for Python).

Every training is a process of its own; the sides take turns in each round. What is timed follows the fifth step; the
first stands apart. Both sides compute in bfloat16 from weights in bfloat16. Of a case, the sides that cut documents
into the same batches have to have the losses of runner's, within 1e-2 in every step; else their row is void and the
exit code 1. A model's FLOPs in a second are held against the maker's peak (--peak, in TFLOP/s). With --deadline nothing
is begun that would probably not end within so many seconds; what was measured until then is shown, and lies in --out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_sides import CASES, OURS, WARM_UP, case_of, is_packed

TOLERANCE = 1e-2
"""Nats by which losses may differ."""
ENOUGH_S = 180
"""No training takes longer."""
HEADS = "side", "useful tokens/s", "each round", "MFU", "peak GiB", "reserved", "first step, s", "last loss", "apart"
Results = dict[str, list[dict[str, Any]]]
"""Side → what each round came to; {"failed": why} where it did not end."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE")
    parser.add_argument("--sides", help="names with commas between them; else those of the case")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, help="packs of a step; else those of the case")
    parser.add_argument("--peak", type=float, default=989.0)
    parser.add_argument("--deadline", type=float, default=float("inf"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true")
    words = parser.parse_args()
    if unknown := set(words.cases) - set(CASES):
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(CASES)}")
    if words.smoke:
        words.rounds, words.steps = 1, WARM_UP + 2
    with tempfile.TemporaryDirectory() as name:
        words.out = words.out or Path(name)
        words.out.mkdir(parents=True, exist_ok=True)
        sys.exit(in_turns(words))


def in_turns(words: argparse.Namespace) -> int:
    """Every case, and its table as soon as it is measured; returns the exit code."""
    began, code = time.monotonic(), 0
    print(json.dumps(child(words, words.cases[0], "ceilings")), flush=True)
    for name in words.cases:
        case = case_of(name, words.rows, small=words.smoke)
        results: Results = {side: [] for side in (words.sides.split(",") if words.sides else case.sides)}
        took = dict.fromkeys(results, 0.0)
        for side in list(results) * words.rounds:
            started = time.monotonic()
            if started - began + (took[side] or max(took.values())) > words.deadline:
                print(f"{name}, {side}: left out, {words.deadline:.0f} s are over", flush=True)
                continue
            results[side].append(child(words, name, side))
            took[side] = time.monotonic() - started
        (words.out / f"{name}.json").write_text(json.dumps({"case": asdict(case), "results": results}))
        code |= show(name, results, words.peak)
    return code


def child(words: argparse.Namespace, name: str, side: str) -> dict[str, Any]:
    """What a process of its own came to."""
    file = words.out / "result.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).with_name("gpu_sides.py")), name, side, str(file)]
    command += ["--steps", str(words.steps), *(["--rows", str(words.rows)] if words.rows else [])]
    command += ["--small"] * words.smoke
    began = time.time()
    try:
        said = subprocess.run(command, check=False, capture_output=True, text=True, timeout=ENOUGH_S).stderr
    except subprocess.TimeoutExpired as error:
        said = str(error)
    (words.out / f"{name}-{side}.log").write_text(said)
    if not file.exists():
        last = next((line for line in reversed(said.splitlines()) if "Error" in line), "killed")
        print(f"{name}, {side}: failed\n{said[-1500:]}", flush=True)
        return {"failed": last}
    found: dict[str, Any] = json.loads(file.read_text())
    if "times" in found:
        found["first"] = found["times"][0] - began
        found["rate"] = sum(found["tokens"][WARM_UP:]) / (found["times"][-1] - found["times"][WARM_UP - 1])
        print(f"{name}, {side}: {found['rate']:.0f} tokens/s, first step after {found['first']:.1f} s", flush=True)
    return found


def show(name: str, results: Results, peak: float) -> int:
    """The table of a case; returns 1 where losses differ, which makes a row void, or where a side failed."""
    print(f"\n{name}\n| {' | '.join(HEADS)} |\n{'|---' * len(HEADS)}|")
    code = 0
    for side, rounds in results.items():
        good = [one for one in rounds if "failed" not in one]
        judge = judge_of(name, side, results)
        apart = largest_difference(good[0], judge) if good and judge else None
        if not good:
            cells = [rounds[0]["failed"] if rounds else "not measured"]
        elif apart is not None and not apart <= TOLERANCE:
            cells = ["VOID", *[""] * 5, f"{good[0]['losses'][-1]:.4f}", f"{apart:.1e}"]
        else:
            difference = "–" if apart is None else f"{apart:.1e}"
            cells = [*measured(good, judge, peak), f"{good[0]['losses'][-1]:.4f}", difference]
        code |= int((bool(rounds) and len(cells) == 1) or cells[0] == "VOID")
        print(f"| {side} | {' | '.join(cells)} |")
    tell_graphs(results)
    return code


def judge_of(name: str, side: str, results: Results) -> dict[str, Any] | None:
    """The first of runner's trainings on the same batches."""
    alike = [
        other for other in results if other in OURS and is_packed(CASES[name], other) == is_packed(CASES[name], side)
    ]
    return next((one for other in alike for one in results[other] if "failed" not in one), None)


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    return max(abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=True))


def measured(rounds: list[dict[str, Any]], judge: dict[str, Any] | None, peak: float) -> list[str]:
    rate, allocated, reserved, first = (
        statistics.median(one[key] for one in rounds) for key in ("rate", "peak_gib", "reserved_gib", "first")
    )
    used = f"{rate * judge['flops_per_token'] / (peak * 1e12):.1%}" if judge else "–"
    each = " ".join(f"{one['rate']:.0f}" for one in rounds)
    return [f"{rate:.0f}", each, used, f"{allocated:.2f}", f"{reserved:.2f}", f"{first:.1f}"]


def tell_graphs(results: Results) -> None:
    """Whether runner's steps were what they are meant to be: attention by document, no graph break, nothing anew."""
    for side, rounds in results.items():
        for one in rounds[:1]:
            if "attention" in one:
                late = f"{one['graphs_after_first_step']} graphs after the first step"
                print(f"{side}: attention {one['attention']}, {len(one['graph_breaks'])} graph breaks, {late}")
                print("".join(f"  {reason}\n" for reason in one["graph_breaks"]), end="", flush=True)


if __name__ == "__main__":
    main()
