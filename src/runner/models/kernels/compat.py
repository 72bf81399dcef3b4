"""Where the supported versions of torch, transformers, PEFT and bitsandbytes differ, back to the reference stack.

The reference stack: Python 3.12, torch 2.5.1, transformers 4.48.3, peft 0.14.0, bitsandbytes 0.49.1. Nothing else in
this package looks at a version. Each function names the version that makes it superfluous.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from collections.abc import Container
from typing import Any

from runner import environment_variables
from runner.errors import ConfigError, Fault

WARM_POOL = "TORCH_WARM_POOL"
"""Environment variable: whether Inductor starts its processes before they are needed."""


@functools.cache
def at_least(package: str, version: str) -> bool:
    """Whether the installed ``package`` has this version or a later one."""
    from packaging.version import Version

    return Version(importlib.metadata.version(package)) >= Version(version)


def lora_variants(layer: Any) -> Container[str]:
    """The adapters of a LoRA layer that compute something else than plain LoRA, such as DoRA (PEFT 0.16)."""
    variants: Container[str] | None = getattr(layer, "lora_variant", None)
    return {name for name, uses in layer.use_dora.items() if uses} if variants is None else variants


def masks_by_position() -> bool:
    """Whether transformers masks documents whose ``position_ids`` begin again (transformers 4.53, torch 2.6)."""
    return at_least("transformers", "4.53") and at_least("torch", "2.6")


def can_change_attention(model: Any) -> bool:
    """Whether the attention of a loaded model can be changed (transformers 4.54)."""
    return hasattr(model, "set_attn_implementation")


def forget_device_map(model: Any) -> None:
    """Forget that a model is on one device: PEFT 0.14 takes any map with a CPU for weights that are moved to a GPU."""
    if len(getattr(model, "hf_device_map", {})) == 1:
        del model.hf_device_map


def dtype_keyword() -> str:
    """The argument of ``from_pretrained`` for the dtype; transformers 4.56 renamed it."""
    return "dtype" if at_least("transformers", "4.56") else "torch_dtype"


def model_cache() -> str:
    """The room of the cache for models that transformers writes: 4 cannot load the tokenizers that 5 saves."""
    return "models" if at_least("transformers", "5") else "models-transformers-4"


def without_compile_workers() -> contextlib.AbstractContextManager[None]:
    """For imports inside the block: torch 2.5 starts processes and a thread when Inductor is imported.

    They would be for nothing where nothing is compiled, and a process with threads should not be forked.
    """
    return environment_variables.kept(WARM_POOL, "0")


def check_optimizer(groups: list[dict[str, Any]]) -> None:
    """Check that the optimizers of bitsandbytes have kernels for the devices of the parameters (0.50).

    Raises:
        ConfigError: before 0.50 they have none for a CPU; the first step would end in a NotImplementedError.
    """
    on_cpu = any(parameter.device.type == "cpu" for group in groups for parameter in group["params"])
    if on_cpu and not at_least("bitsandbytes", "0.50"):
        installed = importlib.metadata.version("bitsandbytes")
        problem = f"bitsandbytes {installed} has optimizers for GPUs only, and this machine has none"
        raise ConfigError(Fault("optim", problem, "install bitsandbytes >= 0.50, or use optim=adamw"))


def check_vision(key: str, path: str) -> None:
    """Check that transformers has processors that work without torchvision, and models with one language model (5.0).

    Raises:
        ConfigError: it is older.
    """
    if not at_least("transformers", "5"):
        problem = f"reads images, and transformers {importlib.metadata.version('transformers')} is too old for this"
        raise ConfigError(Fault(key, problem, "install transformers >= 5, or use a model for text", path))


def check_quantization(device: Any) -> None:
    """Check that transformers loads weights of bitsandbytes onto the device (4.53).

    Raises:
        ConfigError: it needs a GPU: 4.48 to 4.50 end in an AttributeError, 4.51 and 4.52 refuse a CPU.
    """
    if str(device).startswith("cpu") and not at_least("transformers", "4.53"):
        installed = importlib.metadata.version("transformers")
        problem = f"transformers {installed} loads 8-bit and 4-bit weights on GPUs only, and this machine has none"
        raise ConfigError(Fault("quant", problem, "install transformers >= 4.53, or use quant=none"))
