"""Repairs of bitsandbytes' optimizers on GPUs: they wait for the GPU too often, and lose paging when resumed."""

from __future__ import annotations

import functools
from typing import Any

PAGED_FROM = 100_000
"""bitsandbytes pages states of at least so many values."""


def repaired(optimizer: Any) -> Any:
    """The optimizer, which waits for the GPU once a step if its state is paged, else never.

    bitsandbytes waits after each parameter (``torch.cuda.synchronize``), so that Python could not run ahead. Its
    kernels run on the stream of the training; only paged states are also read by the CPU.
    """
    import bitsandbytes.optim.optimizer as library

    wait = getattr(library.sync_gpu, "original", library.sync_gpu)
    library.sync_gpu = _no_wait(wait)
    if optimizer.is_paged:
        optimizer.step = _waiting(optimizer, wait)
        optimizer.load_state_dict = _paging(optimizer)
    return optimizer


def _no_wait(original: Any) -> Any:
    def sync_gpu(_: Any) -> None:
        pass

    sync_gpu.original = original  # type: ignore[attr-defined]
    return sync_gpu


def _waiting(optimizer: Any, wait: Any) -> Any:
    step = optimizer.step

    @functools.wraps(step)
    def step_and_wait(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        wait(optimizer.param_groups[0]["params"][0])
        return result

    return step_and_wait


def _paging(optimizer: Any) -> Any:
    load = optimizer.load_state_dict

    @functools.wraps(load)
    def load_into_pages(*args: Any, **kwargs: Any) -> None:
        """Load, then move the large states into pages: a loaded tensor is in GPU memory, as if it were not paged."""
        load(*args, **kwargs)
        for parameter, state in optimizer.state.items():
            for name in ("state1", "state2"):
                loaded = state.get(name)
                if loaded is not None and parameter.numel() >= PAGED_FROM:
                    state[name] = optimizer.get_state_buffer(parameter, dtype=loaded.dtype)
                    state[name].copy_(loaded)

    return load_into_pages
