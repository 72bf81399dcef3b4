"""Load a model and its tokenizer for training; save the result in the format of transformers and PEFT."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.errors import ConfigError, Fault, RunnerError
from runner.models import adapter, hub, model_folder, parameters, shards
from runner.models.dtypes import dtype_argument, dtype_for
from runner.models.kernels import long_rope, score_head
from runner.models.sources import ModelSource

if TYPE_CHECKING:
    import torch
    from torch import nn

    from runner.models.kernels.score_head import ScoreHead
    from runner.models.quantization.quant import Quant

PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|endoftext|>", "<unk>")
"""Candidates, in this order, for a tokenizer without a padding token; none of them occurs in ordinary text."""
TOKENIZER_REMEDY = "use the model's original tokenizer files"

log = logging.getLogger(__name__)


def resolve(source: ModelSource) -> ModelSource:
    """Convert or download everything but the weights; returns the source with its folder, or with its Hub commit.

    Raises:
        ConfigError: the model cannot be downloaded or converted, or its folder is incomplete.
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
    """The transformers configuration of the model; reads no weights.

    Raises:
        ConfigError: unknown architecture, custom model code without ``trust_remote_code``, or quantized weights.
    """
    from transformers import AutoConfig

    folder = _folder(source, weights=False)
    with _loading_errors(source):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=source.trust_remote_code)
    if source.trust_remote_code and getattr(config, "auto_map", None):
        log.warning("model.trust_remote_code=true: Python code from the model %s runs on this machine", source.name)
    if getattr(config, "quantization_config", None):
        remedy = "use the original model, and quantize it with quant=4bit or quant=8bit"
        raise ConfigError(Fault("model.path", "its weights are already quantized", remedy, source.path))
    return config


def tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer, with a padding token.

    If it has none, an existing special token of its vocabulary is used, so the embeddings need no resizing. The last
    choice is the end-of-text token: this is safe because padding is excluded from the loss by position, not by id.
    For a score head it is replaced if there is another, because transformers finds the end of a document by padding.

    Raises:
        ConfigError: the tokenizer is missing or unreadable, or has more tokens than the model has embeddings.
    """
    from transformers import AutoTokenizer

    with _loading_errors(source, "its tokenizer", TOKENIZER_REMEDY):
        result = AutoTokenizer.from_pretrained(
            _folder(source, weights=False), trust_remote_code=source.trust_remote_code
        )
        vocabulary = result.get_vocab()
        if not result("Some text, 12 tokens.")["input_ids"]:
            raise ValueError("it gives no tokens for a text")
        if not isinstance(result.chat_template, str | dict | None):
            raise ValueError("its chat_template is not a text")
    if result.pad_token is None:
        result.pad_token = next((token for token in PAD_TOKENS if token in vocabulary), result.eos_token)
    elif source.head is not None and result.pad_token == result.eos_token:
        others = (token for token in PAD_TOKENS if token in vocabulary and token != result.eos_token)
        result.pad_token = next(others, result.eos_token)
    if result.pad_token_id is None:
        problem, remedy = "its tokenizer has neither pad_token nor eos_token", "set pad_token in tokenizer_config.json"
        raise ConfigError(Fault("model.path", problem, remedy, source.path))
    embeddings = getattr(architecture(source).get_text_config(), "vocab_size", None)
    highest = max(vocabulary.values(), default=0)
    if embeddings is not None and highest >= embeddings:
        problem = f"its tokenizer has token ids up to {highest}, but the model has {embeddings} embeddings"
        raise ConfigError(Fault("model.path", problem, TOKENIZER_REMEDY, source.path))
    return result


def check_max_length(source: ModelSource, max_length: int) -> None:
    """Check that the model supports ``max_length`` positions.

    Raises:
        ConfigError: it does not; the remedy names the largest possible value.
    """
    limit = getattr(architecture(source).get_text_config(), "max_position_embeddings", None)
    if limit is not None and 0 < limit < max_length:
        problem = f"{source.name} supports {limit} positions at most"
        raise ConfigError(Fault("data.max_length", problem, f"set data.max_length={limit} or less", max_length))


def empty(
    source: ModelSource, quant: Quant, device: torch.device | str = "cpu", layers: int | None = None
) -> nn.Module:
    """The model on torch's meta device, without weights, otherwise as ``load`` would create it for ``device``.

    Sufficient for ``lora`` and ``parameters.describe``: a wrong adapter option is detected without loading weights.
    ``layers``: the number of decoder layers to create; None: all.

    Raises:
        ConfigError: ``quant`` would quantize nothing, or cannot work on ``device``.
    """
    quant.library_config(device)
    return _annotate(_without_weights(source, device, layers), source, quant)


def _without_weights(source: ModelSource, device: torch.device | str, layers: int | None) -> Any:
    import torch

    config = _configured(source)
    if layers is not None:
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    with _loading_errors(source), torch.device("meta"):
        model = auto_class(source.head).from_config(
            config,
            trust_remote_code=source.trust_remote_code,
            attn_implementation=_attention(source),
            **dtype_argument(dtype_for(source.dtype, device)),
        )
    if source.head is not None:
        score_head.install(model, source.head)
    return model


def load(source: ModelSource, quant: Quant, device: torch.device | str) -> nn.Module:
    """Load the model for training: on ``device``, quantized according to ``quant``, with use_cache=False.

    Raises:
        ConfigError: weights are missing, damaged, not safetensors, or do not match the architecture; or nothing is
            quantized.
    """
    config = _configured(source)
    is_scored = score_head.is_scored(config)
    folder = _folder(source, weights=True)
    model_folder.check(folder)
    with _loading_errors(source):
        model, info = auto_class(source.head).from_pretrained(
            folder,
            config=config,
            **dtype_argument(dtype_for(source.dtype, device)),
            attn_implementation=_attention(source),
            quantization_config=_quantization(source, quant, device),
            device_map={"": str(device)},
            use_safetensors=True,
            trust_remote_code=source.trust_remote_code,
            output_loading_info=True,
        )
    missing = sorted(info["missing_keys"])
    if source.head is not None:
        missing = _fill_head(model, source, missing, is_new=not is_scored)
    if missing:
        names = ", ".join(missing[:3])
        problem = f"lacks {len(missing)} of the model's weights ({names} …), which would be initialised randomly"
        raise ConfigError(Fault("model.path", problem, "use a complete model for text generation", source.path))
    quant.after_load(model)
    if not quant.plain:
        _unmap(model)
    model.config.use_cache = False
    _refuse_damaged(model, source)
    long_rope.install(model)
    return _annotate(model, source, quant)


def auto_class(head: ScoreHead | None) -> Any:
    """The class of transformers that loads a model with this head."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForCausalLM if head is None else AutoModelForSequenceClassification


