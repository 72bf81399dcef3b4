"""A sweep on this machine: real processes, killed and stopped for real."""

from __future__ import annotations

import fcntl
import math
import os
import pty
import re
import select
import signal
import sys
import time
from pathlib import Path

import gate
import pytest
from conftest import TINY, prepared, until
from fixtures.queued_sweeps import SERVER, ended, noted, played_sweep, queue

from runner.tracking import metrics_log
from runner.tracking.sweepdir import SweepDir


def tiny_sweep(folder: Path, *jobs: str) -> SweepDir:
    """A sweep of real runs, each with some overrides of its own."""
    sweep = SweepDir(folder)
    for number, overrides in enumerate(jobs):
        rundir = prepared(folder / f"{number:03d}", *TINY, "train.max_steps=3", *overrides.split())
        rundir.update_manifest(label=overrides)
    return noted(sweep, list(jobs))


def statuses(sweep: SweepDir) -> list[str]:
    return [rundir.read_state().status for rundir in sweep.rundirs()]


def attempts(sweep: SweepDir) -> list[int]:
    return [rundir.read_state().attempt for rundir in sweep.rundirs()]


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.slow
def test_a_failed_run_stops_no_other_and_what_is_completed_is_not_started_again(tmp_path: Path, cache: Path):
    jobs = ["seed=0", "seed=1", "optim.learning_rate=1e30", "seed=3", "seed=4", "seed=5"]
    sweep = tiny_sweep(tmp_path / "sweep", *jobs)
    codes, said = ended(queue(sweep, parallel=2))
    assert codes == [0, 0, 1, 0, 0, 0]
    assert statuses(sweep) == ["completed"] * 2 + ["failed"] + ["completed"] * 3
    failed = sweep.rundirs()[2].read_state()
    assert "the loss is" in failed.reason
    assert f"[3/6] {jobs[2]}: failed" in said
    assert failed.reason in said
    assert said.count("started") == 6
    assert said.count(": completed after") == 5
    assert "held-out loss" not in said, "what a run says goes into its folder"
    assert "held-out loss" in sweep.rundirs()[0].terminal_log.read_text()
    before = {path: path.stat().st_mtime_ns for path in sweep.rundirs()[0].path.rglob("*")}
    failed_again, said = ended(queue(sweep, parallel=2))
    assert failed_again == codes, "a failed run that is handed over is to be tried again"
    assert said.count("already completed") == 5
    assert said.count("started") == 1
    assert {path: path.stat().st_mtime_ns for path in sweep.rundirs()[0].path.rglob("*")} == before


@pytest.mark.slow
def test_a_killed_run_is_named_and_taken_up_where_it_was(tmp_path: Path, cache: Path):
    sweep = tiny_sweep(tmp_path / "sweep", "train.save_steps=1", "seed=1", "seed=2")
    process, victim = queue(sweep, parallel=1, how="held"), sweep.rundirs()[0]
    for rundir in sweep.rundirs()[1:]:
        gate.let_go(rundir)
    until(lambda: gate.has_come(victim))
    until(lambda: victim.saved_step() == 2)
    os.kill(victim.read_state().pid, signal.SIGKILL)
    codes, said = ended(process)
    assert codes == [1, 0, 0]
    state = victim.read_state()
    assert (state.status, state.reason) == ("killed", "killed by SIGKILL")
    assert re.search(r"\[1/3\] train.save_steps=1: killed after .*: killed by SIGKILL\n", said)
    again, _ = ended(queue(sweep, parallel=2))
    assert again == [0, 0, 0]
    assert attempts(sweep) == [2, 1, 1]
    assert [r["step"] for r in metrics_log.read(victim) if "train/loss" in r] == [1, 2, 3]
    assert "resumed at step 2/3" in victim.log.read_text()


@pytest.mark.slow
def test_sigterm_lets_the_runs_save_and_starts_no_other(tmp_path: Path, cache: Path):
    sweep = tiny_sweep(tmp_path / "sweep", "seed=0", "seed=1", "seed=2")
    process = queue(sweep, parallel=2, how="held")
    until(lambda: all(map(gate.has_come, sweep.rundirs()[:2])))
    process.send_signal(signal.SIGTERM)
    codes, said = ended(process)
    assert codes == [75, 75, 75]
    assert statuses(sweep) == ["preempted", "preempted", "pending"]
    for rundir in sweep.rundirs()[:2]:
        assert rundir.read_state().step == 2
        assert (rundir.checkpoints / "step-000002").is_dir()
    assert said.count("the state is saved at step 2") == 2


