"""Choose the trainable parameters, the options of the group ``lora``: all, LoRA, or any other PEFT adapter.

Adapters are float32 for any dtype of the base (PEFT's default): small updates are lost in bfloat16's 8 bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Le, Len

from runner import imports
from runner.config.bind import bind, bind_target
from runner.config.bounds import Must
from runner.config.schema import Count, Fraction, Positive, Text
from runner.errors import ConfigError, Fault, refuse
from runner.models import adapter, experts, freezing, loftq_base, new_tokens, peft_options, target_modules, warm_start
from runner.models.kernels import compilation, score_head

if TYPE_CHECKING:
    from torch import nn

    from runner.models.quantization.quant import Quant

Init = Literal[True, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "pissa_niter_16", "olora", "eva", "loftq"]
FROM_DATA = "eva"
"""The initialisation that ``train.eva`` computes from the training data, when the model is loaded."""


def none(
    model: nn.Module,
    *,
    trainable: Text | Annotated[list[Text], Len(1)] | None = None,
    trainable_layers: Annotated[int, Ge(-1024), Le(1024), Must(bool, "other than 0")] | None = None,
    train_vision: bool = False,
) -> nn.Module:
    """Full fine-tuning: all parameters (what reads images with ``train_vision`` only), or those of ``freezing``.

    Raises:
        ConfigError: the weights are quantized, or the model does not have the chosen parameters.
    """
    freezing.check_vision(model, train_vision)
    if _quant(model) is not None:
        raise ConfigError(_full_on_quantized())
    if trainable is not None:
        freezing.train_named(model, freezing.listed(trainable))
    elif trainable_layers is not None:
        freezing.train_layers(model, trainable_layers)
    else:
        model.requires_grad_(True)
        freezing.freeze_vision(model, train_vision)
    return model


def lora(
    model: nn.Module,
    *,
    r: Count,
    lora_alpha: Positive,
    lora_dropout: Fraction,
    target_modules: Text | Annotated[list[Text], Len(1)],
    modules_to_save: list[Text] | None,
    bias: Literal["none", "all", "lora_only"],
    use_dora: bool,
    use_rslora: bool,
    init_lora_weights: Init,
    loftq_iter: Count = 1,
    target_parameters: Literal["experts"] | Annotated[list[Text], Len(1)] | None = None,
    start: Text | None = None,
    freeze_a: bool = False,
    train_vision: bool = False,
) -> nn.Module:
    """LoRA (https://arxiv.org/abs/2106.09685), DoRA (2402.09353), rsLoRA (2312.03732), PiSSA (2404.02948).

    ``freeze_a``: LoRA-FA (https://arxiv.org/abs/2308.03303) trains B alone. A needs no state of the optimizer, and the
    inputs of the layers need not be kept for the backward pass.

    Raises:
        ConfigError: target modules that do not exist, or an option without effect on this model.
    """
    parameters = experts.names(model) if target_parameters == experts.ALL else target_parameters
    adapted = peft(
        model,
        method="lora",
        start=start,
        train_vision=train_vision,
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=target_modules,
        modules_to_save=modules_to_save,
        bias=bias,
        use_dora=use_dora,
        use_rslora=use_rslora,
        init_lora_weights=True if init_lora_weights in (FROM_DATA, loftq_base.INIT) else init_lora_weights,
        **({"target_parameters": parameters} if parameters else {}),
    )
    if freeze_a:
        freezing.freeze_a(adapted)
    return adapted


def peft(
    model: nn.Module, *, method: Text, start: Text | None = None, train_vision: bool = False, **options: Any
) -> nn.Module:
    """An adapter of any PEFT method; ``method`` is PEFT's name, ``options`` are fields of its configuration class.

    ``start``: the adapter whose weights it begins with (see ``config.pinned_weights``); it must have the same shape.
    ``train_vision``: the part of a model that reads images is adapted, too.

    Raises:
        ConfigError: faults of ``check_peft``, target modules that do not exist, an error raised by PEFT, or an adapter
            in ``start`` that does not fit.
    """
    with imports.uncollected(), compilation.deferred():
        from peft import get_peft_model

    _refuse(check_peft(method=method, **options))
    _refuse(_model_faults(model, method, options))
    freezing.check_vision(model, train_vision)
    config_class = peft_options.config_class(method)
    if not train_vision:
        options = freezing.without_vision(model, method, config_class.__dataclass_fields__, options)
    all_linear = options.get("target_modules") == target_modules.ALL_LINEAR and not options.get("exclude_modules")
    routers = experts.routers(model) if all_linear else {}
    options = {**options, **routers, **_with_head(model, options)}
    options |= new_tokens.options(model, config_class.__dataclass_fields__, options)
    config = config_class(task_type=_task_type(model), **options)
    meta = any(parameter.is_meta for parameter in model.parameters())
    subtracts = not meta and adapter.subtracts_initial(options.get("init_lora_weights"))
    for key, value in (("init_lora_weights", True), ("prompt_tuning_init", "RANDOM")):
        if meta and key in options:
            setattr(config, key, value)  # other initialisations compute with the weights
    revision = getattr(model.config, "_commit_hash", None)
    try:
        with adapter.fixed_seed() if subtracts else contextlib.nullcontext():
            adapted = get_peft_model(model, config, revision=revision, low_cpu_mem_usage=meta)
    except peft_options.WRONG as error:
        raise ConfigError(peft_options.refusal(method, error)) from error
    _refuse(_effect_faults(adapted, options))
    _refuse(_head_faults(adapted, method))
    new_tokens.in_float32(adapted)
    freezing.freeze_vision(adapted, train_vision)  # bias=all trains biases everywhere
    if subtracts:
        adapter.keep_initial(adapted)
    if start:
        warm_start.begin_with(adapted, start)
    return adapted


def check_none(**values: Any) -> Iterator[Fault]:
    return freezing.faults(**values)


def check_lora(
    *,
    init_lora_weights: Init,
    r: int,
    loftq_iter: int = 1,
    target_parameters: Any = None,
    start: str | None = None,
    **others: Any,
) -> Iterator[Fault]:
    yield from _start_faults(start, init_lora_weights)
    if target_parameters is not None:
        yield from experts.faults(init_lora_weights, target_parameters, **others)
    if init_lora_weights == "orthogonal" and r % 2:
        yield Fault("r", "must be even with init_lora_weights=orthogonal", f"set it to {r + 1}", r)
    yield from loftq_base.faults(init_lora_weights, loftq_iter, uses_dora=bool(others.get("use_dora")))


def _start_faults(start: str | None, init: Any) -> Iterator[Fault]:
    if start and init is not True:
        problem = "has no effect with lora.start: the weights are those of that adapter"
        yield Fault("init_lora_weights", problem, "set lora.init_lora_weights=true", init)


def check_peft(*, method: str, start: str | None = None, train_vision: bool = False, **options: Any) -> Iterator[Fault]:
    """Check a method and its options against PEFT's configuration class (imports PEFT)."""
    yield from _start_faults(start, options.get("init_lora_weights", True))
    yield from peft_options.faults(method, options)


def check_combination(cfg: Mapping[str, Any]) -> Iterator[Fault]:
    """Check the options ``lora`` and ``quant`` together."""
    yield from _virtual_token_faults(cfg)
    quant: Quant = bind(cfg["quant"], "quant")()
    yield from loftq_base.quant_faults(cfg["lora"].get("init_lora_weights"), quant)
    if quant.plain:
        return
    if bind_target(cfg["lora"]) is none:
        yield _full_on_quantized()
        return
    options = {key: value for key, value in cfg["lora"].items() if key in ("method", "init_lora_weights")}
    yield from (fault.below("lora") for fault in check_on_quantized(quant, **options))


def _virtual_token_faults(cfg: Mapping[str, Any]) -> Iterator[Fault]:
    """What does not work with tokens before each row that are vectors of the adapter."""
    method = str(cfg["lora"].get("method", "")).lower()
    if method not in peft_options.PROMPTS:
        return
    problem = f"lora.method={method} puts virtual tokens before each row"
    if cfg["data"]["packing"]:
        yield Fault("data.packing", f"{problem}, so documents cannot share one", "set it to false", True)
    task = bind(cfg["task"], "task")()
    if task.head is not None or task.prepare is not None:
        yield Fault("lora.method", f"does not work with task={task.name}", "use lora=lora", method)
    if method == "prefix_tuning" and (memory := cfg["train"]["memory"]) in ("min", "offload"):
        problem = f"cannot compute layers again: lora.method={method} gives them a cache, which they extend"
        yield Fault("train.memory", problem, "use speed or balanced", memory)


def check_on_quantized(
    quant: Quant, *, method: str = "lora", init_lora_weights: Any = True, **_: Any
) -> Iterator[Fault]:
    """Check that the adapter works on quantized weights; needs no model and imports no library."""
    if method.lower() not in quant.methods:
        remedy = f"use quant=none, or one of {', '.join(quant.methods)}"
        yield Fault("method", f"does not work on weights in {quant.name}", remedy, method)
    if adapter.subtracts_initial(init_lora_weights):
        problem = "needs unquantized base weights (PiSSA and OLoRA subtract the initial adapter from them)"
        remedy = "use lora=lora with quantized weights, or set quant=none"
        yield Fault("init_lora_weights", problem, remedy, init_lora_weights)


def _model_faults(model: nn.Module, method: str, options: dict[str, Any]) -> Iterator[Fault]:
    if quant := _quant(model):
        yield from check_on_quantized(quant, method=method, **options)
    yield from target_modules.faults(model, options)
    yield from experts.faults_on(model, options.get("target_parameters") or ())


def _with_head(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """``modules_to_save`` with the parts of a score head that PEFT would leave frozen: it trains two names only."""
    names = [name.rpartition(".")[2] for name in getattr(model, "head_names", [])]
    more = [name for name in names if name not in score_head.OF_PEFT]
    return {"modules_to_save": [*(options.get("modules_to_save") or []), *more]} if more else {}


def _task_type(model: nn.Module) -> str:
    return "SEQ_CLS" if hasattr(model, "head_names") else "CAUSAL_LM"


def _effect_faults(model: Any, options: dict[str, Any]) -> Iterator[Fault]:
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        yield Fault("", "no parameter is trainable", "choose other target modules")
    if options.get("bias", "none") != "none" and not any(name.endswith("bias") for name in trainable):
        yield Fault(
            "bias", "has no effect: the target modules of this model have no biases", "set it to none", options["bias"]
        )


def _head_faults(model: Any, method: str) -> Iterator[Fault]:
    parameters = [parameter for module in score_head.modules(model) for parameter in module.parameters()]
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        yield Fault("method", "does not train the score head that this task needs", "use lora=lora", method)


def _full_on_quantized() -> Fault:
    remedy = "train an adapter (lora=lora), or load the weights without quantization (quant=none)"
    return Fault("lora", "full fine-tuning does not support quantized weights", remedy, "none")


def _quant(model: nn.Module) -> Quant | None:
    """The quantization of the model; None if its weights are plain."""
    quant: Any = getattr(model, "quant", None)
    return None if quant is None or quant.plain else quant


def _refuse(faults: Iterator[Fault]) -> None:
    refuse(fault.below("lora") for fault in faults)
