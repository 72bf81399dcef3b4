"""The verb ``rerun``: train a run again from its frozen configuration, and compare the numbers."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from runner import files
from runner.cli import rerun_keys, worktree
from runner.cli.args import RUN, URI, Option, Verb
from runner.config import check, pinned_weights
from runner.config.command_line import opened, parse
from runner.config.compose import Composer
from runner.config.job import Job
from runner.errors import ConfigError, Fault
from runner.files import user_path, write_atomic
from runner.launch import prepare
from runner.report import record, reproduction
from runner.report.record import Recorded
from runner.tracking import manifest, origin, provenance, resume
from runner.tracking.rundir import RunDir
from runner.train.distributed import parallel

VERB = Verb(
    "rerun RUN [where and how …]",
    f"""Trains a run again with its frozen configuration, in a new folder. Prints what differs now (code, packages,
data, hardware) before it starts, and at the end whether the numbers are the same.

  python -m runner rerun outputs/2026-01-31/12-00-00
  python -m runner rerun 3f2a uri=https://mlflow.team      a run from another machine, by its MLflow id
  python -m runner rerun lora.r=8 --exact                  with its original code
  python -m runner rerun 3f2a launcher=slurm launcher.partition=gpu

{RUN}.""",
    Option(
        "--exact",
        "use the recorded commit with the recorded uncommitted changes, in a separate git worktree; worktrees are "
        "kept in ~/.cache/runner/worktrees (RUNNER_CACHE/worktrees). To delete them, run in your checkout: "
        "rm -r ~/.cache/runner/worktrees; git worktree prune",
    ),
    URI,
    Option("outputs_dir=FOLDER", "the folder for the new run, and the first one in which RUN is looked up"),
    notes="""You may change where and how it runs: outputs_dir, hydra.run.dir, name, launcher, tracking and their keys;
and the paths of the same files here: data.path, data.eval_path, data.format.function, model.path, lora.start,
task.teacher. Any other key changes what is computed and is refused. The exit code is that of the run; different numbers
are no failure.""",
)


def main(argv: list[str]) -> int:
    """The verb; returns the exit code of the run.

    Raises:
        ConfigError: no such run, a run that never started, a key that changes what is computed, or a configuration
            that cannot run here.
    """
    args = VERB.read(argv)
    outputs_dir = args["outputs_dir"]
    name, overrides = _split(args.words)
    original = _find(name, outputs_dir, args["uri"])
    record.refuse_unbegun(original, "there is nothing to repeat yet")
    rerun_keys.refuse_changes(original, overrides)
    overrides += [f"outputs_dir={outputs_dir}"] if outputs_dir is not None else []
    code = worktree.provide(original) if args["--exact"] else None
    job = _restored(original, overrides, is_exact=code is not None)
    launcher = prepare.launcher_of(job.cfg)
    folder = _folder(job)
    launcher.check()
    reproduction.print_before(original, job.cfg, code)
    _keep_threads(original, job)
    rundir = _prepared(original, job, folder, argv, code)
    exit_code = worktree.finish(rundir, code) if code else launcher.launch([rundir], None)[0]
    if rundir.manifest.exists():  # the folder is removed if the worker refused the run
        is_over = exit_code == 0 and not launcher.is_detached
        reproduction.print_after(original, rundir, is_over=is_over)
    return exit_code


def _split(words: list[str]) -> tuple[str, list[str]]:
    """(RUN, overrides). If all words contain "=", RUN is the first: a job of a sweep may be named ``lora.r=8``."""
    plain = [word for word in words if "=" not in word]
    if len(plain) > 1 or not words:
        raise VERB.misused(f"takes one run, not {len(plain)}" if words else "needs a run")
    name = plain[0] if plain else words[0]
    rest = list(words)
    rest.remove(name)
    return name, rest


def _find(name: str, outputs_dir: str | None, uri: str | None) -> Recorded:
    """The original run: below ``outputs_dir``, the folder of the new run, else below ``outputs``."""
    if outputs_dir is not None and (folder := user_path(outputs_dir, "outputs_dir")).is_dir():
        try:
            return record.find(name, folder, uri)
        except ConfigError:
            if not Path("outputs").is_dir():
                raise
    return record.find(name, Path("outputs"), uri)


def _restored(original: Recorded, overrides: list[str], *, is_exact: bool) -> Job:
    """The job with the frozen configuration and the overrides of where and how it runs.

    Raises:
        ConfigError: with all its faults.
    """
    chosen = {rerun_keys.key_of(word) for word in overrides} & set(rerun_keys.GROUPS)
    composed = [w for w in overrides if rerun_keys.group_of(w) in chosen or rerun_keys.key_of(w) in rerun_keys.WHERE]
    args = parse(composed)
    with opened(args) as hydra:
        composer = Composer(hydra, args)
        job = composer.single()
        values = {rerun_keys.key_of(word): composer.value_of(word) for word in overrides if word not in composed}
    cfg = copy.deepcopy(original.config)
    cfg |= {"sweep": None, "resume": None, "retry": False, "outputs_dir": job.cfg["outputs_dir"]}
    cfg["name"] = job.cfg["name"] or f"rerun of {original.name.removeprefix('rerun of ')}"
    cfg |= {group: job.cfg[group] for group in chosen}
    cfg = _with_start(cfg, original)
    for key, value in values.items():
        _set(cfg, key, _same_weights(cfg, key, value) if key in pinned_weights.KEYS else value)
    job.hydra["runtime"]["choices"] = {
        **manifest.choices(original.manifest),
        **{group: job.choices[group] for group in chosen},
    }
    job.cfg, job.unresolved = cfg, cfg
    job.overrides = [*map(str, original.manifest.get("overrides") or []), *overrides]
    job.hydra["overrides"]["task"] = job.overrides
    (_check_exact if is_exact else _check)(job)
    return job


def _with_start(cfg: dict[str, Any], original: Recorded) -> dict[str, Any]:
    """With ``lora.start`` in the original's own copy, if the run that it names is gone or has other weights now."""
    text = pinned_weights.of(cfg)
    if not text or original.folder is None or origin.is_there(text):
        return cfg
    return pinned_weights.replaced(
        cfg, pinned_weights.joined(RunDir(original.folder).start, pinned_weights.split(text)[1])
    )


