"""The types of the keys that belong to no option: those at the top, and ``train``. Their values are in conf/.

Types of numbers and texts that several packages use are here, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import PurePath
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Len, Lt

from runner.config.bounds import Must
from runner.errors import Fault, is_control

LARGEST = 10**9
COUNTABLE = Must(lambda value: value <= LARGEST, problem=f"is larger than {LARGEST:g}")
COMPUTABLE = Must(lambda value: value == 0 or 1e-30 <= abs(value) <= 1e30, words="within 1e-30 to 1e30",
                  problem="is of a size with which float32 cannot compute")  # fmt: skip
"""float32 has no number between 0 and 1e-38, and none above 3e38."""
Count = Annotated[int, Ge(1), COUNTABLE]
Whole = Annotated[int, Ge(0), COUNTABLE]
Tokens = Annotated[int, Ge(1), Le(10**15)]
Processes = Annotated[int, Ge(1), Le(1024)]
"""Processes or threads of one machine: OpenMP crashes if it cannot start as many threads as requested."""
Seed = Annotated[int, Ge(0), Le(2**63 - 1)]
"""Seeds that torch, NumPy and Python all accept."""
Positive = Annotated[float, Gt(0), COMPUTABLE]
NotNegative = Annotated[float, Ge(0), COMPUTABLE]
Fraction = Annotated[float, Ge(0), Lt(1)]
Ratio = Annotated[float, Ge(1), COMPUTABLE]
Betas = Annotated[list[Fraction], Len(2, 2)]
Memory = Literal["speed", "balanced", "min", "offload"]
"""How many activations are kept for the backward pass: see ``models/kernels/activation_checkpointing``."""

NAME_BYTES = 255
"""The longest file name of the usual file systems."""


def _is_text(value: str) -> bool:
    return bool(value.strip()) and not any(map(is_control, value))


def _is_script(value: str) -> bool:
    return _is_text(value.replace("\n", " ").replace("\t", " "))


def _is_name(value: str) -> bool:
    return (
        value == value.strip() and "/" not in value and len(value.encode()) <= NAME_BYTES and value not in (".", "..")
    )


def _is_inside(value: str) -> bool:
    parts = PurePath(value).parts
    return not value.startswith(("/", "~")) and bool(parts) and ".." not in parts


Text = Annotated[str, Must(_is_text)]
"""Paths, names of columns and packages, …: an empty shell variable is no value."""
Script = Annotated[str, Must(_is_script)]
Name = Annotated[Text, Must(_is_name, "that can be the name of one folder (without /, not . or ..)")]
Inside = Annotated[Text, Must(_is_inside, "that leads below its folder (not absolute, without ..)")]
SweepName = Annotated[Name, Len(1, 120)]
Leaf = Text | bool | Annotated[float, Ge(-1e30), Le(1e30)] | None
Free = Leaf | list[Leaf | list[Leaf]] | dict[str, Leaf | list[Leaf]]
"""The values of keys that a library defines, and not an option."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The keys at the top of the configuration."""

    name: Annotated[Text, Len(1, 250)] | None
    seed: Seed
    outputs_dir: Text
    code: Text | Annotated[list[Text], Len(1)] | dict[str, Text] | None
    sweep: SweepName | None
    resume: Text | None
    retry: bool


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How long to train, the batch size, and when to log, evaluate and save; each key is explained in conf/train."""

    max_steps: Count | None
    num_train_epochs: Annotated[float, Ge(1e-6), Le(1e6)] | None
    max_tokens: Tokens | None
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
    sample_prompts: Whole
    sample_tokens: Count
    metrics: list[Text] = field(default_factory=list)
    metric_rows: Count = 64
    metric_tokens: Count = 128
    metric_timeout_s: Positive = 60.0
    metric_samples: Count = 1
    metric_temperature: Positive = 0.8
    metric_for_best_model: Text | None = None
    greater_is_better: bool | None = None
    early_stopping_patience: Count | None = None
    early_stopping_threshold: NotNegative = 0.0
    max_minutes: Positive | None = None
    loss_watchdog_threshold: Annotated[float, COMPUTABLE] | None = None
    loss_watchdog_patience: Count = 3
    neftune_noise_alpha: Positive | None = None
    router_aux_loss_coef: Positive | None = None
    callbacks: list[Text] = field(default_factory=list)
    layer_norms: bool = False
    profile: Count | None = None
    profile_start: Count = 5
    profile_memory: bool = False
    ema: Annotated[float, Gt(0), Lt(1)] | None = None
    swa_start: Fraction | None = None
    tf32: bool = False

    @property
    def averages(self) -> bool:
        """Whether an average of the trained weights is updated after each step."""
        return self.ema is not None or self.swa_start is not None

    @property
    def rows_at_a_time(self) -> int:
        """Rows of a forward pass; as long as ``micro_batch_size=auto`` is not settled, those of the device."""
        return self.micro_batch_size if isinstance(self.micro_batch_size, int) else self.per_device_batch_size


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The keys of ``data`` that every source has."""

    max_length: Annotated[int, Ge(8), COUNTABLE]
    packing: bool
    overlong: Literal["truncate", "drop"]
    deduplicate: bool
    eval_fraction: Fraction
    eval_rows: Count | None
    train_rows: Count | None
    where: Text | None = None
    order_by: Text | None = None
    system_prompt: Script | None = None


def divisors(count: int) -> list[int]:
    """From 1 to ``count`` itself."""
    small = [size for size in range(1, math.isqrt(count) + 1) if count % size == 0]
    return sorted({*small, *(count // size for size in small)})


def split_data(node: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The config node ``data`` as (node of DataSettings, node of the format, node of the source)."""
    names = {field.name for field in fields(DataSettings)}
    settings = {key: value for key, value in node.items() if key in names}
    source = {key: value for key, value in node.items() if key not in {*names, "format", "evals"}}
    form = node.get("format")
    return settings, dict(form) if isinstance(form, Mapping) else {}, source


def check_data(node: Mapping[str, Any], key: str = "data") -> Iterator[Fault]:
    """Faults of the settings of ``data`` together with its source, each of which is valid by itself."""
    settings, _, source = split_data(node)
    brings_rows = any(value is not None for key, value in source.items() if key.startswith("eval_"))
    if not settings["eval_fraction"] and not brings_rows:
        yield nothing_held_out("leaves nothing to evaluate on: the source brings no rows for that", 0, key)
    yield from unlimited_stream(node, "train_rows", key)


def unlimited_stream(node: Mapping[str, Any], word: str, key: str = "data") -> Iterator[Fault]:
    """The fault of a streamed source whose rows are not limited by ``word``."""
    if node.get("streaming") is True and node.get(word) is None:
        problem = "is null, and data.streaming=true reads only as many rows as it is told"
        yield Fault(f"{key}.{word}", problem, f"set it to a number, such as {key}.{word}=10000", None)


def nothing_held_out(problem: str, fraction: float, key: str = "data") -> Fault:
    remedy = f"raise {key}.eval_fraction, or name rows to evaluate on ({key}.eval_path, {key}.eval_split)"
    return Fault(f"{key}.eval_fraction", problem, remedy, fraction)


FEW_HELD_OUT = 10
"""Held-out rows below which the held-out loss depends on which rows they are."""


def few_held_out(rows: int | None) -> str:
    """A warning if few rows are held out; an empty string if they are enough, or if their number is not known."""
    if rows is None or rows >= FEW_HELD_OUT:
        return ""
    held_out = "1 row is" if rows == 1 else f"{rows} rows are"
    return f"only {held_out} held out: the held-out loss, and which run is best by it, is mostly chance"