def _configured(source: ModelSource) -> Any:
    """The configuration of the model with the head that it is loaded with."""
    config = architecture(source)
    if source.head is not None:
        score_head.configure(config, source.head, source.path)
    return config


def _quantization(source: ModelSource, quant: Quant, device: torch.device | str) -> Any:
    """The library's configuration; a score head stays as it is."""
    config = quant.library_config(device)
    if config is not None and source.head is not None:
        names = _without_weights(source, device, 1).head_names
        config.llm_int8_skip_modules = [name.rpartition(".")[2] for name in names]
    return config


def _fill_head(model: Any, source: ModelSource, missing: list[str], *, is_new: bool) -> list[str]:
    """Prepare the score head, and give it first values if it is new. Returns the missing weights of the rest."""
    assert source.head is not None
    score_head.install(model, source.head)
    names = tuple(f"{name}." for name in model.head_names)
    new = [name for name in missing if is_new and name.startswith(names)]
    score_head.initialise(model, new, source.head)
    score_head.in_float32(model)
    model.config.pad_token_id = tokenizer(source).pad_token_id
    return [name for name in missing if name not in new]


def _attention(source: ModelSource) -> str | None:
    """The attention to load with; None: sdpa, or eager for a model without sdpa.

    ``kernels.varlen_attention`` may replace it later.
    """
    return None if source.attention in ("auto", "by_document") else source.attention


def _refuse_damaged(model: nn.Module, source: ModelSource) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.detach().sum().isfinite():
            problem = f"its weight {name} contains NaN or infinity"
            raise ConfigError(Fault("model.path", problem, "use intact weights", source.path))


