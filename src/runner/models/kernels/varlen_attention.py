"""Attention by document: compute each packed document separately, without a mask and without masked-out scores.

Registered in transformers as the attention implementation ``by_document``. If the caller passes the document
boundaries (``cu_seq_lens_q``, as for FlashAttention), torch's varlen attention computes them on CUDA, and torch's CPU
flash kernel one document at a time on a CPU, where documents may share their first tokens. Without boundaries it is
torch's SDPA with transformers' mask.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from runner.models.kernels import base_model, compat, isolation, varlen_cpu

NAME = "by_document"
UNKNOWN = ("softcap", "s_aux", "position_bias", "head_mask")
"""Arguments of attention functions that change the result and that these kernels do not support."""
PREFIXES = "attention_prefixes"
ARGUMENTS = "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "attention_parts", PREFIXES
"""Arguments that the model passes on to its attention, see ``arguments``."""
AttentionPart = tuple[int, int, int]
"""Neighbouring documents that one call of a GPU kernel computes: their number, their tokens, and an upper bound of
their length, see ``data.boundaries``."""
CUDNN_CAPABILITIES = 9, 10
"""Major compute capabilities for which torch's varlen attention takes cuDNN (Hopper and the first Blackwell)."""
SHARING: dict[str, Any] = {}
"""Arguments for torch's varlen attention if heads share keys and values (GQA). Empty for torch 2.11, which detects it.
Filled by ``_register``, since compiled code cannot inspect a signature."""


def install(model: Any, longest: int, autocast: torch.dtype | None = None) -> str:
    """Switch ``model`` to attention by document if documents stay isolated. Returns "", or the reason why not.

    A model may cap or bias its scores, use chunks shorter than ``longest`` (on a CPU also: a window), not pass the
    boundaries of documents to its attention, or mix tokens by other means, such as convolutions. ``autocast``: as in
    training.
    """
    if reason := obstacle(model):
        return reason
    base = base_model.of(model)
    before = base.config._attn_implementation
    adopt(model)
    reason = isolation.problem(model, lambda batch: model(**inputs(batch)).logits, longest, autocast, packed=True)
    if reason:
        base.set_attn_implementation(before)
        return f"{type(base).__name__} does not support attention by document: {reason}"
    return ""


def adopt(model: Any) -> None:
    """Like ``install`` but without the comparison."""
    if not obstacle(model):
        base_model.of(model).set_attn_implementation(NAME)


def obstacle(model: Any) -> str:
    """The reason why a model cannot use attention by document, or "". Checks its structure; no forward pass."""
    base = base_model.of(model)
    if base_model.has_virtual_tokens(model):
        return "the adapter puts virtual tokens before each row"
    if base_model.reads_images(base.config):
        return f"{type(base).__name__} reads images: attention by document is not proven for it"
    if not compat.can_change_attention(base):
        return "attention by document needs transformers >= 4.54"
    if base.config._attn_implementation != "sdpa" or not getattr(base, "_supports_attention_backend", False):
        return f"{type(base).__name__} has its own attention implementation"
    return "" if _register() else "attention by document needs a newer torch or transformers"


def uses(model: Any) -> bool:
    return str(model.config._attn_implementation) == NAME


def inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the model's forward for a batch of packed rows, laid end to end: (1, B * T)."""
    flat = {name: batch[name].reshape(1, -1) for name in ("input_ids", "position_ids")}
    ends, parts, longest = batch["document_ends"], batch["attention_parts"], batch["longest"]
    return {**flat, "use_cache": False, **arguments(ends, longest, parts, batch.get(PREFIXES))}


