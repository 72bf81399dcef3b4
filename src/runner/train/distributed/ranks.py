"""The process group of a run: rank, world size and collectives on Python objects.

The launcher (torchrun, ``accelerate launch``, our own launchers, a Slurm task) sets the environment variables RANK,
WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT. A single process (``Alone``) neither creates a
process group nor imports ``torch.distributed``.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Protocol, TypeVar

from runner.errors import Fault, Interrupted, LaunchError, Preempted, Pruned, RunnerError, Stopped

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)
"""Timeout of the process group; must be longer than rank 0 needs to write a checkpoint."""
LAST_TENSORS_S = 0.1
"""Time for gloo's threads to release their last tensors; if Python exits earlier, they abort (seen with torch 2.15)."""
LOST = (
    "closed by peer", "reset by peer", "broken pipe", "socket closed", "remote process exited", "ncclremoteerror",
    "connection was likely closed", "timed out waiting", "application timeout",
)  # fmt: skip
"""Parts of the error messages of gloo, NCCL and the store when another rank has died, in lower case."""


class Ranks(Protocol):
    """This process and its collectives with the other ranks."""

    @property
    def rank(self) -> int:
        """Global rank, from 0."""

    @property
    def world(self) -> int:
        """Number of ranks."""

    def join(self) -> None:
        """Create the process group; no-op if it exists."""

    def leave(self) -> None:
        """Barrier, then destroy the process group."""

    def agree(self, check_stop: Callable[[], None], *numbers: float) -> list[float]:
        """All-reduce: each of ``numbers`` summed over all ranks, in one small message.

        Raises:
            Stopped: on all ranks, if ``check_stop`` raised it on any of them.
        """

    def largest(self, numbers: dict[str, float]) -> dict[str, float]:
        """All-reduce: the maximum over all ranks, by name."""

    def gather(self, one: T) -> list[T]:
        """All-gather: one object of every rank, ordered by rank."""

    def broadcast(self, one: T) -> T:
        """The object of rank 0, on every rank."""


@dataclass(frozen=True)
class Alone:
    """A run with a single process."""

    rank: int = 0
    world: int = 1

    def join(self) -> None:
        pass

    def leave(self) -> None:
        pass

    def agree(self, check_stop: Callable[[], None], *numbers: float) -> list[float]:
        check_stop()
        return list(numbers)

    def largest(self, numbers: dict[str, float]) -> dict[str, float]:
        return numbers

    def gather(self, one: T) -> list[T]:
        return [one]

    def broadcast(self, one: T) -> T:
        return one


ALONE: Ranks = Alone()


