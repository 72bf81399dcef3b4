"""What training needs: its peak memory by part, its parameters and FLOPs, and the memory of its device."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from runner.train.memory import heap

HEAP_HOLES, FEWER_HEAP_HOLES = 0.7, 0.2
"""Fragmentation of glibc's heap, as a fraction of activations and gradients. The lower value is for activations with
the settings of ``memory/heap``. Gradients are allocated while activations are freed, but rarely fit their blocks."""
ROUNDED = 0.05
"""Fraction of activations and gradients that the CUDA allocator rounds up or cannot use."""
CUBLAS_BYTES = 64 * 2**20
"""Workspace of cuBLAS."""
ROOM = 0.95
"""Fraction of the free memory that micro_batch_size=auto may use."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated peak memory of training, in bytes by part."""

    weights: int
    gradients: int
    optimizer: int
    activations: int | None
    """Everything allocated between a forward pass and the end of its backward pass, including logits; None: unknown."""
    libraries: int
    """Memory that this process uses already, plus memory that the allocator wastes."""

    @property
    def total(self) -> int:
        """The sum of the parts that are known."""
        return sum(part for part in asdict(self).values() if part is not None)

    def in_shards(self, count: int, layers: int, gathered: float = 1) -> MemoryEstimate:
        """The estimate for one of ``count`` FSDP processes: its shard, plus two unsharded layers (current and next).

        ``gathered``: bytes of a gathered weight for each byte of a shard.
        """
        return replace(
            self,
            weights=self.weights // count + int(2 * self.weights * gathered) // layers,
            gradients=self.gradients // count + self.gradients // layers,
            optimizer=self.optimizer // count,
        )


def allocator_waste(device: torch.device, activations: int, gradients: int) -> int:
    """Bytes that the allocator wastes, given the bytes of activations and gradients."""
    if device.type == "cuda":
        return int(ROUNDED * (activations + gradients)) + CUBLAS_BYTES
    return int((FEWER_HEAP_HOLES if heap.is_glibc() else HEAP_HOLES) * activations + HEAP_HOLES * gradients)


@dataclass(frozen=True)
class TeacherNeeds:
    """What the teacher of a distillation needs, in bytes."""

    weights: int
    forward: int | None
    """Activations in a forward pass of the largest batch; None: unknown."""
    outputs: int
    """Its last hidden states, and the logits that exist at the same time."""
    flops_per_token: float
    parameters: int
    stored: str


@dataclass(frozen=True)
class Expected:
    """Estimated parameters, memory and FLOPs of a training run, and the memory of its device."""

    counts: dict[str, Any]
    """Parameter counts of ``models/parameters.describe``."""
    memory: MemoryEstimate
    held_bytes: int
    """Device memory that this process uses already."""
    total_bytes: int
    """Device memory for this process, used or free."""
    free_bytes: int
    flops_per_token: float
    layers: int
    """Number of decoder layers that can be compiled one by one; 0 if none are found."""
    unknown: str = ""
    """Why the activations are unknown; empty if they are known."""
    teacher: TeacherNeeds | None = None
    share: float = 1.0
    """The tokens that are computed, as a part of all tokens, see ``Batches.computed_share``."""

    @property
    def fits(self) -> bool:
        """Whether the estimate fits into ``ROOM`` of the free memory; not if it is unknown."""
        return not self.unknown and self.memory.total - self.held_bytes <= ROOM * self.free_bytes
