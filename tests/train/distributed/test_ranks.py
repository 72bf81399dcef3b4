"""Ranks agree, over real gloo between two processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fixtures.mirrored_runs import _free_port, fork

from runner.errors import DataError, Fault, Interrupted, LaunchError, Preempted
from runner.train.distributed import ranks


def both(do: Callable[[ranks.Ranks], None]) -> None:
    """Run ``do`` on two ranks, each a process of its own."""
    port = str(_free_port())

    def work(rank: int) -> None:
        os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        own = ranks.of_environment()
        own.join()
        do(own)
        own.leave()

    children = [fork(lambda rank=rank: work(rank)) for rank in range(2)]  # type: ignore[misc]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]


def raising(error: Exception) -> Any:
    def do() -> None:
        raise error

    return do


@pytest.mark.unmeasured
def test_numbers_and_objects_of_two_ranks():
    def do(own: ranks.Ranks) -> None:
        assert own.agree(lambda: None, own.rank + 1.0, 10.0) == [3.0, 20.0]
        assert own.largest({"memory": 5.0 - own.rank}) == {"memory": 5.0}
        assert own.gather({"rank": own.rank}) == [{"rank": 0}, {"rank": 1}]
        assert own.broadcast(f"from {own.rank}") == "from 0"

    both(do)


@pytest.mark.unmeasured
def test_a_stop_on_one_rank_stops_both_and_an_interrupt_counts_most():
    def do(own: ranks.Ranks) -> None:
        with pytest.raises(Preempted):
            own.agree(raising(Preempted("stopped by SIGTERM")) if own.rank else lambda: None)
        with pytest.raises(Interrupted):
            own.agree(raising(Interrupted("interrupted") if own.rank else Preempted("stopped by SIGTERM")))

    both(do)


@pytest.mark.unmeasured
def test_an_error_of_one_rank_is_raised_on_both():
    def do(own: ranks.Ranks) -> None:
        refuse = raising(DataError(Fault("data.path", "no such file")))
        with pytest.raises(DataError) as caught:
            ranks.unanimous(own, refuse if own.rank else lambda: None)
        assert str(caught.value) == f"data.path: {'' if own.rank else 'rank 1: '}no such file"

    both(do)


def test_the_rank_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert ranks.of_environment() is ranks.ALONE
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert not ranks.under_torchrun(), "without a rank"
    monkeypatch.setenv("RANK", "3")
    assert ranks.of_environment() == ranks.ProcessGroup(3, 4, 3, 4)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert ranks.of_environment() == ranks.ProcessGroup(3, 4, 1, 2)


def test_more_processes_than_gpus_are_refused():
    third = ranks.ProcessGroup(2, 3, 2, 3)
    assert (third._device(4), third._device(1)) == (2, 0)
    with pytest.raises(LaunchError, match="3 processes run on this machine, but only 2 GPUs are visible"):
        third._device(2)


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:4"), True),
        (ConnectionResetError("Connection reset by peer"), True),
        (RuntimeError("CUDA out of memory"), False),
        (ValueError("broken pipe"), False),
        (DataError(Fault("data", "connection reset by peer")), False),
    ],
)
def test_the_death_of_another_rank_is_known_by_the_words_of_gloo(error: Exception, is_lost: bool):
    assert ranks.lost_peer(error) is is_lost


def test_a_rank_can_be_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    with ranks.silent(tmp_path / "log"):
        os.write(1, b"one\n")
        os.write(2, b"two\n")
    os.write(1, b"three\n")
    assert ((tmp_path / "log").read_text(), capfd.readouterr()) == ("one\ntwo\n", ("three\n", ""))
