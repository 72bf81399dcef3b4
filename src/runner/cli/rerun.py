"""The verb ``rerun``: a run once more, as it was configured, and whether the same came of it."""

from __future__ import annotations

import copy
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner import files
from runner.cli import args, worktree
from runner.config import check
from runner.config.bind import TARGET, config_dir, unknown_key
from runner.config.compose import Composer, Job, opened, parse
from runner.errors import ConfigError, Fault, suggest
from runner.files import write_atomic
from runner.launch import prepare
from runner.report import record, reproduction
from runner.report.record import Recorded
from runner.tracking import manifest, provenance, resume
from runner.tracking.rundir import RunDir
from runner.train.distributed import parallel

HELP = """python -m runner rerun RUN [--exact] [where and how …] [uri=URI]

Trains a run again, as it was configured then, into a new folder. What is not as it was (code, packages, data,
hardware) is said before it starts; in the end, whether the numbers are the same.

  python -m runner rerun outputs/2026-01-31/12-00-00
  python -m runner rerun 3f2a uri=https://mlflow.team      a run of another machine, by its MLflow id
  python -m runner rerun lora.r=8 --exact                  with the code that it ran: its commit, its changes
  python -m runner rerun 3f2a launcher=slurm launcher.partition=gpu

RUN is a run folder, a name, or the beginning (4 characters or more) of an MLflow run id.
  --exact    run the recorded commit with the recorded uncommitted changes, in a git worktree of its own; these stay in
             ~/.cache/runner/worktrees (RUNNER_CACHE/worktrees) for the next time; in your checkout this clears them:
             rm -r ~/.cache/runner/worktrees; git worktree prune
  uri=URI    the MLflow store that has a run which lies on no disk here
Where and how it happens may be changed: outputs_dir, hydra.run.dir, name, launcher, tracking and their keys; and where
the same files lie here: data.path, data.eval_path, data.format.function, model.path. Any other key makes another run.
The exit code is that of the run; other numbers than the original's are said, and no failure."""

WHERE = ("name", "outputs_dir", "hydra.run.dir")
GROUPS = ("launcher", "tracking")
PLACES = ("data.path", "data.eval_path", "data.format.function", "model.path")
"""Keys that say where files lie; that they are the same files is checked, or seen at the first evaluation."""


def main(argv: list[str]) -> int:
    """The verb; returns the exit code of the run.

    Raises:
        ConfigError: no such run, one that never began, a key that would make it another run, or a configuration that
            cannot run here.
    """
    outputs_dir = next((word.partition("=")[2] for word in argv if word.startswith("outputs_dir=")), None)
    words = args.read([w for w in argv if not w.startswith("outputs_dir=")], HELP, flags=("--exact",))
    if words is None:
        return 0
    rest, settings = args.settings(words.words, ("uri",))
    name, given = _apart(rest)
    original = _find(name, outputs_dir, settings.get("uri"))
    record.refuse_unbegun(original, "there is nothing to repeat yet")
    _refuse_others(original, given)
    given += [f"outputs_dir={outputs_dir}"] if outputs_dir is not None else []
    code = worktree.provide(original) if words.has("--exact") else None
    job = _restored(original, given, is_exact=code is not None)
    launcher = prepare.launcher_of(job.cfg)
    folder = _folder(job)
    launcher.check()
    reproduction.tell_before(original, job.cfg, code)
    _keep_threads(original, job)
    rundir = _prepared(original, job, folder, argv, code)
    exit_code = worktree.finish(rundir, code) if code else launcher.launch([rundir], None)[0]
    if rundir.manifest.exists():  # it is tidied away where the worker refused it
        is_over = exit_code == 0 and not launcher.is_detached
        reproduction.tell_after(original, rundir, is_over=is_over)
    return exit_code


def _apart(words: list[str]) -> tuple[str, list[str]]:
    """RUN, and the overrides; a job of a sweep may be called ``lora.r=8``, so the first word is RUN if all have a =."""
    plain = [word for word in words if "=" not in word]
    if len(plain) > 1 or not words:
        problem = "needs a run" if not words else f"repeats one run, and {len(plain)} are named"
        raise ConfigError(Fault("rerun", problem, HELP.splitlines()[0]))
    name = plain[0] if plain else words[0]
    rest = list(words)
    rest.remove(name)
    return name, rest


