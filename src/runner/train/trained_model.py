"""Load the model that a run has trained: base model plus adapter, or the fully fine-tuned model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from runner import terminal
from runner.config import pinned_weights
from runner.errors import ConfigError, Fault, first_line
from runner.models import architecture, loftq_base, model_folder, new_tokens, tokenizer_files
from runner.models.kernels import base_model
from runner.tracking import run_status
from runner.tracking.rundir import RunDir
from runner.train.options import Options

if TYPE_CHECKING:
    import torch

    from runner.models.dtypes import Precision
    from runner.models.quantization.quant import Quant
    from runner.models.sources import ModelSource

ADAPTER, ADAPTER_WEIGHTS = pinned_weights.ADAPTER, pinned_weights.WEIGHTS
AGAIN = {
    "completed": "its folder model/ was deleted: train the run again",
    "running": "wait until it has completed: python -m runner status {run}",
    "failed": "see the reason with python -m runner logs {run}; retry with python -m runner {resume} retry=true",
}
"""Status → what to do about a run without a model."""


@dataclass(frozen=True)
class Trained:
    """A run that has a model, not loaded yet."""

    rundir: RunDir
    cfg: dict[str, Any]
    base_path: str | None = None
    """The path of the base model, if it has moved since training."""

    @property
    def is_adapter(self) -> bool:
        return (self.rundir.model / ADAPTER).is_file()

    @cached_property
    def base(self) -> ModelSource:
        """The source of the base model; does not load weights.

        Raises:
            ConfigError: the base model does not exist.
        """

        options, moved_to = self.options, self.base_path
        try:
            return architecture.resolve(options.model if moved_to is None else options.model_in(moved_to, is_base=True))
        except ConfigError as error:
            remedy = "or, if the base model of this run has moved, add model.path=FOLDER"
            faults = [replace(fault, remedy=f"{fault.remedy}; {remedy}".lstrip("; ")) for fault in error.faults]
            raise ConfigError(*faults) from error

    @cached_property
    def result(self) -> ModelSource:
        """The source of the tokenizer and, after full fine-tuning, of the weights."""
        if self.is_adapter:
            return self.base
        source = self.options.model_in(str(self.rundir.model), trusts_code=True)
        return replace(source, name=self.rundir.path.name)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the training, including its chat template."""

        return tokenizer_files.load(self.result)

    @cached_property
    def options(self) -> Options:
        return Options(self.cfg)

    @property
    def quant(self) -> Quant:
        """How the weights were stored in training."""
        return self.options.on(self.base).quant if self.is_adapter else self.options.quant

    @property
    def scores(self) -> bool:
        """Whether the model gives documents scores instead of text."""
        return self.options.task.head is not None

    @property
    def reads_images(self) -> bool:
        """Whether the model reads images beside text."""
        return base_model.reads_images(architecture.read(self.result))

    @property
    def is_chat(self) -> bool:
        """Whether the model answers messages; otherwise it continues a text."""
        return self.options.task.chats


def load(
    trained: Trained,
    device: torch.device | str,
    *,
    dtype: Precision | None = None,
    quant: Quant | None = None,
    unties: bool = False,
) -> Any:
    """Load the fine-tuned model in eval mode; ``dtype`` and ``quant`` replace those of the run.

    ``unties``: untie head and embeddings if the adapter changes one of them.

    Raises:
        ConfigError: the weights are missing, damaged, or do not fit the base model.
    """
    from runner.models import pretrained

    if not trained.is_adapter:
        terminal.loading(f"the model of {terminal.nearest(trained.rundir.path)}")
        source = trained.result if dtype is None else replace(trained.result, dtype=dtype)
        return pretrained.load(source, quant or trained.quant, device).eval()
    base = load_base(trained, device, dtype=dtype, quant=quant)
    if unties:
        _untie(base, trained)
    return _adapted(base, trained)


def load_base(
    trained: Trained, device: torch.device | str, *, dtype: Precision | None = None, quant: Quant | None = None
) -> Any:
    """Load the base model in eval mode."""
    from runner.models import pretrained

    terminal.loading(f"{trained.base.name}, the base of {terminal.nearest(trained.rundir.path)}")
    source = trained.base if dtype is None else replace(trained.base, dtype=dtype)
    return pretrained.load(source, quant or trained.quant, device).eval()


@contextlib.contextmanager
def without_adapter(model: Any) -> Iterator[Any]:
    """Disable the adapter while the block runs; gives the base model only if ``has_base_inside``."""
    with model.disable_adapter():
        yield model


def has_base_inside(model: Any) -> bool:
    """Whether disabling the adapter gives the base model; not with trained biases, nor weights quantized anew."""
    configs = getattr(model, "peft_config", {}).values()
    is_base = all(getattr(config, "bias", "none") == "none" for config in configs)
    return bool(configs) and is_base and not getattr(model, "is_requantized", False)


def quiet() -> None:
    """Silence warnings and progress bars of libraries; only errors remain."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    logging.getLogger("mlflow").setLevel(logging.ERROR)


def _adapted(base: Any, trained: Trained) -> Any:
    from peft import PeftModel

    weights = trained.rundir.model / ADAPTER_WEIGHTS
    if problem := model_folder.damage(weights) if weights.is_file() else "does not exist":
        raise ConfigError(Fault("", f"{weights} {problem}", "train the run again, or restore the file"))
    if trained.options.loftq_iter or (trained.rundir.model / loftq_base.FILE).is_file():
        from runner.models.quantization import loftq

        loftq.settle(base, trained.base, trained.rundir.model / loftq_base.FILE)
    try:
        return PeftModel.from_pretrained(base, str(trained.rundir.model)).eval()
    except (RuntimeError, ValueError, KeyError) as error:
        if "out of memory" in str(error):
            raise
        problem = f"the adapter does not fit the base model {trained.base.path}: {first_line(error)}"
        raise ConfigError(
            Fault("model.path", problem, "set it to the base model that the run was trained on")
        ) from error


def _untie(base: Any, trained: Trained) -> None:
    """Give the head a copy of the tied embedding weight, if the adapter changes the embeddings or the head."""
    from torch import nn

    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if head is None or head.weight is not embedding.weight or not _changes_embeddings(base, trained):
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    base.config.tie_word_embeddings = base.config.get_text_config().tie_word_embeddings = False


def _changes_embeddings(base: Any, trained: Trained) -> bool:
    """Whether the adapter contains weights for the embeddings or the head; rows of new tokens stay tied."""
    from safetensors import safe_open

    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    names = [name for name, module in base.named_modules() if any(module is end for end in ends)]
    with safe_open(trained.rundir.model / ADAPTER_WEIGHTS, "pt") as weights:
        keys = [key for key in weights.keys() if not new_tokens.is_row(key)]  # noqa: SIM118 (not a dict)
    return any(f".{name}." in key for key in keys for name in names)


def refuse_without_model(rundir: RunDir) -> None:
    """Raise a ConfigError if the run has no model."""
    if any((rundir.model / name).is_file() for name in (ADAPTER, "config.json")):
        return
    (run,) = run_status.of([rundir])
    step = f" (step {run.state.step}/{run.state.total_steps})" if run.state.total_steps else ""
    remedy = AGAIN.get("running" if run.is_live else run.status, "continue it with python -m runner {resume}")
    near = terminal.nearest(rundir.path)
    problem = f"the run {near} has no model yet: it is {run.status}{step}"
    words = {"run": terminal.typed(near), "resume": terminal.typed(near, "resume")}
    raise ConfigError(Fault("", problem, remedy.format(**words)))