def _same_weights(cfg: dict[str, Any], key: str, folder: Any) -> str:
    """The adapter or the teacher of the original in another place; its weights are checked."""
    group, _, name = key.partition(".")
    if not (text := pinned_weights.of(cfg, (group, name))):
        raise ConfigError(Fault(key, "the original run has none", "leave it out", folder))
    return pinned_weights.joined(folder, pinned_weights.split(text)[1])


def _set(cfg: dict[str, Any], key: str, value: Any) -> None:
    *above, last = key.split(".")
    node: Any = cfg
    for part in above:
        if not isinstance(node.get(part), dict):
            remedy = f"keys here: {', '.join(sorted(node))}"
            raise ConfigError(Fault(key, "no such key", remedy, value))
        node = node[part]
    node[last] = value


def _check(job: Job) -> None:
    """Check and freeze the job like any run."""
    try:
        prepare.admit([job], is_new=False)
    except ConfigError as error:
        faults = list(error.faults)
        if any(fault.key in rerun_keys.PLACES for fault in faults):
            faults.append(
                Fault("", "the files of the run are not at these paths on this machine", "set KEY=… to their path here")
            )
        elif not all(rerun_keys.group_of(fault.key) in rerun_keys.GROUPS for fault in faults):
            problem = "the current code does not accept the configuration of the run"
            faults.append(Fault("", problem, "rerun --exact uses the code of the run"))
        raise ConfigError(*faults) from error


def _check_exact(job: Job) -> None:
    """Check only where and how the job runs: other code will read the rest of the configuration."""
    manifest.keep_credentials(job.cfg)
    faults = [fault for group in rerun_keys.GROUPS for fault in check.faults_of_group(job.cfg, group)]
    if not faults:
        job.cfg = manifest.freeze(job.cfg)
        try:
            parallel.resolve(job.cfg["parallel"], getattr(prepare.launcher_of(job.cfg), "processes", 1))
        except ConfigError as error:
            faults = list(error.faults)
    if faults:
        raise ConfigError(*faults)


def _folder(job: Job) -> Path:
    """A new folder for the job.

    Raises:
        RunnerError: the folder of ``hydra.run.dir`` is not empty.
    """
    folder, _ = resume.choose(job.cfg, Path(job.folder), named=job.is_folder_named, overrides=[])
    if RunDir(folder).manifest.exists():
        problem = "contains a run already, but a rerun needs a new folder"
        raise ConfigError(Fault("hydra.run.dir", problem, "give another folder, or leave it out", folder))
    manifest.refuse_files(folder)
    return folder


def _prepared(original: Recorded, job: Job, folder: Path, argv: list[str], code: Path | None) -> RunDir:
    """Prepare the new folder. Its manifest records the original run, and the data digest that the worker checks."""
    data = original.manifest.get("data") or {}
    model = {key: value for key, value in (original.manifest.get("model") or {}).items() if key == "revision"}
    pinned = {key: data[key] for key in ("digest", "revision", "function", "sources", "evals") if key in data}
    source = {
        "of": original.mlflow_id or original.manifest.get("id"),
        "id": original.manifest.get("id"),
        "where": str(original.folder or original.where),
        "exact": code is not None,
    }
    notes: dict[str, Any] = {"rerun": source, "data": pinned, "model": model}
    kept = ("micro_batch_size", "compile", "teacher", origin.FIELD)
    notes |= {key: original.manifest[key] for key in kept if original.manifest.get(key)}
    if code:
        notes |= {key: original.manifest[key] for key in ("git", "code_sha256") if key in original.manifest}
        notes |= {"lock_sha256": provenance.lock_digest(code)}
        if manifest.signature(job.cfg) == manifest.signature(original.config):
            notes["signature"] = original.manifest.get("signature")  # as the original code computed it
    command, is_new = ["python", "-m", "runner", "rerun", *argv], not job.is_folder_named
    with files.writing(folder):
        rundir = prepare.prepared(job, folder, command, is_new=is_new, **notes)
        if code:
            if original.is_of_first:
                manifest.write_for_first(rundir)
            rundir.dirty_diff.unlink(missing_ok=True)
            if original.patch:
                write_atomic(rundir.dirty_diff, original.patch.encode("utf-8", "surrogateescape"))
    return rundir


def _keep_threads(original: Recorded, job: Job) -> None:
    """Use as many CPU threads as the original run: another number changes the rounding of sums."""
    threads = (original.manifest.get("hardware") or {}).get("threads")
    if threads and original.manifest["hardware"].get("device") == "cpu" and not job.cfg["launcher"].get("threads"):
        os.environ["OMP_NUM_THREADS"] = str(threads)
