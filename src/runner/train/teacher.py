"""The teacher of a distillation before its weights are loaded: where it is, whether its tokens fit, what it needs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.config import pinned_weights
from runner.config.bind import bind, option
from runner.errors import ConfigError, Fault
from runner.models import architecture, parameters, pretrained, tokenizer_files
from runner.models.dtypes import dtype_for
from runner.models.kernels import lora_linear
from runner.models.quantization.quant import Quant
from runner.models.sources import ModelSource
from runner.tasks import soft_targets, task
from runner.tracking import manifest, naming, origin, provenance
from runner.tracking.rundir import RunDir
from runner.train import throughput, trained_model
from runner.train.memory import peak
from runner.train.memory.footprint import TeacherNeeds
from runner.train.options import Options
from runner.train.trained_model import Trained

if TYPE_CHECKING:
    import torch
    from torch import nn

    from runner.data.batches import Shape

SHOWN = 3
"""Tokens named in the message about another tokenizer."""


@dataclass(frozen=True)
class Teacher:
    """A model that is not trained, not loaded yet."""

    spec: task.Teacher
    source: ModelSource
    """Of its weights; of a run with an adapter: of the base model."""
    run: Trained | None
    quant: Quant
    size: int
    """How many tokens its vocabulary and the student's have in common."""

    @property
    def name(self) -> str:
        if self.run is None:
            return self.source.name
        return naming.label(self.run.rundir.read_manifest(), self.run.rundir.path)

    @property
    def text(self) -> str:
        """Its name, quantization and use, for the header and ``plan``."""
        stored = f" ({self.quant.name})" if not self.quant.plain else ""
        top = self.spec.top_k
        return f"{self.name}{stored}, " + ("in memory" if top is None else f"its {top} most likely tokens")

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What determines its probabilities, beside the rows and the device."""
        _, digest = pinned_weights.split(self.spec.where or "")
        base = Path(self.source.path)
        weights = provenance.remembered_digest(base) if base.exists() else [self.source.path, self.source.revision]
        return {"weights": [digest, weights], "quant": self.spec.quant, "dtype": self.source.dtype,
                "attention": self.source.attention, "versions": provenance.versions()}  # fmt: skip

    @property
    def record(self) -> dict[str, Any]:
        """The entry of manifest.json. ``path`` and ``revision`` name a model of the Hub again."""
        where, digest = pinned_weights.split(self.spec.where or "")
        known = self.run.rundir.read_manifest() if self.run is not None else {}
        path = where if self.run is not None else self.source.path
        return {"name": self.name, "path": path, "weights": digest,
                "revision": None if digest or not where else self.source.revision, "quant": self.spec.quant,
                "top_k": self.spec.top_k, "mlflow_run_id": (known.get("mlflow") or {}).get("run_id")}  # fmt: skip

    def load(self, device: torch.device | str) -> nn.Module:
        """The model in eval mode, without gradients."""
        with _named():
            if self.run is not None:
                model = trained_model.load(self.run, device, dtype=self.source.dtype, quant=self.quant)
            else:
                model = pretrained.load(self.source, self.quant, device).eval()
        lora_linear.fuse(model)
        model.requires_grad_(False)
        return model  # type: ignore[no-any-return]

    def needs(
        self, device: torch.device, length: int, share: float, batch: Shape, autocast: torch.dtype | None, *,
        by_document: bool,
    ) -> TeacherNeeds:  # fmt: skip
        """``length``: tokens of a document; ``share``: of the tokens that are trained; ``batch``: the largest one."""
        with _named():
            model, small = (pretrained.empty(self.source, self.quant, device, layers) for layers in (None, 2))
        counts, size = parameters.describe(model), dtype_for(self.source.dtype, device).itemsize
        weights = counts["quantized_bytes"] + (counts["total"] - counts["quantized"]) * size
        if self.run is not None and self.run.is_adapter:
            weights += (self.run.rundir.model / trained_model.ADAPTER_WEIGHTS).stat().st_size
        states = batch.trained * architecture.read(self.source).get_text_config().hidden_size * size
        outputs = states + soft_targets.working_bytes(self.size, size, device.type)
        forward = None
        with contextlib.suppress(Exception):  # any kind, if the model reads tensor values
            forward = peak.of_forward_pass(small, batch, by_document=by_document, autocast=autocast, device=device)
            forward += (
                0 if self.quant.plain else parameters.largest_matrix(model) * size
            )  # dequantized while it is used
        flops = throughput.flops_per_token(model, length, share, forward_passes=1, updates=0)
        return TeacherNeeds(weights, forward, outputs, flops, counts["total"], counts["stored"])


def of(options: Options, own: ModelSource, tokenizer: Any) -> Teacher | None:
    """The teacher of a run; None if its task has none. ``own``: the run's own model.

    Raises:
        ConfigError: the teacher does not exist, has changed, gives scores, or has other tokens.
    """
    spec = options.task.teacher
    if spec is None:
        return None
    if spec.where and not origin.is_teacher_there(spec.where):
        problem = "the teacher is missing, or has other weights than when the run was prepared"
        remedy = "restore it, or start a new run"
        raise ConfigError(Fault("task.teacher", problem, remedy, pinned_weights.split(spec.where)[0]))
    quant = bind(option("quant", spec.quant), "quant")()
    with _named():
        source, run, theirs = _found(options, spec, own, tokenizer)
        size = min(_vocabulary(own), _vocabulary(source))
    _refuse_other_tokens(tokenizer.get_vocab(), theirs.get_vocab(), size)
    if spec.top_k is not None and spec.top_k > size:
        raise ConfigError(Fault("task.top_k", f"the vocabulary has {size} tokens", "lower it", spec.top_k))
    return Teacher(spec, source, run, quant, size)


def _found(
    options: Options, spec: task.Teacher, own: ModelSource, tokenizer: Any
) -> tuple[ModelSource, Trained | None, Any]:
    """(source of the weights, the run that trained it if one did, its tokenizer)"""
    if spec.where is None:
        return own, None, tokenizer
    place, digest = pinned_weights.split(spec.where)
    rundir = RunDir(Path(place))
    if digest and rundir.manifest.exists():
        trained_model.refuse_without_model(rundir)
        run = Trained(rundir, manifest.pinned(manifest.read_config(rundir), rundir))
        if run.scores:
            raise ConfigError(Fault("model.path", "it gives scores, not text", "name a model for text generation"))
        source = run.base if run.is_adapter else run.result
        return replace(source, dtype=options.model.dtype, attention=options.model.attention), run, run.tokenizer
    name, _, revision = (place, "", "") if digest else place.partition("@")
    source = options.model_in(name)
    source = architecture.resolve(replace(source, revision=revision or None))
    return source, None, tokenizer_files.load(source)


def _vocabulary(source: ModelSource) -> int:
    return int(architecture.read(source).get_text_config().vocab_size)


def _refuse_other_tokens(ours: dict[str, int], theirs: dict[str, int], size: int) -> None:
    """Compare the tokens one by one: sizes differ where a vocabulary is padded, and equal sizes prove nothing."""
    texts, others = ({number: text for text, number in each.items() if number < size} for each in (ours, theirs))
    differing = sorted(n for n in texts.keys() | others.keys() if texts.get(n) != others.get(n))
    if differing:
        pairs = (f"{n} is {texts.get(n)!r} here and {others.get(n)!r} there" for n in differing[:SHOWN])
        problem = f"has other tokens than the model: {len(differing)} of {size} differ ({', '.join(pairs)})"
        raise ConfigError(Fault("task.teacher", problem, "use a teacher of the same model family"))


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Faults of the teacher's model name the key ``task.teacher``."""
    try:
        yield
    except ConfigError as error:
        keys = ("model.", "quant")
        named = (replace(f, key="task.teacher") if not f.key or f.key.startswith(keys) else f for f in error.faults)
        raise ConfigError(*named) from error
