"""What is trained: everything, a LoRA adapter, or any other adapter that PEFT has.

Adapters are float32 whatever the base is stored in (PEFT's default): small updates are lost in bfloat16's 8 bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from runner.config.bind import is_none, mismatch, unknown_key
from runner.config.schema import Count, Fraction, Positive
from runner.errors import ConfigError, Fault, suggest
from runner.models import adapter
from runner.models.kernels import compilation

if TYPE_CHECKING:
    from torch import nn

ALL_LINEAR = "all-linear"
Init = Literal[True, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "pissa_niter_16", "olora"]

SET_HERE = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
}  # fmt: skip
"""Fields of PEFT's configurations that follow from the run."""

UNSUITED = {
    "adalora": "its ranks are re-allocated by a call after every step, which this loop does not make: use lora=lora",
    "xlora": "it mixes adapters trained before",
    "poly": "it needs a task id with every row",
    "shadow": "its auxiliary loss is computed inside PEFT, from labels that this loop does not pass",
}
"""PEFT methods that would run and not do what they promise, and why."""

UNSUITED_FIELDS = {"alora_invocation_tokens", "use_asa", "megatron_core"}
"""Fields that, like all whose names end in _config, need more than rows and a loop: calls, objects, files."""

DATA_INITS = ("eva", "corda", "loftq", "lora_ga")

ON_QUANTIZED = (
    "beft", "hira", "ia3", "lily", "ln_tuning", "lora", "miss", "oft", "pvera", "randlora", "road", "trainable_tokens",
    "vera",
)  # fmt: skip
"""Methods that compute right on 4-bit and 8-bit weights (tested); others crash, or take packed bytes for weights."""


def none(model: nn.Module) -> nn.Module:
    """Full fine-tuning: every parameter trains.

    Raises:
        ConfigError: quantized weights, which cannot.
    """
    if _is_quantized(model):
        remedy = "train an adapter on them (lora=lora), or load them whole (quant=none)"
        raise ConfigError(Fault("lora", "full fine-tuning cannot train quantized weights", remedy, "none"))
    return model.requires_grad_(True)


def lora(
    model: nn.Module,
    *,
    r: Count,
    lora_alpha: Positive,
    lora_dropout: Fraction,
    target_modules: str | list[str],
    modules_to_save: list[str] | None,
    bias: Literal["none", "all", "lora_only"],
    use_dora: bool,
    use_rslora: bool,
    init_lora_weights: Init,
) -> nn.Module:
    """LoRA (https://arxiv.org/abs/2106.09685) and its kin: DoRA (2402.09353), rsLoRA (2312.03732), PiSSA (2404.02948).

    Raises:
        ConfigError: modules that do not exist, or an option that cannot take effect on this model.
    """
    options = {
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "target_modules": target_modules,
        "modules_to_save": modules_to_save,
        "bias": bias,
        "use_dora": use_dora,
        "use_rslora": use_rslora,
        "init_lora_weights": init_lora_weights,
    }
    return peft(model, method="lora", **options)


def peft(model: nn.Module, *, method: str, **options: Any) -> nn.Module:
    """An adapter by any method of PEFT, by its name there; ``options`` are the fields of that method's configuration.

    Raises:
        ConfigError: what ``check_peft`` finds, modules that do not exist, or PEFT's own refusal of this model.
    """
    with compilation.deferred():
        from peft import get_peft_model

    _refuse(check_peft(method=method, **options))
    _refuse(_model_faults(model, method, options))
    config = _config_class(method)(task_type="CAUSAL_LM", **options)
    meta = any(parameter.is_meta for parameter in model.parameters())
    cut = not meta and adapter.is_cut_from_base(options.get("init_lora_weights"))
    if meta and "init_lora_weights" in options:
        config.init_lora_weights = True  # the others compute with the weights
    revision = getattr(model.config, "_commit_hash", None)
    try:
        with adapter.same_cut_each_time() if cut else contextlib.nullcontext():
            adapted = get_peft_model(model, config, revision=revision, low_cpu_mem_usage=meta)
    except (ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError, KeyError, ImportError) as error:
        raise ConfigError(_refusal(method, error)) from error
    _refuse(_effect_faults(adapted, options))
    if cut:
        adapter.keep_start(adapted)
    return adapted


def check_lora(*, init_lora_weights: Init, r: int, **_: Any) -> Iterator[Fault]:
    if init_lora_weights == "orthogonal" and r % 2:
        yield Fault("r", "must be even for orthogonal initial weights", f"set it to {r + 1}", r)


def check_peft(*, method: str, **options: Any) -> Iterator[Fault]:
    """Faults of a method and of its options, against PEFT's own configuration class: this imports PEFT."""
    known = methods()
    name = method.lower()
    if name in UNSUITED or (name in _all_methods() and name not in known):
        reason = UNSUITED.get(name, "it prepends virtual tokens, which shift positions and labels of packed rows")
        yield Fault("method", f"is not offered: {reason}", f"use one of {', '.join(known)}", method)
        return
    if name not in known:
        remedy = f"{suggest(name, known)} methods: {', '.join(known)}".strip()
        yield Fault("method", "PEFT has no such method", remedy, method)
        return
    faults = list(_option_faults(name, options))
    yield from faults
    if not faults:
        yield from _construction_faults(name, options)


