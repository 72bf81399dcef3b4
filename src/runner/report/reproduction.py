"""How alike a rerun and its original are: what differs before it starts, and whether the same came of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from runner import terminal
from runner.report import diff, record
from runner.report.diff import Section
from runner.report.record import Recorded
from runner.tracking import checkout, machine, provenance
from runner.tracking.rundir import RunDir


def tell_before(original: Recorded, cfg: dict[str, Any], code: Path | None) -> None:
    """Say what is repeated, and everything that is not as it was then."""
    steps = f", {original.last_step} steps" if original.last_step else ""
    _say(f"rerun of    {original.where}  ({original.status}{steps})")
    here = _here(original, cfg, code)
    for section in diff.materials(original, here):
        if section.title != "data":
            _tell_section(section)
    if code:
        _say(f"            it runs in {code}")
    data = original.manifest.get("data") or {}
    digest = f"is compared with the digest {data['digest'][:12]} when it is read" if data.get("digest") else "unknown"
    _say(f"data        {digest}")
    if original.status not in ("completed", ""):
        _say(f"note        the original is {original.status}: only the steps that it has can be compared")
    device = (original.manifest.get("hardware") or {}).get("device", "cpu")
    if device != "cpu" and not cfg["train"].get("deterministic"):
        _say("note        it was not deterministic (train.deterministic=false): the last digits may differ on a GPU")


def tell_after(original: Recorded, rundir: RunDir, *, is_over: bool) -> None:
    """Say whether the numbers are those of the original, and write it into the manifest; ``is_over``: it completed."""
    first = terminal.nearest(original.folder) if original.folder else original.mlflow_id[:8]
    command = f"python -m runner diff {first} {terminal.nearest(rundir.path)}"
    if not is_over:
        _say(f"compare     {command}   when it is completed")
        return
    made = record.of_folder(rundir)
    found = diff.numbers(original.curves, made.curves)
    weights = [run.manifest.get("weights_sha256") for run in (original, made)]
    # A run that was killed has the weights of the middle of its way, or none.
    is_comparable = all(weights) and original.status == "completed"
    same_weights = weights[0] == weights[1] if is_comparable else None
    is_same = found.first is None and found.steps > 0 and same_weights is not False
    outcome = {"identical": is_same, "steps": found.steps, "first": found.first, "same_weights": same_weights}
    rundir.update_manifest(rerun={**made.manifest["rerun"], "outcome": outcome})
    _say(f"data        {_about_data(original, made)}")
    _say(f"rerun       {_verdict(found, same_weights)}")
    if not is_same:
        _say(f"compare     {command}")


def _tell_section(section: Section) -> None:
    differing = [row for row in section.rows if row.differs]
    title = f"{section.title:<11} "
    if not differing:
        _say(f"{title}the same" + (f"; {section.note}" if section.note and not section.files else ""))
        return
    for row in differing:
        _say(f"{title}{row.key}: then {_short(row.ours)}, now {_short(row.theirs)}")
        title = " " * len(title)
    for changed in section.files:
        _say(f"{title}{changed}")
    if section.note:
        _say(f"{title}{section.note}")


def _here(original: Recorded, cfg: dict[str, Any], code: Path | None) -> Recorded:
    """This machine and the code that will run, in the words of a manifest; what cannot be known yet is as it was."""
    current = checkout.current()
    patch = current.patch if current else ""
    manifest: dict[str, Any] = {"git": checkout.note(current)[0], "code_sha256": provenance.code_digest()}
    if code:
        patch = original.patch
        manifest = {key: original.manifest.get(key) for key in ("git", "code_sha256")}
    lock = provenance.lock_digest(code) if code else provenance.lock_digest()
    manifest |= {"versions": provenance.versions(), "lock_sha256": lock}
    hardware = _hardware(original.manifest.get("hardware") or {})
    return Recorded("here", "the code here", cfg, {**manifest, "hardware": hardware}, patch=patch)


def _hardware(then: dict[str, Any]) -> dict[str, Any]:
    """This machine, with the device that a worker will find, where the original says what it had."""
    found = {**provenance.machine(), **{key: value for key, value in then.items() if key == "threads"}}
    if "device" in then:
        gpus = machine.gpu_names()
        kind = "cuda" if gpus else "cpu"
        found["device"] = then["device"] if str(then["device"]).startswith(kind) else kind
        found["device_name"] = gpus[0] if gpus else found["cpu"]
    return found


def _about_data(original: Recorded, made: Recorded) -> str:
    """Whether the worker read the rows of the original; it refuses others."""
    then, now = (run.manifest.get("data") or {} for run in (original, made))
    if not then.get("digest"):
        return "the original did not note what it read: whether these were the same rows is not known"
    return f"the same rows as then (digest {now['digest'][:12]})"


def _verdict(found: diff.Numbers, same_weights: bool | None) -> str:
    if not found.steps:
        return "no step was reached that could be compared"
    about = {True: "and so are the weights", False: "but the weights differ", None: "the weights cannot be compared"}
    if found.first is None:
        measured = ", ".join(name for name in ("train/loss", "eval/loss") if name in found.metrics)
        text = f"identical to the original: {measured} and all else at {found.steps} steps, bit by bit"
        return f"{text}; {about[same_weights]}"
    step, name, then, now = found.first
    text = f"not identical: first at step {step}, {name} was {then!r} and is {now!r}"
    return f"{text}; the losses differ by at most {found.largest:.3g}"


def _short(text: str) -> str:
    return text[:12] if len(text) >= 32 and " " not in text else text or "unknown"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
