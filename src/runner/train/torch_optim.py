"""Any optimizer of torch.optim by name. Its options are checked against torch's source without importing torch."""

from __future__ import annotations

import ast
import functools
import importlib.util
import operator
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.config.bind import unknown_key
from runner.config.bounds import mismatch
from runner.config.schema import NotNegative, Positive, Ratio, Text
from runner.errors import ConfigError, Fault, suggest

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from runner.train.optim import Groups

CLOSURE_OR_SPARSE = {
    "LBFGS": "it evaluates the loss several times per step, which the train loop does not support",
    "SparseAdam": "it supports only sparse gradients, which language models do not have",
    "Muon": "it supports only matrices, but models also have biases and norms",
}
"""Classes of torch.optim that cannot train a language model, and why."""


SHARDABLE = (
    "adadelta", "adagrad", "adam", "adamax", "adamw", "asgd", "nadam", "radam", "rmsprop", "rprop", "sgd",
)  # fmt: skip
"""Elementwise optimizers of torch: training a shard gives the same values as training the whole parameter."""


def torch_optimizer(
    groups: Groups,
    *,
    name: Text,
    learning_rate: Positive,
    weight_decay: NotNegative,
    loraplus_lr_ratio: Ratio = 1.0,
    **options: Any,
) -> Optimizer:
    """Any class of torch.optim by name, with its own options; same contract as the options in ``train/optim``.

    Raises:
        ConfigError: the class rejects a value.
    """
    import torch

    if "weight_decay" in _constructors()[name]:
        options["weight_decay"] = weight_decay
    values = {key: tuple(map(float, value)) if isinstance(value, list) else value for key, value in options.items()}
    try:
        return getattr(torch.optim, name)(groups, lr=learning_rate, **values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(Fault("optim", f"{name}: {error}", "correct the value")) from error


def shardable(node: Mapping[str, Any]) -> bool:
    """Whether a shard is trained as the whole parameter would be."""
    return str(node["name"]).lower() in SHARDABLE


def check_torch_optimizer(
    *, name: str, learning_rate: float, weight_decay: float, loraplus_lr_ratio: float = 1.0, **options: Any
) -> Iterator[Fault]:
    known = _constructors()
    if name not in known:
        listed = ", ".join(sorted(set(known) - set(CLOSURE_OR_SPARSE)))
        remedy = f"{suggest(name, known)} available: {listed}".strip()
        yield Fault("name", "torch.optim has no such class", remedy, name)
    elif name in CLOSURE_OR_SPARSE:
        better = "use optim=muon" if name == "Muon" else "use another class, such as AdamW or Adagrad"
        yield Fault("name", f"cannot be used here: {CLOSURE_OR_SPARSE[name]}", better, name)
    else:
        yield from _option_faults(known[name], options)
        if weight_decay and "weight_decay" not in known[name]:
            yield Fault("weight_decay", f"{name} has no weight decay", "set optim.weight_decay=0", weight_decay)


def _option_faults(annotations: dict[str, str], options: dict[str, Any]) -> Iterator[Fault]:
    for key, value in options.items():
        if key == "lr":
            yield Fault(key, "is called learning_rate here", "set optim.learning_rate", value)
        elif key not in annotations:
            yield unknown_key(
                key, set(annotations) - {"lr"} | {"learning_rate", "loraplus_lr_ratio"}, value, is_ours=False
            )
        elif problem := _mismatch(value, annotations[key]):
            yield Fault(key, problem, f"correct optim.{key}", value)


def _mismatch(value: object, annotation: str) -> str:
    # Annotations in torch's source: "float", "bool | None", "float | Tensor"; torch itself checks other types.
    plain: dict[str, Any] = {"float": float, "int": int, "bool": bool, "str": str, "None": None, "Tensor": float}
    words = [word.strip() for word in annotation.split("|")]
    if not set(words) <= set(plain):
        return ""
    allowed: Any = functools.reduce(operator.or_, (plain[word] for word in words))
    return mismatch(value, allowed)


@functools.cache
def _constructors() -> dict[str, dict[str, str]]:
    """{optimizer class: {option: annotation}}, parsed from torch's source without importing torch."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    classes = {}
    for path in (Path(spec.origin).parent / "optim").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            bases = [getattr(base, "id", "") for base in node.bases] if isinstance(node, ast.ClassDef) else []
            if isinstance(node, ast.ClassDef) and {"Optimizer", "Adam"} & set(bases):
                classes[node.name] = _options(node)
    return {name: options or classes["Adam"] for name, options in classes.items()}


def _options(node: ast.ClassDef) -> dict[str, str]:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            arguments = [*item.args.args, *item.args.kwonlyargs]
            named = {arg.arg: ast.unparse(arg.annotation) if arg.annotation else "" for arg in arguments}
            return {name: kind for name, kind in named.items() if name not in ("self", "params")}
    return {}
