"""``resume=RUN train.max_steps=…`` on a completed run: a new run that goes on where RUN ended.

If the schedule of the longer run is the same up to there, the new run begins with the last checkpoint of RUN and ends
as one run of the new length does, bit by bit. Otherwise it begins with the weights of RUN alone, trains the steps
that are missing, and says why.
"""

from __future__ import annotations

import copy
import re
import shutil
import sys
from typing import Any

from runner.config import pinned_weights
from runner.config.bind import bind, option
from runner.config.check import LIMITS
from runner.config.job import Job
from runner.errors import ConfigError, Fault
from runner.files import write_atomic
from runner.tracking import manifest, origin, resume
from runner.tracking.rundir import RunDir
from runner.tracking.state_file import State

WHERE = ("resume", "retry", "name", "outputs_dir", "launcher", "tracking", "hydra")
"""What may change besides the end of the run."""
PINNED = ("micro_batch_size", "compile", "teacher")


def settle(job: Job) -> None:
    """Turn a job that extends a completed run into the job of a new run; other jobs are not changed.

    Raises:
        ConfigError: the new end is not later.
    """
    words = {word.partition("=")[0].removeprefix("train."): word for word in job.overrides if _is_limit(word)}
    if job.cfg["resume"] in (None, "auto") or not words:
        return
    rundir = RunDir(resume.folder_of(job.cfg))
    frozen = manifest.read_config(rundir)
    state, ends = rundir.read_state(), {key: job.cfg["train"][key] for key in words}
    others = [word for word in job.overrides if not _is_limit(word) and re.split("[.=/]", word)[0] not in WHERE]
    if (
        state.status != "completed"
        or all(frozen["train"][key] == value for key, value in ends.items())
        or not all(resume.is_kept(word, job.cfg, frozen) for word in others)
    ):
        return  # ``resume.configuration`` continues it or refuses it
    key, end = _later(ends, frozen, state)
    obstacle = _obstacle(rundir, frozen, state, key, end)
    cfg = _configuration(job, frozen, key, end)
    recorded = rundir.read_manifest()
    job.hydra["runtime"]["choices"] = manifest.choices(recorded)
    kept = [word for word in map(str, recorded.get("overrides") or []) if not _is_limit(word) and _is_own(word)]
    job.overrides = [*kept, *(word for word in job.overrides if word not in words.values() and _is_own(word))]
    if obstacle:
        job.overrides += _from_weights(cfg, rundir, frozen, key, _done(frozen, state, key))
    else:
        job.overrides.append(f"train.{key}={end}")
        job.continues, job.notes = rundir.path, _notes(rundir, recorded, state)
    job.cfg = job.unresolved = cfg
    _announce(rundir, state, key, cfg["train"][key], obstacle)


def copy_state(source: RunDir, rundir: RunDir) -> None:
    """Copy what a resumed run needs: the last checkpoint and the best one, the records and the first samples."""
    state = source.read_state()
    for path in (source.metrics, source.samples):
        if path.exists():
            write_atomic(rundir.path / path.name, path.read_bytes())
    for name in sorted({f"step-{step:06d}" for step in (state.model_step, state.step)}):
        aside = rundir.checkpoints / f".{name}.partial"
        shutil.copytree(source.checkpoints / name, aside, dirs_exist_ok=True)
        aside.rename(rundir.checkpoints / name)
    rundir.write_state(step=state.step, seconds=state.seconds)


def _is_limit(word: str) -> bool:
    return word.partition("=")[0].removeprefix("train.") in LIMITS and word.startswith("train.")


def _is_own(word: str) -> bool:
    """Whether an override belongs to the new run, not to the way it is started."""
    return not word.startswith(("resume=", "retry=", "hydra.", "name="))


def _later(ends: dict[str, Any], frozen: dict[str, Any], state: State) -> tuple[str, Any]:
    """(key, value) of the new end.

    Raises:
        ConfigError: not one end, or not a later one than that of the run.
    """
    given = {key: value for key, value in ends.items() if value is not None}
    if len(given) != 1:
        raise ConfigError(Fault("train", "needs one new end", f"set one of train.{', train.'.join(LIMITS)}"))
    ((key, end),) = given.items()
    reached = _done(frozen, state, key) or 0
    if isinstance(end, int | float) and end <= reached:
        problem = f"the run has trained {reached} already"
        raise ConfigError(Fault(f"train.{key}", problem, "set a larger value", end))
    return key, end


