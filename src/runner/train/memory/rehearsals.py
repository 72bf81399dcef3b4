"""Remember what simulated training steps need, so that a step is simulated once and not again by every worker."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from runner.files import cache_dir, write_atomic
from runner.tracking import provenance


def remembered(step: Mapping[str, Any], rehearse: Callable[[], int]) -> int:
    """The bytes that ``rehearse`` returns, from the cache if the same code has simulated the same step before.

    ``step``: everything that the result depends on beside code, libraries and device. Exceptions are not cached.
    """
    cuda = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    key = {
        **step,
        "code": provenance.code_digest(),
        "versions": provenance.versions(),
        "device": f"{cuda.name} {cuda.major}.{cuda.minor}" if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    text = json.dumps(key, sort_keys=True, default=str)
    file = cache_dir("rehearsals") / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not there yet, or damaged
        return int(json.loads(file.read_text())["bytes"])
    size = rehearse()
    with contextlib.suppress(OSError):  # a full disk: the next worker simulates the step again
        write_atomic(file, json.dumps({"bytes": size}))
    return size
