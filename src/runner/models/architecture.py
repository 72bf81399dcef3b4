"""The files of a model without its weights: convert or download them, and read the configuration."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner import imports
from runner.errors import ConfigError, Fault, RunnerError, first_line, refuse
from runner.models import hub, model_folder, quantized_files, rope, vision
from runner.models.kernels import base_model, compat
from runner.models.sources import ModelSource

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


def read(source: ModelSource) -> Any:
    """The transformers configuration of the model; reads no weights.

    Raises:
        ConfigError: unknown architecture, custom model code without ``trust_remote_code``, or weights
            that are quantized in a way that cannot be trained.
    """
    with imports.uncollected():
        from transformers import AutoConfig

    folder = folder_of(source, weights=False)
    with loading_errors(source):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=source.trust_remote_code)
    if source.trust_remote_code and getattr(config, "auto_map", None):
        log.warning("model.trust_remote_code=true: Python code from the model %s runs on this machine", source.name)
    refuse(quantized_files.faults(config, source.path))
    vision.check_family(config, source.path)
    if base_model.reads_images(config):
        compat.check_vision("model.path", source.path)
    quantized_files.prepare(config)
    rope.configure(config, source.rope_scaling, source.max_position_embeddings)
    return config


def check_max_length(source: ModelSource, max_length: int) -> None:
    """Check that the model supports ``max_length`` positions."""
    limit = getattr(read(source).get_text_config(), "max_position_embeddings", None)
    if limit is not None and 0 < limit < max_length:
        problem = f"{source.name} supports {limit} positions at most"
        remedy = f"set data.max_length={limit} or less, or scale its positions (model.rope_scaling)"
        raise ConfigError(Fault("data.max_length", problem, remedy, max_length))


def folder_of(source: ModelSource, *, weights: bool) -> Path:
    """The folder with the model's files; downloads them if it is on the Hub."""
    if source.make is not None:
        return source.make()
    if Path(source.path).is_dir():
        return Path(source.path)
    return hub.fetch(source.path, source.revision, weights=weights, code=source.trust_remote_code)


@contextlib.contextmanager
def loading_errors(source: ModelSource, part: str = "", remedy: str = "") -> Iterator[None]:
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
            problem = f"{part} cannot be loaded: {first_line(error)}".strip()
            fault = Fault("model.path", problem, remedy, source.path)
        raise ConfigError(fault) from error
