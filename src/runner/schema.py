"""The types of the keys that belong to no option: those at the top, and ``train``. Their values are in conf/.

Where several rooms ask for the same kind of number, it is named here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Len, Lt

Count = Annotated[int, Ge(1)]
Seed = Annotated[int, Ge(0), Le(2**63 - 1)]
"""What torch, NumPy and Python all take."""
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Memory = Literal["speed", "balanced", "min"]
"""What of a forward pass is kept for the backward pass: see ``recompute``."""
SweepName = Annotated[str, Len(1, 120)]
Fraction = Annotated[float, Ge(0), Lt(1)]


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The keys at the top of the configuration."""

    name: str | None
    seed: Seed
    outputs_dir: str
    sweep: SweepName | None
    resume: str | None
    retry: bool


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How long, how much at a time, and how often something is said or saved; the key comments are in conf/train."""

    max_steps: Count | None
    num_train_epochs: Positive | None
    max_tokens: Count | None
    per_device_batch_size: Count
    micro_batch_size: Count | Literal["auto"] | None
    gradient_accumulation_steps: Count
    max_grad_norm: Positive | None
    memory: Memory
    logging_steps: Count
    eval_steps: Count | None
    save_steps: Count | None
    save_total_limit: Count
    deterministic: bool
    sample_prompts: Annotated[int, Ge(0)]
    sample_tokens: Count

    @property
    def rows_at_a_time(self) -> int:
        """Rows of a forward pass; as long as ``micro_batch_size=auto`` is not settled, those of the device."""
        return self.micro_batch_size if isinstance(self.micro_batch_size, int) else self.per_device_batch_size
