"""Models: reading them, loading them to be trained, saving them so that plain transformers and PEFT can load them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.errors import ConfigError, Fault
from runner.models import adapter, hub, model_folder, quantization, shards
from runner.models.dtypes import dtype_argument, dtype_for
from runner.models.sources import ModelSource

if TYPE_CHECKING:
    import torch
    from torch import nn

    from runner.models.quantization import Quant

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from runner.models.sources import ModelSource


PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|endoftext|>", "<unk>")
"""Tried in this order where a tokenizer names no padding token; ordinary text holds none of them."""

log = logging.getLogger(__name__)


def resolve(source: ModelSource) -> ModelSource:
    """The same model with all but its weights at hand: converted if it must be, a Hub revision pinned to its commit.

    Raises:
        ConfigError: it cannot be had, or its folder lacks something.
    """
    if source.make is not None:
        return replace(source, path=str(source.make()), make=None)
    if Path(source.path).is_dir():
        model_folder.check(Path(source.path))
        return source
    folder = hub.fetch(source.path, source.revision, weights=False, code=source.trust_remote_code)
    model_folder.check(folder, weights=False)
    return replace(source, revision=folder.name)


def architecture(source: ModelSource) -> Any:
    """The transformers configuration, read without the weights.

    Raises:
        ConfigError: an unknown architecture, code of the model's own, or weights already quantized.
    """
    from transformers import AutoConfig

    folder = _folder(source, weights=False)
    with _told(source):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=source.trust_remote_code)
    if source.trust_remote_code and getattr(config, "auto_map", None):
        log.warning("model.trust_remote_code=true: Python code that came with %s runs on this machine", source.name)
    if getattr(config, "quantization_config", None):
        remedy = "name the model it was made from, and choose how to quantize it with quant=4bit or quant=8bit"
        raise ConfigError(Fault("model.path", "its weights are quantized already", remedy, source.path))
    return config


def tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer, with a padding token.

    One that has none gets a special token which its vocabulary holds already: the embeddings are not resized. The last
    resort is the end-of-text token, which is safe here, as padding is left out of the loss by position, not by its id.

    Raises:
        ConfigError: none, an unreadable one, or one with more tokens than the model has embeddings.
    """
    from transformers import AutoTokenizer

    with _told(source):
        made = AutoTokenizer.from_pretrained(_folder(source, weights=False), trust_remote_code=source.trust_remote_code)
    if made.pad_token is None:
        vocabulary = made.get_vocab()
        made.pad_token = next((token for token in PAD_TOKENS if token in vocabulary), made.eos_token)
    if made.pad_token is None:
        remedy = "name one in tokenizer_config.json (pad_token)"
        raise ConfigError(
            Fault("model.path", "its tokenizer has neither a padding nor an end token", remedy, source.path)
        )
    rows = architecture(source).get_text_config().vocab_size
    if len(made) > rows:
        problem = f"its tokenizer has {len(made)} tokens, the model embeds {rows}: they do not belong together"
        raise ConfigError(Fault("model.path", problem, "use the tokenizer files that came with the model", source.path))
    return made


def check_max_length(source: ModelSource, max_length: int) -> None:
    """Refuse rows longer than the model has positions for.

    Raises:
        ConfigError: with the longest that can be used.
    """
    limit = getattr(architecture(source).get_text_config(), "max_position_embeddings", None)
    if limit is not None and max_length > limit:
        problem = f"{source.name} was built for {limit} positions at most"
        raise ConfigError(Fault("data.max_length", problem, f"set data.max_length={limit} or less", max_length))


