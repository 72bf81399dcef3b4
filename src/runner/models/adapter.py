"""A PEFT adapter's weights: what to keep of their start, and writing them for plain PEFT.

PiSSA and OLoRA cut their start B₀·A₀ out of the base weights W and train B·A on the rest. The finished model is thus
W + B·A − B₀·A₀ = W + [B, −B₀]·[A; A₀]: on the original base, a plain LoRA of twice the rank. PEFT can convert so too,
by loading a second adapter into the model at work; here the start is kept aside, and saving leaves the model alone.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def is_cut_from_base(init: Any) -> bool:
    """Whether these initial weights are taken out of the base weights."""
    return isinstance(init, str) and init.lower().startswith(("pissa", "olora"))


@contextlib.contextmanager
def same_cut_each_time() -> Iterator[None]:
    """A seed of its own for PiSSA's randomised SVD: a resumed run must cut the same start again."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def keep_start(model: Any) -> None:
    """Keep the adapter's start with the model, for ``save``."""
    model.initial_adapter = {name: tensor.detach().cpu().clone() for name, tensor in state(model).items()}


def state(model: Any) -> dict[str, Any]:
    """The adapter's tensors by PEFT's names."""
    from peft import get_peft_model_state_dict

    # "auto" would ask the Hub whether the vocabulary grew; here it never does, and modules_to_save are in anyway.
    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def save(model: Any, folder: Path, found: dict[str, Any]) -> None:
    """Write the adapter, ``found`` by ``state``, to ``folder`` so that plain PEFT loads it onto the *original* base."""
    from safetensors.torch import save_file

    config = copy.deepcopy(model.peft_config["default"])
    config.inference_mode = True
    tensors = {name: tensor.detach().cpu() for name, tensor in found.items()}
    start = getattr(model, "initial_adapter", None)
    if start is not None:
        tensors = {name: _beside_start(name, tensor, start) for name, tensor in tensors.items()}
        _double_rank(config)
    config.save_pretrained(str(folder))
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    model.create_or_update_model_card(str(folder))


def _beside_start(name: str, tensor: Any, start: dict[str, Any]) -> Any:
    import torch

    if name.endswith("lora_A.weight"):
        return torch.cat([tensor, start[name].to(tensor)], dim=0)
    if name.endswith("lora_B.weight"):
        return torch.cat([tensor, -start[name].to(tensor)], dim=1)
    return tensor


def _double_rank(config: Any) -> None:
    """Twice the rank at the same scale, which is alpha / r, or alpha / √r with rsLoRA."""
    factor = 2**0.5 if config.use_rslora else 2
    config.init_lora_weights = True
    config.r *= 2
    config.lora_alpha *= factor
    config.rank_pattern = {name: 2 * rank for name, rank in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {name: factor * alpha for name, alpha in (config.alpha_pattern or {}).items()}