def save(model: nn.Module, tokenizer: Any, folder: Path, *, writes: bool = True) -> None:
    """Write the trained weights and the tokenizer to ``folder``, atomically.

    An adapter is saved as a plain PEFT adapter of the original base model, a fully trained model as safetensors. An
    adapter with a score head has the configuration with which transformers loads its base model, too.
    With a sharded model every rank must call this, one of them with ``writes``.
    """
    model = getattr(model, "_orig_mod", model)
    is_adapter = hasattr(model, "peft_config")
    state = shards.gathered(adapter.state(model) if is_adapter else model.state_dict(keep_vars=True), keep=writes)
    if not writes:
        return
    with model_folder.written_aside(folder) as temporary:
        if is_adapter:
            adapter.save(model, temporary, state)
            if score_head.modules(model):
                score_head.configuration(model).save_pretrained(temporary)
        else:
            save_whole(model, temporary, state)
        tokenizer.save_pretrained(temporary)


def save_whole(model: Any, folder: Path, state: dict[str, Any]) -> None:
    """Write all weights (``state``) and the configuration to ``folder`` with transformers' ``save_pretrained``."""
    generation = getattr(model, "generation_config", None)
    if generation is not None and any((generation.temperature, generation.top_p, generation.top_k)):
        # Many published models set a temperature without do_sample; transformers loads this but fails to save it.
        generation.do_sample = True
    use_cache, model.config.use_cache = model.config.use_cache, True
    try:
        model.save_pretrained(folder, safe_serialization=True, state_dict=state)
    finally:
        model.config.use_cache = use_cache


def keep_updates(source: ModelSource, device: torch.device, *, full: bool) -> tuple[ModelSource, torch.dtype | None]:
    """For full fine-tuning: float32 weights with bfloat16 autocast, as bfloat16 weights lose small updates.

    Returns (source, autocast dtype). Changes nothing unless ``source.dtype`` is ``auto``.
    """
    import torch

    if full and source.dtype == "auto" and dtype_for("auto", device) == torch.bfloat16:
        return replace(source, dtype="float32"), torch.bfloat16
    return source, None


def _folder(source: ModelSource, *, weights: bool) -> Path:
    if source.make is not None:
        return source.make()
    if Path(source.path).is_dir():
        return Path(source.path)
    return hub.fetch(source.path, source.revision, weights=weights, code=source.trust_remote_code)


@contextlib.contextmanager
def _loading_errors(source: ModelSource, part: str = "", remedy: str = "") -> Iterator[None]:
    """Turn transformers' exceptions about an unreadable model, or a part of it, into one ConfigError."""
    try:
        yield
    except Exception as error:  # a malformed file, or the model's own code, may raise anything
        text = str(error) or type(error).__name__
        if "out of memory" in text or isinstance(error, MemoryError | RunnerError):
            raise
        if "trust_remote_code" in text:
            problem = f"{source.name} needs Python code from its own repository"
            trust = "read that code; if you trust it, set model.trust_remote_code=true"
            fault = Fault("model.trust_remote_code", problem, trust, False)
        elif source.attention not in ("auto", "eager") and "attention" in text and "support" in text:
            problem = f"{source.name} does not support it in the installed transformers"
            fault = Fault("model.attention", problem, "use model.attention=auto", source.attention)
        else:
            if type(error).__name__ == "SafetensorError":
                part, remedy = "a weight file", "download the model again"
            remedy = remedy or "use a model for text generation that the installed transformers supports"
            problem = f"{part} cannot be loaded: {text.splitlines()[0][:300]}".strip()
            fault = Fault("model.path", problem, remedy, source.path)
        raise ConfigError(fault) from error


def _annotate(model: Any, source: ModelSource, quant: Quant) -> nn.Module:
    """Record on the model its source (an adapter names it as its base: a Hub id, not the cache) and quantization.

    Raises:
        ConfigError: nothing is quantized, or would be.
    """
    model.name_or_path = model.config._name_or_path = source.path
    model.config._commit_hash = source.revision
    model.quant = quant
    if not quant.plain and not parameters.describe(model)["quantized"]:
        problem = f"{type(model).__name__} has no layer that can be stored as {quant.name}: nothing would be quantized"
        raise ConfigError(Fault("quant", problem, "use quant=none, or another model"))
    result: nn.Module = model
    return result


def _unmap(model: nn.Module) -> None:
    """Copy the weights that are not quantized, which transformers maps from the file if they are on a CPU.

    A single mapped weight keeps the whole file in memory, which is larger than the quantized weights.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.dtype.is_floating_point:
            parameter.data = parameter.data.clone()
