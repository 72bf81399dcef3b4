"""Activation checkpointing of decoder layers: save fewer activations, recompute the others in the backward pass.

``speed`` drops only the outputs of norms and of the activation function in MLPs: a third of all activations, almost
free to recompute. ``balanced`` also recomputes the whole MLP, the widest part of a layer. ``min`` saves only the input
of each layer, ``offload`` saves it in CPU memory. Results are bit-identical in all four.

In compiled layers Inductor drops cheap activations itself; there torch's checkpoint recomputes the MLP or the layer.
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
from runner.models.kernels import buffers, compilation, offloading

GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")
"""Attributes of a gated MLP, which computes down(act(gate(x)) * up(x)), as in Llama."""
MLPS = ("mlp", "feed_forward", "ffn")
"""Attribute names of other MLPs in their layers."""


def arrange(model: nn.Module, memory: Memory, *, eager: bool = True) -> None:
    """Apply the option ``train.memory`` to the decoder layers of ``model``, in place. Call before compiling.

    ``eager``: the model will not be compiled.

    Raises:
        ConfigError: the model has no list of decoder layers, or the layers have no MLP.
    """
    layers = compilation.layers_of(model)
    if memory != "speed" and not layers:
        problem = f"{type(model).__name__} has no list of decoder layers of one class to recompute"
        raise ConfigError(Fault("train.memory", problem, "use train.memory=speed", memory))
    gated = _gated_classes([layers[0], layers[-1]] if layers else [], getattr(model, "dtype", torch.float32))
    for layer in layers:
        match memory:
            case "min":
                _checkpoint(layer)
            case "offload":
                _checkpoint(layer)
                offloading.install(layer)
            case "balanced":
                checkpointed = _checkpoint_mlps(layer, gated if eager else set())
                if eager:
                    _drop_cheap_activations(layer, gated, checkpointed, products=True)
            case "speed":
                if eager:
                    _drop_cheap_activations(layer, gated, set(), products=False)


def _checkpoint_mlps(layer: nn.Module, excluded: set[type[nn.Module]]) -> set[nn.Module]:
    """Recompute MLPs with torch's checkpoint, except classes in ``excluded``; returns these MLPs and their submodules.

    MLPs with dropout are never excluded.
    """
    named = [(name.rpartition(".")[2], module) for name, module in layer.named_modules()]
    mlps = [module for name, module in named if name in MLPS or all(hasattr(module, part) for part in GATED)]
    if not mlps:
        problem = f"{type(layer).__name__} has no MLP module to recompute"
        raise ConfigError(Fault("train.memory", problem, "use train.memory=speed or min", "balanced"))
    selected = [mlp for mlp in mlps if type(mlp) not in excluded or _has_dropout(mlp)]
    inside = {part for mlp in selected for part in mlp.modules() if part is not mlp}
    for mlp in selected:
        if mlp not in inside:
            _checkpoint(mlp)
    return {*selected, *inside}


def _checkpoint(module: nn.Module) -> None:
    """Recompute the whole module in the backward pass, with torch's checkpoint."""
    forward = module.forward

    def checkpointed_forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    module.forward = checkpointed_forward


@dataclass
class _Activation:
    """A dropped activation: how to recompute it, and how many backward functions still need it."""

    numel: int
    offset: int
    compute: Callable[[], Tensor]
    autocast: Callable[[], AbstractContextManager[Any]]
    """The autocast state of the forward pass."""
    uses: int = 0
    value: Tensor | None = None

    def take(self, shape: Size) -> Tensor:
        """The value for one use; recomputed at the first use and freed after the last."""
        if self.value is None:
            with torch.no_grad(), self.autocast():
                self.value = self.compute()
        value, self.uses = self.value, self.uses - 1
        if not self.uses:
            self.value = None
        return value.reshape(shape)


Packed = Tensor | tuple[_Activation, Size]


class _Forward:
    """One forward pass of a layer: its dropped activations, by the address of their storage."""

    def __init__(self) -> None:
        self.activations: dict[int, _Activation] = {}
        self.storages: list[StorageWeakRef] = []
        """Weak references to the storages: they prevent that an address is reused."""

    def drop(self, result: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """Do not save ``result`` for the backward pass; ``compute`` recomputes it from saved or packed tensors."""
        if not result.is_contiguous():  # autograd may save the same numbers in another order
            return result
        device, storage = result.device.type, result.untyped_storage()
        autocast = partial(
            torch.autocast, device, torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device)
        )
        self.activations[storage._cdata] = _Activation(result.numel(), int(result.storage_offset()), compute, autocast)
        self.storages.append(StorageWeakRef(storage))
        return result

    def pack(self, tensor: Tensor) -> Packed:
        activation = self.activations.get(tensor.untyped_storage()._cdata)
        extent = tensor.numel(), tensor.storage_offset()
        if activation is None:
            return tensor.detach()  # its graph would be a reference cycle, never freed without a backward pass
        if extent != (activation.numel, activation.offset) or not tensor.is_contiguous():
            return tensor.clone()  # the storage may be a buffer that the next layer overwrites, see ``buffers``
        activation.uses += 1
        return activation, tensor.shape


