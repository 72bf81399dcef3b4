"""One rank: from a prepared run folder to its end. It reads the folder and nothing else.

It starts or resumes, decided by what it finds: ``python -m runner.worker FOLDER`` is all a launcher has to run.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from runner import compiling, console, prepare, report, tracking
from runner.errors import Fault, Interrupted, ResumeError, RunnerError, Stopped, TrainingError
from runner.rundir import DIED, RunDir, write_atomic
from runner.secrets import redact
from runner.stop import Stop

if TYPE_CHECKING:
    from runner.build import Inputs
    from runner.checkpoint import Progress
    from runner.train import Parts

Ask = Callable[[list[str]], list[str]]
OUT_OF_MEMORY = ("outofmemory", "out of memory", "can't allocate memory", "not enough memory")
log = logging.getLogger("runner")


class Loaded(NamedTuple):
    """All that is needed to train; until it is there a run can be refused."""

    cfg: dict[str, Any]
    made: Inputs
    parts: Parts
    progress: Progress


class Clock:
    """Seconds of training, those of earlier attempts included; it stands until it is started."""

    def __init__(self, before: float) -> None:
        self._before = before
        self._since: float | None = None

    def start(self) -> None:
        self._since = time.monotonic()

    @property
    def is_started(self) -> bool:
        return self._since is not None

    def seconds(self) -> float:
        return self._before + (time.monotonic() - self._since if self._since is not None else 0.0)


def work(rundir: RunDir) -> int:
    """Bring the run in ``rundir`` to its end, or as far as it gets.

    Returns:
        the exit code: 0 completed (now or earlier), 1 failed, 2 refused, 75 preempted, 130 interrupted.
    """
    with rundir.held() as mine:
        if not mine:
            return attach(rundir)
        found = rundir.read_state().status
        if found == "completed":
            print(f"{rundir.path} is completed already: nothing to do", file=sys.stderr)
            return 0
        with console.logging_to(rundir.log), Stop() as stop:
            code = _attempt(rundir, stop)
    if code == 2 and found == "pending":
        rundir.discard()
    return code


def attach(rundir: RunDir) -> int:
    """Follow a run that another worker holds, until that worker lets go of it; returns that run's exit code."""
    print(f"{rundir.path} is being worked on (pid {rundir.read_state().pid}); following its log", file=sys.stderr)
    position = rundir.log.stat().st_size if rundir.log.exists() else 0
    while rundir.is_alive():
        time.sleep(0.5)
        if rundir.log.exists():
            with rundir.log.open() as handle:
                handle.seek(position)
                sys.stderr.write(handle.read())
                position = handle.tell()
    return {"completed": 0, "preempted": 75, "killed": 130}.get(rundir.read_state().status, 1)


def _attempt(rundir: RunDir, stop: Stop) -> int:
    """Train, and write down truthfully how it ended."""
    mirror, clock = None, Clock(rundir.read_state().seconds)
    try:
        cfg = prepare.read_config(rundir)
        mirror = tracking.start_mirror(rundir, cfg)
        with stop.at_once():
            loaded = _load(rundir, cfg)
        summary = _train(rundir, loaded, stop, clock)
        rundir.write_state(status="completed", reason="", summary=summary, seconds=clock.seconds())
        code = 0
    except (Stopped, KeyboardInterrupt) as error:
        code = _stopped(rundir, clock, error)
    except Exception as error:
        if isinstance(error, RunnerError) and error.exit_code == 2 and not clock.is_started:
            return _refused(rundir, clock, error)
        code = _failed(rundir, clock, _explained(error))
    report.ending(rundir, tracking.wait_mirror(mirror, rundir), code)
    return code


def _load(rundir: RunDir, cfg: dict[str, Any]) -> Loaded:
    from runner import build  # torch and all that, only now

    console.quiet_libraries()
    made = build.inputs(_pinned(cfg, rundir))
    _refuse_other_data(rundir, report.data_identity(cfg, made))
    parts = build.parts(cfg, made, rundir)
    report.header(cfg, made, parts, rundir)
    return Loaded(cfg, made, parts, parts.checkpoints.restore(parts.model, parts.optimizer))


def _train(rundir: RunDir, loaded: Loaded, stop: Stop, clock: Clock) -> dict[str, Any]:
    """Train from where the run stands to its end; returns the numbers of the summary."""
    from runner import models, samples, train

    cfg, made, parts, progress = loaded
    tracking.rewind(rundir, progress.step, progress.evaluated)
    rundir.update_manifest(**report.manifest(cfg, made, rundir))
    clock.start()
    _write_running(rundir, progress.step, made.total_steps)
    ask = partial(samples.generate, parts.model, made.tokenizer, max_new_tokens=made.settings.sample_tokens)
    with stop.at_once():
        answered = _samples_before(rundir, made, ask, progress.step)
    graphs = []
    with console.Display(made.total_steps) as display:

        def record(step: int, metrics: dict[str, float]) -> None:
            tracking.append(rundir, {"step": step, "time": time.time(), **metrics})
            rundir.write_state(step=step, seconds=clock.seconds())
            display.record(step, metrics)

        hooks = train.Hooks(
            record=record,
            evaluating=display.evaluating,
            saving=partial(tracking.sync_to_disk, rundir),
            check_stop=stop.check,
            warm=lambda: graphs.append(compiling.graphs()),
        )
        progress = train.train(parts, progress, hooks)
    models.save(parts.model, made.tokenizer, rundir.model)
    _samples_after(rundir, ask, answered)
    compiled = report.compiled(parts.model, sum(graphs))
    return {**report.summary(rundir, parts, progress, clock.seconds()), **compiled}


