"""Average the weights of several trained models of the same kind into one.

Of LoRA adapters the changes of the weights are averaged, s·(B₁A₁ + … + BₙAₙ)/n, which is not the product of the
averages of A and B: it is a plain LoRA of n times the rank, s·[B₁ … Bₙ]/n · [A₁; …; Aₙ]. All other tensors, and those
of whole models, are averaged one by one ("model soups", https://arxiv.org/abs/2203.05482).
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.config import pinned_weights
from runner.errors import Fault, refuse
from runner.models import model_folder
from runner.models.warm_start import FREE

if TYPE_CHECKING:
    import torch

WEIGHTS = "*.safetensors"
BASE = ("base_model_name_or_path", "revision")


def average(folders: Sequence[Path], target: Path) -> str:
    """Write the average of the models in ``folders`` to ``target``, which must not exist; other files are of the first.

    Returns:
        what was averaged, in words.

    Raises:
        ConfigError: the models differ in kind, base model, options or shapes, or their kind cannot be averaged.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    configs = [model_folder.read_json(folder / pinned_weights.ADAPTER) for folder in folders]
    refuse(_faults(folders, configs))
    shutil.copytree(folders[0], target)
    for path in sorted(set(target.glob(WEIGHTS)) - {target / pinned_weights.LOFTQ}):
        files = [safe_open(folder / path.name, "pt") for folder in folders]
        refuse(_shape_faults(folders, files))
        tensors = {name: _mean(name, [file.get_tensor(name) for file in files]) for name in files[0].keys()}  # noqa: SIM118
        del files
        path.unlink()  # the copy may be a link to the file that is read
        save_file(tensors, path, metadata={"format": "pt"})
    if configs[0] is None:
        return f"mean of the weights of {len(folders)} models"
    scaled = _with_rank(configs[0], len(folders))
    (target / pinned_weights.ADAPTER).write_text(json.dumps(scaled, indent=2))
    return f"mean of the changes of {len(folders)} adapters, as one of rank {scaled['r']}"


def _faults(folders: Sequence[Path], configs: Sequence[Mapping[str, Any] | None]) -> Iterator[Fault]:
    first, names = configs[0], [sorted(path.name for path in folder.glob(WEIGHTS)) for folder in folders]
    if first is not None and (problem := _unsuited(first)):
        yield Fault("--average", problem, "average merged models: export each --merged")
        return
    for config, files, folder in zip(configs[1:], names[1:], folders[1:], strict=True):
        if (config is None) != (first is None):
            yield Fault("--average", "is of adapters, or of whole models, not of both", "name runs of one kind", folder)
        elif config is not None and first is not None:
            differing = [key for key in sorted({*config, *first} - (FREE - set(BASE))) if _differs(key, first, config)]
            if differing:
                shown = ", ".join(differing)
                yield Fault("--average", f"the adapters differ in {shown}", "name runs that are equal in these", folder)
            elif _base_of(folder) != _base_of(folders[0]):
                yield Fault("--average", "the adapters belong to different bases (LoftQ)", "name others", folder)
        elif files != names[0]:
            yield Fault("--average", "the models have different files of weights", "name runs of one model", folder)


def _base_of(folder: Path) -> bytes:
    """What tells the base of an adapter that began with LoftQ; the same options on the same model give the same."""
    file = folder / pinned_weights.LOFTQ
    return file.read_bytes() if file.is_file() else b""


def _unsuited(config: Mapping[str, Any]) -> str:
    """Why the average of such adapters is none of this kind; empty if it is."""
    if config.get("peft_type") != "LORA":
        return f"the average of adapters of the method {config.get('peft_type')} is no such adapter"
    if config.get("use_dora"):
        return "the average of DoRA adapters is no DoRA adapter: their magnitudes do not add up"
    return "adapters of single parameters cannot be averaged" if config.get("target_parameters") else ""


def _differs(key: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    values = [sorted(map(str, each)) if isinstance(each, list) else each for each in (one.get(key), other.get(key))]
    return "dropout" not in key and values[0] != values[1]


def _shape_faults(folders: Sequence[Path], files: Sequence[Any]) -> Iterator[Fault]:
    shapes = [{name: file.get_slice(name).get_shape() for name in file.keys()} for file in files]  # noqa: SIM118
    for folder, of_folder in zip(folders[1:], shapes[1:], strict=True):
        if differing := sorted(name for name in {*of_folder, *shapes[0]} if of_folder.get(name) != shapes[0].get(name)):
            problem = f"{len(differing)} tensors have other shapes, such as {differing[0]}"
            yield Fault("--average", problem, "name runs of the same model and options", folder)


def _mean(name: str, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean of tensors of one name, computed in float32; of A and B of LoRA the parts of the averaged product."""
    import torch

    n, dtype = len(tensors), tensors[0].dtype
    if ".lora_A." in name or "lora_embedding_A" in name:
        return torch.cat(list(tensors), dim=0)
    if name.endswith("lora_B.weight") or "lora_embedding_B" in name:
        return (torch.cat(list(tensors), dim=1).float() / n).to(dtype)
    if not dtype.is_floating_point:
        return tensors[0]
    return torch.stack([tensor.float() for tensor in tensors]).mean(0).to(dtype)


def _with_rank(config: Mapping[str, Any], n: int) -> dict[str, Any]:
    """n times the rank with the same scale, which is alpha / r, or alpha / √r with rsLoRA."""
    factor = n**0.5 if config.get("use_rslora") else n
    scaled = {**copy.deepcopy(dict(config)), "r": config["r"] * n, "lora_alpha": config["lora_alpha"] * factor}
    scaled["rank_pattern"] = {name: n * rank for name, rank in (config.get("rank_pattern") or {}).items()}
    scaled["alpha_pattern"] = {name: factor * alpha for name, alpha in (config.get("alpha_pattern") or {}).items()}
    return scaled