def _unpack(packed: Packed) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed[0].take(packed[1])


class _State:
    """The running forward pass of a layer, shared with its modules; None outside of a forward pass."""

    forward: _Forward | None = None


def _drop_cheap_activations(
    layer: nn.Module, gated: set[type[nn.Module]], excluded: set[nn.Module], *, products: bool
) -> None:
    """Drop the outputs of norms and MLP gates, in place, except in ``excluded``.

    ``products``: also drop the outputs of gate_proj and up_proj.
    """
    state = _State()
    for module in [module for module in layer.modules() if module not in excluded]:
        if type(module).__name__.endswith("Norm") and not list(module.children()):
            module.forward = _norm_forward(module.forward, state)
        elif type(module) in gated and not _has_dropout(module):
            module.forward = _gated_forward(module, module.forward, state, products)
    layer.forward = _layer_forward(layer.forward, state)


def _layer_forward(forward: Callable[..., Any], state: _State) -> Callable[..., Any]:
    def compute(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        state.forward = _Forward()
        try:
            with saved_tensors_hooks(state.forward.pack, _unpack):
                return forward(*args, **kwargs)
        finally:
            state.forward = None  # the autograd graph still references the activations that it needs

    return compute


def _norm_forward(forward: Callable[..., Any], state: _State) -> Callable[..., Any]:
    def compute(*args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        if state.forward is None or not isinstance(result, Tensor):
            return result
        return state.forward.drop(result, partial(forward, *args, **kwargs))

    return compute


def _gated_forward(
    mlp: Any, forward: Callable[[Tensor], Tensor], state: _State, products: bool
) -> Callable[[Tensor], Tensor]:
    def compute(x: Tensor) -> Tensor:
        if not (current := state.forward):
            return forward(x)
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        if products:
            current.drop(gate, partial(_apply, mlp.gate_proj, current.pack(x)))
            current.drop(up, partial(_apply, mlp.up_proj, current.pack(x)))
        product = _Gate.apply(gate, up, mlp.act_fn)
        current.drop(product, partial(_apply_gate, mlp.act_fn, current.pack(gate), current.pack(up)))
        return mlp.down_proj(product)

    return compute


def _apply(function: Callable[[Tensor], Tensor], x: Packed) -> Tensor:
    return function(_unpack(x))


def _apply_gate(activation: Callable[[Tensor], Tensor], gate: Packed, up: Packed) -> Tensor:
    return activation(_unpack(gate)) * _unpack(up)


class _Gate(torch.autograd.Function):
    """act(gate) * up, all (..., M); saves gate and up. The result is valid until the next layer, see ``buffers``."""

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
        (gate_grad,) = torch.autograd.grad(activated, leaf, grad * up)
        return gate_grad, grad * activated.detach(), None


def _is_silu(activation: Any) -> bool:
    """Whether the activation is plain SiLU, which has a variant with an output tensor."""
    return type(activation).__name__ in ("SiLU", "SiLUActivation") and not activation._forward_hooks


def _gated_classes(layers: list[nn.Module], dtype: torch.dtype) -> set[type[nn.Module]]:
    """The module classes that compute down(act(gate(x)) * up(x)): checked by attribute names and by a forward pass."""
    return {type(module) for layer in layers for module in layer.modules() if _is_gated(module, dtype)}


def _has_dropout(module: nn.Module) -> bool:
    """Whether the module has dropout: recomputing must use the same mask, which only torch's checkpoint restores."""
    return any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.modules())


def _is_gated(module: Any, dtype: torch.dtype) -> bool:
    if not all(callable(getattr(module, part, None)) for part in GATED) or _has_dropout(module):
        return False
    if isinstance(module.act_fn, nn.Module) and list(module.act_fn.parameters()):
        return False  # ``_Gate`` computes no gradient of these parameters
    device = next(module.parameters()).device
    if device.type == "meta":
        return True

    def plain(x: Tensor) -> Any:
        return module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x))

    x = torch.linspace(-1, 1, 2 * module.gate_proj.in_features).reshape(1, 2, -1).to(device, dtype)
    with torch.no_grad():
        return torch.equal(module(x), plain(x))
