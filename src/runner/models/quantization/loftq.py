"""LoftQ: the adapter begins as what 4-bit weights lose (https://arxiv.org/abs/2310.08659, algorithm 1).

W ≈ Q + B·A: quantize W − B·A to Q, then let B·A be the best product of rank r for W − Q, alternately. After one
iteration Q is the plain 4-bit weight, so the adapter fits every 4-bit base of the same kind. After more, no program
gets Q by quantizing the model: it is ``quantize(W − B'·A')`` with the factors of the iteration before. These are kept
in ``loftq_base.FILE`` beside the adapter, and the base gets its Q again wherever the runner loads the adapter.

PEFT 0.21 computes it on GPUs alone, and ignores the scale of the adapter (``loftq_init``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.errors import ConfigError, Fault
from runner.models import loftq_base, pretrained
from runner.models.loftq_base import About
from runner.models.quantization.bitsandbytes import four_bit

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from runner.models.sources import ModelSource

PREFIX = "base_model.model."
"""What PEFT puts before the name of a layer."""
log = logging.getLogger("runner")


@dataclass(frozen=True)
class Factors:
    """Of one weight (rows, columns): W ≈ Q + b·a and Q = quantize(W − before_b·before_a), all float32."""

    b: Tensor
    """(rows, r)."""
    a: Tensor
    """(r, columns)."""
    before_b: Tensor
    before_a: Tensor


def factors(weight: Tensor, rounded: Callable[[Tensor], Tensor], rank: int, iterations: int) -> Factors:
    """Algorithm 1. ``rounded``: a weight (rows, columns) → its values after quantization, in float32."""
    import torch

    rows, columns = weight.shape
    b, a = weight.new_zeros(rows, rank, dtype=torch.float32), weight.new_zeros(rank, columns, dtype=torch.float32)
    for _ in range(iterations):
        before_b, before_a = b, a
        rest = weight.float() - rounded(without(weight, b, a))
        b, a = low_rank(rest, rank) if rows <= columns else (each.t() for each in reversed(low_rank(rest.t(), rank)))
    return Factors(b, a, before_b, before_a)


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(b (rows, r), a (r, columns)) of the best product of this rank, from the singular values; rows <= columns.

    By the eigenvectors of matrix·matrixᵀ in float64: for wide matrices in half the time of an SVD, as exact in float32.
    """
    import torch

    wide = matrix.double()
    squares, vectors = torch.linalg.eigh(wide @ wide.t())
    u, s = vectors[:, -rank:], squares[-rank:].clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    return (u * s.sqrt()).float(), ((u.t() @ wide) / s.sqrt()[:, None]).float()


