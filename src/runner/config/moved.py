"""Where the options of version 0.1.0 are today: configurations that it froze name its modules.

A signature is computed from the names of 0.1.0, so that moving a module makes no run another run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

MOVED = {
    "runner.compiling": "runner.models.kernels.compilation",
    "runner.formats": "runner.data.formats",
    "runner.launch.elastic": "runner.launch.local.accelerate",
    "runner.launch.local": "runner.launch.local.launcher",
    "runner.launch.slurm": "runner.launch.slurm.launcher",
    "runner.lora": "runner.models.lora",
    "runner.optim": "runner.train.optim",
    "runner.origins": "runner.models.sources",
    "runner.parallel": "runner.train.distributed.parallel",
    "runner.schedules": "runner.train.schedules",
    "runner.search": "runner.sweep.algorithms",
    "runner.sources": "runner.data.sources",
    "runner.torch_optim": "runner.train.torch_optim",
    "runner.tracking": "runner.tracking.trackers",
}
"""Module of 0.1.0 → module of today."""
MOVED_FUNCTIONS = {
    "runner.quant.four_bit": "runner.models.quantization.bitsandbytes.four_bit",
    "runner.quant.int8": "runner.models.quantization.bitsandbytes.int8",
    "runner.quant.none": "runner.models.quantization.none.none",
    "runner.tasks.sft": "runner.tasks.sft.sft",
    "runner.tasks.pretrain": "runner.tasks.pretrain.pretrain",
}

_MOVED_BACK = {new: old for old, new in MOVED.items()}
_FUNCTIONS_MOVED_BACK = {new: old for old, new in MOVED_FUNCTIONS.items()}


def to_today(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with each ``_target_`` of 0.1.0 replaced by the name that it has today."""
    return _with_targets(config, target_today)


def to_first(config: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``to_today``; the targets of options that came later stay as they are."""
    return _with_targets(config, lambda target: _replaced(target, _FUNCTIONS_MOVED_BACK, _MOVED_BACK))


def target_today(target: str) -> str:
    """One ``_target_``, as in ``to_today``."""
    return _replaced(target, MOVED_FUNCTIONS, MOVED)


def is_of_first(config: Mapping[str, Any]) -> bool:
    """Whether version 0.1.0 froze this configuration."""
    return to_today(config) != config


def _replaced(target: str, functions: Mapping[str, str], modules: Mapping[str, str]) -> str:
    module, _, function = target.rpartition(".")
    return functions.get(target) or (f"{modules[module]}.{function}" if module in modules else target)


def _with_targets(node: Any, replaced: Callable[[str], str]) -> Any:
    if not isinstance(node, Mapping):
        return node
    return {
        key: replaced(value) if key == "_target_" and isinstance(value, str) else _with_targets(value, replaced)
        for key, value in node.items()
    }
