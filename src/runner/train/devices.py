"""The device of this process, and the kernels that torch may choose on it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import torch

from runner.config.schema import Memory
from runner.errors import ConfigError, Fault
from runner.tracking import machine

EXACT_CUDNN = 92500
"""The first cuDNN whose attention is right for documents of length zero (NVIDIA/cudnn-frontend#943)."""
ALLOCATOR_VARIABLES = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"
"""Environment variables that set up torch's allocator."""


def pick() -> torch.device:
    """This rank's current CUDA device, or the CPU.

    Raises:
        ConfigError: this torch cannot use the GPU of this machine.
    """
    if not torch.cuda.is_available():
        _refuse_unused_gpus()
        return torch.device("cpu")
    device = torch.device("cuda", torch.cuda.current_device())
    capability, architectures = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    if not is_supported(capability, architectures):
        name = f"{torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]})"
        problem = f"torch {torch.__version__} has no kernels for the GPU {name}; it has {', '.join(architectures)}"
        raise ConfigError(Fault("", problem, "install a torch that is built for it, or set CUDA_VISIBLE_DEVICES="))
    return device


def is_supported(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether one of torch's builds (``sm_80``: this major version; ``compute_90``: later ones too) runs on a GPU."""
    for architecture in architectures:
        kind, _, number = architecture.rstrip("af").partition("_")
        built = int(number[:-1]), int(number[-1])
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return not architectures


def choose_kernels(deterministic: bool, tf32: bool = False) -> None:
    """Let torch choose FlashAttention instead of cuDNN's where cuDNN is not deterministic, or wrong.

    ``tf32``: multiply float32 matrices in TF32 on GPUs.
    """
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    version = torch.backends.cudnn.version() if torch.cuda.is_available() else EXACT_CUDNN
    torch.backends.cuda.enable_cudnn_sdp(not deterministic and (version or 0) >= EXACT_CUDNN)


def choose_allocator(device: torch.device, *, graphs: bool) -> bool:
    """Let CUDA's allocator grow its segments, so that batches of other sizes leave no holes; whether it does.

    Not if the user has set up the allocator, nor with CUDA graphs (``graphs``), whose memory stays where it is.
    """
    if device.type != "cuda" or graphs or any(os.environ.get(name) for name in ALLOCATOR_VARIABLES):
        return False
    set_up: Any = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # torch 2.9
    (set_up or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")
    return True


def has_tf32(device: torch.device) -> bool:
    """Whether this GPU multiplies float32 in TF32 if allowed: those from Ampere on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def check_tf32(wanted: bool, device: torch.device) -> None:
    """Check that ``train.tf32`` has an effect on this device.

    Raises:
        ConfigError: it has none.
    """
    if wanted and not has_tf32(device):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        remedy = "set it to false, or use a GPU of the generation of A100 or later"
        raise ConfigError(Fault("train.tf32", f"has no effect on {name}, which has no TF32", remedy, "true"))


def check_offload(memory: Memory, device: torch.device) -> None:
    """Check that ``train.memory=offload`` has an effect on this device.

    Raises:
        ConfigError: it has none: the memory of a CPU is that to which activations would be moved.
    """
    if memory == "offload" and device.type == "cpu":
        problem = "has no effect without a GPU: it moves activations from GPU memory to that of the CPU"
        raise ConfigError(Fault("train.memory", problem, "use train.memory=min", memory))


def _refuse_unused_gpus() -> None:
    """A training that silently runs on the CPU because of an old driver would be a hundred times slower."""
    if not (names := machine.gpu_names()):
        return
    built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
    problem = f"this machine has the GPU {names[0]}, but torch {torch.__version__}, which {built}, cannot use it"
    remedy = "update the driver or install a torch for it; to train on the CPU: set CUDA_VISIBLE_DEVICES="
    raise ConfigError(Fault("", problem, remedy))


def matches(name: str, known: str) -> bool:
    """Whether a GPU's name is that of a known GPU: whole words, since an A1000 is no A10, nor a part of a GPU (MIG)."""
    return "MIG" not in name and re.search(rf"\b{re.escape(known)}\b", name, re.IGNORECASE) is not None
