"""``Quant``: what a quantization back end declares. An option of the group ``quant`` returns one.

Everything that depends on the quantization (plan, header, memory estimate, ``compile=auto``, fused LoRA, the supported
adapters) reads it here, so a new back end is one Python file and one YAML file.

Only the decoder's layers are quantized; embeddings, norms and the LM head keep the model's dtype. They are not upcast
to float32 as by ``peft.prepare_model_for_kbit_training``: the norms of every supported family compute in float32
anyway, and a float32 head costs memory (1 GiB for Llama-3's vocabulary) for nothing.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Place(NamedTuple):
    """An attribute of an object of a quantization library that is a tensor."""

    owner: Any
    name: str

    def get(self) -> Tensor:
        tensor: Tensor = getattr(self.owner, self.name)
        return tensor.detach()

    def put(self, tensor: Tensor) -> None:
        setattr(self.owner, self.name, tensor)


class Places(NamedTuple):
    """All tensors of a quantized weight."""

    sharded: list[Place]
    """Those that grow with the weight: its bytes and scales."""
    small: list[Place]
    """Tables, of at most a few KiB."""


class Quant(Protocol):
    """A quantization back end. Derive from it: then only the members with other values need to be written.

    Creating one imports no library.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """How the weights are stored, for the header and the plan: ``nf4 (bitsandbytes)``."""
        ...

    plain: bool = False
    """Whether all weights stay as they are: full fine-tuning and every adapter work."""
    shards: bool = False
    """Whether FSDP can shard the quantized weights: ``places`` names their tensors."""
    methods: tuple[str, ...] = ("lora",)
    """The PEFT methods that work on these weights, by PEFT's names."""
    graph_breaks: str = ""
    """Why the layers cause graph breaks under torch.compile; empty if they do not."""
    rounds_activations: bool = False
    """Whether products round activations too, so that outputs depend a little on what is computed beside them."""
    unpacks: bool = False
    """Whether ``unpack`` gives the dense weight. If so, plain LoRA layers are fused, whatever class PEFT has for them;
    else they compute as PEFT does."""

    def library_config(self, device: torch.device | str) -> Any:  # noqa: ARG002
        """The ``quantization_config`` for ``from_pretrained``; None: ``after_load`` quantizes.

        Raises:
            ConfigError: an option that does not suit the device.
        """
        return None

    def selects(self, layer: nn.Module) -> bool:
        """Whether this layer of a model without weights would be quantized. The LM head never is."""
        from torch import nn

        return isinstance(layer, nn.Linear)

    spares: bool = False
    """Whether ``library_config`` can be told what stays as it is, by ``llm_int8_skip_modules``."""

    @abstractmethod
    def holds(self, layer: nn.Module) -> bool:
        """Whether the weight of this layer of a loaded model is quantized; it has ``in_features``, ``out_features``."""
        ...

    def quantizes(self, layer: nn.Module) -> bool:
        """Whether the weight of this layer is quantized (``holds``), or would be: ``selects``, without weights."""
        is_empty = any(weight.is_meta for weight in layer.parameters(recurse=False))
        is_wanted = not getattr(layer, "stays_plain", False)  # as what reads the images of a model does
        return self.selects(layer) and is_wanted if is_empty else self.holds(layer)

    packs: bool = False
    """Whether ``pack`` quantizes a weight: then LoftQ works."""

    def pack(self, weight: Tensor) -> tuple[Tensor, Any]:
        """(the quantized weight, what ``unpack`` needs beside it) of a dense weight (rows, columns)."""
        raise AssertionError(f"{self.name} packs no weight of shape {tuple(weight.shape)}")

    @abstractmethod
    def bytes_of(self, rows: int, columns: int) -> float:
        """Bytes of a quantized weight of this shape, including its scales."""
        ...

    @contextlib.contextmanager
    def loading_for(self, device: torch.device) -> Iterator[Quant]:  # noqa: ARG002
        """Inside the block a model is loaded on the CPU that will compute on ``device``.

        Gives the quantization to load it with: ``auto`` means there what it means on ``device``.
        """
        yield self

    def after_load(self, model: nn.Module) -> None:  # noqa: ARG002
        """Prepare a loaded model for training, in place."""
        return

    def state(self, layer: Any) -> Any:  # noqa: ARG002
        """What ``unpack`` needs besides the layer's weight: scales, for example."""
        return None

    def places(self, layer: Any) -> Places:  # noqa: ARG002
        """Where the tensors of the layer's quantized weight are."""
        raise AssertionError(f"{self.name}: the weights are not sharded")

    def unpack(self, weight: Tensor, state: Any, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The dense weight (rows, columns) in ``dtype``, written to ``out`` if given. The default casts the weight."""
        return weight.to(dtype) if out is None else out.copy_(weight)
