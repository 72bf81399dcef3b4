"""Simulate a training step on fake tensors, before any weights are loaded: its peak memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from runner.config.schema import Memory
from runner.data.batches import Shape
from runner.models.kernels import (
    activation_checkpointing,
    attention,
    base_model,
    compilation,
    lm_head,
    varlen_attention,
)
from runner.tasks import cross_entropy
from runner.train.memory.known_values import KnownValues

LAYERS = 6, 8
"""Numbers of decoder layers simulated for a deeper model; the difference is the memory of one more layer.

Fewer layers give a wrong result: in a shallow model the peak may be at another point of the step."""


def rehearsed(
    make: Callable[[int], Any],
    layers: int,
    shape: Shape,
    *,
    by_document: bool,
    kept: Memory,
    autocast: torch.dtype | None,
    device: torch.device,
    accumulates: bool = False,
    head_in_loss: bool = True,
    alike: bool = True,
    images: Mapping[str, Any] = MappingProxyType({}),
) -> int:
    """Peak bytes of one training step without weights and gradients, simulated with fake tensors.

    ``make(n)`` returns the model on torch's meta device, with its adapter and n decoder layers; the real model has
    ``layers``. Every operation is dispatched as in training, and every tensor is counted while it is alive. Two small
    models are simulated (about a second) and extrapolated, because decoder layers are equal. The peak may be at the
    start of the backward pass, with all activations, or later, with gradients: both are extrapolated.

    Args:
        accumulates: gradients of earlier micro-batches exist when the step begins.
        head_in_loss: the loss computes the logits if it can, see ``models/kernels/lm_head``.
        alike: all layers train the same parameters; if not, all of them are simulated, which takes longer.
        images: what a model that reads images is given, in place of ids of ``shape``, see ``data.vision.largest``.

    Raises:
        Exception: of any kind, if the model reads tensor values or cannot be created with fewer layers.
    """

    def peaks(count: int) -> _Peaks:
        model = make(count)
        if head_in_loss:
            lm_head.adopt(model)
        return _peaks(model, shape, by_document, kept, autocast, device, accumulates, images)

    if layers <= LAYERS[1] or not alike:
        return max(*peaks(layers), 0)
    small, larger = map(peaks, LAYERS)
    more = (layers - LAYERS[0]) / (LAYERS[1] - LAYERS[0])
    at_turn = small.at_turn + more * (larger.at_turn - small.at_turn)
    in_all = small.in_all + more * (larger.in_all - small.in_all)
    return max(larger.before, int(at_turn), int(in_all), 0)


class Ledger(TorchDispatchMode):
    """Dispatch mode that counts the bytes of all live tensors created under it, on one device or (None) anywhere."""

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.kind = device and device.type
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}

    def enter(self, tensor: Tensor, *, anywhere: bool = False) -> None:
        storage = tensor.untyped_storage()
        is_here = anywhere or self.kind in (None, tensor.device.type)
        if is_here and storage._cdata not in self._known:  # a weak reference keeps the address from being reused
            self._known[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            self.live += storage.nbytes()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self.enter(value)
        if self.live > self.peak:
            self._remove_freed()
            self.peak = max(self.peak, self.live)
        return result

    def _remove_freed(self) -> None:
        for key, (storage, size) in list(self._known.items()):
            if storage.expired():
                self.live -= size
                del self._known[key]


class _Peaks(NamedTuple):
    """Peak bytes without weights and gradients."""

    before: int
    """Before the first decoder layer: that of the encoder of images, if there is one."""
    at_turn: int
    """Before the backward pass leaves the last layer."""
    in_all: int
    """Over the whole step."""


def _peaks(
    model: Any,
    shape: Shape,
    by_document: bool,
    kept: Memory,
    autocast: torch.dtype | None,
    device: torch.device,
    accumulates: bool,
    images: Mapping[str, Any],
) -> _Peaks:
    from torch._subclasses.fake_tensor import FakeTensorMode

    if by_document:
        varlen_attention.adopt(model)
    activation_checkpointing.arrange(model, kept)
    computing = torch.autocast(device.type, autocast) if autocast else contextlib.nullcontext()
    before: list[int] = []
    begun: list[int] = []
    knowing = KnownValues(device) if images else contextlib.nullcontext()
    with FakeTensorMode(), torch.device(device), knowing, Ledger(device) as ledger:
        weights = _enter_weights(model, device, ledger)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = sum(parameter.numel() * parameter.element_size() for parameter in trained)
        for parameter in trained if accumulates else ():
            parameter.grad = torch.zeros_like(parameter)

        def watch(layer: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.requires_grad:
                hidden.register_hook(lambda _: begun.append(ledger.peak))

        def enter_first(*_: object) -> None:
            if not before:  # it is computed again in the backward pass, if its activations were not kept
                before.append(ledger.peak)
                ledger.peak = ledger.live

        for value in images.values():
            if isinstance(value, Tensor):
                ledger.enter(value, anywhere=True)
        compilation.decoder_layers(model)[0].register_forward_pre_hook(enter_first)
        compilation.decoder_layers(model)[-1].register_forward_pre_hook(watch, with_kwargs=True)
        with computing:
            total = cross_entropy.rehearsal(model.train(), *_rehearsal_arguments(model, shape, images))
        total.backward()  # type: ignore[no-untyped-call]
    turn = begun[0] if begun else ledger.peak  # nothing is trained below the last layer
    return _Peaks(*(each - weights - gradients for each in (before[0], turn, ledger.peak)))


def of_forward_pass(
    model: Any, shape: Shape, *, by_document: bool, autocast: torch.dtype | None, device: torch.device
) -> int:
    """Peak bytes, without weights, of a forward pass without gradients to the last hidden states, simulated likewise.

    ``model``: on the meta device; two decoder layers are enough, because each frees what it has computed.

    Raises:
        Exception: of any kind, as ``rehearsed``.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    if by_document:
        varlen_attention.adopt(model)
    computing = torch.autocast(device.type, autocast) if autocast else contextlib.nullcontext()
    with FakeTensorMode(), torch.device(device), Ledger() as ledger, torch.no_grad(), computing:
        weights = _enter_weights(model, device, ledger)
        inputs, _ = _rehearsal_arguments(model, shape)
        model.eval().get_decoder()(**inputs, use_cache=False)
    return ledger.peak - weights


