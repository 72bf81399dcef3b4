"""Save a PEFT adapter so that plain PEFT loads it onto the original base model, also for PiSSA and OLoRA.

PiSSA and OLoRA subtract the initial adapter B₀·A₀ from the base weights W and train B·A. The final weights are
W + B·A − B₀·A₀ = W + [B, −B₀]·[A; A₀]: on the original base, a plain LoRA of twice the rank. PEFT's own conversion
loads a second adapter into the model; here a copy of the initial adapter is kept, and saving does not change the model.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runner.models import hub, loftq_base


def subtracts_initial(init: Any) -> bool:
    """Whether this initialisation subtracts the initial adapter from the base weights (PiSSA, OLoRA)."""
    return isinstance(init, str) and init.lower().startswith(("pissa", "olora"))


@contextlib.contextmanager
def fixed_seed() -> Iterator[None]:
    """Fix the seed of PiSSA's randomised SVD: a resumed run must compute the same initial adapter again."""
    import torch

    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        torch.manual_seed(0)
        yield


def keep_initial(model: Any) -> None:
    """Store a copy of the initial adapter on the model, for ``save``."""
    model.initial_adapter = {name: tensor.detach().cpu().clone() for name, tensor in state(model).items()}


def state(model: Any) -> dict[str, Any]:
    """The adapter's tensors, by PEFT's names."""
    from peft import get_peft_model_state_dict

    # The default "auto" asks the Hub whether the vocabulary was resized, which never happens here.
    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def save(model: Any, folder: Path, tensors: dict[str, Any]) -> None:
    """Write the adapter to ``folder`` for the *original* base model; ``tensors``: the result of ``state``."""
    from safetensors.torch import save_file

    config = copy.deepcopy(model.peft_config["default"])
    config.inference_mode = True
    if on_hub := hub.published(str(config.base_model_name_or_path)):
        config.base_model_name_or_path, config.revision = on_hub
    tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    initial = getattr(model, "initial_adapter", None)
    if initial is not None:
        tensors = {name: _subtract_initial(name, tensor, initial) for name, tensor in tensors.items()}
        _double_rank(config)
    config.save_pretrained(str(folder))
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    loftq_base.write_beside(model, folder)
    model.create_or_update_model_card(str(folder))


def _subtract_initial(name: str, tensor: Any, initial: dict[str, Any]) -> Any:
    """[A; A₀] for A and [B, −B₀] for B: their product is B·A − B₀·A₀."""
    import torch

    if name.endswith("lora_A.weight"):
        return torch.cat([tensor, initial[name].to(tensor)], dim=0)
    if name.endswith("lora_B.weight"):
        return torch.cat([tensor, -initial[name].to(tensor)], dim=1)
    return tensor


def _double_rank(config: Any) -> None:
    """Double the rank and keep the scale, which is alpha / r, or alpha / √r with rsLoRA."""
    factor = 2**0.5 if config.use_rslora else 2
    config.init_lora_weights = True
    config.r *= 2
    config.lora_alpha *= factor
    config.rank_pattern = {name: 2 * rank for name, rank in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {name: factor * alpha for name, alpha in (config.alpha_pattern or {}).items()}
