"""What training holds at its peak, told before anything is loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from runner.config.schema import Memory
from runner.data.batches import Shape
from runner.models.kernels import activation_checkpointing, compilation, lm_head, varlen_attention
from runner.tasks import cross_entropy
from runner.train.memory import heap

LAYERS = 6, 8
"""Decoder layers of the models that are rehearsed for a deeper one; what the others take follows from the difference.

Fewer would not do: the peak is the largest of several sums, of which another one may lead in a shallow model."""
HEAP_HOLES, FEWER_HEAP_HOLES = 0.7, 0.2
"""What glibc's heap keeps empty between its blocks, as a part of activations and gradients; less of activations where
``heap`` is set, or will be when the run begins. Gradients come when activations go, and fit few of their places."""
ROUNDED = 0.05
"""What CUDA's allocator rounds up or cannot use, likewise; plus cuBLAS's workspace."""
CUBLAS_BYTES = 64 * 2**20


@dataclass(frozen=True)
class MemoryEstimate:
    """What training is expected to hold at its peak, in bytes by part."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """All that lives from a forward pass to the end of its backward pass, logits included."""
    libraries: int
    """What this process holds already, and what the allocator cannot use."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def in_shards(self, count: int, layers: int) -> MemoryEstimate:
        """Of one process of ``count``, each with its shard, and two layers whole: the one at work and the next."""
        return replace(
            self,
            weights=self.weights // count + 2 * self.weights // layers,
            gradients=self.gradients // count + self.gradients // layers,
            optimizer=self.optimizer // count,
        )


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
) -> int:
    """Bytes that a step holds at its peak beside weights and gradients, from a step on tensors without content.

    ``make`` gives the model on torch's meta device, adapted, with so many decoder layers; the real one has ``layers``.
    Every operation is dispatched as in training, and every tensor counted while it lives. It takes about a second, as
    it is done with two small models: decoder layers are equal. The peak may lie where the backward pass begins, with
    all activations, or later, with gradients: both are followed. ``accumulates``: gradients of earlier micro-batches
    are there from the beginning. ``head_in_loss``: the loss computes the logits where it can, see ``head``.

    Raises:
        Exception: whatever a model does that looks into its tensors, or that a small one cannot be made.
    """

    def peaks(count: int) -> _Peaks:
        model = make(count)
        if head_in_loss:
            lm_head.adopt(model)
        return _peaks(model, shape, by_document, kept, autocast, device, accumulates)

    if layers <= LAYERS[1]:
        return max(peaks(layers).in_all, 0)
    small, larger = map(peaks, LAYERS)
    more = (layers - LAYERS[0]) / (LAYERS[1] - LAYERS[0])
    at_turn = small.at_turn + more * (larger.at_turn - small.at_turn)
    in_all = small.in_all + more * (larger.in_all - small.in_all)
    return max(int(at_turn), int(in_all), 0)


def by_formula(config: Any, shape: Shape, *, kept: Memory, dtype_bytes: int, full: bool, scores: bool) -> int:
    """The same from the numbers of a Llama-like decoder, for what cannot be rehearsed.

    Kept for the backward pass of a layer, for each token, in values: the inputs of both norms (2 h, 4 h where the norms
    train), queries, keys, values and the result of attention (4 q), gate and up of the MLP (2 m). Below float32 the
    norms keep their input in float32. On top, the gradients of the widest place (3 m) and what is computed again there,
    the mask of packed rows, and logits: once, and a chunk of them twice in float32. ``scores``: those of attention are
    kept as well.
    """
    text = _text(config)
    hidden, tokens = text.hidden_size, shape.tokens
    wide = getattr(text, "intermediate_size", None) or 4 * hidden
    wide = max(wide) if isinstance(wide, Sequence) else wide
    heads = getattr(text, "num_attention_heads", None) or 0
    queries = heads * getattr(text, "head_dim", 0) or hidden
    narrow = (4 if full else 2) * hidden + 4 * queries
    of_attention = tokens * (narrow * dtype_bytes + (2 * hidden * 4 if dtype_bytes < 4 else 0))
    of_attention += 2 * heads * tokens * shape.length * dtype_bytes if scores else 0
    layer = of_attention + tokens * 2 * wide * dtype_bytes
    of_each = {"speed": layer, "balanced": of_attention, "min": tokens * hidden * dtype_bytes}[kept]
    activations = (depth(config) - 1) * of_each + layer + tokens * (2 * hidden + 2 * wide) * dtype_bytes
    passing = tokens * 3 * wide * dtype_bytes + shape.rows * shape.length**2 * dtype_bytes
    logits = shape.trained * text.vocab_size
    return activations + passing + logits * dtype_bytes + 2 * min(logits, cross_entropy.CHUNK_VALUES) * 4


