"""One rank: from a prepared run folder to its end. It reads the folder and nothing else.

It starts or resumes, decided by what it finds: ``python -m runner.worker FOLDER`` is all a launcher has to run.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner import console, prepare, report, tracking
from runner.errors import ConfigError, DataError, Fault, Interrupted, Preempted, RunnerError, Stopped, TrainingError
from runner.rundir import RunDir, write_atomic
from runner.stop import Stop

if TYPE_CHECKING:
    from runner.build import Inputs

Ask = Callable[[list[str]], list[str]]
log = logging.getLogger("runner")


def work(rundir: RunDir) -> int:
    """Bring the run in ``rundir`` to its end, or as far as it gets.

    Returns:
        the exit code: 0 completed (now or earlier), 1 failed, 2 refused, 75 preempted, 130 interrupted.
    """
    with rundir.held() as mine:
        if not mine:
            return attach(rundir)
        state = rundir.read_state()
        if state.status == "completed":
            print(f"{rundir.path} is completed already: nothing to do", file=sys.stderr)
            return 0
        fresh = state.attempt == 0
        with console.logging_to(rundir.log), Stop() as stop:
            code = _attempt(rundir, stop)
    if code == 2 and fresh:
        discard(rundir)
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


def discard(rundir: RunDir) -> None:
    """Remove the folder of a run that was refused before it started, and the date's folder if that is now empty."""
    shutil.rmtree(rundir.path, ignore_errors=True)
    for parent in list(rundir.path.parents)[:2]:
        try:
            parent.rmdir()
        except OSError:
            return


def _attempt(rundir: RunDir, stop: Stop) -> int:
    """Train, and write down truthfully how it ended."""
    mirror = None
    try:
        cfg = prepare.read_config(rundir)
        mirror = tracking.start_mirror(rundir, cfg)
        summary = _train(rundir, cfg, stop)
        rundir.write_state(status="completed", reason="", summary=summary)
        code = 0
    except (ConfigError, DataError) as error:
        if rundir.read_state().status != "running":
            return _refused(rundir, error)
        code = _failed(rundir, error)
    except Preempted as error:
        code = _stopped(rundir, "preempted", error)
    except (Interrupted, KeyboardInterrupt) as error:
        code = _stopped(rundir, "killed", error)
    except Exception as error:
        code = _failed(rundir, _explained(error))
    report.ending(rundir, tracking.wait_mirror(mirror, rundir), code)
    return code


def _train(rundir: RunDir, cfg: dict[str, Any], stop: Stop) -> dict[str, Any]:
    from runner import build, models, samples, train  # torch and all that, only now

    console.quiet_libraries()
    made = build.inputs(_pinned(cfg, rundir))
    parts = build.parts(cfg, made, rundir)
    report.header(cfg, made, parts, rundir)
    progress = parts.checkpoints.restore(parts.model, parts.optimizer)
    tracking.rewind(rundir, progress.step, progress.evaluated)
    state = rundir.read_state()
    if progress.step:
        log.info(f"resumed at step {progress.step}/{made.total_steps}")
    rundir.update_manifest(**report.manifest(cfg, made, rundir))
    started = state.started or time.time()
    rundir.write_state(
        status="running", attempt=state.attempt + 1, pid=os.getpid(), host=os.uname().nodename, reason="",
        step=progress.step, total_steps=made.total_steps, started=started,
    )  # fmt: skip

    stop.defer()
    ask = partial(samples.generate, parts.model, made.tokenizer, max_new_tokens=made.settings.sample_tokens)
    answered = _samples_before(rundir, made, ask, progress.step)
    with console.Display(made.total_steps) as display:

        def record(step: int, metrics: dict[str, float]) -> None:
            tracking.append(rundir, {"step": step, "time": time.time(), **metrics})
            rundir.write_state(step=step)
            display.record(step, metrics)

        hooks = train.Hooks(record, display.evaluating, partial(tracking.sync_to_disk, rundir), stop.check)
        progress = train.train(parts, progress, hooks)
    models.save(parts.model, made.tokenizer, rundir.model)
    _samples_after(rundir, ask, answered)
    return report.summary(rundir, parts, progress, time.time() - started)


def _pinned(cfg: dict[str, Any], rundir: RunDir) -> dict[str, Any]:
    """The configuration with the commit of the Hub model that the first attempt found: a branch may move meanwhile."""
    found = rundir.read_manifest().get("model", {}).get("revision")
    return {**cfg, "model": {**cfg["model"], "revision": found}} if found and "revision" in cfg["model"] else cfg


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


def _refused(rundir: RunDir, error: RunnerError) -> int:
    log.error(str(error), exc_info=bool(os.environ.get("RUNNER_TRACEBACK")))
    if rundir.read_state().attempt:
        rundir.write_state(status="failed", reason=_first_line(error))
    return 2


def _stopped(rundir: RunDir, status: str, error: BaseException) -> int:
    saved = isinstance(error, Stopped)
    reason = _first_line(error) if saved else "interrupted twice; the last checkpoint holds"
    rundir.write_state(status=status, reason=reason)
    return 75 if status == "preempted" else 130


def _failed(rundir: RunDir, error: BaseException) -> int:
    rundir.write_state(status="failed", reason=_first_line(error))
    if isinstance(error, RunnerError):
        log.error(str(error), exc_info=bool(os.environ.get("RUNNER_TRACEBACK")))
    else:
        log.error("".join(traceback.format_exception(error)), extra={"quiet": True})
        if os.environ.get("RUNNER_TRACEBACK"):
            traceback.print_exception(error)
        log.error(f"{_first_line(error)}\n    → the traceback is in {rundir.log}")
    return 1


def _explained(error: Exception) -> Exception:
    """Failures of the machine in words that help; everything else as it is."""
    text = f"{type(error).__name__}: {error}"
    if "OutOfMemory" in text or "out of memory" in text or "can't allocate memory" in text:
        remedy = (
            "use a smaller train.per_device_batch_size or data.max_length, "
            "train.gradient_checkpointing=true, or quant=4bit"
        )
        return TrainingError(Fault("", f"out of memory: {error}".splitlines()[0], remedy))
    if isinstance(error, OSError) and error.errno == 28:
        return TrainingError(
            Fault("", f"no space left on the device: {error}", "make room, or set outputs_dir elsewhere")
        )
    return error


def _first_line(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    first = text.splitlines()[0]
    return first if isinstance(error, RunnerError) else f"{type(error).__name__}: {first}"


if __name__ == "__main__":
    sys.exit(work(RunDir(Path(sys.argv[1]).resolve())))