def check_combination(cfg: Mapping[str, Any]) -> Iterator[Fault]:
    """Faults of ``lora`` together with ``quant``."""
    if is_none(cfg["quant"]):
        return
    if is_none(cfg["lora"]):
        remedy = "train an adapter on them (lora=lora), or load them whole (quant=none)"
        yield Fault("lora", "full fine-tuning cannot train quantized weights", remedy, "none")
        return
    given = {key: value for key, value in cfg["lora"].items() if key in ("method", "init_lora_weights")}
    yield from (fault.below("lora") for fault in check_on_quantized(**given))


def check_on_quantized(*, method: str = "lora", init_lora_weights: Any = True, **_: Any) -> Iterator[Fault]:
    """Faults of the keys of ``lora`` or ``peft`` that matter on quantized weights; needs no model, imports nothing."""
    if method.lower() not in ON_QUANTIZED:
        remedy = f"use quant=none, or one of {', '.join(ON_QUANTIZED)}"
        yield Fault("method", "does not work on quantized weights", remedy, method)
    if adapter.is_cut_from_base(init_lora_weights):
        problem = "cuts its start out of the base weights, and what is left would be quantized again, with loss"
        remedy = "use lora=lora on quantized weights, or quant=none"
        yield Fault("init_lora_weights", problem, remedy, init_lora_weights)


def methods() -> list[str]:
    """The PEFT methods that train here, by their names."""
    return sorted(name for name, cls in _all_methods().items() if name not in UNSUITED and not _is_prompt(cls))


def _all_methods() -> dict[str, Any]:
    with compilation.deferred():
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {str(getattr(kind, "value", kind)).lower(): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def _config_class(method: str) -> Any:
    return _all_methods()[method.lower()]


def _is_prompt(cls: Any) -> bool:
    from peft import PromptLearningConfig

    return issubclass(cls, PromptLearningConfig)


def _option_faults(method: str, options: dict[str, Any]) -> Iterator[Fault]:
    cls = _config_class(method)
    types = typing.get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls)} - SET_HERE
    for name, value in options.items():
        if name in SET_HERE:
            yield Fault(name, "follows from the run", "leave it out", value)
        elif name in UNSUITED_FIELDS or name.endswith("_config"):
            yield Fault(name, "needs more than this training loop gives it", "leave it out", value)
        elif name not in known:
            yield unknown_key(name, known, value)
        elif name == "init_lora_weights" and value in DATA_INITS:
            problem = "needs passes over the data before training, which are not made here"
            yield Fault(name, problem, "use true, gaussian, orthogonal, pissa, pissa_niter_16 or olora", value)
        elif name != "init_lora_weights" and (problem := mismatch(value, types[name])):
            yield Fault(name, problem, f"see PEFT's {cls.__name__}.{name}", value)


def _construction_faults(method: str, options: dict[str, Any]) -> Iterator[Fault]:
    """What the configuration class itself finds: missing fields and impossible combinations."""
    try:
        _config_class(method)(task_type="CAUSAL_LM", **options)
    except (ValueError, TypeError, ImportError) as error:
        yield Fault("", f"{method}: {_first_line(error)}", "set the options as PEFT asks: '+lora.name=value'")


def _model_faults(model: nn.Module, method: str, options: dict[str, Any]) -> Iterator[Fault]:
    if _is_quantized(model):
        yield from check_on_quantized(method=method, **options)
    for key in ("target_modules", "modules_to_save", "exclude_modules"):
        wanted = options.get(key)
        if not wanted or wanted == ALL_LINEAR:
            continue
        for pattern in [wanted] if isinstance(wanted, str) else wanted:
            try:
                matched = _matches(model, pattern, is_regex=isinstance(wanted, str))
            except re.error as error:
                yield Fault(
                    key, f"is not a regular expression: {error}", "correct it, or give a list of names", pattern
                )
                continue
            if not matched:
                yield _no_match(model, key, pattern)


def _matches(model: nn.Module, pattern: str, *, is_regex: bool) -> bool:
    """As PEFT matches: a text is a regular expression for the whole name; the entries of a list are ends of names."""
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


def _effect_faults(model: Any, options: dict[str, Any]) -> Iterator[Fault]:
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        yield Fault("", "leaves nothing to train", "choose other target modules")
    if options.get("bias", "none") != "none" and not any(name.endswith("bias") for name in trainable):
        yield Fault("bias", "cannot take effect: this model has no biases there", "set it to none", options["bias"])


def _refusal(method: str, error: Exception) -> Fault:
    text = _first_line(error)
    if "target_modules" in text and "specify" in text:
        problem = f"{method} has no default for this model"
        return Fault("lora.target_modules", problem, f"'+lora.target_modules={ALL_LINEAR}'")
    return Fault("lora", f"PEFT cannot put {method} on this model: {text}", "use other options, or lora=lora", method)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _is_quantized(model: nn.Module) -> bool:
    return bool(getattr(model, "is_quantized", False))


def _refuse(faults: Iterator[Fault]) -> None:
    found = tuple(fault.below("lora") for fault in faults)
    if found:
        raise ConfigError(*found)