def without(weight: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """W − b·a in float32, computed in float64: any number of threads gives the same values to quantize."""
    return (weight.double() - b.double() @ a.double()).float()


def compute(model: Any, source: ModelSource, iterations: int, file: Path, progress: Callable[[int, int], None]) -> None:
    """Write the factors of every 4-bit layer that ``model`` adapts to ``file``, unless it is there.

    The unquantized weights stay in the files of the model; one at a time is read. ``progress``: called with (layers
    done, all layers).
    """
    import torch

    if file.is_file():
        return
    if not (layers := dict(_adapted(model))):
        problem = "has no effect: none of the adapted layers has 4-bit weights"
        remedy = "choose other lora.target_modules, or set it to true"
        raise ConfigError(Fault("lora.init_lora_weights", problem, remedy, loftq_base.INIT))
    plain, first = pretrained.mapped(source), next(iter(layers.values())).get_base_layer()
    dtype = str(first.weight.quant_state.dtype).removeprefix("torch.")
    about = About(iterations, *loftq_base.kind(model.quant), dtype, list(layers))
    found: dict[str, Tensor] = {}
    # A sharded model is still on the CPU, where the vectors of a large matrix take minutes.
    device = torch.device("cuda") if torch.cuda.is_available() else first.weight.device
    for done, (name, layer) in enumerate(layers.items()):
        progress(done, len(layers))
        weight = _dense(plain, name).to(device)
        of_layer = factors(weight, _rounding(model.quant, about.torch_dtype), layer.r["default"], iterations)
        parts = {part: tensor for part, tensor in vars(of_layer).items() if iterations > 1 or part in ("a", "b")}
        found |= {f"{name}.{part}": tensor.cpu().contiguous() for part, tensor in parts.items()}
    loftq_base.write(file, found, about)
    log.info(f"the adapter begins as what {model.quant.name} loses of {len(layers)} weights (LoftQ)")


def begin(model: Any, source: ModelSource, file: Path) -> None:
    """Give the adapter of ``model`` its first values, and its base the Q that they belong to, from ``file``."""
    import torch

    tensors, about = loftq_base.read(file)
    requantize(model, source, tensors, about)
    with torch.no_grad():
        for name, layer in _adapted(model):
            root = layer.scaling["default"] ** 0.5  # the layer adds scaling · B·A
            layer.lora_A["default"].weight.copy_(tensors[f"{name}.a"] / root)
            layer.lora_B["default"].weight.copy_(tensors[f"{name}.b"] / root)
    loftq_base.keep(model, file)


def settle(base: Any, source: ModelSource, file: Path) -> None:
    """Give the layers of a base model the weights Q that the adapter beside ``file`` was trained on.

    4-bit weights are quantized again after several iterations; unquantized ones become the values of Q.

    Raises:
        ConfigError: the file is damaged, or the weights are stored in another way.
    """
    tensors, about = loftq_base.read(file)
    if not base.quant.plain:
        loftq_base.refuse_other(base.quant, about)
        requantize(base, source, tensors, about)
        return
    import torch

    quant = four_bit(kind=about.kind, double=about.double, compute_dtype="auto")
    with torch.no_grad():
        for name in about.layers:
            module = base.get_submodule(name)
            dense = _rounding(quant, about.torch_dtype)(_quantized(base, name, tensors, module.weight.device))
            module.weight.copy_(dense.t() if _is_turned(module) else dense)


def requantize(model: Any, source: ModelSource, tensors: Mapping[str, Tensor], about: About) -> None:
    """After several iterations: replace the 4-bit weights of the layers by Q, in place."""
    if about.iterations == 1:
        return
    plain, inner = pretrained.mapped(source), getattr(model, "get_base_model", lambda: model)()
    for name in about.layers:
        module: Any = inner.get_submodule(name)
        module = getattr(module, "base_layer", module)
        dense = _quantized(plain, name, tensors, module.weight.device)
        module.weight.data, state = model.quant.pack(dense.to(about.torch_dtype))
        module.weight.quant_state = module.quant_state = state
    inner.is_requantized = True


def _quantized(plain: Any, name: str, tensors: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """What was quantized to Q in the last iteration: W − B'·A', and W in the first."""
    weight = _dense(plain, name).to(device)
    if f"{name}.before_b" not in tensors:
        return weight
    b, a = (tensors[f"{name}.before_{part}"].to(device) for part in "ba")
    return without(weight, b, a)


def _adapted(model: Any) -> Iterator[tuple[str, Any]]:
    """(name in the base model, LoRA layer) of each layer with 4-bit weights that the model adapts."""
    from peft.tuners.lora.layer import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and model.quant.holds(module.get_base_layer()):
            yield name.removeprefix(PREFIX), module


def _rounding(quant: Any, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def rounded(weight: Tensor) -> Tensor:
        packed, state = quant.pack(weight.to(dtype))
        dense: Tensor = quant.unpack(packed, state, dtype)
        return dense.float()

    return rounded


def _dense(plain: Any, name: str) -> Tensor:
    """The unquantized weight (outputs, inputs) of a layer."""
    module: nn.Module = plain.get_submodule(name)
    weight: Any = module.weight
    return (weight.t() if _is_turned(module) else weight).detach()  # type: ignore[no-any-return]


def _is_turned(module: nn.Module) -> bool:
    """GPT-2's layers have weights (inputs, outputs)."""
    return type(module).__name__ == "Conv1D"
