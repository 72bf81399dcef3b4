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

from runner.config.schema import Memory
from runner.errors import ConfigError, Fault
from runner.models.kernels import buffers, compilation

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
    layers = compilation.layers_of(model)
    if memory != "speed" and not layers:
        problem = f"{type(model).__name__} has no list of equal layers that could be computed again"
        raise ConfigError(Fault("train.memory", problem, "use train.memory=speed", memory))
    gated = _gated_classes([layers[0], layers[-1]] if layers else [], getattr(model, "dtype", torch.float32))
    for layer in layers:
        match memory:
            case "min":
                _again(layer)
            case "balanced":
                again = _compute_mlp_again(layer, gated if eager else set())
                if eager:
                    _let_go_of_cheap_results(layer, gated, again, products=True)
            case "speed":
                if eager:
                    _let_go_of_cheap_results(layer, gated, set(), products=False)


def _compute_mlp_again(layer: nn.Module, apart: set[type[nn.Module]]) -> set[nn.Module]:
    """By torch's checkpoint, but for classes seen to ``apart``; returns what is computed so, with its parts."""
    named = [(name.rpartition(".")[2], module) for name, module in layer.named_modules()]
    mlps = [module for name, module in named if name in MLPS or all(hasattr(module, part) for part in GATED)]
    if not mlps:
        problem = f"{type(layer).__name__} has no MLP that could be computed again by itself"
        raise ConfigError(Fault("train.memory", problem, "use train.memory=speed or min", "balanced"))
    found = [mlp for mlp in mlps if type(mlp) not in apart or _drops(mlp)]
    inside = {part for mlp in found for part in mlp.modules() if part is not mlp}
    for mlp in found:
        if mlp not in inside:
            _again(mlp)
    return {*found, *inside}


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
    offset: int
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
        """``compute`` gives it again, from what is kept anyway or from what ``pack`` gave it."""
        if not result.is_contiguous():  # what is saved of it may be another order of the same numbers
            return result
        device, storage = result.device.type, result.untyped_storage()
        autocast = partial(
            torch.autocast, device, torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device)
        )
        self.results[storage._cdata] = _Result(result.numel(), int(result.storage_offset()), compute, autocast)
        self.storages.append(StorageWeakRef(storage))
        return result

    def pack(self, tensor: Tensor) -> Packed:
        found = self.results.get(tensor.untyped_storage()._cdata)
        place = tensor.numel(), tensor.storage_offset()
        if found is None:
            return tensor.detach()  # with its history it would keep itself alive where no backward pass follows
        if place != (found.numel, found.offset) or not tensor.is_contiguous():
            return tensor.clone()  # a result may lie where the next one will, see ``scratch``
        found.uses += 1
        return found, tensor.shape


def _unpack(packed: Packed) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed[0].take(packed[1])


class _Now:
    """The forward pass that a layer is in, for its modules."""

    forward: _Forward | None = None


def _let_go_of_cheap_results(
    layer: nn.Module, gated: set[type[nn.Module]], apart: set[nn.Module], *, products: bool
) -> None:
    """In place, but for what is ``apart``; ``products``: those of the MLP are let go as well."""
    now = _Now()
    for module in [module for module in layer.modules() if module not in apart]:
        if type(module).__name__.endswith("Norm") and not list(module.children()):
            module.forward = _norm(module.forward, now)
        elif type(module) in gated and not _drops(module):
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


def _norm(forward: Callable[..., Any], now: _Now) -> Callable[..., Any]:
    def normalize(*args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        if now.forward is None or not isinstance(result, Tensor):
            return result
        return now.forward.offer(result, partial(forward, *args, **kwargs))

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
    """act(gate) * up, all (..., M), of which gate and up are kept; valid until the next layer's, see ``scratch``."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        out = buffers.take("opened", gate.shape, gate)
        activated = torch.ops.aten.silu.out(gate, out=out) if _is_silu(activation) else activation(gate)
        return torch.mul(activated, up, out=out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            activated = ctx.activation(leaf)
        (of_gate,) = torch.autograd.grad(activated, leaf, grad * up)
        return of_gate, grad * activated.detach(), None


def _is_silu(activation: Any) -> bool:
    """Whether it is SiLU and nothing else, which can be told where to write."""
    return type(activation).__name__ in ("SiLU", "SiLUActivation") and not activation._forward_hooks


def _gated_classes(layers: list[nn.Module], dtype: torch.dtype) -> set[type[nn.Module]]:
    """The classes in them that compute down(act(gate(x)) * up(x)): by the names of their parts, and by trying."""
    return {type(module) for layer in layers for module in layer.modules() if _is_gated(module, dtype)}


def _drops(module: nn.Module) -> bool:
    """What is dropped is drawn once; torch's checkpoint knows how to draw it again."""
    return any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.modules())


def _is_gated(module: Any, dtype: torch.dtype) -> bool:
    if not all(callable(getattr(module, part, None)) for part in GATED) or _drops(module):
        return False
    if isinstance(module.act_fn, nn.Module) and list(module.act_fn.parameters()):
        return False  # they would get no gradient
    device = next(module.parameters()).device
    if device.type == "meta":
        return True

    def plain(x: Tensor) -> Any:
        return module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x))

    x = torch.linspace(-1, 1, 2 * module.gate_proj.in_features).reshape(1, 2, -1).to(device, dtype)
    with torch.no_grad():
        return torch.equal(module(x), plain(x))
