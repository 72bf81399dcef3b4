"""Memory for time: what of a decoder layer's forward pass is kept for the backward pass, and what is computed again.

``speed`` keeps what takes time to compute: all but the results of norms and of the gates of MLPs, which are a third of
everything and cost next to nothing. ``balanced`` computes the whole MLP again, whose inside is the widest part of a
layer. ``min`` keeps the input of a layer alone. The numbers are the same, bit for bit.

What is compiled decides by itself what is cheap, and the whole MLP or layer is computed again by torch's checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from runner import compiling
from runner.errors import ConfigError, Fault
from runner.schema import Memory

GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")
"""The parts of an MLP that computes down(act(gate(x)) * up(x)), as in Llama."""
MLPS = ("mlp", "feed_forward", "ffn")
"""What other MLPs are called in their layers."""


def arrange(model: nn.Module, memory: Memory, *, eager: bool = True) -> None:
    """Let the decoder layers of ``model`` keep no more than that. In place; before compiling.

    ``eager``: nothing will be compiled.

    Raises:
        ConfigError: the model has no list of decoder layers, or no MLPs in them.
    """
    layers = compiling.layers_of(model)
    if memory != "speed" and not layers:
        problem = f"{type(model).__name__} has no list of equal layers that could be computed again"
        raise ConfigError(Fault("train.memory", problem, "use train.memory=speed", memory))
    gated = _gated_classes(layers[0], getattr(model, "dtype", torch.float32)) if layers else set()
    for layer in layers:
        match memory:
            case "min":
                _again(layer)
            case "balanced":
                _compute_mlp_again(layer, gated if eager else set())
                if eager:
                    _let_go_of_cheap_results(layer, gated, products=True)
            case "speed":
                if eager:
                    _let_go_of_cheap_results(layer, gated, products=False)


def _compute_mlp_again(layer: nn.Module, apart: set[type[nn.Module]]) -> None:
    """By torch's checkpoint, but for classes that are seen to ``apart``."""
    named = [(name.rpartition(".")[2], module) for name, module in layer.named_modules()]
    mlps = [module for name, module in named if name in MLPS or all(hasattr(module, part) for part in GATED)]
    if not mlps:
        problem = f"{type(layer).__name__} has no MLP that could be computed again by itself"
        raise ConfigError(Fault("train.memory", problem, "use train.memory=speed or min", "balanced"))
    for mlp in mlps:
        if type(mlp) not in apart:
            _again(mlp)


def _again(module: nn.Module) -> None:
    forward = module.forward

    def computed_again(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    module.forward = computed_again


@dataclass
class _Result:
    """One that is not kept: how often it would have been, and how it is computed again."""

    numel: int
    compute: Callable[[], Tensor]
    autocast: Callable[[], AbstractContextManager[Any]]
    """As it was in the forward pass."""
    uses: int = 0
    value: Tensor | None = None

    def take(self, shape: Size) -> Tensor:
        """For one of its uses; it lives from the first to the last of them."""
        if self.value is None:
            with torch.no_grad(), self.autocast():
                self.value = self.compute()
        value, self.uses = self.value, self.uses - 1
        if not self.uses:
            self.value = None
        return value.reshape(shape)


Packed = Tensor | tuple[_Result, Size]


class _Forward:
    """A forward pass of a layer: which of its results are computed again, by the storage that they lie in."""

    def __init__(self) -> None:
        self.results: dict[int, _Result] = {}
        self.storages: list[StorageWeakRef] = []
        """Of the results: an address is not used again as long as there is a weak reference to it."""

    def offer(self, result: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """``compute`` gives it again; it keeps nothing itself but what ``pack`` gave it."""
        device, storage = result.device.type, result.untyped_storage()
        autocast = partial(
            torch.autocast, device, torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device)
        )
        self.results[storage._cdata] = _Result(result.numel(), compute, autocast)
        self.storages.append(StorageWeakRef(storage))
        return result

    def pack(self, tensor: Tensor) -> Packed:
        found = self.results.get(tensor.untyped_storage()._cdata)
        if found is None or tensor.numel() != found.numel or not tensor.is_contiguous():
            return tensor
        found.uses += 1
        return found, tensor.shape


def _unpack(packed: Packed) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed[0].take(packed[1])


class _Now:
    """The forward pass that a layer is in, for its modules."""

    forward: _Forward | None = None


def _let_go_of_cheap_results(layer: nn.Module, gated: set[type[nn.Module]], *, products: bool) -> None:
    """In place. They are computed again from what is kept anyway; ``products``: those of the MLP are let go as well."""
    now = _Now()
    for module in layer.modules():
        if type(module).__name__.endswith("Norm"):
            module.forward = _norm(module.forward, now)
        elif type(module) in gated:
            module.forward = _gated(module, module.forward, now, products)
    layer.forward = _followed(layer.forward, now)


def _followed(forward: Callable[..., Any], now: _Now) -> Callable[..., Any]:
    def follow(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        now.forward = _Forward()
        try:
            with saved_tensors_hooks(now.forward.pack, _unpack):
                return forward(*args, **kwargs)
        finally:
            now.forward = None  # what is left of it hangs on the results that the backward pass will ask for

    return follow


def _norm(forward: Callable[..., Tensor], now: _Now) -> Callable[..., Tensor]:
    def normalize(*args: Any, **kwargs: Any) -> Tensor:
        result = forward(*args, **kwargs)
        return now.forward.offer(result, partial(forward, *args, **kwargs)) if now.forward else result

    return normalize


def _gated(mlp: Any, forward: Callable[[Tensor], Tensor], now: _Now, products: bool) -> Callable[[Tensor], Tensor]:
    def compute(x: Tensor) -> Tensor:
        if not (during := now.forward):
            return forward(x)
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        if products:
            during.offer(gate, partial(_applied, mlp.gate_proj, during.pack(x)))
            during.offer(up, partial(_applied, mlp.up_proj, during.pack(x)))
        opened = _Gate.apply(gate, up, mlp.act_fn)
        during.offer(opened, partial(_opened, mlp.act_fn, during.pack(gate), during.pack(up)))
        return mlp.down_proj(opened)

    return compute


def _applied(function: Callable[[Tensor], Tensor], x: Packed) -> Tensor:
    return function(_unpack(x))


def _opened(activation: Callable[[Tensor], Tensor], gate: Packed, up: Packed) -> Tensor:
    return activation(_unpack(gate)) * _unpack(up)


class _Gate(torch.autograd.Function):
    """act(gate) * up, all (..., M), of which gate and up are kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            activated = ctx.activation(gate)
        (of_gate,) = torch.autograd.grad(activated, gate, grad * up)
        return of_gate, grad * activated.detach(), None


def _gated_classes(layer: nn.Module, dtype: torch.dtype) -> set[type[nn.Module]]:
    """The classes in it that compute down(act(gate(x)) * up(x)): by the names of their parts, and by trying."""
    return {type(module) for module in layer.modules() if _is_gated(module, dtype)}


def _is_gated(module: Any, dtype: torch.dtype) -> bool:
    if not all(callable(getattr(module, part, None)) for part in GATED):
        return False
    if any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.modules()):
        return False  # what is dropped is drawn once; torch's checkpoint knows how to draw it again
    device = next(module.parameters()).device
    if device.type == "meta":
        return True

    def plain(x: Tensor) -> Any:
        return module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x))

    x = torch.linspace(-1, 1, 2 * module.gate_proj.in_features).reshape(1, 2, -1).to(device, dtype)
    with torch.no_grad():
        return torch.equal(module(x), plain(x))
