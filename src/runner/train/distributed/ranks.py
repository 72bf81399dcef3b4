"""The processes that train one run together, and what they tell each other.

Whoever starts them (torchrun, ``accelerate launch``, our own launchers, a Slurm task) says so in the environment: RANK,
WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT. A process that is alone pays nothing: it neither
joins a group nor loads ``torch.distributed``.
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
"""How long a rank waits for the others: longer than rank 0 takes to write a checkpoint."""
LAST_TENSORS_S = 0.1
"""For gloo's own threads to let go of the last tensors: they abort if Python ends meanwhile (seen with torch 2.15)."""
LOST = (
    "closed by peer", "reset by peer", "broken pipe", "socket closed", "remote process exited", "ncclremoteerror",
    "connection was likely closed", "timed out waiting", "application timeout",
)  # fmt: skip
"""What gloo, NCCL and the store say when another rank is no more, in lower case."""


class Ranks(Protocol):
    """One of the processes of a run, as it sees itself and the others."""

    @property
    def rank(self) -> int:
        """Its number among all, from 0."""

    @property
    def world(self) -> int:
        """How many there are."""

    def join(self) -> None:
        """Meet the others; nothing happens the second time."""

    def leave(self) -> None:
        """Part from the others once all of them are here."""

    def agree(self, check_stop: Callable[[], None], *numbers: float) -> list[float]:
        """Each of ``numbers`` summed over all ranks, in one small message.

        Raises:
            Stopped: ``check_stop`` raised it on any rank; then it is raised on all of them.
        """

    def largest(self, numbers: dict[str, float]) -> dict[str, float]:
        """By name, the largest of all ranks."""

    def gather(self, one: T) -> list[T]:
        """What each rank brings, by rank."""

    def broadcast(self, one: T) -> T:
        """What rank 0 brings."""


@dataclass(frozen=True)
class Alone:
    """The only process of a run."""

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
    """One of several processes. What they tell each other goes through gloo on the CPU; gradients take NCCL on GPUs."""

    rank: int
    world: int
    local_rank: int
    """Its number among those on this machine."""
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
            with contextlib.suppress(RuntimeError):  # somebody left without waiting
                self.gather(None)
            time.sleep(LAST_TENSORS_S)
            distributed.destroy_process_group()

    def agree(self, check_stop: Callable[[], None], *numbers: float) -> list[float]:
        asked = _asked(check_stop)
        votes = [float(isinstance(asked, kind)) for kind in (Preempted, Interrupted, Pruned)]
        preempted, interrupted, pruned, *sums = self._reduced([*votes, *numbers], "SUM")
        if interrupted:
            raise asked if isinstance(asked, Interrupted) else Interrupted("interrupted")
        if preempted:
            raise asked if isinstance(asked, Preempted) else Preempted("stopped by SIGTERM")
        if pruned:
            raise asked or Pruned("given up")
        return sums

    def largest(self, numbers: dict[str, float]) -> dict[str, float]:
        return dict(zip(numbers, self._reduced(list(numbers.values()), "MAX"), strict=True))

    def gather(self, one: T) -> list[T]:
        from torch import distributed

        found: list[Any] = [None] * self.world
        distributed.all_gather_object(found, one)
        return found

    def broadcast(self, one: T) -> T:
        import torch
        from torch import distributed

        brought: list[Any] = [one]
        distributed.broadcast_object_list(brought, src=0, device=torch.device("cpu"))
        return brought[0]  # type: ignore[no-any-return]

    def _reduced(self, numbers: Sequence[float], how: str) -> list[float]:
        import torch
        from torch import distributed

        values = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(values, op=getattr(distributed.ReduceOp, how))
        return [float(value) for value in values]

    def _device(self, count: int) -> int:
        """The GPU of this rank, by number; a launcher may show each process only its own."""
        if count == 1:
            return 0
        if self.local_rank >= count:
            problem = f"{self.local_world} processes run on this machine, and it shows them {count} GPUs"
            raise LaunchError(Fault("", problem, f"start {count} processes on each machine"))
        return self.local_rank

    def _refuse_shared_device(self) -> None:
        """NCCL cannot have two ranks on one GPU, and says so in its own way, much later."""
        import torch

        own = torch.cuda.get_device_properties(torch.cuda.current_device())
        devices = self.gather((socket.gethostname(), str(getattr(own, "uuid", self.local_rank))))
        if len(set(devices)) < self.world:
            problem = f"{self.world} processes share {len(set(devices))} GPUs"
            raise LaunchError(Fault("", problem, "start one process for each GPU"))


def of_environment() -> Ranks:
    """This process, as its environment describes it."""
    world = _number("WORLD_SIZE", 1)
    if world <= 1 or "RANK" not in os.environ:
        return ALONE
    rank = _number("RANK", 0)
    return ProcessGroup(rank, world, _number("LOCAL_RANK", rank), _number("LOCAL_WORLD_SIZE", world))


def under_torchrun() -> bool:
    """Whether this process is one of several that were started alike, by torchrun or ``accelerate launch``."""
    return of_environment().world > 1


def unanimous(ranks: Ranks, do: Callable[[], T]) -> T:
    """What ``do`` gives; where it refuses on any rank, it does on all of them, with that rank's words.

    Raises:
        RunnerError: the refusal.
    """
    refusal, made = None, None
    try:
        made = do()
    except RunnerError as error:
        refusal = error
    refusals = ranks.gather(refusal)
    if refusal is not None:
        raise refusal
    for rank, other in enumerate(refusals):
        if other is not None:
            raise type(other)(*(replace(fault, problem=f"rank {rank}: {fault.problem}") for fault in other.faults))
    return made  # type: ignore[return-value]


def lost_peer(error: BaseException) -> bool:
    """Whether this says that another rank is no more."""
    text = f"{type(error).__name__}: {error}".lower()
    is_torch = isinstance(error, RuntimeError | OSError) or "Dist" in type(error).__name__
    return is_torch and not isinstance(error, RunnerError) and any(words in text for words in LOST)


@contextlib.contextmanager
def silent(path: str | os.PathLike[str]) -> Iterator[None]:
    """While the block runs, all that this process prints, libraries in C included, goes to the end of a file."""
    kept = [os.dup(number) for number in (1, 2)]
    with open(path, "ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, before in zip((1, 2), kept, strict=True):
            os.dup2(before, number)
            os.close(before)


def _asked(check_stop: Callable[[], None]) -> Stopped | None:
    try:
        check_stop()
    except Stopped as stopped:
        return stopped
    return None


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else default
