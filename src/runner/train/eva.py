"""EVA: lora_A begins with the directions in which the inputs of its layer vary most (https://arxiv.org/abs/2410.07170).

PEFT computes them by an incremental SVD of the inputs at trained tokens, over batches of the first steps, until they
stay the same. lora_B begins as zero, so the model begins as its base. Ranks are not moved between layers (PEFT's
``rho=1``): all layers keep ``lora.r``, so memory is known before, and adapters of several runs can be averaged.

The first attempt of a run writes the directions to the run folder. Later ones read them.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runner.data.batches import Batches
from runner.data.collator import Batch
from runner.errors import ConfigError, Fault
from runner.files import write_atomic
from runner.models.kernels import attention, base_model, score_head
from runner.tasks.cross_entropy import MODEL_INPUTS
from runner.train.distributed.ranks import Ranks
from runner.train.distributed.wrap import on_device

KEY = "lora.init_lora_weights"
BATCHES = 64
"""Micro-batches whose inputs are decomposed; they are passed through the model again until the directions stay."""
MOST_PASSES = 256
"""Forward passes after which directions that still change are given up."""
log = logging.getLogger("runner")
Progress = Callable[[int, int], None]


def begin(
    model: Any, batches: Batches, autocast: torch.dtype | None, ranks: Ranks, file: Path, progress: Progress
) -> None:
    """Give each lora_A of the model its directions, in place: those of ``file``, or new ones, which are kept there.

    Every rank computes them of the same batches. ``progress``: called with (passes done, most passes). Call it before
    compiling.

    Raises:
        ConfigError: a layer has inputs that cannot be decomposed, batches are too small, or directions keep changing.
    """
    from safetensors.torch import load_file, save

    if ranks.broadcast(file.is_file()):
        directions = load_file(file)
    else:
        directions = _computed(model, batches, autocast, progress)
        if ranks.rank == 0:
            write_atomic(file, save({name: each.cpu().contiguous() for name, each in directions.items()}))
    with torch.no_grad():
        for name, layer in _layers(model):
            layer.lora_A["default"].weight.copy_(directions[name])


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    """The LoRA layers, by name."""
    from peft.tuners.lora.layer import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _computed(model: Any, batches: Batches, autocast: torch.dtype | None, progress: Progress) -> dict[str, Tensor]:
    """Name of each LoRA layer → orthonormal directions (r, inputs), float32."""
    from peft.tuners.lora.config import EvaConfig
    from peft.tuners.lora.eva import get_eva_state_dict

    config = copy.copy(model.peft_config["default"])
    config.eva_config = EvaConfig(rho=1.0)
    given = _given(model, batches, config.r)
    device, base, passes = next(model.parameters()).device, base_model.of(model), itertools.count(1)
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
    _check_layers(model, decoder, config.r)

    def forward(_: Any, batch: _Given) -> None:
        done = next(passes)
        progress(done, MOST_PASSES)
        if done > MOST_PASSES:
            raise ConfigError(_unsettled(batches))
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            decoder(**batch.inputs, use_cache=False)

    with _same_parameters_trained(model):
        directions: dict[str, Tensor] = get_eva_state_dict(
            model,
            given,
            peft_config=config,
            forward_fn=forward,
            prepare_model_inputs_fn=lambda batch, _: batch,
            prepare_layer_inputs_fn=_at_tokens,
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )
    log.info(f"lora_A begins with directions of the data (EVA), after {next(passes) - 1} forward passes")
    return directions


@contextlib.contextmanager
def _same_parameters_trained(model: Any) -> Iterator[None]:
    """PEFT trains all of an adapter that was disabled, also an A that was frozen (``lora.freeze_a``)."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    yield
    for parameter in frozen:
        parameter.requires_grad_(False)


@dataclass(frozen=True)
class _Given:
    """A micro-batch: the inputs of the decoder, and the flattened positions whose activations are decomposed."""

    inputs: Mapping[str, Any]
    positions: Tensor

    def to(self, _: torch.device) -> _Given:
        """PEFT calls this; the tensors are on the device already."""
        return self


def _given(model: Any, batches: Batches, rank: int) -> list[_Given]:
    """The first micro-batches with enough tokens, as of one process: PEFT needs twice as many as directions."""
    alone, device = copy.copy(batches), next(model.parameters()).device
    alone.rank, alone.world, alone.per_micro_batch = 0, 1, batches.rows_per_batch
    steps = -(-BATCHES * alone.per_micro_batch // alone.order.per_step)
    micro_batches = itertools.islice((batch for step in range(steps) for batch in alone.step(step)), BATCHES)
    given = [_of_batch(model, on_device(batch, device)) for batch in micro_batches]
    if enough := [each for each in given if len(each.positions) >= 2 * rank]:
        return enough
    most = max((len(each.positions) for each in given), default=0)
    problem = f"needs batches of at least {2 * rank} trained tokens (twice lora.r), and the largest has {most}"
    raise ConfigError(Fault(KEY, problem, "raise train.per_device_batch_size, or lower lora.r", "eva"))


def _of_batch(model: Any, batch: Batch) -> _Given:
    arguments = attention.inputs(batch, batch["packed"], model)
    inputs = {name: arguments[name] for name in MODEL_INPUTS if arguments.get(name) is not None}
    positions = batch["trained_at"]
    if not len(positions) or list(score_head.modules(model)):  # prompts, or documents with one label: all their tokens
        spans = [torch.arange(int(start), int(end)) for _, start, end in batch["spans"]]
        positions = torch.cat(spans).to(batch["input_ids"].device)
    return _Given(inputs, positions)


def _at_tokens(layer_input: Any, batch: _Given, name: str) -> Tensor:
    """The activations (positions, inputs) of a layer at the trained tokens."""
    activations = layer_input[0] if isinstance(layer_input, tuple) else layer_input
    rows: Tensor = activations.reshape(-1, activations.shape[-1])
    if len(rows) != batch.inputs["input_ids"].numel():
        problem = f"EVA cannot decompose the inputs of {name}: it is not computed for each token"
        raise ConfigError(Fault("lora.target_modules", problem, f"leave it out, or set {KEY}=true"))
    return rows[batch.positions]


def _check_layers(model: Any, decoder: Any, rank: int) -> None:
    inside = set(decoder.modules())
    for name, layer in _layers(model):
        linear = hasattr(layer, "in_features") and layer in inside and layer.lora_A
        if not linear or layer.in_features < 2 * rank:
            problem = f"EVA cannot decompose the inputs of {name}: it needs a linear layer of the decoder"
            problem += f" with at least {2 * rank} inputs (twice lora.r)"
            raise ConfigError(Fault("lora.target_modules", problem, f"leave it out, or set {KEY}=true"))


def _unsettled(batches: Batches) -> Fault:
    problem = f"EVA's directions still change after {MOST_PASSES} batches of {batches.rows_per_batch} rows"
    return Fault(KEY, problem, "raise train.per_device_batch_size, or lower lora.r", "eva")