def empty(
    source: ModelSource, quant: Quant, device: torch.device | str = "cpu", layers: int | None = None
) -> nn.Module:
    """The model without its weights (on torch's meta device), as ``load`` would make it on ``device``.

    Enough for ``lora`` and ``describe``, and made in no time: an adapter that would be refused is refused here.
    ``layers``: so many of its decoder layers, or all.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = architecture(source)
    if layers is not None:
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    with _told(source), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config,
            trust_remote_code=source.trust_remote_code,
            attn_implementation=_attention(source),
            **dtype_argument(dtype_for(source.dtype, device)),
        )
    return _marked(model, source, quant)


def load(source: ModelSource, quant: Quant, device: torch.device | str) -> nn.Module:
    """The whole model on ``device``, ready to be trained: quantized as asked, without a key-value cache.

    Raises:
        ConfigError: weights that are missing, damaged, not safetensors or not this model's.
    """
    from transformers import AutoModelForCausalLM

    config = architecture(source)
    folder = _folder(source, weights=True)
    model_folder.check(folder)
    with _told(source):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            **dtype_argument(dtype_for(source.dtype, device)),
            attn_implementation=_attention(source),
            quantization_config=quantization.library_config(quant, device),
            device_map={"": str(device)},
            use_safetensors=True,
            trust_remote_code=source.trust_remote_code,
            output_loading_info=True,
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        problem = f"lacks {len(missing)} of the model's weights ({', '.join(missing[:3])} …), which would be random"
        raise ConfigError(Fault("model.path", problem, "name a complete model for text generation", source.path))
    if quant.bits is not None:
        quantization.make_trainable(model)
        quantization.leave_file(model)
    model.config.use_cache = False
    return _marked(model, source, quant)


def _attention(source: ModelSource) -> str:
    """What transformers is asked for; ``documents`` may put its own in its place."""
    return "sdpa" if source.attention in ("auto", "by_document") else source.attention


def save(model: nn.Module, tokenizer: Any, folder: Path, *, writes: bool = True) -> None:
    """Write what was trained, and the tokenizer, to ``folder``, all or nothing.

    An adapter is written as a plain PEFT adapter of the original base model; a fully trained model as safetensors.
    Where the model is in shards each rank calls this, and one of them ``writes``.
    """
    model = getattr(model, "_orig_mod", model)
    is_adapter = hasattr(model, "peft_config")
    state = shards.gathered(adapter.state(model) if is_adapter else model.state_dict(keep_vars=True), keep=writes)
    if not writes:
        return
    with model_folder.written_aside(folder) as aside:
        if is_adapter:
            adapter.save(model, aside, state)
        else:
            save_whole(model, aside, state)
        tokenizer.save_pretrained(aside)


def save_whole(model: Any, folder: Path, state: dict[str, Any]) -> None:
    """Write all weights, ``state``, and the configuration into ``folder`` as plain transformers does."""
    generation = getattr(model, "generation_config", None)
    if generation is not None and any((generation.temperature, generation.top_p, generation.top_k)):
        # Many published models set a temperature without do_sample, which transformers loads and then refuses to save.
        generation.do_sample = True
    use_cache, model.config.use_cache = model.config.use_cache, True
    try:
        model.save_pretrained(folder, safe_serialization=True, state_dict=state)
    finally:
        model.config.use_cache = use_cache


def describe(model: nn.Module) -> dict[str, Any]:
    """Parameter counts: ``total``, ``trainable`` and by kind; packed 4-bit weights count as what they stand for.

    The kinds are ``embedding``, ``linear`` (what quantization applies to), ``head`` (an untied one), ``adapter`` and
    ``other`` (norms, biases). ``bytes`` is the memory of all as stored, for an empty model as it would be; ``dtype``
    is the one the weights that are not quantized have.
    """
    counts = dict.fromkeys(("total", "trainable", "embedding", "linear", "head", "adapter", "other", "bytes"), 0)
    kinds = _kinds(model)
    for name, parameter in model.named_parameters():
        count, kind = _numel(parameter), kinds.get(name, "other")
        counts["total"] += count
        counts["trainable"] += count if parameter.requires_grad else 0
        counts[kind] += count
        counts["bytes"] += _bytes(parameter, getattr(model, "quant", None) if kind == "linear" else None)
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    return {**counts, "dtype": str(embedding.weight.dtype).removeprefix("torch.")}


def _folder(source: ModelSource, *, weights: bool) -> Path:
    if source.make is not None:
        return source.make()
    if Path(source.path).is_dir():
        return Path(source.path)
    return hub.fetch(source.path, source.revision, weights=weights, code=source.trust_remote_code)


@contextlib.contextmanager
def _told(source: ModelSource) -> Iterator[None]:
    """Turn what transformers says of a model it cannot read into one message."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        text = str(error) or type(error).__name__
        if "out of memory" in text:
            raise
        if "trust_remote_code" in text:
            remedy = "read that code; if you trust it, set model.trust_remote_code=true"
            fault = Fault(
                "model.trust_remote_code", f"{source.name} needs Python code of its own to run", remedy, False
            )
        else:
            remedy = "use a model for text generation that the installed transformers knows"
            fault = Fault("model.path", f"cannot be loaded: {text.splitlines()[0][:300]}", remedy, source.path)
        raise ConfigError(fault) from error


def _marked(model: Any, source: ModelSource, quant: Quant) -> nn.Module:
    """Note what an adapter must name as its base (a Hub id, not the cache), and whether all may be trained."""
    model.name_or_path = model.config._name_or_path = source.path
    model.config._commit_hash = source.revision
    model.quant, model.is_quantized = quant, quant.bits is not None
    return model


def _kinds(model: nn.Module) -> dict[str, str]:
    """Parameter name → kind, of all that are not ``other``."""
    from torch import nn

    prefix = getattr(getattr(model, "base_model", None), "prefix", None)
    adapters = tuple(part for part in (prefix, "modules_to_save") if part)
    kinds = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{key}"
            if hasattr(model, "peft_config") and any(part in full for part in adapters):
                kinds[full] = "adapter"
            elif isinstance(module, nn.Embedding):
                kinds[full] = "embedding"
            elif isinstance(module, nn.Linear) and parameter.dim() > 1:
                kinds[full] = "head" if "lm_head" in name else "linear"
    return kinds


def _numel(parameter: nn.Parameter) -> int:
    packed = getattr(parameter, "quant_state", None)
    return int(packed.shape.numel() if packed is not None else parameter.numel())


def _bytes(parameter: nn.Parameter, quant: Quant | None) -> int:
    """The parameter's own memory and, of a quantized one, its scales'."""
    if parameter.is_meta and quant is not None and quant.bytes_per_weight is not None:
        return int(parameter.numel() * quant.bytes_per_weight)
    size = parameter.numel() * parameter.element_size()
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        size += state.absmax.numel() * state.absmax.element_size()
        state = state.state2
    return int(size)


def keep_updates(source: ModelSource, device: torch.device, *, full: bool) -> tuple[ModelSource, torch.dtype | None]:
    """Weights that train whole are kept in float32 and computed with in bfloat16: pure bfloat16 loses small updates.

    Returns the source and the dtype of autocast. A dtype that was asked for is left as it is.
    """
    import torch

    if full and source.dtype == "auto" and dtype_for("auto", device) == torch.bfloat16:
        return replace(source, dtype="float32"), torch.bfloat16
    return source, None
