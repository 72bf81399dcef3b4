"""Load the tokenizer of a model."""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from runner import imports
from runner.errors import ConfigError, Fault, first_line, refuse
from runner.models import architecture
from runner.models.kernels import base_model
from runner.models.sources import ModelSource

PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|endoftext|>", "<unk>")
"""Candidates, in this order, for a tokenizer without a padding token; none of them occurs in ordinary text."""
REMEDY = "use the model's original tokenizer files"
OF_PROCESSOR = "copy the files of the original model (preprocessor_config.json, processor_config.json)"


def load(source: ModelSource) -> Any:
    """The model's tokenizer, with a padding token, and with the new tokens and the chat template of ``source``.

    Of a model that reads images it has the attribute ``processor``, whose tokenizer it is.

    If it has none, an existing special token of its vocabulary is used, so the embeddings need no resizing. The last
    choice is the end-of-text token: this is safe because padding is excluded from the loss by position, not by id.
    For a score head it is replaced if there is another, because transformers finds the end of a document by padding.

    Raises:
        ConfigError: the tokenizer is missing or unreadable, or has more tokens than the model has embeddings.
    """
    with imports.uncollected():
        from transformers import AutoTokenizer

    config = architecture.read(source)
    processor = _processor(source) if base_model.reads_images(config) else None
    with architecture.loading_errors(source, "its tokenizer", REMEDY):
        if processor is not None:
            result = processor.tokenizer
            result.processor, result.chat_template = processor, processor.chat_template or result.chat_template
        else:
            result = AutoTokenizer.from_pretrained(
                architecture.folder_of(source, weights=False), trust_remote_code=source.trust_remote_code
            )
        vocabulary = result.get_vocab()
        if not result("Some text, 12 tokens.")["input_ids"]:
            raise ValueError("it gives no tokens for a text")
        if source.chat_template is not None:
            result.chat_template = source.chat_template
            if processor is not None:
                processor.chat_template = source.chat_template
        if not isinstance(result.chat_template, str | dict | None):
            raise ValueError("its chat_template is not a text")
    if source.new_tokens:
        _add(result, source.new_tokens, vocabulary)
    if result.pad_token is None:
        result.pad_token = next((token for token in PAD_TOKENS if token in vocabulary), result.eos_token)
    elif source.head is not None and result.pad_token == result.eos_token:
        others = (token for token in PAD_TOKENS if token in vocabulary and token != result.eos_token)
        result.pad_token = next(others, result.eos_token)
    if result.pad_token_id is None:
        problem, remedy = "its tokenizer has neither pad_token nor eos_token", "set pad_token in tokenizer_config.json"
        raise ConfigError(Fault("model.path", problem, remedy, source.path))
    embeddings = getattr(config.get_text_config(), "vocab_size", None)
    highest = max(vocabulary.values(), default=0)
    if embeddings is not None and highest >= embeddings:
        problem = f"its tokenizer has token ids up to {highest}, but the model has {embeddings} embeddings"
        raise ConfigError(Fault("model.path", problem, REMEDY, source.path))
    return result


def save(tokenizer: Any, folder: Path) -> None:
    """Write the files of a tokenizer, and of the processor that it belongs to."""
    getattr(tokenizer, "processor", tokenizer).save_pretrained(folder)


def _processor(source: ModelSource) -> Any:
    """The processor of a model that reads images.

    Raises:
        ConfigError: its files are missing or damaged, or it needs a package that is not installed.
    """
    from transformers import AutoProcessor

    folder = architecture.folder_of(source, weights=False)
    with architecture.loading_errors(source, "its processor of images", OF_PROCESSOR):
        try:
            return AutoProcessor.from_pretrained(folder, trust_remote_code=source.trust_remote_code)
        except ImportError as error:
            missing = [name for name in ("torchvision", "num2words") if name in str(error).lower()]
            problem = f"its processor of images needs {' and '.join(missing) or first_line(error)}"
            remedy = "install what models with videos need: uv sync --extra vision"
            raise ConfigError(Fault("model.path", problem, remedy, source.path)) from error


def _add(tokenizer: Any, tokens: Sequence[str], vocabulary: Container[str]) -> None:
    """Add tokens that are matched exactly and, unlike special tokens, shown in answers."""
    from transformers import AddedToken

    refuse(
        Fault("model.new_tokens", f"{token} is a token of this model already", "leave it out", list(tokens))
        for token in tokens
        if token in vocabulary
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