def _done(frozen: dict[str, Any], state: State, key: str) -> Any:
    """How far the run has come, in the unit of ``key``; None if that is not known."""
    epochs = frozen["train"]["num_train_epochs"]
    reached = {
        "max_steps": state.step,
        "max_tokens": state.summary.get("train/tokens"),
        "num_train_epochs": epochs and round(epochs * state.step / state.total_steps, 6),
    }[key]
    return reached if state.reason and reached else frozen["train"][key] or reached


def _obstacle(rundir: RunDir, frozen: dict[str, Any], state: State, key: str, end: Any) -> str:
    """Why the new run cannot go on with the optimizer of the old one; empty if it can."""
    if frozen["train"]["num_train_epochs"] is not None:
        return "the last step of an epoch may be smaller"
    if not all((rundir.checkpoints / f"step-{step:06d}").is_dir() for step in (state.step, state.model_step)):
        return "its last checkpoint is missing" if state.model_step == state.step else "a checkpoint is missing"
    if state.reason:
        return f"it {state.reason}"
    schedule = bind(frozen["schedule"], "schedule")
    totals = [end] if key == "max_steps" else [state.step + 1, 10 * state.step]
    for step in range(state.step):
        if any(schedule(step, total) != schedule(step, state.step) for total in totals):
            return f"the learning rates of a longer run differ from step {step + 1} on"
    return ""


def _configuration(job: Job, frozen: dict[str, Any], key: str, end: Any) -> dict[str, Any]:
    cfg = copy.deepcopy(frozen)
    cfg |= {"sweep": None, "resume": None, "retry": False, "outputs_dir": job.cfg["outputs_dir"]}
    cfg["name"] = job.cfg["name"] or (f"{frozen['name']}, {key}={end}" if frozen["name"] else None)
    for group in ("launcher", "tracking"):
        if any(word.startswith(group) for word in job.overrides):
            cfg[group] = job.cfg[group]
    cfg["train"] |= dict.fromkeys(LIMITS) | {key: end}
    return cfg


def _notes(rundir: RunDir, recorded: dict[str, Any], state: State) -> dict[str, Any]:
    """Entries of the new manifest: where the run comes from, and what its first steps were computed with."""
    (nearest, *before) = origin.entry("resume", rundir.path)
    pinned = {key: recorded[key] for key in PINNED if recorded.get(key)}
    data, model = recorded.get("data") or {}, recorded.get("model") or {}
    pinned["data"] = {key: data[key] for key in ("digest", "revision", "function", "sources", "evals") if key in data}
    pinned["model"] = {"revision": model["revision"]} if model.get("revision") else {}
    return {origin.FIELD: [{**nearest, "step": state.step}, *before], **pinned}


def _from_weights(cfg: dict[str, Any], rundir: RunDir, frozen: dict[str, Any], key: str, done: Any) -> list[str]:
    """Start from the weights of the run, and train what is missing; returns these overrides."""
    if frozen["train"][key] is None:
        kinds = " or ".join(f"train.{limit}" for limit in LIMITS if frozen["train"][limit] is not None)
        problem = "cannot be counted from the end of that run, which has another kind of end"
        raise ConfigError(Fault(f"train.{key}", problem, f"set {kinds}", cfg["train"][key]))
    cfg["train"][key] -= done
    if (rundir.model / pinned_weights.ADAPTER).is_file():
        cfg["lora"]["start"] = str(rundir.path)
        return [f"train.{key}={cfg['train'][key]}", f"lora.start={rundir.path}"]
    kept = {name: value for name, value in cfg["model"].items() if name in ("dtype", "attention", "trust_remote_code")}
    cfg["model"] = {**option("model", "local"), **kept, "path": str(rundir.model)}
    return [f"train.{key}={cfg['train'][key]}", "model=local", f"model.path={rundir.model}"]


def _announce(rundir: RunDir, state: State, key: str, value: Any, obstacle: str) -> None:
    if obstacle:
        text = f"a new run of {key}={value} from the weights of {rundir.path}; {obstacle}, so optimizer, schedule and "
        text += "data begin anew"
    else:
        text = f"a new run goes on from step {state.step} of {rundir.path}, as one run of {key}={value} would"
    print(f"note: {text}", file=sys.stderr)
