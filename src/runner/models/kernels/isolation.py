"""Prove on a small batch that a model computes each document as it computes the document alone.

Two proofs, because each detects what the other cannot:

- Gradients: the outputs of a document have a gradient of exactly zero with respect to all tokens that they must not
  depend on (later tokens, other documents, padding), also in low precision and with quantized weights.
- Outputs: they equal those of the document alone up to rounding. This detects wrong positions, windows and chunks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from runner.errors import RunnerError
from runner.models.kernels import lm_head, score_head

NOT_FINITE = "its outputs are not finite numbers"
REACH_NAMES = ("window", "chunk", "conv", "kernel", "block_size", "topk", "original_max_position")
"""Parts of the names of settings that count tokens: a longer document is computed differently from a shorter one."""
SHORT, BEYOND, LAST, PADDING = 4, 8, 3, 1
"""Tokens of the first document, of the second one beyond the reach of the model, of the third one, and of the padding.
They are few: with FSDP the trial is computed on a CPU."""
TOLERANCE, LOOSE_TOLERANCE = 1e-3, 0.1
"""Allowed relative difference of outputs, in float32 and in lower precision. The median over the tokens of a part of a
document counts: in low precision rounding may send a single token to another expert."""

Forward = Callable[[dict[str, Any]], Tensor]
"""A batch → the model's logits: (B, T, V), or (1, B * T, V) for documents in a single row."""


def problem(model: Any, forward: Forward, longest: int | None, autocast: torch.dtype | None, *, packed: bool) -> str:
    """The reason why ``forward`` does not compute each document as the model computes it alone, or "".

    Costs one forward and backward pass of two rows, and one forward pass of each document. The rows are about as long
    as the largest window, chunk or convolution that is shorter than ``longest``, the maximum length of a document
    (None: unlimited). ``packed``: a row contains three documents and padding, else one document and padding.
    """
    trial = _trial(model, longest, packed=packed)
    try:
        with _computing(model, autocast), _hidden_states(model):
            return _gradient_problem(model, forward, trial, packed) or _output_problem(model, forward, trial, packed)
    except RunnerError:
        raise
    except Exception as error:  # a model's code may raise anything if it does not support these inputs
        if "out of memory" in str(error):
            raise
        return str(error).partition("\n")[0] or type(error).__name__


@torch.no_grad()
def padding_problem(model: Any, forward: Forward, autocast: torch.dtype | None) -> str:
    """The reason why ``forward`` does not give a row the outputs (B, …) that its document has alone, or ""."""
    trial = _trial(model, None, packed=False)
    with _computing(model, autocast):
        model.eval()
        together, ids = forward(trial.batch), trial.batch["input_ids"].flatten()
        alone = torch.cat([model(input_ids=ids[document][None]).logits for document in trial.documents])
    if not together.isfinite().all():
        return NOT_FINITE
    is_close = float((together - alone).norm() / alone.norm()) <= _tolerance(model, together)
    return "" if is_close else "a document with padding behind it does not have the outputs that it has alone"


class _Trial(NamedTuple):
    batch: dict[str, Any]
    documents: list[slice]
    """The positions of each document in the flattened batch."""
    seen: list[slice]
    """Parts of documents, one of each row. Their outputs depend on no token outside."""
    reach: int