@pytest.mark.slow
def test_the_runs_outlive_a_queue_that_is_killed(tmp_path: Path, cache: Path):
    sweep = tiny_sweep(tmp_path / "sweep", "seed=0", "seed=1")
    process, rundir = queue(sweep, parallel=1, how="held"), sweep.rundirs()[0]
    until(lambda: gate.has_come(rundir))
    process.kill()
    process.wait()
    assert process.stderr
    assert process.stdout
    process.stderr.close()
    process.stdout.close()
    with sweep.queue_lock.open() as handle, pytest.raises(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its mirror has to see that somebody works here
    another = queue(sweep, parallel=1)
    assert another.stderr
    assert another.stderr.readline().startswith("[1/2] seed=0: another process (pid ")
    gate.let_go(rundir)
    assert ended(another)[0] == [0, 0]
    assert attempts(sweep) == [1, 1]


@pytest.mark.slow
def test_runs_of_several_processes_take_the_same_queue(tmp_path: Path, cache: Path):
    ranks = "parallel=ddp launcher=accelerate launcher.processes=2"
    sweep = tiny_sweep(tmp_path / "sweep", ranks, f"{ranks} seed=1")
    process, (first, second) = queue(sweep, parallel=1, how="ranks held"), sweep.rundirs()
    gate.let_go(second)
    until(lambda: gate.has_come(first))
    launcher = int(Path(f"/proc/{first.read_state().pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(launcher, signal.SIGKILL)  # its ranks save, and are waited for
    codes, said = ended(process)
    assert codes == [1, 0], "the queue itself was not stopped"
    assert statuses(sweep) == ["preempted", "completed"]
    assert "the state is saved at step 2" in said
    assert second.rank_log(1).exists()


@pytest.mark.slow
def test_two_queues_at_once_work_on_each_run_once(tmp_path: Path, cache: Path):
    sweep = tiny_sweep(tmp_path / "sweep", *(f"seed={n}" for n in range(5)))
    both = [queue(sweep, parallel=1) for _ in range(2)]
    assert [ended(process)[0] for process in both] == [[0] * 5] * 2
    assert attempts(sweep) == [1] * 5


def test_two_queues_wait_for_each_other_without_a_slot(tmp_path: Path):
    sweep = played_sweep(tmp_path, "sleep 3", "ok", "ok", "fail", "sleep 3")
    both = [queue(sweep, parallel=1, how="imitate") for _ in range(2)]
    for codes, said in map(ended, both):
        assert codes == [0, 0, 0, 1, 0]
        assert "completed" in said
    assert attempts(sweep) == [1] * 5


def test_the_state_has_the_true_end_of_a_process(tmp_path: Path):
    sweep = played_sweep(tmp_path, "crash", "exit 3", "ok", "fail")
    codes, said = ended(queue(sweep, parallel=2, how="imitate"))
    assert codes == [1, 1, 0, 1]
    assert statuses(sweep) == ["failed", "failed", "completed", "failed"]
    reasons = [rundir.read_state().reason for rundir in sweep.rundirs()]
    assert reasons[0] == "crashed (SIGSEGV)"
    assert "ended with exit code 3" in reasons[1]
    assert reasons[2:] == ["", "as asked"]
    assert re.search(r"\[1/4\] crash: failed after .* at step 1/2: crashed \(SIGSEGV\)\n", said)
    assert "loss 1.2500" in said
    assert "a line for the terminal" not in said


def test_a_run_that_is_cancelled_while_it_waits_is_not_started(tmp_path: Path):
    sweep = played_sweep(tmp_path, "sleep 2", "ok", "ok")
    asked_before, asked_now = sweep.rundirs()[1:]
    asked_before.cancel_request.write_text("last week")
    process = queue(sweep, parallel=1, how="imitate")
    until(lambda: statuses(sweep)[0] == "running")
    asked_now.cancel_request.write_text("cancelled by me")
    codes, said = ended(process)
    assert codes == [0, 0, 1], "the queue itself was not stopped"
    assert attempts(sweep) == [1, 1, 0]
    assert (asked_now.read_state().status, asked_now.read_state().reason) == ("killed", "cancelled by me")
    assert "[3/3] ok: cancelled" in said
    assert not asked_before.cancel_request.exists(), "a worker would honour it"


def test_a_run_that_is_ended_alone_stops_no_other(tmp_path: Path):
    sweep = played_sweep(tmp_path, "sleep 900", "ok", "fail")
    process, first = queue(sweep, parallel=1, how="imitate"), sweep.rundirs()[0]
    until(lambda: first.read_state().status == "running")
    os.kill(first.read_state().pid, signal.SIGINT)
    assert ended(process)[0] == [1, 0, 1]
    assert statuses(sweep) == ["killed", "completed", "failed"]


def test_a_run_that_cannot_be_claimed_is_worked_on_all_the_same(tmp_path: Path):
    """A full disk, for one, which the run itself may well survive."""
    sweep = played_sweep(tmp_path, "ok")
    sweep.rundirs()[0].queue_lock.mkdir()
    assert ended(queue(sweep, parallel=1, how="imitate"))[0] == [0]


def test_what_a_killed_process_leaves_behind_goes_with_it(tmp_path: Path):
    """A rank or a loader of data that stays would keep the folder and the GPU."""
    sweep = played_sweep(tmp_path, "leave")
    codes, _ = ended(queue(sweep, parallel=1, how="imitate"))
    assert codes == [1]
    state = sweep.rundirs()[0].read_state()
    assert state.reason == "killed by SIGKILL"
    assert is_gone(state.step)


def on_terminal(sweep: SweepDir, *, parallel: int) -> tuple[int, int]:
    """The queue with a terminal of its own; returns its pid and our end of the terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        for number in (signal.SIGHUP, signal.SIGINT):  # ignored under nohup, and in a shell's background
            signal.signal(number, signal.SIG_DFL)
        os.execv(sys.executable, [sys.executable, SERVER, str(parallel), str(sweep.path), "imitate"])
    return pid, terminal


def read_all(terminal: int, seconds: float = math.inf) -> str:
    shown, until = b"", time.monotonic() + seconds
    while time.monotonic() < until:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                shown += os.read(terminal, 65536)
            except OSError:  # its last process has gone
                break
    return shown.decode(errors="replace")


@pytest.mark.unmeasured
def test_a_terminal_shows_a_table_and_nothing_else(tmp_path: Path):
    sweep = played_sweep(tmp_path, "sleep 1", "fail", "ok")
    pid, terminal = on_terminal(sweep, parallel=1)
    shown = read_all(terminal)
    os.close(terminal)
    os.waitpid(pid, 0)
    for words in ("sleep 1", "running", "1/2", "waiting", "0/3 done", "failed: as asked", "0 1 0"):
        assert words in shown, words
    assert "a line for the terminal" not in shown


@pytest.mark.unmeasured
def test_ctrl_c_lets_the_runs_save_and_starts_no_other(tmp_path: Path):
    sweep = played_sweep(tmp_path, "sleep 900", "ok")
    pid, terminal = on_terminal(sweep, parallel=1)
    until(lambda: statuses(sweep)[0] == "running")
    os.write(terminal, b"\x03")
    shown = read_all(terminal)
    os.close(terminal)
    os.waitpid(pid, 0)
    assert "130 130" in shown
    assert statuses(sweep) == ["killed", "pending"]
    assert sweep.rundirs()[0].read_state().reason == "interrupted"


@pytest.mark.unmeasured
def test_a_second_ctrl_c_kills_and_the_states_say_so(tmp_path: Path):
    sweep = played_sweep(tmp_path, "sleep 900", "sleep 900", "ok")
    pid, terminal = on_terminal(sweep, parallel=2)
    until(lambda: statuses(sweep)[:2] == ["running"] * 2)
    children = [rundir.read_state().pid for rundir in sweep.rundirs()[:2]]
    for child in children:
        os.kill(child, signal.SIGSTOP)  # one that does not listen any more
    shown = ""

    def are_gone_after_another() -> bool:  # what comes within a moment of the first is the same Ctrl-C
        nonlocal shown
        os.write(terminal, b"\x03")
        shown += read_all(terminal, 0.1)
        return all(map(is_gone, children))

    until(are_gone_after_another)
    shown += read_all(terminal)
    os.close(terminal)
    os.waitpid(pid, 0)
    assert "stopping" in shown
    assert "130 130 130" in shown
    assert statuses(sweep) == ["killed", "killed", "pending"]
    assert all("interrupted twice" in rundir.read_state().reason for rundir in sweep.rundirs()[:2])
    assert all(map(is_gone, children))


@pytest.mark.unmeasured
def test_a_closed_terminal_stops_the_queue_as_sigterm_does(tmp_path: Path):
    sweep = played_sweep(tmp_path, "sleep 900", "ok")
    pid, terminal = on_terminal(sweep, parallel=1)
    until(lambda: statuses(sweep)[0] == "running")
    child = sweep.rundirs()[0].read_state().pid
    os.close(terminal)
    os.waitpid(pid, 0)
    assert is_gone(child)
    assert statuses(sweep) == ["preempted", "pending"]
