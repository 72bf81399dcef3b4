"""The options of a run: where its configuration becomes typed values and functions.

No other module of ``train`` reads keys of the configuration, or decides by the name of an option.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from runner.config import schema, user_code
from runner.config.bind import bind
from runner.data import formats
from runner.data.examples import Example
from runner.models import sources
from runner.tracking import manifest
from runner.tracking.rundir import RunDir

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from runner.data.sources import Source
    from runner.models.quantization import Quant
    from runner.models.sources import ModelSource
    from runner.tasks.task import Task
    from runner.train.distributed.parallel import Parallel


@dataclass(frozen=True)
class Options:
    """The options of a run. Each is bound once, at its first use: an export needs neither data nor optimizer."""

    _cfg: Mapping[str, Any] = field(repr=False)
    """The configuration, composed, resolved and checked."""

    @classmethod
    def of(cls, rundir: RunDir) -> Options:
        """The options of the run in a folder, with the values that its first attempt has fixed."""
        return cls(manifest.pinned(manifest.read_config(rundir), rundir))

    def refuse_changed_code(self) -> None:
        """Check that the user's code in the run folder is the code of the first attempt.

        Raises:
            ConfigError: it has changed.
        """
        user_code.refuse_changed(self._cfg)

    def _bound(self, group: str) -> partial[Any]:
        return bind(self._cfg[group], group)

    @cached_property
    def task(self) -> Task:
        return self._bound("task")()

    @cached_property
    def model(self) -> ModelSource:
        """The source of the model, as configured: nothing is downloaded or converted."""
        return self._bound("model")()

    def model_in(self, folder: str, *, trusts_code: bool = False) -> ModelSource:
        """A model folder, loaded in the dtype and with the attention of ``model``.

        ``trusts_code``: run Python files of the folder, if ``model`` does.
        """
        node = {key: value for key, value in self._cfg["model"].items() if key in ("dtype", "attention")}
        code = trusts_code and bool(self._cfg["model"].get("trust_remote_code"))
        node |= {"path": folder, "revision": None, "trust_remote_code": code}
        return bind(node, "model", sources.pretrained)()

    @cached_property
    def quant(self) -> Quant:
        return self._bound("quant")()

    @cached_property
    def lora(self) -> Callable[[nn.Module], nn.Module]:
        """Adds the adapter to a model."""
        return self._bound("lora")

    @cached_property
    def optim(self) -> Callable[[list[dict[str, Any]]], Optimizer]:
        """Parameter groups → optimizer."""
        return self._bound("optim")

    @property
    def weight_decay(self) -> float:
        """0.0 for an optimizer of the user's code that has no such key."""
        return self._cfg["optim"].get("weight_decay", 0.0)

    @cached_property
    def schedule(self) -> Callable[[int, int], float]:
        """(step, total steps) → factor of the learning rate."""
        return self._bound("schedule")

    @cached_property
    def compile(self) -> partial[nn.Module]:
        """Compiles a model in place."""
        return self._bound("compile")

    @cached_property
    def parallel(self) -> Parallel:
        return self._bound("parallel")()

    @cached_property
    def train(self) -> schema.TrainSettings:
        return bind(self._cfg["train"], "train", schema.TrainSettings)()

    @property
    def seed(self) -> int:
        return self._cfg["seed"]

    @cached_property
    def data(self) -> schema.DataSettings:
        return bind(self._data_nodes[0], "data", schema.DataSettings)()

    @cached_property
    def format(self) -> Callable[[Mapping[str, Any]], Example]:
        return formats.of(self._data_nodes[1])

    @property
    def source(self) -> Callable[[], Source]:
        """Opens the source of the rows."""
        return bind(self._data_nodes[2], "data")

    @property
    def data_path(self) -> str | None:
        """``data.path``, if the source has that key."""
        return self._cfg["data"].get("path")

    @cached_property
    def encoding(self) -> dict[str, Any]:
        """What decides, beside rows, tokenizer and ``data``, how rows are tokenised: format, task, the user's code."""
        code = {"code": self._cfg["code"]} if self._cfg.get("code") else {}
        return {"format": self._data_nodes[1], "task": self._cfg["task"], **code}

    @cached_property
    def function_sha256(self) -> str | None:
        """Hash of the source code of ``data.format.function``; None without a custom function."""
        form = self._data_nodes[1]
        if not (function := form.get("function")):
            return None
        text = formats.source_text(function, form.get(user_code.PATHS) or ())
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def _data_nodes(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return schema.split_data(dict(self._cfg["data"]))
