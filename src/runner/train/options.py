"""The options of a run: where its configuration becomes typed values and functions.

No other module of ``train`` reads keys of the configuration, or decides by the name of an option.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar

from runner.config import data_nodes, eval_metrics, pinned_weights, schema, user_code, user_function
from runner.config.bind import bind, bind_target, bound_companion
from runner.data import formats
from runner.data.examples import Format
from runner.data.mixture import ALONE, Mixture
from runner.errors import ConfigError, Fault, refuse
from runner.models import architecture, loftq_base, lora, quantized_files, sources
from runner.models.quantization.quant import Quant
from runner.models.sources import ModelSource
from runner.tasks.task import Task
from runner.tracking import manifest, origin
from runner.tracking.rundir import RunDir
from runner.train import loraplus, optim, schedule_free
from runner.train.distributed import parallel
from runner.train.distributed.parallel import Parallel

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from runner.data.sources import Source

T = TypeVar("T")


class _Option(cached_property[T]):
    """An option, bound at its first use; ``waits``: it is a function of run-time objects."""

    def __init__(self, group: str, *, waits: bool = False) -> None:
        def bound(options: Options) -> Any:
            option = bind(options._cfg[group], group)
            return option if waits else option()

        super().__init__(bound)


@dataclass(frozen=True)
class DataSet:
    """The rows of one source, and how they are read and tokenised."""

    settings: schema.DataSettings
    format: Format
    source: Callable[[], Source]
    encoding: Mapping[str, Any]
    """What decides, beside rows, tokenizer and ``settings``, how rows are tokenised: format, task, the user's code."""


