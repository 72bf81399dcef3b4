"""Sources of models, the options of the group ``model``: Hub, local folder, GGUF file, random weights."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import logging
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from runner.config.bounds import Must
from runner.config.schema import Script, Seed, Text
from runner.errors import ConfigError, Fault
from runner.files import cache_dir, locked, user_path, written_aside
from runner.models import gguf_import, model_folder, rope, tiny
from runner.models.dtypes import Precision, dtype_faults
from runner.models.kernels import compat
from runner.models.kernels.score_head import ScoreHead

Attention = Literal["auto", "by_document", "sdpa", "eager", "flash_attention_2", "flex_attention"]

Width = Annotated[int, Ge(1), Le(2**24)]
Layers = Annotated[int, Ge(1), Le(1024)]
Token = Annotated[Text, Must(lambda text: text == text.strip(), "without spaces around it")]

CHANGES = ("chat_template", "rope_scaling", "max_position_embeddings", "new_tokens")
"""Fields of ``ModelSource`` by which the loaded tokenizer and model differ from their files."""

HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSource:
    """Location of a model and how to load it. Creating one reads no file and imports no library."""

    path: str
    """A local folder or a Hub id. If ``make`` is set, only a label until ``architecture.resolve`` replaces it."""
    revision: str | None
    dtype: Precision
    attention: Attention
    trust_remote_code: bool
    name: str
    make: Callable[[], Path] | None = field(default=None, compare=False)
    """Creates the model folder if it does not exist yet, and returns it."""
    origin: str = ""
    """Text for the model card: where the model comes from, if neither from a folder nor from the Hub."""
    head: ScoreHead | None = None
    """What the model is loaded with instead of its LM head, which gives the next token."""
    chat_template: str | None = None
    """The text of a chat template that replaces that of the tokenizer."""
    rope_scaling: Mapping[str, Any] | None = None
    """See ``rope``; None: as the model is."""
    max_position_embeddings: int | None = None
    """Positions that the model is said to have; None: as its configuration says."""
    new_tokens: tuple[str, ...] = ()
    """Tokens that its vocabulary does not have, see ``new_tokens``."""

    @property
    def changes(self) -> str:
        """How the loaded model differs from its files: ``, RoPE yarn × 4, 2 new tokens``; empty if it does not."""
        added = f"{len(self.new_tokens)} new token" + "s" * (len(self.new_tokens) > 1) if self.new_tokens else ""
        return "".join(f", {text}" for text in (rope.describe(self.rope_scaling), added) if text)


def pretrained(
    *,
    path: Text,
    revision: Text | None,
    dtype: Precision,
    attention: Attention,
    trust_remote_code: bool,
    chat_template: Script | None = None,
    rope_scaling: rope.Scaling | None = None,
    max_position_embeddings: Width | None = None,
    new_tokens: list[Token] = [],  # noqa: B006 - never changed
) -> ModelSource:
    """A model folder, a GGUF file, or a model of the Hugging Face Hub."""
    local = user_path(path, "model.path")
    if local.suffix == ".gguf" and os.path.isfile(local):
        source = _from_gguf(local, dtype, attention)
    else:
        is_local = os.path.exists(local)
        name = local.resolve().name if is_local else path.rpartition("/")[2]
        place = str(local.resolve()) if is_local else path
        source = ModelSource(place, revision, dtype, attention, trust_remote_code, name)
    return _changed(source, chat_template, rope_scaling, max_position_embeddings, new_tokens)


def gguf(
    *,
    package: Text,
    file: Text,
    dtype: Precision,
    attention: Attention,
    chat_template: Script | None = None,
    rope_scaling: rope.Scaling | None = None,
    max_position_embeddings: Width | None = None,
    new_tokens: list[Token] = [],  # noqa: B006 - never changed
) -> ModelSource:
    """A GGUF file inside an installed Python package; the package is not imported."""
    source = replace(_from_gguf(_package_file(package, file), dtype, attention), origin=f"from the package {package}")
    return _changed(source, chat_template, rope_scaling, max_position_embeddings, new_tokens)


def random(
    *,
    hidden_size: Width,
    intermediate_size: Width,
    layers: Layers,
    heads: Layers,
    kv_heads: Layers,
    max_position_embeddings: Width,
    tie_word_embeddings: bool,
    seed: Seed,
    dtype: Precision,
    attention: Attention,
    chat_template: Script | None = None,
    rope_scaling: rope.Scaling | None = None,
    new_tokens: list[Token] = [],  # noqa: B006 - never changed
) -> ModelSource:
    """A Llama of this shape with random weights and a byte-level tokenizer."""
    shape: dict[str, Any] = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": tie_word_embeddings,
        "seed": seed,
    }
    key = "random-" + hashlib.sha256(json.dumps(shape).encode()).hexdigest()[:16]
    make = functools.partial(make_once, key, functools.partial(tiny.write, **shape))
    name, origin = f"random-{hidden_size}x{layers}", "random weights of model=tiny"
    source = ModelSource(key, None, dtype, attention, False, name, make, origin)
    return _changed(source, chat_template, rope_scaling, None, new_tokens)


def check_pretrained(
    *, path: str, revision: str | None, dtype: Precision, attention: Attention, **changes: Any
) -> Iterator[Fault]:
    yield from _common_faults(dtype, attention, **changes)
    local = user_path(path, "model.path")
    if not os.path.exists(local):
        if not HUB_ID.fullmatch(path) or path.startswith("."):
            remedy = "set it to a model folder, a .gguf file, or a Hub id owner/name"
            yield Fault("path", "no such folder or file", remedy, path)
        return
    if revision is not None:
        problem = "applies to Hub models only, and model.path is local"
        yield Fault("revision", problem, "set model.revision=null", revision)
    if local.is_file():
        yield from _file_faults(local)
    if local.is_dir():
        yield from (replace(fault, key="path") for fault in model_folder.faults(local))


def check_gguf(*, package: str, file: str, dtype: Precision, attention: Attention, **changes: Any) -> Iterator[Fault]:
    yield from _common_faults(dtype, attention, **changes)
    try:
        gguf_import.check(_package_file(package, file))
    except ConfigError as error:
        yield from (replace(fault, key="file", value=file) for fault in error.faults)


def check_random(
    *, hidden_size: int, heads: int, kv_heads: int, dtype: Precision, attention: Attention, **others: Any
) -> Iterator[Fault]:
    yield from _common_faults(dtype, attention, **{**others, "max_position_embeddings": None})
    if hidden_size % (2 * heads):
        problem = f"must be a multiple of 2 × heads ({2 * heads})"
        yield Fault("hidden_size", problem, f"set it to {4 * heads}", hidden_size)
    if heads % kv_heads:
        yield Fault("kv_heads", f"must divide heads ({heads})", f"set it to {heads}", kv_heads)


def _changed(
    source: ModelSource,
    chat_template: str | None,
    rope_scaling: Mapping[str, Any] | None,
    max_position_embeddings: int | None,
    new_tokens: list[str],
) -> ModelSource:
    """The source with what its model and tokenizer are loaded with."""
    return replace(
        source,
        chat_template=chat_template,
        rope_scaling=rope_scaling or None,
        max_position_embeddings=max_position_embeddings,
        new_tokens=tuple(new_tokens),
    )


def _from_gguf(file: Path, dtype: Precision, attention: Attention) -> ModelSource:
    def make() -> Path:
        gguf_import.check(file)
        with file.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        return make_once(f"{file.stem}-{digest[:16]}", functools.partial(gguf_import.convert, file))

    return ModelSource(str(file.resolve()), None, dtype, attention, False, file.stem, make)


def make_once(name: str, write: Callable[[Path], None]) -> Path:
    """The folder of this name in the cache; ``write`` fills it if it does not exist yet."""
    folder = cache_dir(compat.model_cache()) / name
    with locked(folder.with_name(f".{name}.lock")):
        if not folder.is_dir():
            log.info("writing the model folder %s (once)", folder)
            with written_aside(folder) as temporary:
                _write_on_any_rank(write, temporary)
    return folder


def _write_on_any_rank(write: Callable[[Path], None], folder: Path) -> None:
    """Call ``write(folder)``; on rank 1 and above in a subprocess without a process group.

    In a process group, transformers (5.2x) saves on rank 0 only. Waiting for rank 0 is not enough, because each
    machine may have its own cache.
    """
    from torch import distributed

    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_rank() == 0:
        write(folder)
        return
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as subprocess:
        subprocess.submit(write, folder).result()


def _package_file(package: str, file: str) -> Path:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # "..", "a.b" without a package a
        spec = None
    if spec is None or not spec.submodule_search_locations:
        remedy = f"pip install {package.replace('_', '-')}, or use another model"
        raise ConfigError(Fault("model.package", "is not installed", remedy, package))
    return Path(spec.submodule_search_locations[0], file)


def _file_faults(file: Path) -> Iterator[Fault]:
    if file.suffix != ".gguf":
        problem = "is neither a folder nor a .gguf file"
        yield Fault("path", problem, "set it to the folder that contains config.json, or to a .gguf file", file)
        return
    try:
        gguf_import.check(file)
    except ConfigError as error:
        yield from (replace(fault, key="path") for fault in error.faults)


def _common_faults(
    dtype: Precision,
    attention: Attention,
    rope_scaling: Mapping[str, Any] | None = None,
    max_position_embeddings: int | None = None,
    new_tokens: Sequence[str] = (),
    **_: object,
) -> Iterator[Fault]:
    yield from dtype_faults("dtype", dtype)
    if twice := next((token for token in new_tokens if new_tokens.count(token) > 1), None):
        yield Fault("new_tokens", f"names {twice} twice", "name each token once", list(new_tokens))
    yield from rope.faults(rope_scaling or None, max_position_embeddings)
    if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        problem = "needs the package flash-attn, which is not installed"
        yield Fault("attention", problem, "use sdpa, which is nearly as fast", attention)