def _find(name: str, outputs_dir: str | None, uri: str | None) -> Recorded:
    """The run, below the folder that the new one will lie in, or else below the usual one."""
    if outputs_dir is not None and Path(outputs_dir).expanduser().is_dir():
        try:
            return record.find(name, Path(outputs_dir).expanduser(), uri)
        except ConfigError:
            if not Path("outputs").is_dir():
                raise
    return record.find(name, Path("outputs"), uri)


def _refuse_others(original: Recorded, given: list[str]) -> None:
    """Refuse keys that change what is computed, or that mean nothing here."""
    faults = []
    others = {_key(word): word for word in given if not _is_where(_key(word))}
    meaningless = {key: word for key, word in others.items() if key in ("resume", "retry", "sweep")}
    others = {key: word for key, word in others.items() if key not in meaningless}
    for key, word in meaningless.items():
        problem = "means nothing to a rerun, which gets a folder of its own"
        faults.append(Fault(key, problem, "leave it out", word.partition("=")[2]))
    unknown = [fault for word in others.values() if (fault := _unknown(word, original.config, set(others)))]
    faults += unknown
    if others and not unknown:
        then = [str(word) for word in original.manifest.get("overrides") or []]
        kept = [word for word in then if _key(word) not in {*others, "resume", "retry"}]
        problem = "would make it another run" if len(others) == 1 else "would make it another run, each of them"
        remedy = f"start that one: python -m runner {shlex.join([*kept, *others.values()])}"
        faults.append(Fault(" ".join(others.values()), problem, remedy))
    if faults:
        raise ConfigError(*faults)


def _unknown(word: str, config: dict[str, Any], given: set[str]) -> Fault | None:
    """What is wrong with an override that no run could have: a key, or an option of a group, that is not there."""
    key, _, value = word.partition("=")
    groups = {path.name for path in config_dir().iterdir() if path.is_dir()}
    if word.startswith(("+", "~")) or (_group(key) in given and key not in groups) or _group(key) == "hydra":
        return None  # of another option than the run's, or of a method that knows it: its own checks will say
    if key in groups:
        options = sorted(path.stem for path in (config_dir() / key).glob("*.yaml") if path.stem != "base")
        is_there = value in (*options, "null")
        allowed = f"{suggest(value, options)} options here: {', '.join(options)}".strip()
        return None if is_there else Fault(key, "no such option", allowed, value)
    node: Any = config
    parts = key.split(".")
    for number, part in enumerate(parts):
        if not isinstance(node, dict) or part not in node:
            known = [name for name in node if name != TARGET] if isinstance(node, dict) else []
            names = [*known, *(sorted(groups) if not number else [])]
            return replace(unknown_key(part, names, value), key=key)
        node = node[part]
    return None


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def _is_where(key: str) -> bool:
    return key in (*WHERE, *GROUPS, *PLACES) or key.startswith(tuple(f"{group}." for group in GROUPS))


def _restored(original: Recorded, given: list[str], *, is_exact: bool) -> Job:
    """The job as it was frozen, with what was given of where and how.

    Raises:
        ConfigError: with all faults of it.
    """
    chosen = {_key(word) for word in given} & set(GROUPS)
    composed = [w for w in given if _group(w) in chosen or _key(w) in WHERE]
    args = parse([*composed])
    with opened(args) as hydra:
        composer = Composer(hydra, args)
        job = composer.single()
        values = {_key(word): composer.value_of(word) for word in given if word not in composed}
    cfg = copy.deepcopy(original.config)
    cfg |= {"sweep": None, "resume": None, "retry": False, "outputs_dir": job.cfg["outputs_dir"]}
    cfg["name"] = job.cfg["name"] or f"rerun of {original.name.removeprefix('rerun of ')}"
    cfg |= {group: job.cfg[group] for group in chosen}
    for key, value in values.items():
        _set(cfg, key, value)
    job.cfg, job.unresolved = cfg, cfg
    job.overrides = [*map(str, original.manifest.get("overrides") or []), *given]
    job.hydra["overrides"]["task"] = job.overrides
    (_check_exact if is_exact else _check)(job)
    return job


