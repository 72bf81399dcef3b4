"""Load a model for training; save the result in the format of transformers and PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner import imports
from runner.errors import ConfigError, Fault
from runner.files import written_aside
from runner.models import (
    adapter,
    architecture,
    model_folder,
    new_tokens,
    parameters,
    quantized_files,
    rope,
    shards,
    tokenizer_files,
    vision,
)
from runner.models.dtypes import dtype_argument, dtype_for
from runner.models.kernels import base_model, compat, long_rope, score_head
from runner.models.sources import ModelSource

if TYPE_CHECKING:
    import torch
    from torch import nn

    from runner.models.kernels.score_head import ScoreHead
    from runner.models.quantization.quant import Quant


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
    model = _without_weights(source, device, layers)
    new_tokens.resize(model, new_tokens.ids(source))
    return _annotate(model, source, quant, quantized_files.dequantized_from(_configured(source)))


def _without_weights(source: ModelSource, device: torch.device | str, layers: int | None) -> Any:
    import torch

    config = _configured(source)
    if layers is not None:
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    with architecture.loading_errors(source), torch.device("meta"):
        model = auto_class(config, source.head).from_config(
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
    is_scored, stored = score_head.is_scored(config), quantized_files.dequantized_from(config)
    folder = architecture.folder_of(source, weights=True)
    model_folder.check(folder)
    quantization = _quantization(source, config, quant, device)
    model, missing = _read(source, config, folder, quantization, device, dtype_for(source.dtype, device))
    if source.head is not None:
        missing = _fill_head(model, source, missing, is_new=not is_scored)
    if missing:
        names = ", ".join(missing[:3])
        problem = f"lacks {len(missing)} of the model's weights ({names} …), which would be initialised randomly"
        raise ConfigError(Fault("model.path", problem, "use a complete model for text generation", source.path))
    if quant.plain:
        model = quantized_files.dequantized(model, config, dtype_for(source.dtype, device))
    quant.after_load(model)
    if not quant.plain:
        _unmap(model)
    model.config.use_cache = False
    _refuse_damaged(model, source)
    new_tokens.resize(model, new_tokens.ids(source))
    long_rope.install(model)
    return _annotate(model, source, quant, stored)


def mapped(source: ModelSource) -> nn.Module:
    """The unquantized model on the CPU, in the dtype of its files: weights are read from there when they are used."""
    import torch

    config = _configured(source)
    dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or torch.float32
    model: nn.Module = _read(source, config, architecture.folder_of(source, weights=True), None, "cpu", dtype)[0]
    return model


def _read(
    source: ModelSource, config: Any, folder: Path, quantization: Any, device: torch.device | str, dtype: torch.dtype
) -> tuple[Any, list[str]]:
    """(model with the weights of the folder, names of the weights that the folder lacks)."""
    from transformers import GenerationConfig
    from transformers.models.auto.auto_factory import _get_model_class

    given = quantized_files.weights(config, folder, dtype)
    with architecture.loading_errors(source):
        cls = auto_class(config, source.head)
        if "state_dict" in given:  # the classes of transformers that choose another one need a folder
            cls = _get_model_class(config, cls._model_mapping)
        model, info = cls.from_pretrained(
            **given,
            config=config,
            **dtype_argument(dtype),
            attn_implementation=_attention(source),
            quantization_config=quantization,
            device_map={"": str(device)},
            use_safetensors=True,
            trust_remote_code=source.trust_remote_code,
            output_loading_info=True,
        )
        compat.forget_device_map(model)
        if "state_dict" in given and model.can_generate() and (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, sorted(info["missing_keys"])


def auto_class(config: Any, head: ScoreHead | None) -> Any:
    """The class of transformers that loads a model of this configuration with this head."""
    with imports.uncollected():
        import transformers.modeling_utils  # noqa: F401 - the classes below import it when they load
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSequenceClassification

    if head is None and base_model.reads_images(config):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM if head is None else AutoModelForSequenceClassification


def _configured(source: ModelSource) -> Any:
    """The configuration of the model with the head that it is loaded with."""
    config = architecture.read(source)
    if source.head is not None:
        score_head.configure(config, source.head, source.path)
    return config


def _quantization(source: ModelSource, config: Any, quant: Quant, device: torch.device | str) -> Any:
    """The library's configuration, if the files are not quantized already; a score head stays as it is."""
    wanted = quant.library_config(device)
    if wanted is not None and quantized_files.method(config):
        quantized_files.set_compute_dtype(config, wanted)
        return None
    if wanted is not None and base_model.reads_images(config):
        wanted.llm_int8_skip_modules = [*vision.others(_without_weights(source, device, 1)), "lm_head"]
    if wanted is not None and source.head is not None:
        names = _without_weights(source, device, 1).head_names
        wanted.llm_int8_skip_modules = [name.rpartition(".")[2] for name in names]
    return wanted