@dataclass(frozen=True)
class Options:
    """The options of a run. Each is bound once, at its first use: an export needs neither data nor optimizer."""

    _cfg: Mapping[str, Any] = field(repr=False)
    """The configuration, composed, resolved and checked."""

    task = _Option[Task]("task")
    quant = _Option[Quant]("quant")
    parallel = _Option[Parallel]("parallel")
    lora = _Option[Callable[["nn.Module"], "nn.Module"]]("lora", waits=True)
    compile = _Option[partial["nn.Module"]]("compile", waits=True)
    optim = _Option[Callable[[list[dict[str, Any]]], "Optimizer"]]("optim", waits=True)
    schedule = _Option[Callable[[int, int], float]]("schedule", waits=True)
    train = cached_property(lambda self: schema.TrainSettings(**self._cfg["train"]))
    seed = cached_property(lambda self: int(self._cfg["seed"]))
    model = cached_property(lambda self: self._with_head(bind(self._cfg["model"], "model")()))
    weight_decay = cached_property(lambda self: float(self._cfg["optim"].get("weight_decay", 0.0)))
    data = cached_property(lambda self: bind(self._data_nodes[0], "data", schema.DataSettings)())
    sources = cached_property(lambda self: self._data_sets(data_nodes.SOURCES))
    """The data sets that are trained and held out, by name; one without a name if the data are no mixture."""
    evals = cached_property(lambda self: self._data_sets(data_nodes.EVALS))
    """Further data sets to evaluate on."""
    _data_nodes = cached_property(lambda self: schema.split_data(dict(self._cfg["data"])))

    @classmethod
    def of(cls, rundir: RunDir) -> Options:
        """The options of the run in a folder, with the values that its first attempt has fixed."""
        return cls(manifest.pinned(manifest.read_config(rundir), rundir))

    def model_in(self, folder: str, *, trusts_code: bool = False, is_base: bool = False) -> ModelSource:
        """A model folder, loaded in the dtype and with the attention of ``model``.

        ``trusts_code``: run Python files of the folder, if ``model`` does. ``is_base``: the folder has the files of
        ``model``, which are loaded with its changes; a trained model has the changes in its files.
        """
        own, keys = self._cfg["model"], ("dtype", "attention", *(sources.CHANGES if is_base else ()))
        node = {key: value for key, value in own.items() if key in keys}
        if bind_target(own) is sources.random:
            node.pop("max_position_embeddings", None)  # the folder has this shape
        code = trusts_code and bool(self._cfg["model"].get("trust_remote_code"))
        node |= {"path": folder, "revision": None, "trust_remote_code": code}
        return self._with_head(bind(node, "model", sources.pretrained)())

    def _with_head(self, source: ModelSource) -> ModelSource:
        head = self.task.head
        return source if head is None else replace(source, head=replace(head, seed=self.seed))

    def settled(self, keys: Mapping[str, Any]) -> Options:
        """The options with the keys of the task that the data have decided."""
        return Options({**self._cfg, "task": {**self._cfg["task"], **keys}}) if keys else self

    def on(self, source: ModelSource) -> Options:
        """The options on this model: weights that its files have in bitsandbytes' format stay so.

        Raises:
            ConfigError: they are to be quantized again, or trained in a way that needs unquantized weights.
        """
        config = architecture.read(source)
        if (stored := quantized_files.method(config)) and not self.quant.plain:
            problem = f"the weights of {source.name} are quantized already ({stored})"
            raise ConfigError(Fault("quant", problem, "use quant=none", self.quant.name))
        if not (node := quantized_files.option(config)):
            return self
        if self.loftq_iter:
            problem = f"needs the unquantized weights, and the files of {source.name} have 4 or 8 bits"
            remedy = "use the original model with quant=4bit, or set it to true"
            raise ConfigError(Fault("lora.init_lora_weights", problem, remedy, loftq_base.INIT))
        cfg = {**self._cfg, "quant": node}
        refuse([*lora.check_combination(cfg), *parallel.check_combination(cfg)])
        return Options(cfg)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The trainable parameters, grouped for ``optim``."""
        groups, node = optim.parameter_groups(model, self.weight_decay), self._cfg["optim"]
        rate, ratio = node["learning_rate"], node.get("loraplus_lr_ratio", 1.0)
        groups = groups if ratio == 1 else loraplus.split(groups, model, rate, ratio)
        of_head = 1.0 if self.task.head is None else self.task.head.lr_ratio
        return groups if of_head == 1 else optim.with_faster_head(groups, model, rate, of_head)

    def refuse_changed_code(self) -> None:
        """Check that the user's code in the run folder is the code of the first attempt."""
        user_code.refuse_changed(self._cfg)

    def refuse_changed_start(self) -> None:
        """Check that the adapter of ``lora.start`` has the weights with which the run was prepared.

        Raises:
            ConfigError: it is missing, or has other weights.
        """
        text = pinned_weights.of(self._cfg)
        if text and not origin.is_there(text):
            problem = "the adapter that the run starts from is missing, or has other weights than when it was prepared"
            raise ConfigError(
                Fault("lora.start", problem, "restore it, or start a new run", pinned_weights.split(text)[0])
            )

    @cached_property
    def mixture(self) -> Mixture:
        """How ``sources`` are mixed."""
        source = self._data_nodes[2]
        return bind(source, "data")() if data_nodes.SOURCES in source else ALONE

    def _data_sets(self, group: str) -> dict[str, DataSet]:
        code = {"code": self._cfg["code"]} if self._cfg.get("code") else {}
        sets = {}
        for name, node in data_nodes.each(self._cfg["data"], group).items():
            settings, form, source = schema.split_data(node)
            sets[name] = DataSet(
                bind(settings, "data", schema.DataSettings)(),
                formats.of(form),
                bind(source, "data"),
                {"format": form, "task": self._cfg["task"], **code},
            )
        return sets

    @property
    def optimizer_state_values(self) -> Callable[..., int] | None:
        """(shape, kind) → numbers in the state of a parameter, if the option declares them."""
        return bound_companion("state_values", self._cfg["optim"])

    @property
    def trains_vision(self) -> bool:
        """Whether what reads images is trained, too."""
        return bool(self._cfg["lora"].get("train_vision"))

    @property
    def average(self) -> str:
        """The option that averages the trained weights; empty if none does."""
        if self.train.ema is not None:
            return f"train.ema={self.train.ema:g}"
        if self.train.swa_start is not None:
            return f"train.swa_start={self.train.swa_start:g}"
        return "optim=schedule_free" if schedule_free.is_used(self._cfg) else ""

    @property
    def virtual_tokens(self) -> int:
        """How many virtual tokens the adapter puts before each row."""
        return int(self._cfg["lora"].get("num_virtual_tokens") or 0)

    @property
    def begins_from_data(self) -> bool:
        """Whether the first weights of the adapter are computed from the training data, see ``eva``."""
        return bool(self._cfg["lora"].get("init_lora_weights") == lora.FROM_DATA)

    @property
    def loftq_iter(self) -> int:
        """The iterations of LoftQ that the adapter begins with; 0: it begins otherwise."""
        node = self._cfg["lora"]
        return int(node.get("loftq_iter", 1)) if node.get("init_lora_weights") == loftq_base.INIT else 0

    @property
    def is_larger_better(self) -> bool:
        """Whether larger values of ``train.metric_for_best_model`` are better."""
        return eval_metrics.direction(self._cfg) == "maximize"

    @property
    def code(self) -> list[str]:
        """Where the user's code is."""
        return [str(path) for path in user_code.paths_of(self._cfg)]

    @property
    def data_path(self) -> str | None:
        """``data.path``, if the source has that key."""
        return self._cfg["data"].get("path")

    @cached_property
    def layers(self) -> dict[str, Any]:
        """The options that determine the layers of the model, besides its own configuration."""
        nodes = pinned_weights.without_folders({name: self._cfg.get(name) for name in ("quant", "lora", "code")})
        return dict(user_code.detached(nodes))

    @cached_property
    def start(self) -> dict[str, Any]:
        """The options that determine the weights before the first step."""
        nodes = pinned_weights.without_folders(
            {name: self._cfg.get(name) for name in ("model", "quant", "lora", "seed", "code")}
        )
        source = [self.model.path, self.model.revision, self.model.dtype, self.model.attention]
        return {**user_code.detached(nodes), "source": source}

    @cached_property
    def function_sha256(self) -> str | None:
        """Hash of the source code of each ``data.format.function``; None without a custom function."""
        forms = (each.encoding["format"] for each in (*self.sources.values(), *self.evals.values()))
        texts = [
            user_function.source_text(form["function"], form.get(user_code.PATHS) or ())
            for form in forms
            if form.get("function")
        ]
        return hashlib.sha256("\0".join(texts).encode()).hexdigest() if texts else None