def _set(cfg: dict[str, Any], key: str, value: Any) -> None:
    *above, last = key.split(".")
    node: Any = cfg
    for part in above:
        if not isinstance(node.get(part), dict):
            remedy = f"the run has {', '.join(sorted(node))} there"
            raise ConfigError(Fault(key, "no such key", remedy, value))
        node = node[part]
    node[last] = value


def _group(word: str) -> str:
    return _key(word).partition(".")[0]


def _check(job: Job) -> None:
    """Check and freeze it as every run is."""
    try:
        prepare.admit([job])
    except ConfigError as error:
        faults = list(error.faults)
        if any(fault.key in PLACES for fault in faults):
            faults.append(Fault("", "the run found its files where they are not here", "KEY=… names where they lie"))
        elif not all(_group(fault.key) in GROUPS for fault in faults):
            problem = "that is how the run was configured, and the code here does not take it"
            faults.append(Fault("", problem, "rerun --exact runs it with its own code"))
        raise ConfigError(*faults) from error


def _check_exact(job: Job) -> None:
    """Of a configuration that other code will read only where and how it runs is checked."""
    manifest.keep_credentials(job.cfg)
    faults = [fault for group in GROUPS for fault in check.faults_of_group(job.cfg, group)]
    if not faults:
        job.cfg = manifest.freeze(job.cfg)
        try:
            parallel.resolve(job.cfg["parallel"], getattr(prepare.launcher_of(job.cfg), "processes", 1))
        except ConfigError as error:
            faults = list(error.faults)
    if faults:
        raise ConfigError(*faults)


def _folder(job: Job) -> Path:
    """A new folder for it.

    Raises:
        RunnerError: the one that was named holds something already.
    """
    folder, _ = resume.choose(job.cfg, Path(job.folder), named=job.is_folder_named, overrides=[])
    if RunDir(folder).manifest.exists():
        problem, remedy = "holds a run already, and a rerun gets a folder of its own", "name another, or leave it out"
        raise ConfigError(Fault("hydra.run.dir", problem, remedy, folder))
    manifest.refuse_files(folder)
    return folder


def _prepared(original: Recorded, job: Job, folder: Path, argv: list[str], code: Path | None) -> RunDir:
    """The new folder, which says what it repeats, and holds the worker to the rows of the original."""
    data = original.manifest.get("data") or {}
    model = {key: value for key, value in (original.manifest.get("model") or {}).items() if key == "revision"}
    known = {key: data[key] for key in ("digest", "revision", "function") if key in data}
    origin = {
        "of": original.mlflow_id or original.manifest.get("id"),
        "id": original.manifest.get("id"),
        "where": str(original.folder or original.where),
        "exact": code is not None,
    }
    notes: dict[str, Any] = {"rerun": origin, "data": known, "model": model}
    notes |= {key: original.manifest[key] for key in ("micro_batch_size", "compile") if original.manifest.get(key)}
    if code:
        notes |= {key: original.manifest[key] for key in ("git", "code_sha256") if key in original.manifest}
        notes |= {"lock_sha256": provenance.lock_digest(code)}
        if manifest.signature(job.cfg) == manifest.signature(original.config):
            notes["signature"] = original.manifest.get("signature")  # as its own code reckons it
    command, is_new = ["python", "-m", "runner", "rerun", *argv], not job.is_folder_named
    with files.writing(folder):
        rundir = prepare.prepared(job, folder, command, is_new=is_new, **notes)
        if code:
            rundir.dirty_diff.unlink(missing_ok=True)
            if original.patch:
                write_atomic(rundir.dirty_diff, original.patch.encode("utf-8", "surrogateescape"))
    return rundir


def _keep_threads(original: Recorded, job: Job) -> None:
    """Compute on as many threads as then: sums over more or fewer of them round in other places."""
    then = (original.manifest.get("hardware") or {}).get("threads")
    if then and original.manifest["hardware"].get("device") == "cpu" and not job.cfg["launcher"].get("threads"):
        os.environ["OMP_NUM_THREADS"] = str(then)
