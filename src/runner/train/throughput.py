"""Measure throughput: tokens per second, FLOPs per token, peak FLOP/s and MFU."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
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
from runner.models import parameters
from runner.models.kernels import compilation, cpu_products
from runner.train import devices

PEAK_TFLOPS = {
    # name → dense (bf16, or fp16 if no bf16; float32) TFLOP/s from the vendors' data sheets; the first match is used
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
RECENT_S = 60.0
"""A peak that was measured so few seconds ago is not measured again: a run of a short sweep would wait for it."""
WINDOW = 50
"""Number of recent steps over which ``train/step_seconds`` is averaged."""


@dataclass
class Timing:
    """Accumulated time of steps."""

    steps: int = 0
    tokens: int = 0
    """Without padding."""
    seconds: float = 0.0
    waited: float = 0.0
    """Part of ``seconds`` spent waiting for data."""
    prepared: float = 0.0
    """Part of ``seconds`` spent in ``Task.prepare``, such as generating answers."""

    def __add__(self, other: Timing) -> Timing:
        return Timing(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


class Meter:
    """Throughput of a whole run, earlier attempts included.

    The first step of a process (compilation, warm-up) is not counted, unless it is the only one.
    """

    def __init__(self, flops_per_token: float, peak_flops: float, *, prepares: bool = False) -> None:
        self._flops_per_token, self._peak_flops, self._prepares = flops_per_token, peak_flops, prepares
        self.timing, self._first = Timing(), Timing()  # all counted steps; the first step of this process
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self.is_counting = True
        """False while steps are profiled, which makes them slower."""
        self.start()

    def resume(self, before: Timing) -> None:
        """Continue from the timing of earlier attempts."""
        self.timing = before

    def start(self) -> None:
        """Start the clock of the next step."""
        self._since = time.perf_counter()

    pause = start
    """Exclude the time since the last step (an evaluation, a checkpoint)."""

    def step(self, tokens: int, waited: float = 0.0, prepared: float = 0.0) -> None:
        """Count a finished step: its tokens without padding, and the seconds that it waited for data and prepared."""
        if not self.is_counting:
            self.pause()
            return
        now = time.perf_counter()
        done = Timing(1, tokens, now - self._since, waited, prepared)
        # A peak measured while other programs were running is too low; a faster step corrects it.
        self._peak_flops = max(self._peak_flops, tokens / done.seconds * self._flops_per_token)
        if self._first.steps:
            self.timing += done
            self._recent.append(done.seconds)
        else:
            self._first = done
        self._since = now

    def rates(self) -> dict[str, float]:
        """Tokens per second (without padding), data wait fraction and MFU of the run so far, and the mean seconds of
        recent steps."""
        timing = self.timing if self.timing.steps else self._first
        if not timing.steps:
            return {}
        speed = timing.tokens / timing.seconds
        recent = self._recent or [timing.seconds / timing.steps]
        prepares = {"train/prepare_fraction": timing.prepared / timing.seconds} if self._prepares else {}
        return {
            "train/tokens_per_second": speed,
            "train/step_seconds": sum(recent) / len(recent),
            "train/data_wait_fraction": timing.waited / timing.seconds,
            "train/mfu": speed * self._flops_per_token / self._peak_flops,
            **prepares,
        }


def flops_per_token(
    model: nn.Module, length: int, trained: float = 1.0, forward_passes: int = 0, updates: int = 1
) -> float:
    """Training FLOPs per token of a document of ``length`` tokens.

    ``forward_passes``: passes without gradient beside those of training; ``updates``: how often the token is trained.

    Per weight: 2 in the forward pass, 2 for the gradient of its input, 2 for its own gradient if it is trained. So
    6 N for full fine-tuning, 4 N + 2 N_adapter for LoRA. Embeddings cost nothing (a lookup). The head counts for the
    fraction ``trained`` of the tokens. In mixture-of-experts layers only active experts count. Causal attention adds
    2 * span * heads * head_dim per layer, and 2.5 times that in the backward pass (FlashAttention-2,
    https://arxiv.org/abs/2307.08691, section 4.1); ``span`` is the length, or a shorter sliding window. With packing,
    the length of a row overestimates attention, because tokens attend only within their document. The backward pass
    ends above frozen layers that have nothing trained below them.
    """
    head, forward_only = {id(module) for module in _head(model).modules()}, _without_backward(model)
    inside = {id(module) for layer in forward_only for module in layer.modules()}
    used, quant = _experts_used(_config(model)), getattr(model, "quant", None)
    total = 0.0
    for name, module in model.named_modules():
        for parameter in _matrices(module):
            part = (trained if id(module) in head else 1.0) * (used if ".experts" in name else 1.0)
            of_backward = 0 if id(module) in inside else 4 if parameter.requires_grad else 2
            per_weight = (2 + of_backward) * updates + 2 * forward_passes
            total += part * parameters.dense_count(module, parameter, quant) * per_weight
    backward = 2.5 * (1 - len(forward_only) / max(len(compilation.layers_of(model)), 1))
    return total + ((1 + backward) * updates + forward_passes) * _attention_flops(_config(model), length)


def peak_flops(device: torch.device, dtype: torch.dtype, *, tf32: bool = False) -> float:
    """Peak FLOP/s: the vendor's figure of a known GPU, else the best matmul measured on this machine (cached).

    It is measured again after a minute, because other programs may have been running.

    ``tf32``: float32 is multiplied in TF32, at half the rate of bfloat16 on each GPU that has both.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    if device.type == "cuda":
        for known, (half, single) in PEAK_TFLOPS.items():
            if devices.matches(name, known):
                return (half if dtype != torch.float32 else half / 2 if tf32 else single) * 1e12
    key = f"{name}/{torch.get_num_threads()}/{dtype}{'/tf32' if tf32 else ''}/{torch.__version__}"
    key += "/onednn" if device.type == "cpu" and cpu_products.is_used() else ""
    file = cache_dir("meters") / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    cached = 0.0
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not measured yet, or damaged
        known = json.loads(file.read_text())
        cached = float(known["flops"])
        if abs(time.time() - float(known["measured"])) < RECENT_S:
            return cached
    size = 1024 if device.type == "cpu" else 8192  # on a GPU, a small product waits for its launch
    best = max(_measured_flops(device, dtype, size, seconds=0.05 if cached else 0.2), cached)
    with contextlib.suppress(OSError):  # a full disk: the next run measures again
        write_atomic(file, json.dumps({"key": key, "flops": best, "measured": time.time()}))
    return best


def _without_backward(model: nn.Module) -> list[nn.Module]:
    """The decoder layers that gradients do not reach: the first ones, if nothing in or before them is trained."""
    layers = compilation.layers_of(model)
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    before = itertools.takewhile(lambda parameter: id(parameter) not in inside, model.parameters())
    if any(parameter.requires_grad for parameter in before):
        return []
    return list(itertools.takewhile(lambda layer: not any(p.requires_grad for p in layer.parameters()), layers))


def _matrices(module: nn.Module) -> Iterator[nn.Parameter]:
    """The module's own weight matrices, without embeddings; a tied head yields the embedding's weight."""
    if not isinstance(module, nn.Embedding):
        for parameter in module.parameters(recurse=False):
            if parameter.ndim >= 2:
                yield parameter


def _head(model: Any) -> nn.Module:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head if head is not None else nn.Identity()


def _attention_flops(config: Any, length: int) -> float:
    """Forward FLOPs of attention per token over all layers; the causal mask halves them."""
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
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


@functools.cache
def _measured_flops(device: torch.device, dtype: torch.dtype, size: int, *, seconds: float) -> float:
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    result, best = a @ b, math.inf  # the first product warms up
    until = time.perf_counter() + seconds
    while best == math.inf or time.perf_counter() < until:
        start = time.perf_counter()
        if device.type == "cpu":
            cpu_products.product(a, b)
        else:
            torch.mm(a, b, out=result)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = [line for line in lines if line.startswith("flags")]  # virtual machines hide the model, but not its flags
    digest = hashlib.sha256("".join(flags[:1]).encode()).hexdigest()[:8]
    return f"{names[0]} {digest}" if names else platform.processor() or platform.machine()
