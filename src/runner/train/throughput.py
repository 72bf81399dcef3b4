"""Speed: what a step costs, what the hardware could do, and what is used of it."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runner.files import cache_dir, write_atomic

PEAK_TFLOPS = {
    # name → (bf16, or fp16 where there is no bf16; float32), dense, from the makers' data sheets; the first match holds
    "GB200": (2500.0, 80.0),
    "B200": (2250.0, 75.0),
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100 NVL": (835.0, 60.0),
    "H100": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "L40": (181.0, 90.5),
    "L4": (121.0, 30.3),
    "A10G": (70.0, 35.0),
    "A10": (125.0, 31.2),
    "RTX 5090": (209.5, 104.8),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
    "RTX A6000": (154.8, 38.7),
    "V100": (125.0, 15.7),
    "T4": (65.0, 8.1),
}
WINDOW = 50
"""Steps over which the time of a step is averaged."""


@dataclass
class Timing:
    """What steps took."""

    steps: int = 0
    tokens: int = 0
    """Useful ones: padding is none."""
    seconds: float = 0.0
    waited: float = 0.0
    """Seconds of those in which the step waited for data."""

    def __add__(self, other: Timing) -> Timing:
        return Timing(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


class Meter:
    """Speed over a whole run, earlier attempts included.

    A process's first step (compiling, warming up) counts only while there is no other.
    """

    def __init__(self, flops_per_token: float, peak_flops: float) -> None:
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self.timing, self._first = Timing(), Timing()  # of all steps that count, and of this process's first
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self.start()

    def go_on(self, before: Timing) -> None:
        """Count on from what the steps of earlier attempts took."""
        self.timing = before

    def start(self) -> None:
        """Start the clock of the next step."""
        self._since = time.perf_counter()

    pause = start
    """What was done since the last step (an evaluation, a checkpoint) is not to count."""

    def step(self, tokens: int, waited: float = 0.0) -> None:
        """Note a finished step: its useful tokens, and the seconds it waited for data."""
        now = time.perf_counter()
        done = Timing(1, tokens, now - self._since, waited)
        # Beside other work a peak is measured that the run itself then exceeds: it was none.
        self._peak_flops = max(self._peak_flops, tokens / done.seconds * self._flops_per_token)
        if self._first.steps:
            self.timing += done
            self._recent.append(done.seconds)
        else:
            self._first = done
        self._since = now

    def rates(self) -> dict[str, float]:
        """Useful tokens per second, the part of the time spent waiting for data, and MFU, of the run so far; and the
        seconds of one of the last steps."""
        timing = self.timing if self.timing.steps else self._first
        if not timing.steps:
            return {}
        speed = timing.tokens / timing.seconds
        recent = self._recent or [timing.seconds / timing.steps]
        return {
            "train/tokens_per_second": speed,
            "train/step_seconds": sum(recent) / len(recent),
            "train/data_wait_fraction": timing.waited / timing.seconds,
            "train/mfu": speed * self._flops_per_token / self._peak_flops,
        }


def flops_per_token(model: nn.Module, length: int, trained: float = 1.0) -> float:
    """Floating-point operations of training on one token of a document of ``length`` tokens.

    2 for each weight in the forward pass, 2 for the gradient of its input, 2 for its own gradient where it is trained:
    6 N for full fine-tuning, 4 N + 2 N_adapter for LoRA. Embeddings are looked up, not multiplied; the head is, for the
    part ``trained`` of the tokens. Of mixture-of-experts layers only the experts used count. Causal attention adds
    2 * span * heads * head_dim for each layer, and 2.5 times that backward (FlashAttention-2,
    https://arxiv.org/abs/2307.08691, section 4.1), where ``span`` is the length or a shorter sliding window. With
    packing it is the length of the documents that counts, so a row's length overstates.
    """
    head = {id(module) for module in _head(model).modules()}
    used = _experts_used(_config(model))
    total = 0.0
    for name, module in model.named_modules():
        for parameter in _matrices(module):
            part = (trained if id(module) in head else 1.0) * (used if ".experts" in name else 1.0)
            total += part * _numel(parameter) * (6 if parameter.requires_grad else 4)
    return total + 3.5 * _attention_flops(_config(model), length)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s: the maker's figure for a known GPU, else the best matrix product seen here, now or before."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    if device.type == "cuda":
        for known, (half, single) in PEAK_TFLOPS.items():
            if known.lower() in name.lower():
                return (single if dtype == torch.float32 else half) * 1e12
    key = f"{name}/{torch.get_num_threads()}/{dtype}/{torch.__version__}"
    file = cache_dir("meters") / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    before = json.loads(file.read_text())["flops"] if file.exists() else 0.0
    best = max(_measured_flops(device, dtype, seconds=0.05 if before else 0.2), before)
    write_atomic(file, json.dumps({"key": key, "flops": best}))
    return float(best)


def _matrices(module: nn.Module) -> Iterator[nn.Parameter]:
    """The module's own weights that multiply its input; a tied head has the embedding's, and does multiply."""
    if not isinstance(module, nn.Embedding):
        for parameter in module.parameters(recurse=False):
            if parameter.ndim >= 2:
                yield parameter


def _numel(parameter: nn.Parameter) -> int:
    packed = getattr(parameter, "quant_state", None)  # bitsandbytes' 4-bit weights: two in a byte
    return int(math.prod(packed.shape)) if packed is not None else parameter.numel()


def _head(model: Any) -> nn.Module:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head if head is not None else nn.Identity()


def _attention_flops(config: Any, length: int) -> float:
    """Forward, one token, all layers: scores and weighted values, half of which a causal mask leaves out."""
    if config is None or not hasattr(config, "num_attention_heads"):
        return 0.0
    layers = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or length
    if not getattr(config, "layer_types", None) and getattr(config, "use_sliding_window", True):
        layers = ["sliding_attention"] * config.num_hidden_layers
    spans = sum(min(length, window) if kind == "sliding_attention" else length for kind in layers)
    return 2.0 * spans * config.num_attention_heads * _head_dim(config)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _experts_used(config: Any) -> float:
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return config.num_experts_per_tok / experts if experts and hasattr(config, "num_experts_per_tok") else 1.0


def _config(model: Any) -> Any:
    return _text(getattr(model, "config", None))


def _text(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _measured_flops(device: torch.device, dtype: torch.dtype, size: int = 1024, *, seconds: float) -> float:
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    result, best = a @ b, math.inf  # the first product warms up
    until = time.perf_counter() + seconds
    while best == math.inf or time.perf_counter() < until:
        start = time.perf_counter()
        torch.mm(a, b, out=result)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = [line for line in lines if line.startswith("flags")]  # virtual machines hide the model, not what it can do
    digest = hashlib.sha256("".join(flags[:1]).encode()).hexdigest()[:8]
    return f"{named[0]} {digest}" if named else platform.processor() or platform.machine()