def _trial(model: Any, longest: int | None, *, packed: bool) -> _Trial:
    """Two rows of random tokens, as ``data.batches`` would build them."""
    reach = _reach(model, longest)
    long = reach + BEYOND if longest is None else min(reach + BEYOND, max(longest - SHORT - LAST - PADDING, SHORT))
    rows = [[SHORT, long, LAST]] * 2 if packed else [[long], [SHORT]]
    width = max(map(sum, rows)) + PADDING
    positions, documents, ends = torch.zeros(2, width, dtype=torch.int64), [], [0]
    for row, lengths in enumerate(rows):
        start = row * width
        for length in lengths:
            positions.view(-1)[start : start + length] = torch.arange(length)
            documents.append(slice(start, start + length))
            start += length
            ends.append(start)
        ends.append((row + 1) * width)
    ends += ends[-1:] * 2  # as in training: the last end is repeated
    first = [documents[2], documents[4]] if packed else documents
    halves = [slice(part.start, (part.start + part.stop + 1) // 2) for part in first]
    seen = [first[0], halves[1]] if packed else halves
    device = model.get_input_embeddings().weight.device
    batch = {
        "input_ids": _tokens(model, width).to(device),
        "position_ids": positions.to(device),
        "document_ends": torch.tensor(ends, dtype=torch.int32, device=device),
        "last_at": torch.tensor([document.stop - 1 for document in documents], device=device),
        "longest": longest or long,
        "attention_parts": [(len(rows[0]) + 1, width, width), (len(rows[1]) + 3, width, width)],
    }
    return _Trial(batch, documents, seen, reach)


def _reach(model: Any, longest: int | None) -> int:
    """The largest number of tokens below ``longest`` from which on the model computes differently."""
    limit = longest or 2**62
    return max((size for size in _reaches(_settings(model).to_dict()) if size < limit), default=SHORT)


def _settings(model: Any) -> Any:
    return model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config


def _reaches(settings: Mapping[str, Any]) -> Iterator[int]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _reaches({str(key): each for key, each in value.items()})
        elif any(part in name for part in REACH_NAMES):
            yield from (size for size in (value if isinstance(value, list) else [value]) if type(size) is int)


def _tokens(model: Any, width: int) -> Tensor:
    """Random ids (2, width) without special tokens, which are among the first ids, and without padding."""
    config = _settings(model)
    highest = min(int(config.vocab_size), 1000)
    ids = torch.randint(min(4, highest - 1), highest, (2, width), generator=torch.Generator().manual_seed(0))
    padding = getattr(config, "pad_token_id", None)
    return ids.where(ids != (-1 if padding is None else padding), min(4, highest - 1))


@contextlib.contextmanager
def _computing(model: Any, autocast: torch.dtype | None) -> Iterator[None]:
    """The precision of training inside the block; random state and mode of the model as before afterwards."""
    training, device = model.training, model.get_input_embeddings().weight.device
    try:
        forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
        with forked, torch.autocast(device.type, autocast, enabled=autocast is not None):
            yield
    finally:
        model.train(training)


@contextlib.contextmanager
def _hidden_states(model: Any) -> Iterator[None]:
    """Let the model return hidden states instead of logits if possible: the logits of a long row need much memory."""
    head = score_head.of(model)
    if head is None and not lm_head.obstacle(model):
        head = lm_head.of(model)
    with contextlib.nullcontext() if head is None else lm_head.bypassed(head):
        yield


def _gradient_problem(model: Any, forward: Forward, trial: _Trial, packed: bool) -> str:
    embedded: list[Tensor] = []

    def keep(module: object, args: object, output: Tensor) -> Tensor:
        embedded.append(output if output.requires_grad else output.detach().requires_grad_())
        return embedded[-1]

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            model.train()
            outputs = _flat(forward(trial.batch), trial)
            chosen = torch.cat([outputs[part] for part in trial.seen]).float()
            if not outputs.isfinite().all():
                return NOT_FINITE
            weights = torch.randn(chosen.shape, generator=torch.Generator().manual_seed(0)).to(chosen.device)
            (gradient,) = torch.autograd.grad((chosen * weights).sum(), embedded[:1])
    finally:
        hook.remove()
    if not gradient.isfinite().all():
        return "its gradients are not finite numbers"
    gradient = _flat(gradient, trial)
    unseen = torch.ones(len(gradient), dtype=torch.bool, device=gradient.device)
    for part in trial.seen:
        unseen[part] = False
    if not gradient[unseen].any():
        return ""
    return "documents packed into one row attend to each other" if packed else "its outputs depend on later tokens"


@torch.no_grad()
def _output_problem(model: Any, forward: Forward, trial: _Trial, packed: bool) -> str:
    model.eval()
    together, ids = _flat(forward(trial.batch), trial), trial.batch["input_ids"].flatten()
    tolerance = _tolerance(model, together)
    for document in trial.documents:
        alone = model(input_ids=ids[document][None], use_cache=False).logits[0].float()
        alone = alone[-len(ids[document]) :]  # without virtual tokens
        difference = (together[document].float() - alone).norm(dim=-1) / alone.norm(dim=-1)  # (tokens,)
        parts = difference[1 : trial.reach], difference[trial.reach :]
        if any(float(part.median()) > tolerance for part in parts if len(part)):
            kind = "a packed document" if packed else "a document with padding behind it"
            return f"{kind} does not have the outputs that it has alone"
    return ""


def _tolerance(model: Any, outputs: Tensor) -> float:
    is_exact = outputs.dtype == torch.float32 and not torch.is_autocast_enabled(outputs.device.type)
    rounds = getattr(getattr(model, "quant", None), "rounds_activations", False)
    return TOLERANCE if is_exact and not rounds else LOOSE_TOLERANCE


def _flat(outputs: Tensor, trial: _Trial) -> Tensor:
    """(B, T, …) or (1, B * T, …) → (B * T, …), without virtual tokens in front of a row (prompt tuning)."""
    width = trial.batch["input_ids"].numel() // len(outputs)
    return outputs[:, -width:].flatten(0, 1)