def _fill_head(model: Any, source: ModelSource, missing: list[str], *, is_new: bool) -> list[str]:
    """Prepare the score head, and give it first values if it is new. Returns the missing weights of the rest."""
    assert source.head is not None
    score_head.install(model, source.head)
    names = tuple(f"{name}." for name in model.head_names)
    new = [name for name in missing if is_new and name.startswith(names)]
    score_head.initialise(model, new, source.head)
    score_head.in_float32(model)
    model.config.pad_token_id = tokenizer_files.load(source).pad_token_id
    return [name for name in missing if name not in new]


def _attention(source: ModelSource) -> str | None:
    """The attention to load with; None: sdpa, or eager for a model without sdpa.

    ``kernels.varlen_attention`` may replace it later.
    """
    return None if source.attention in ("auto", "by_document") else source.attention


def _refuse_damaged(model: nn.Module, source: ModelSource) -> None:
    for name, parameter in _plain_parameters(model):
        if not parameter.detach().sum().isfinite():
            problem = f"its weight {name} contains NaN or infinity"
            raise ConfigError(Fault("model.path", problem, "use intact weights", source.path))


def save(model: nn.Module, tokenizer: Any, folder: Path, *, writes: bool = True) -> None:
    """Write the trained weights and the tokenizer to ``folder``, atomically.

    An adapter is saved as a plain PEFT adapter of the original base model, a fully trained model as safetensors. An
    adapter with a score head, or of a model with other positions, has the configuration with which transformers loads
    its base model, too.
    With a sharded model every rank must call this, one of them with ``writes``.
    """
    model = getattr(model, "_orig_mod", model)
    is_adapter = hasattr(model, "peft_config")
    state = shards.gathered(adapter.state(model) if is_adapter else model.state_dict(keep_vars=True), keep=writes)
    if not writes:
        return
    with written_aside(folder) as temporary:
        if is_adapter:
            adapter.save(model, temporary, state)
            if score_head.modules(model) or getattr(base_model.of(model), "is_reconfigured", False):
                score_head.configuration(model).save_pretrained(temporary)
        else:
            save_whole(model, temporary, state)
        tokenizer_files.save(tokenizer, temporary)


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


def is_in_bfloat16(source: ModelSource) -> bool:
    """Whether all weights in the files of the model are bfloat16, and none are made or packed when it is loaded."""
    if source.head is not None or new_tokens.ids(source) or quantized_files.method(architecture.read(source)):
        return False
    files = model_folder.weight_files(architecture.folder_of(source, weights=True))
    return bool(files) and set().union(*map(model_folder.stored_dtypes, files)) == {"BF16"}


def _annotate(model: Any, source: ModelSource, quant: Quant, stored: str) -> nn.Module:
    """Record on the model its source (a Hub id, not the cache) and quantization, which must quantize something.

    ``stored``: how its files are quantized, if it is dequantized when it is loaded.
    """
    model.name_or_path = model.config._name_or_path = source.path
    model.config._commit_hash = source.revision
    model.quant, model.dequantized_from = quant, stored
    others = vision.others(model)
    for name, module in model.named_modules() if others else ():
        if vision.is_below(name, others):
            module.stays_plain = True
    model.is_reconfigured = bool(source.rope_scaling or source.max_position_embeddings)
    rope.check_used(model, source.rope_scaling)
    if not quant.plain and not parameters.describe(model)["quantized"]:
        problem = f"{type(model).__name__} has no layer that can be stored as {quant.name}: nothing would be quantized"
        raise ConfigError(Fault("quant", problem, "use quant=none, or another model"))
    result: nn.Module = model
    return result


def _unmap(model: nn.Module) -> None:
    """Copy the weights that are not quantized, which transformers maps from the file if they are on a CPU.

    A single mapped weight keeps the whole file in memory, which is larger than the quantized weights.
    """
    for _, parameter in _plain_parameters(model):
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def _plain_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that are not quantized, by name; torchao has classes of its own for quantized ones."""
    from torch import nn

    for name, parameter in model.named_parameters():
        if type(parameter) is nn.Parameter and parameter.is_floating_point():
            yield name, parameter
