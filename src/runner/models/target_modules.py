"""Names of modules in the options of an adapter: each must match a module of the model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from runner.errors import Fault, suggest

if TYPE_CHECKING:
    from torch import nn

ALL_LINEAR = "all-linear"
"""PEFT's word for all linear layers but the head."""
KEYS = "target_modules", "modules_to_save", "exclude_modules"


def faults(model: nn.Module, options: Mapping[str, Any]) -> Iterator[Fault]:
    """The names and regular expressions in ``options`` that match no module of the model; keys as in ``KEYS``."""
    for key in KEYS:
        patterns = options.get(key)
        if not patterns or patterns == ALL_LINEAR:
            continue
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            try:
                matched = _matches(model, pattern, is_regex=isinstance(patterns, str))
            except re.error as error:
                problem = f"is not a valid regular expression: {error}"
                yield Fault(key, problem, "correct it, or use a list of module names", pattern)
                continue
            if not matched:
                yield _no_match(model, key, pattern)


def _matches(model: nn.Module, pattern: str, *, is_regex: bool) -> bool:
    """Match module names as PEFT does: a string is a regular expression for the full name, a list contains suffixes."""
    names = [name for name, _ in model.named_modules()]
    if is_regex:
        return any(re.fullmatch(pattern, name) for name in names)
    return any(name == pattern or name.endswith(f".{pattern}") for name in names)


def _no_match(model: nn.Module, key: str, pattern: str) -> Fault:
    modules = list(model.named_modules())
    linear = sorted({name.rpartition(".")[2] for name, module in modules if hasattr(module, "in_features")})
    others = {name.rpartition(".")[2] for name, _ in modules}
    near = suggest(pattern, [*linear, *sorted(others)])
    remedy = f"{near} linear modules: {', '.join(linear)}; or {ALL_LINEAR}".strip()
    return Fault(key, "matches no module of this model", remedy, pattern)