def _write_running(rundir: RunDir, step: int, total_steps: int) -> None:
    state = rundir.read_state()
    if step:
        log.info(f"resumed at step {step}/{total_steps}")
    rundir.write_state(
        status="running", attempt=state.attempt + 1, pid=os.getpid(), host=os.uname().nodename, reason="",
        step=step, total_steps=total_steps, started=state.started or time.time(),
    )  # fmt: skip


def _pinned(cfg: dict[str, Any], rundir: RunDir) -> dict[str, Any]:
    """The configuration with the commits of the Hub that the first attempt found: a branch may move meanwhile."""
    manifest = rundir.read_manifest()
    found = {group: (manifest.get(group) or {}).get("revision") for group in ("model", "data")}
    named = {group: revision for group, revision in found.items() if revision and "revision" in cfg[group]}
    return {**cfg, **{group: {**cfg[group], "revision": revision} for group, revision in named.items()}}


def _refuse_other_data(rundir: RunDir, found: dict[str, Any]) -> None:
    """A run goes on with the rows that it began with, or not at all."""
    begun = rundir.read_manifest().get("data") or {}
    if begun.get("digest", found["digest"]) != found["digest"]:
        problem = f"{found['uri']} is not what this run began with (digest {found['digest']}, then {begun['digest']})"
        raise ResumeError(Fault("data", problem, "restore the data, or start a new run with it"))
    if begun.get("function", found["function"]) != found["function"]:
        problem = "the source text of the function has changed since this run began"
        raise ResumeError(Fault("data.format.function", problem, "restore it, or start a new run with it"))


def _samples_before(rundir: RunDir, made: Inputs, ask: Ask, step: int) -> list[dict[str, str]]:
    """Answers of the untrained model; kept in the folder, so that a resumed run still has them."""
    if step and rundir.samples.exists():
        return list(json.loads(rundir.samples.read_text()))
    chosen = made.splits.samples[: made.settings.sample_prompts]
    answers = ask([sample["prompt"] for sample in chosen])
    answered = [{**sample, "before": answer} for sample, answer in zip(chosen, answers, strict=True)]
    write_atomic(rundir.samples, json.dumps(answered, indent=1, ensure_ascii=False))
    return answered


def _samples_after(rundir: RunDir, ask: Ask, answered: list[dict[str, str]]) -> None:
    answers = ask([sample["prompt"] for sample in answered])
    done = [{**sample, "after": answer} for sample, answer in zip(answered, answers, strict=True)]
    write_atomic(rundir.samples, json.dumps(done, indent=1, ensure_ascii=False))


def _refused(rundir: RunDir, clock: Clock, error: RunnerError) -> int:
    """Nothing was done: what the folder said of the run before stays true."""
    log.error(str(error), exc_info=error if os.environ.get("RUNNER_TRACEBACK") else None)
    if rundir.read_state().status == "running":  # a kill -9 that nobody has written down yet
        _note(rundir, clock, status="killed", reason=DIED)
    return 2


def _stopped(rundir: RunDir, clock: Clock, error: BaseException) -> int:
    stopped = error if isinstance(error, Stopped) else Interrupted("interrupted twice")
    steps = [int(path.name.removeprefix("step-")) for path in rundir.checkpoints.glob("step-*")]
    reason = f"{stopped}; " + (f"the state is saved at step {max(steps)}" if steps else "nothing was trained yet")
    log.info(reason, extra={"quiet": True})
    _note(rundir, clock, status=stopped.status, reason=reason)
    return stopped.exit_code


def _failed(rundir: RunDir, clock: Clock, error: Exception) -> int:
    wanted = bool(os.environ.get("RUNNER_TRACEBACK"))
    if isinstance(error, RunnerError):
        log.error(str(error), exc_info=error if wanted else None)
    else:
        log.error("".join(traceback.format_exception(error)), extra={} if wanted else {"quiet": True})
        log.error(f"{_first_line(error)}\n    → the traceback is in {rundir.log}")
    _note(rundir, clock, status="failed", reason=_first_line(error))
    return 1


def _note(rundir: RunDir, clock: Clock, *, status: str, reason: str) -> None:
    """Write down how it ended; on a full disk it stays unwritten, and the run counts as killed: it can be continued."""
    with contextlib.suppress(OSError):
        rundir.write_state(status=status, reason=redact(reason), seconds=clock.seconds())


def _explained(error: Exception) -> Exception:
    """Failures of the machine in words that help; everything else as it is."""
    text = f"{type(error).__name__}: {error}".lower()
    if isinstance(error, RunnerError):
        return error
    if isinstance(error, MemoryError) or any(words in text for words in OUT_OF_MEMORY):
        remedy = (
            "use a smaller train.per_device_batch_size or data.max_length, "
            "train.gradient_checkpointing=true, or quant=4bit"
        )
        return _told_as(f"out of memory: {error}".splitlines()[0], remedy, error)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "no space left" in text:
        remedy = "make room, then give the same command with this hydra.run.dir; or set outputs_dir elsewhere"
        return _told_as(f"no space left on the device: {error}", remedy, error)
    return error


def _told_as(problem: str, remedy: str, error: Exception) -> TrainingError:
    told = TrainingError(Fault("", problem, remedy))
    told.__cause__ = error
    return told


def _first_line(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    first = text.splitlines()[0]
    return first if isinstance(error, RunnerError) else f"{type(error).__name__}: {first}"


if __name__ == "__main__":
    sys.exit(work(RunDir(Path(sys.argv[1]).resolve())))