def allocator_waste(device: torch.device, activations: int, gradients: int) -> int:
    """Bytes that the allocator keeps without use for so many bytes that come and go."""
    if device.type == "cuda":
        return int(ROUNDED * (activations + gradients)) + CUBLAS_BYTES
    return int((FEWER_HEAP_HOLES if heap.is_glibc() else HEAP_HOLES) * activations + HEAP_HOLES * gradients)


class Ledger(TorchDispatchMode):
    """Counts the bytes of all tensors that operations under it make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}

    def enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:  # an address is not used again as long as there is a weak reference to it
            self._known[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            self.live += storage.nbytes()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for value in tree_iter(made):
            if isinstance(value, Tensor):
                self.enter(value)
        if self.live > self.peak:
            self._strike_out()
            self.peak = max(self.peak, self.live)
        return made

    def _strike_out(self) -> None:
        for key, (storage, size) in list(self._known.items()):
            if storage.expired():
                self.live -= size
                del self._known[key]


class _Peaks(NamedTuple):
    """Bytes above weights and gradients."""

    at_turn: int
    """Until the last layer's backward pass is done."""
    in_all: int


def _peaks(
    model: Any,
    shape: Shape,
    by_document: bool,
    kept: Memory,
    autocast: torch.dtype | None,
    device: torch.device,
    accumulates: bool,
) -> _Peaks:
    from torch._subclasses.fake_tensor import FakeTensorMode

    if by_document:
        varlen_attention.adopt(model)
    activation_checkpointing.arrange(model, kept)
    computing = torch.autocast(device.type, autocast) if autocast else contextlib.nullcontext()
    begun: list[int] = []
    with FakeTensorMode(), torch.device(device), Ledger() as ledger:
        _give_storage(model, device)
        for parameter in model.parameters():
            ledger.enter(parameter)
        weights = ledger.live
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = sum(parameter.numel() * parameter.element_size() for parameter in trained)
        for parameter in trained if accumulates else ():
            parameter.grad = torch.zeros_like(parameter)

        def watch(layer: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            hidden.register_hook(lambda _: begun.append(ledger.peak))

        compilation.decoder_layers(model)[-1].register_forward_pre_hook(watch, with_kwargs=True)
        with computing:
            total = cross_entropy.rehearsal(model.train(), **_asked(model, shape))
        total.backward()  # type: ignore[no-untyped-call]
    return _Peaks(begun[0] - weights - gradients, ledger.peak - weights - gradients)


def _asked(model: Any, shape: Shape) -> dict[str, Any]:
    """What the model is called with, and the positions that have logits: (count,) of each row."""
    if varlen_attention.uses(model):
        ids = torch.zeros(1, shape.tokens, dtype=torch.int64)
        ends = torch.zeros(shape.rows + 1, dtype=torch.int32)
        asked = varlen_attention.arguments(ends, shape.length)
        kept = shape.trained
    else:
        ids = torch.zeros(shape.rows, shape.length, dtype=torch.int64)
        asked = {"attention_mask": torch.zeros(shape.rows, 1, shape.length, shape.length, dtype=model.dtype)}
        kept = -(-shape.trained // shape.rows)
    return {"asked": {"input_ids": ids, "position_ids": ids, **asked}, "kept": torch.zeros(kept, dtype=torch.int64)}


def _give_storage(model: nn.Module, device: torch.device) -> None:
    """Replace what is on the meta device by what pretends to lie on ``device``; shared parameters stay shared."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


def depth(config: Any) -> int:
    """How many decoder layers a model has."""
    return max(int(_text(config).num_hidden_layers), 1)


def _text(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


ROOM = 0.95
"""Of the free memory, for micro_batch_size=auto."""


@dataclass(frozen=True)
class Expected:
    """Parameters, memory against the device, and operations."""

    counts: dict[str, int]
    """Parameters as ``models.describe`` counts them."""
    memory: MemoryEstimate
    held_bytes: int
    """What this process holds of the device's memory already."""
    total_bytes: int
    """What the device has for this process, in use or not."""
    free_bytes: int
    flops_per_token: float
    layers: int
    """Equal ones that make up the decoder; 0 where there is no list of them."""

    @property
    def fits(self) -> bool:
        """With a little room beside what else is running."""
        return self.memory.total - self.held_bytes <= ROOM * self.free_bytes
