"""Report how a rerun compares with its original: the differences before it starts, and its results after."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from runner import terminal
from runner.config import user_code
from runner.report import diff, record
from runner.report.diff import Section
from runner.report.record import Recorded
from runner.tracking import checkout, machine, provenance
from runner.tracking.rundir import RunDir


def print_before(original: Recorded, cfg: dict[str, Any], code: Path | None) -> None:
    """Print which run is repeated, and every difference in code, environment and hardware."""
    steps = f", {original.last_step} steps" if original.last_step else ""
    _print(f"rerun of    {original.where}  ({original.status}{steps})")
    here = _here(original, cfg, code)
    for section in diff.materials(original, here):
        if section.title != "data":
            _print_section(section)
    for name in user_code.edited(original.config, original.manifest.get("code") or {}):
        _print(f"            {name} was edited since; the rerun uses the copy of the original run")
    if code:
        _print(f"            the code runs in {code}")
    data = original.manifest.get("data") or {}
    digest = f"will be checked against the digest {data['digest'][:12]}" if data.get("digest") else "unknown"
    _print(f"data        {digest}")
    if original.status not in ("completed", ""):
        _print(f"note        the original is {original.status}: only its recorded steps can be compared")
    device = (original.manifest.get("hardware") or {}).get("device", "cpu")
    if device != "cpu" and not cfg["train"].get("deterministic"):
        _print("note        train.deterministic=false: on a GPU the last digits may differ")


def print_after(original: Recorded, rundir: RunDir, *, is_over: bool) -> None:
    """Print whether the rerun reproduced the original, and write the outcome into its manifest.json.

    If the rerun is not completed (``is_over``), only print the command that compares the two runs later.
    """
    first = terminal.typed(terminal.nearest(original.folder)) if original.folder else original.mlflow_id[:8]
    command = f"python -m runner diff {first} {terminal.typed(terminal.nearest(rundir.path))}"
    if not is_over:
        _print(f"compare     {command}   when the rerun is completed")
        return
    rerun = record.of_folder(rundir)
    numbers = diff.numbers(original.curves, rerun.curves)
    weights = [run.manifest.get("weights_sha256") for run in (original, rerun)]
    # A killed run has no final weights to compare.
    is_comparable = all(weights) and original.status == "completed"
    same_weights = weights[0] == weights[1] if is_comparable else None
    is_same = numbers.first is None and numbers.steps > 0 and same_weights is not False
    outcome = {"identical": is_same, "steps": numbers.steps, "first": numbers.first, "same_weights": same_weights}
    rundir.update_manifest(rerun={**rerun.manifest["rerun"], "outcome": outcome})
    _print(f"data        {_about_data(original, rerun)}")
    _print(f"rerun       {_verdict(numbers, same_weights)}")
    if not is_same:
        _print(f"compare     {command}")


def _print_section(section: Section) -> None:
    differing = [row for row in section.rows if row.differs]
    title = f"{section.title:<11} "
    if not differing:
        _print(f"{title}the same" + (f"; {section.note}" if section.note and not section.files else ""))
        return
    for row in differing:
        _print(f"{title}{row.key}: then {_short(row.ours)}, now {_short(row.theirs)}")
        title = " " * len(title)
    for changed in section.files:
        _print(f"{title}{changed}")
    if section.note:
        _print(f"{title}{section.note}")


def _here(original: Recorded, cfg: dict[str, Any], code: Path | None) -> Recorded:
    """What the manifest of the rerun will contain. ``code``: a worktree with the original's code, or None."""
    current = checkout.current()
    patch = current.patch if current else ""
    manifest: dict[str, Any] = {"git": checkout.note(current)[0], "code_sha256": provenance.code_digest()}
    sources = [Path(path) for path in (original.manifest.get("code") or {}).values()]
    manifest["repositories"] = checkout.repositories(sources)
    if code:
        patch = original.patch
        manifest |= {key: original.manifest.get(key) for key in ("git", "code_sha256")}
    lock = provenance.lock_digest(code) if code else provenance.lock_digest()
    manifest |= {"versions": provenance.versions(), "lock_sha256": lock}
    hardware = _hardware(original.manifest.get("hardware") or {})
    return Recorded("here", "the code here", cfg, {**manifest, "hardware": hardware}, patch=patch)


def _hardware(then: dict[str, Any]) -> dict[str, Any]:
    """The hardware of this machine, with the device that the worker will use if the original recorded its device."""
    hardware = {**provenance.machine(), **{key: value for key, value in then.items() if key in ("threads", "products")}}
    if "device" in then:
        gpus = machine.gpu_names()
        kind = "cuda" if gpus else "cpu"
        hardware["device"] = then["device"] if str(then["device"]).startswith(kind) else kind
        hardware["device_name"] = gpus[0] if gpus else hardware["cpu"]
    return hardware


def _about_data(original: Recorded, rerun: Recorded) -> str:
    """The line on the data; the worker itself refuses rows with another digest than the original's."""
    then, now = (run.manifest.get("data") or {} for run in (original, rerun))
    if not then.get("digest"):
        return "the original has no data digest: cannot check that the rows are the same"
    return f"the same rows as the original (digest {now['digest'][:12]})"


def _verdict(numbers: diff.Numbers, same_weights: bool | None) -> str:
    if not numbers.steps:
        return "there is no step to compare"
    weights = {True: "the weights are identical", False: "the weights differ", None: "the weights cannot be compared"}
    if numbers.first is None:
        losses = ", ".join(name for name in ("train/loss", "eval/loss") if name in numbers.metrics)
        text = (
            f"identical to the original: {losses} and all other compared metrics at {numbers.steps} steps, bit for bit"
        )
        return f"{text}; {weights[same_weights]}"
    step, name, then, now = numbers.first
    text = f"not identical: first difference at step {step}, {name} was {then!r} and is {now!r}"
    return f"{text}; the losses differ by at most {numbers.largest:.3g}"


def _short(text: str) -> str:
    return text[:12] if len(text) >= 32 and " " not in text else text or "unknown"


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