def _enter_weights(model: Any, device: torch.device, ledger: Ledger) -> int:
    """Give the model fake weights, and count them; returns their bytes."""
    give_storage(model, device)
    for parameter in model.parameters():
        ledger.enter(parameter)
    return ledger.live


def _rehearsal_arguments(
    model: Any, shape: Shape, images: Mapping[str, Any] = MappingProxyType({})
) -> tuple[dict[str, Tensor], Tensor]:
    """(model inputs, positions with logits (count,) of each row) for ``cross_entropy.rehearsal``."""
    if images:
        given = attention.inputs(images, images["packed"], model)
        given = {name: given[name] for name in cross_entropy.MODEL_INPUTS if name in given}
        return given, torch.zeros(-(-shape.trained // shape.rows), dtype=torch.int64)
    if varlen_attention.uses(model):
        ids = torch.zeros(1, shape.tokens, dtype=torch.int64)
        ends = torch.zeros(shape.rows + 1, dtype=torch.int32)
        more = varlen_attention.arguments(ends, shape.length)
        positions = shape.trained
    else:
        ids = torch.zeros(shape.rows, shape.length, dtype=torch.int64)
        more = {"attention_mask": torch.zeros(shape.rows, 1, shape.length, shape.length, dtype=model.dtype)}
        positions = -(-shape.trained // shape.rows)
    if base_model.has_virtual_tokens(model):
        return {"input_ids": ids}, torch.zeros(positions, dtype=torch.int64)
    return {"input_ids": ids, "position_ids": ids, **more}, torch.zeros(positions, dtype=torch.int64)


def give_storage(model: nn.Module, device: torch.device) -> None:
    """Replace tensors on the meta device by fake tensors on ``device``; shared parameters stay shared."""
    replaced: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in replaced:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                    replaced[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = replaced[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    prompts: dict[str, Tensor] = getattr(model, "prompt_tokens", {})  # PEFT's numbers of virtual tokens
    prompts.update({name: torch.empty(each.shape, dtype=each.dtype, device=device) for name, each in prompts.items()})


def depth(config: Any) -> int:
    """Number of decoder layers."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return max(int(text.num_hidden_layers), 1)