def arguments(
    ends: Tensor, longest: int, parts: Sequence[AttentionPart] = (), prefixes: Tensor | None = None
) -> dict[str, Any]:
    """Keyword arguments of the model's forward, in addition to one row of tokens (1, T).

    ``ends``: (documents + 1,) int32, document boundaries from 0 to T; values may repeat. ``longest``: upper bound of
    the document length of all batches. ``parts``: the documents that one call of a GPU kernel computes; by default all.
    ``prefixes``: on a CPU, (documents, 2) int64, the first position and the number of tokens that each document attends
    to before its own, which are the first ones of a document before it; None: none.
    The mask is a dummy: with a 4D mask, transformers does not build its own.
    """
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=ends.device)
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].maybe_mark_dynamic(ends, 0)  # else another number of documents would recompile
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    shared = {} if prefixes is None else {PREFIXES: prefixes}
    return {"attention_mask": mask, **lengths, "attention_parts": tuple(parts), **shared}


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    attention_parts: Sequence[AttentionPart] = (),
    attention_prefixes: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query (B, H, T, D), key and value (B, Hkv, T, D) → (B, T, H, D).

    Raises:
        NotImplementedError: document boundaries with an argument that the kernels do not support (see ``install``).
    """
    if cu_seq_lens_q is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        options = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options, **others)  # type: ignore
    longest = max_length_q or query.shape[2]
    window = -1 if sliding_window is None or sliding_window >= longest else sliding_window - 1
    unsupported = [name for name in UNKNOWN if others.get(name) is not None]
    on_cpu = query.device.type == "cpu"
    unsupported += ["dropout"] * bool(dropout) + ["sliding_window"] * (window >= 0 and on_cpu)
    unsupported += [PREFIXES] * (attention_prefixes is not None and not on_cpu)
    if unsupported or not getattr(module, "is_causal", True) or query.shape[0] != 1:
        raise NotImplementedError(f"attention with {', '.join(unsupported) or 'several rows, or without causality'}")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if torch.is_autocast_enabled(query.device.type):  # autocast casts torch's own attention, but not these kernels
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if on_cpu:
        out, _ = varlen_cpu.attend(query, key, value, cu_seq_lens_q, scale, attention_prefixes)
        return out, None
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, heads, D)
    sharing = SHARING if query.shape[1] != key.shape[1] else {}
    kernel = partial(varlen_attn, scale=scale, window_size=(window, 0), **sharing)
    parts = attention_parts or [(len(cu_seq_lens_q) - 1, query.shape[2], longest)]
    return by_parts(kernel, q, k, v, cu_seq_lens_q, parts).unsqueeze(0), None


def by_parts(
    kernel: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, ends: Tensor, parts: Sequence[AttentionPart]
) -> Tensor:
    """Call ``kernel``, torch's varlen attention, once for each part.

    ``query``: (T, H, D), ``key`` and ``value``: (T, Hkv, D) → (T, H, D).
    """
    sizes = [tokens for _, tokens, _ in parts]
    outputs, documents, tokens = [], 0, 0
    for q, k, v, part in zip(query.split(sizes), key.split(sizes), value.split(sizes), parts, strict=True):
        own = ends if len(parts) == 1 else ends[documents : documents + part[0] + 1] - tokens
        outputs.append(kernel(q, k, v, own, own, part[2], part[2]))  # the same object twice: cuDNN asks for it
        documents, tokens = documents + part[0], tokens + part[1]
    return outputs[0] if len(parts) == 1 else torch.cat(outputs)


def workspace_bytes(config: Any, positions: int, device: torch.device) -> int:
    """Bytes that cuDNN's backward pass allocates for a layer: float32 gradients of the queries of ``positions``, which
    are ``documents * longest`` of a call. 0 where torch chooses another kernel."""
    if device.type != "cuda" or not torch.backends.cuda.cudnn_sdp_enabled():
        return 0
    if torch.cuda.get_device_capability(device)[0] not in CUDNN_CAPABILITIES:
        return 0
    settings = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = int(settings.num_attention_heads)
    width = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    return positions * heads * int(width) * 4


def _register() -> bool:
    """Register the implementation in transformers; False if transformers or torch is too old."""
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    except ImportError:
        return False
    if torch.cuda.is_available():
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            return False
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            SHARING["enable_gqa"] = True
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return True