@dataclass(frozen=True)
class ProcessGroup:
    """One of several processes. Python objects and numbers use gloo on the CPU, gradients on GPUs use NCCL."""

    rank: int
    world: int
    local_rank: int
    """Rank among the processes on this machine."""
    local_world: int

    def join(self) -> None:
        import torch
        from torch import distributed

        if distributed.is_initialized():
            return
        on_gpus = torch.cuda.is_available()
        distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=PATIENCE)
        if on_gpus:
            torch.cuda.set_device(unanimous(self, lambda: self._device(torch.cuda.device_count())))
            self._refuse_shared_device()

    def leave(self) -> None:
        from torch import distributed

        if distributed.is_initialized():
            with contextlib.suppress(RuntimeError):  # another rank left without the barrier
                self.gather(None)
            time.sleep(LAST_TENSORS_S)
            distributed.destroy_process_group()

    def agree(self, check_stop: Callable[[], None], *numbers: float) -> list[float]:
        stopped = _stopped(check_stop)
        votes = [float(isinstance(stopped, kind)) for kind in (Preempted, Interrupted, Pruned)]
        preempted, interrupted, pruned, *sums = self._reduced([*votes, *numbers], "SUM")
        if interrupted:
            raise stopped if isinstance(stopped, Interrupted) else Interrupted("interrupted")
        if preempted:
            raise stopped if isinstance(stopped, Preempted) else Preempted("stopped by SIGTERM")
        if pruned:
            raise stopped or Pruned("pruned")
        return sums

    def largest(self, numbers: dict[str, float]) -> dict[str, float]:
        return dict(zip(numbers, self._reduced(list(numbers.values()), "MAX"), strict=True))

    def gather(self, one: T) -> list[T]:
        from torch import distributed

        objects: list[Any] = [None] * self.world
        distributed.all_gather_object(objects, one)
        return objects

    def broadcast(self, one: T) -> T:
        import torch
        from torch import distributed

        objects: list[Any] = [one]
        distributed.broadcast_object_list(objects, src=0, device=torch.device("cpu"))
        return objects[0]  # type: ignore[no-any-return]

    def _reduced(self, numbers: Sequence[float], how: str) -> list[float]:
        import torch
        from torch import distributed

        values = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(values, op=getattr(distributed.ReduceOp, how))
        return [float(value) for value in values]

    def _device(self, count: int) -> int:
        """The GPU index of this rank; 0 if the launcher makes only one GPU visible to each process."""
        if count == 1:
            return 0
        if self.local_rank >= count:
            problem = f"{self.local_world} processes run on this machine, but only {count} GPUs are visible"
            raise LaunchError(Fault("", problem, f"start {count} processes per machine"))
        return self.local_rank

    def _refuse_shared_device(self) -> None:
        """NCCL does not support two ranks on one GPU; its own error comes much later and is unclear."""
        import torch

        own = torch.cuda.get_device_properties(torch.cuda.current_device())
        devices = self.gather((socket.gethostname(), str(getattr(own, "uuid", self.local_rank))))
        if len(set(devices)) < self.world:
            problem = f"{self.world} processes share {len(set(devices))} GPUs, which NCCL does not support"
            raise LaunchError(Fault("", problem, "start one process per GPU"))


def of_environment() -> Ranks:
    """The rank of this process, from the environment variables of the launcher."""
    world = _number("WORLD_SIZE", 1)
    if world <= 1 or "RANK" not in os.environ:
        return ALONE
    rank = _number("RANK", 0)
    return ProcessGroup(rank, world, _number("LOCAL_RANK", rank), _number("LOCAL_WORLD_SIZE", world))


def under_torchrun() -> bool:
    """Whether a launcher such as torchrun or ``accelerate launch`` started this process as one of several."""
    return of_environment().world > 1


def unanimous(ranks: Ranks, do: Callable[[], T]) -> T:
    """Return ``do()``; if it raises a RunnerError on any rank, raise it on all ranks.

    Raises:
        RunnerError: this rank's own error, or the first error of another rank with ``rank N:`` in front.
    """
    refusal, result = None, None
    try:
        result = do()
    except RunnerError as error:
        refusal = error
    refusals = ranks.gather(refusal)
    if refusal is not None:
        raise refusal
    for rank, other in enumerate(refusals):
        if other is not None:
            raise type(other)(*(replace(fault, problem=f"rank {rank}: {fault.problem}") for fault in other.faults))
    return result  # type: ignore[return-value]


def lost_peer(error: BaseException) -> bool:
    """Whether the error means that another rank has died."""
    text = f"{type(error).__name__}: {error}".lower()
    is_torch = isinstance(error, RuntimeError | OSError) or "Dist" in type(error).__name__
    return is_torch and not isinstance(error, RunnerError) and any(words in text for words in LOST)


@contextlib.contextmanager
def silent(path: str | os.PathLike[str]) -> Iterator[None]:
    """While the block runs, append stdout and stderr of this process, C libraries included, to a file."""
    saved = [os.dup(number) for number in (1, 2)]
    with open(path, "ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, original in zip((1, 2), saved, strict=True):
            os.dup2(original, number)
            os.close(original)


def _stopped(check_stop: Callable[[], None]) -> Stopped | None:
    try:
        check_stop()
    except Stopped as stopped:
        return stopped
    return None


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else default
