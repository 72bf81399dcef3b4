"""Compare two runs: configuration, code, environment, data, hardware, results, and the logged values step by step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from runner.config import bind, choices, code_files, user_code
from runner.errors import RunnerError
from runner.report.record import Curves, Recorded
from runner.tracking import checkout, manifest, origin
from runner.tracking.checkout import Changed, Code
from runner.tracking.metrics_log import BEST, LOSS
from runner.tracking.mlflow import store

PROGRAM = ("src/", "conf/", "pyproject.toml", "uv.lock")
"""Files of the repository that can change a run; other changed files are only counted."""
REPEATED = ("train/loss", "train/grad_norm", "train/learning_rate", "train/tokens", "train/epoch")
"""Metrics that a deterministic rerun reproduces bit for bit, besides ``eval/*``; the others depend on speed."""
FINAL = ("train/loss", "train/tokens", "train/tokens_per_second", "train/mfu")


@dataclass(frozen=True)
class Row:
    """The values of one key in both runs; an empty text if a run has no value."""

    key: str
    ours: str
    theirs: str

    @property
    def differs(self) -> bool:
        return self.ours != self.theirs


@dataclass(frozen=True)
class Section:
    title: str
    rows: list[Row]
    files: list[Changed] = field(default_factory=list)
    """Files of the program that differ; empty without git."""
    note: str = ""

    @property
    def differs(self) -> bool:
        return any(row.differs for row in self.rows)


@dataclass(frozen=True)
class Numbers:
    """The result of comparing the logged values of two runs."""

    steps: int
    """Number of steps at which both runs logged a value."""
    last: int
    """The last of these steps."""
    first: tuple[int, str, float, float] | None
    """The first difference, (step, metric, ours, theirs); None if all values are equal."""
    largest: float
    """The largest absolute difference of train/loss or eval/loss."""
    metrics: list[str]
    """The metrics that were compared."""


def of(ours: Recorded, theirs: Recorded) -> list[Section]:
    """All sections of the comparison, with equal and different rows."""
    configs = [_named(run) for run in (ours, theirs)]
    return [
        Section("configuration", _rows(*(_part(keys, is_run_time=False) for keys in configs))),
        Section("where and how", _rows(*(_part(keys, is_run_time=True) for keys in configs))),
        *materials(ours, theirs),
        Section("results", _rows(_results(ours), _results(theirs))),
    ]


def materials(ours: Recorded, theirs: Recorded) -> list[Section]:
    """The sections on what a result depends on besides the configuration: code, environment, data, hardware."""
    files, note = _files(ours, theirs)
    return [
        Section("code", _known(_rows(_code(ours), _code(theirs))), files, note),
        Section("environment", _rows(_environment(ours), _environment(theirs))),
        Section("data", _rows(_data(ours), _data(theirs))),
        Section("hardware", _rows(*(run.manifest.get("hardware") or {} for run in (ours, theirs)))),
    ]


def numbers(ours: Curves, theirs: Curves) -> Numbers:
    """Compare the logged values at all steps that both runs have."""
    names = [name for name in ours if name in theirs and (name in REPEATED or name.startswith("eval/"))]
    points = sorted((step, name) for name in names for step in ours[name].keys() & theirs[name].keys())
    pairs = [(step, name, ours[name][step], theirs[name][step]) for step, name in points]
    unlike = [pair for pair in pairs if not _same(pair[2], pair[3])]
    losses = [abs(a - b) for _, name, a, b in unlike if name in ("train/loss", "eval/loss")]
    steps = {step for step, _ in points}
    first = unlike[0] if unlike else None
    return Numbers(len(steps), max(steps, default=0), first, max(losses, default=0.0), names)


def _same(ours: float, theirs: float) -> bool:
    if math.isnan(ours) or math.isnan(theirs):
        return math.isnan(ours) and math.isnan(theirs)
    ours, theirs = (max(-store.INFINITY, min(store.INFINITY, value)) for value in (ours, theirs))
    return ours == theirs


def _named(run: Recorded) -> dict[str, str]:
    """The configuration flattened with dots; a group has the name of its chosen option: ``quant: 4bit``."""
    return choices.named(dict(bind.flatten(run.config)), manifest.choices(run.manifest))[0]


def _part(keys: Mapping[str, str], *, is_run_time: bool) -> dict[str, str]:
    return {key: text for key, text in keys.items() if (key.split(".")[0] in manifest.RUN_TIME_KEYS) == is_run_time}


def _code(run: Recorded) -> dict[str, Any]:
    git = run.manifest.get("git") or {}
    uncommitted = "none" if git.get("dirty") is False else ""
    if git.get("dirty"):
        digest = git.get("diff_sha256")
        uncommitted = f"yes ({digest[:12]})" if digest else "yes"
    modules = run.config.get(code_files.KEY)
    digests = modules if isinstance(modules, Mapping) else {}
    return {
        "commit": git.get("sha"),
        "uncommitted changes": uncommitted,
        "digest": run.manifest.get("code_sha256"),
        **{f"your code: {name}": digest for name, digest in digests.items()},
        **{key: text for each in run.manifest.get("repositories") or [] for key, text in _repository(each).items()},
    }


def _repository(each: Mapping[str, Any]) -> dict[str, str]:
    """Commit and uncommitted changes of a repository of the user."""
    name = PurePath(str(each.get("top"))).name
    changes = f"yes ({str(each.get('diff_sha256'))[:12]})" if each.get("dirty") else "none"
    return {f"commit of {name}": str(each.get("sha")), f"uncommitted changes in {name}": changes}


def _environment(run: Recorded) -> dict[str, Any]:
    return {**(run.manifest.get("versions") or {}), "lock file (sha256)": run.manifest.get("lock_sha256")}


def _data(run: Recorded) -> dict[str, Any]:
    data, model = run.manifest.get("data") or {}, run.manifest.get("model") or {}
    plain = {key: data.get(key) for key in ("name", "digest", "revision", "uri", "function")}
    report = {str(key).replace("_", " "): value for key, value in (data.get("report") or {}).items()}
    model = {"model": model.get("name"), "model revision": model.get("revision")}
    return {**plain, **report, **model, "came from": origin.chain(run.manifest) or None}


def _results(run: Recorded) -> dict[str, Any]:
    # The best loss is computed below for both runs: only MLflow stores it as a metric, the run folder does not.
    if run.lost:  # last and best values may be wrong
        return {"status": run.status, "records": run.lost, "weights (sha256)": run.manifest.get("weights_sha256")}
    names = [n for n in run.curves if n in FINAL or (n.startswith(("eval/", "memory/")) and n != BEST)]
    last = {name: run.curves[name][max(run.curves[name])] for name in sorted(names)}
    losses = [
        value for step, value in run.curves.get(LOSS, {}).items() if step
    ]  # without the evaluation before training
    best = {f"{LOSS} (best)": min(losses)} if losses else {}
    weights = run.manifest.get("weights_sha256")
    return {"status": run.status, "steps": run.last_step, **last, **best, "weights (sha256)": weights}


def _files(ours: Recorded, theirs: Recorded) -> tuple[list[Changed], str]:
    """(files of the program that differ, notes)."""
    first, second = ours.code, theirs.code
    if first is None or second is None:
        without_git = ours if first is None else theirs
        return [], f"{without_git.where} was started outside a git repository: its source files are unknown"
    if first == second:
        return [], ""
    try:
        changes = checkout.between(first, second)
    except RunnerError as error:
        return [], f"cannot list the files that differ: {error}".splitlines()[0]
    program = [changed for changed in changes if changed.file.startswith(PROGRAM)]
    others = len(changes) - len(program)
    redacted = [run.where for run in (ours, theirs) if (run.manifest.get("git") or {}).get("redacted")]
    notes = [f"{others} other file{'s' * (others > 1)} (tests, documents)"] if others else []
    notes += [f"secrets are redacted in the recorded changes of {' and '.join(redacted)}"] if redacted else []
    return program, "; ".join(notes)


def patch(ours: Recorded, theirs: Recorded) -> str:
    """The differing lines of code as a patch, those of the user's own code first; empty without git."""
    return user_code.patch(ours.config, theirs.config) + _patch_of_program(ours, theirs)


def _patch_of_program(ours: Recorded, theirs: Recorded) -> str:
    first, second = ours.code, theirs.code
    if not isinstance(first, Code) or not isinstance(second, Code):
        return ""
    try:
        return checkout.patch_between(first, second)
    except RunnerError:
        return ""


def _rows(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[Row]:
    return [Row(key, _text(ours.get(key)), _text(theirs.get(key))) for key in _merged(ours, theirs)]


def _known(rows: list[Row]) -> list[Row]:
    """The rows for which both runs have a value (a run started outside a git repository has no commit)."""
    return [row for row in rows if row.ours and row.theirs]


def _merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    """The keys of both in one order; keys that only ``theirs`` has keep their position."""
    remaining = list(ours)
    for key in theirs:
        if key in ours:
            while key in remaining:
                yield remaining.pop(0)
        else:
            yield key
    yield from remaining


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value)
    return str(value)
