"""Count the parameters of a model by kind, and the weights that are quantized or adapted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from runner.models.kernels import score_head

if TYPE_CHECKING:
    from torch import nn

    from runner.models.quantization.quant import Quant

KINDS = ("embedding", "linear", "head", "adapter", "other")
PACKED = "packed_weights"
"""Name of a parameter with copies of the bytes of quantized weights, see ``train/distributed/packed_weights``."""
NEARLY_ALL = 0.95
"""Fraction of the layers' weights from which quantizing them counts as quantizing all."""


def describe(model: nn.Module) -> dict[str, Any]:
    """Parameter counts of a loaded model, or of one without weights; a packed weight counts as the dense one.

    - ``total``, ``trainable``, and by kind: ``embedding``, ``linear``, ``head`` (if not tied), ``adapter``, ``other``.
    - ``matrices``: the weights of the layers without biases and norms. Of them: ``quantized`` (or to be quantized),
      ``adapted`` (having an adapter) and ``experts`` (of a mixture of experts).
    - ``quantized_bytes``: memory of the quantized weights with their scales.
    - ``dtype``: of the weights that are not quantized. ``stored``: how the weights are stored, as text.
    - ``about_experts``: which share of the experts is trained, as text; empty without experts, or if all are trained.
    """
    weights = list(_weights(model))

    def count(is_meant: Callable[[_Weight], bool]) -> int:
        return sum(weight.size for weight in weights if is_meant(weight))

    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    counts = {
        "total": count(lambda _: True),
        "trainable": count(lambda weight: weight.trainable),
        **{kind: count(lambda weight, kind=kind: weight.kind == kind) for kind in KINDS},  # type: ignore[misc]
        "matrices": count(lambda weight: weight.matrix),
        "quantized": count(lambda weight: weight.quantized),
        "adapted": count(lambda weight: weight.adapted),
        "experts": count(lambda weight: weight.expert),
        "quantized_bytes": int(sum(weight.bytes for weight in weights if weight.quantized)),
        "dtype": str(embedding.weight.dtype).removeprefix("torch."),
    }
    experts_quantized = count(lambda weight: weight.expert and weight.quantized)
    experts_trained = count(lambda weight: weight.expert and (weight.adapted or weight.trainable))
    stored = _stored(getattr(model, "quant", None), counts, experts_quantized)
    if files := getattr(model, "dequantized_from", ""):
        stored += f", dequantized from {files}"
    return {**counts, "stored": stored, "about_experts": _about_experts(counts, experts_trained)}


def dense_count(module: Any, parameter: nn.Parameter, quant: Quant | None) -> int:
    """Number of values of the parameter; if the module's weight is packed, of the dense weight."""
    if quant is not None and not parameter.is_meta and parameter.dim() > 1 and quant.holds(module):
        return int(module.out_features * module.in_features)
    return parameter.numel()


def largest_matrix(model: nn.Module) -> int:
    """Number of values of the largest linear weight."""
    from torch import nn

    return max((module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear)), default=0)


class _Weight(NamedTuple):
    size: int
    bytes: float
    kind: str
    trainable: bool
    matrix: bool
    quantized: bool
    adapted: bool
    expert: bool


def _weights(model: Any) -> Iterator[_Weight]:
    quant: Quant | None = getattr(model, "quant", None)
    heads = [head for head in (model.get_output_embeddings(), *score_head.modules(model)) if head is not None]
    parts_of_head = {id(module) for head in heads for module in head.modules()}
    adapted = _adapted(model)
    for name, parameter in model.named_parameters():
        if name.endswith(f".{PACKED}"):
            continue
        module = model.get_submodule(name.rpartition(".")[0])
        quantized, kind = False, _kind(model, name, module, id(module) in parts_of_head)
        if quant is not None and parameter.dim() > 1 and kind != "adapter":
            quantized = quant.quantizes(module) and not (parameter.is_meta and kind == "head")
        size = dense_count(module, parameter, quant)
        stored: float = parameter.numel() * parameter.element_size()
        if quant is not None and quantized:
            kind, rows = "linear", getattr(module, "out_features", parameter.shape[0])
            stored = quant.bytes_of(rows, size // rows)
        matrix = kind in ("linear", "other") and parameter.dim() > 1
        expert = matrix and ".experts." in name
        trainable = parameter.requires_grad
        yield _Weight(size, stored, kind, trainable, matrix, quantized, matrix and id(parameter) in adapted, expert)


def _kind(model: Any, name: str, module: nn.Module, in_head: bool) -> str:
    from torch import nn

    prefix = getattr(getattr(model, "base_model", None), "prefix", None)
    parts = [part for part in (prefix, "modules_to_save", "trainable_tokens_delta", "prompt_encoder") if part]
    if hasattr(model, "peft_config") and any(part in name for part in parts):
        return "adapter"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if not isinstance(module, nn.Linear) or name.endswith("bias"):
        return "other"
    return "head" if in_head else "linear"


def _adapted(model: nn.Module) -> set[int]:
    """The ids of the parameters that have an adapter."""
    if not hasattr(model, "peft_config"):
        return set()
    from peft.tuners.tuners_utils import BaseTunerLayer

    ids = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            only = getattr(module, "parameter_name", None)  # of an adapter of a single parameter (target_parameters)
            base = module.get_base_layer()
            ids |= {id(value) for key, value in base.named_parameters(recurse=False) if only in (None, key)}
    return ids


def _about_experts(counts: dict[str, Any], trained: int) -> str:
    if not counts["experts"] or (trained == counts["experts"] and not counts["adapted"]):
        return ""
    if not trained:
        return "the experts have no adapter" if counts["adapted"] else "the experts are not trained"
    verb = "have an adapter" if counts["adapted"] else "are trained"
    return f"{trained / counts['experts']:.0%} of the experts' weights {verb}"


def _stored(quant: Quant | None, counts: dict[str, Any], experts_quantized: int) -> str:
    """``bfloat16``, ``nf4 (bitsandbytes)``, or with the share of the layers' weights that are quantized."""
    if quant is None or not counts["quantized"]:
        return str(counts["dtype"])
    share = counts["quantized"] / counts["matrices"]
    if share >= NEARLY_ALL:
        return quant.name
    experts = ", not the experts" if counts["experts"] and not experts_quantized else ""
    return f"{quant.name} ({share:.0%} of the layers' weights{experts}; the others in {counts['dtype']})"
