"""Train an adapter further: begin with the weights of a saved one, which must be of the same kind, shape and base."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runner.config import pinned_weights
from runner.errors import ConfigError, Fault, refuse
from runner.models import adapter, hub, loftq_base, model_folder, new_tokens
from runner.models.kernels import base_model

FREE = {
    "base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode", "init_lora_weights",
    "init_weights", "task_type", "peft_type",
}  # fmt: skip
"""Fields of PEFT's configurations that do not describe the adapter, or are compared separately; so is dropout."""

log = logging.getLogger("runner")


def begin_with(model: Any, text: str) -> None:
    """Copy the weights of the adapter in ``lora.start`` into the adapter of ``model``.

    On the meta device, only check that they fit.

    Raises:
        ConfigError: naming everything that does not fit: method, options, head, base model, shapes.
    """
    folder = pinned_weights.adapter_in(Path(pinned_weights.split(text)[0]))
    weights = folder / pinned_weights.WEIGHTS
    problem = model_folder.damage(weights) if weights.is_file() else "does not exist"
    saved = model_folder.read_json(folder / pinned_weights.ADAPTER) if not problem else None
    if saved is None:
        problem = f"{weights} {problem}" if problem else f"{folder / pinned_weights.ADAPTER} {model_folder.NOT_JSON}"
        raise ConfigError(Fault("lora.start", problem, "restore the file, or train that run again"))
    config = model.peft_config["default"]
    refuse([*_kind_faults(config, saved), *_position_faults(model, folder), *loftq_base.start_faults(model, folder)])
    refuse(_shape_faults(model, weights))
    if not any(parameter.is_meta for parameter in model.parameters()):
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        set_peft_model_state_dict(model, load_file(weights))
        if (folder / loftq_base.FILE).is_file():
            loftq_base.keep(model, folder / loftq_base.FILE)


def _kind_faults(config: Any, saved: Mapping[str, Any]) -> Iterator[Fault]:
    """The fields in which the saved adapter's configuration differs."""
    ours = _plain(config.to_dict())
    for name, what in (("peft_type", "method"), ("task_type", "head")):
        if str(saved.get(name)) != str(ours[name]):
            problem = f"that adapter has the {what} {saved.get(name)}, and this run has {ours[name]}"
            yield Fault("lora.start", problem, "start from a run of the same kind, or leave lora.start out")
            return
    yield from _base_faults(config, saved)
    theirs = _plain(saved)
    for name in sorted(ours.keys() & theirs.keys() - FREE):
        if name == new_tokens.ROWS and ours[name] != theirs[name]:
            problem = "the adapter of lora.start has other new tokens, or none"
            yield Fault(new_tokens.KEY, problem, "set it as in that run, or leave lora.start out")
        elif ours[name] != theirs[name] and "dropout" not in name:
            value = json.dumps(theirs[name]).replace('"', "").replace(" ", "")
            problem, remedy = (
                f"the adapter of lora.start has {value}",
                f"set lora.{name}={value}, or leave lora.start out",
            )
            yield Fault(f"lora.{name}", problem, remedy, ours[name])


def _base_faults(config: Any, saved: Mapping[str, Any]) -> Iterator[Fault]:
    """The base model must be the one that the saved adapter was trained on: path, or Hub id and commit."""
    here = str(config.base_model_name_or_path)
    ours, revision = hub.published(here) or (here, config.revision)
    theirs, commit = str(saved.get("base_model_name_or_path")), saved.get("revision")
    if Path(ours).resolve() == Path(theirs).resolve():
        if revision and commit and revision != commit:
            problem = f"the adapter was trained on the commit {commit} of {theirs}, and this run has {revision}"
            yield Fault("model.revision", problem, f"set model.revision={commit}", revision)
    elif not Path(theirs).exists() and Path(theirs).name == Path(ours).name and Path(ours).exists():
        log.warning(f"lora.start: its base model {theirs} is not on this machine; {ours} is taken for the same model")
    else:
        problem = f"the adapter was trained on {theirs}, and this run has {ours}"
        yield Fault("lora.start", problem, "choose that base model (model=…), or another run")


def _position_faults(model: Any, folder: Path) -> Iterator[Fault]:
    """The rotary position embeddings must be those that the adapter was trained with."""
    text = base_model.of(model).config.get_text_config()
    ours = getattr(text, "rope_parameters", None)
    saved = model_folder.read_json(folder / "config.json") or {}
    theirs = (saved.get("text_config") or saved).get("rope_parameters")
    is_changed = getattr(base_model.of(model), "is_reconfigured", False)
    if (theirs or is_changed) and theirs != ours:
        shown = json.dumps(theirs) if theirs else "those of the base model"
        problem = f"the adapter of lora.start was trained with other positions: {shown}"
        yield Fault("model.rope_scaling", problem, "set it as in that run, or leave lora.start out")


def _shape_faults(model: Any, weights: Path) -> Iterator[Fault]:
    """The tensors must have the same names and shapes."""
    from safetensors import safe_open

    ours = {name: list(tensor.shape) for name, tensor in adapter.state(model).items()}
    with safe_open(weights, "pt") as file:
        theirs = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)
    differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if differing:
        name = differing[0]
        problem = f"{len(differing)} of its tensors do not fit this model: {name} has the shape "
        problem += f"{theirs.get(name, 'none')} there, {ours.get(name, 'none')} here"
        yield Fault("lora.start", problem, "use the base model and the options of that run")


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as in JSON; names of modules in one order."""

    def plain(value: Any) -> Any:
        if isinstance(value, set | list | tuple):
            items = [plain(item) for item in value]
            return sorted(items) if all(isinstance(item, str) for item in items) else items
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        return getattr(value, "value", value)

    return {name: plain(value) for name, value in fields.items()}
