"""Speed and memory: what a step costs, what the hardware could do, and what is used of it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runner.files import cache_dir, write_atomic

GIB = 2**30
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
"""Steps over which the speed is averaged."""


@dataclass(frozen=True)
class MemoryEstimate:
    """What training is expected to hold at its peak, in bytes by part."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    overhead: int
    """Libraries, the runtime's own buffers, and what the allocator cannot reuse."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def in_shards(self, count: int, config: Any) -> MemoryEstimate:
        """Of one process of ``count``, each with its shard, and two layers whole: the one at work and the next."""
        layers = max(_text(config).num_hidden_layers, 1)
        return replace(
            self,
            weights=self.weights // count + 2 * self.weights // layers,
            gradients=self.gradients // count + self.gradients // layers,
            optimizer=self.optimizer // count,
        )


class Meter:
    """Speed over the last steps; a process's first (compiling, warming up) counts only while it is the only one."""

    def __init__(self, flops_per_token: float, peak_flops: float) -> None:
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._steps: deque[tuple[int, float, float]] = deque(maxlen=WINDOW)  # tokens, seconds, seconds waited for data
        self._warm = False
        self.start()

    def start(self) -> None:
        """Start the clock of the next step."""
        self._since = time.perf_counter()

    pause = start
    """What was done since the last step (an evaluation, a checkpoint) is not to count."""

    def step(self, tokens: int, waited: float = 0.0) -> None:
        """Note a finished step: its useful tokens, and the seconds it waited for data."""
        now = time.perf_counter()
        if len(self._steps) == 1 and not self._warm:
            self._steps.clear()
            self._warm = True
        self._steps.append((tokens, now - self._since, waited))
        self._since = now

    def rates(self) -> dict[str, float]:
        """Useful tokens per second, seconds per step, the part of them spent waiting for data, and MFU."""
        if not self._steps:
            return {}
        tokens, seconds, waited = (sum(column) for column in zip(*self._steps, strict=True))
        return {
            "train/tokens_per_second": tokens / seconds,
            "train/step_seconds": seconds / len(self._steps),
            "train/data_wait_fraction": waited / seconds,
            "train/mfu": tokens / seconds * self._flops_per_token / self._peak_flops,
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
    best = max(_measured_flops(device, dtype), json.loads(file.read_text())["flops"] if file.exists() else 0.0)
    write_atomic(file, json.dumps({"key": key, "flops": best}))
    return float(best)


def memory_metrics() -> dict[str, float]:
    """The peak so far in GiB: of CUDA's allocator, or of this process's resident memory where there is no CUDA."""
    if torch.cuda.is_available():
        return {
            "memory/peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB,
            "memory/peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        }
    return {"memory/peak_rss_gib": _peak_rss() / GIB}


def device_memory(device: torch.device) -> tuple[int, int]:
    """(total, free) bytes of the device; for a CPU, of the machine or of the container's limit where that is less."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, free
    import psutil

    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    for limit, used in _cgroup_limits():
        total, free = min(total, limit), min(free, limit - used)
    return total, free


def estimate(
    *,
    trainable_params: int,
    weight_bytes: int,
    config: Any,
    rows: int,
    length: int,
    logits_rows: int,
    optimizer_bytes: float = 8.0,
    dtype_bytes: int = 4,
    checkpointing: bool = False,
    full: bool = False,
    device: str = "cpu",
) -> MemoryEstimate:
    """The memory of training ``rows`` x ``length`` tokens at a time, before anything is loaded.

    ``weight_bytes`` are all weights as stored, ``optimizer_bytes`` the state of one trained parameter (AdamW 8, in
    8 bits 2, Muon 4), ``dtype_bytes`` those of an activation, ``logits_rows`` the trained positions of a batch, and
    ``full`` whether the base itself trains. Kept for the backward pass of a layer, for each token, in values:
    the inputs of both norms and of what follows them (4 h, 6 h where the norms train), queries, keys, values and the
    result of attention (4 q), gate, up, activated gate and product of the MLP (4 m). Below float32 the norms keep
    their input in float32. With checkpointing: the input of each layer, and one layer in full. On top, the gradients
    of the widest place (3 m), and the mask of packed rows. Logits: once, and a chunk of them twice in float32.

    Against the measured peak of SmolLM2's shapes on a CPU: 0.73 to 1.27 of it, LoRA below and full fine-tuning above.
    """
    text = _text(config)
    hidden, layers, tokens = text.hidden_size, text.num_hidden_layers, rows * length
    wide = getattr(text, "intermediate_size", None) or 4 * hidden
    queries = text.num_attention_heads * _head_dim(text)
    kept = (6 if full else 4) * hidden + 4 * queries + 4 * wide
    layer = tokens * (kept * dtype_bytes + (2 * hidden * 4 if dtype_bytes < 4 else 0))
    all_layers = layers * tokens * hidden * dtype_bytes + layer if checkpointing else layers * layer
    passing = tokens * 3 * wide * dtype_bytes + rows * length**2 * dtype_bytes
    activations = all_layers + passing
    logits = logits_rows * text.vocab_size * dtype_bytes + 2 * min(logits_rows * text.vocab_size, 2**25) * 4
    # A CPU's heap keeps holes between what lives in it, measured at 0 to 1.2 times the short-lived part (glibc 2.36).
    base, holes = (0.7, 0.7) if device == "cpu" else (0.5, 0.05)
    return MemoryEstimate(
        weights=weight_bytes,
        gradients=trainable_params * dtype_bytes,
        optimizer=int(trainable_params * optimizer_bytes),
        activations=activations,
        logits=logits,
        overhead=int(base * GIB + holes * (activations + logits)),
    )


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


def _measured_flops(device: torch.device, dtype: torch.dtype, size: int = 1024, seconds: float = 0.2) -> float:
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


def _peak_rss() -> int:
    """Bytes. On Linux getrusage survives exec, so that a child would report its parent's: VmHWM does not."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cgroup_limits() -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of the container this process runs in, where it has one (cgroup 2, then 1)."""
    for folder, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        path = os.path.join(folder, limit)
        text = Path(path).read_text().strip() if os.path.exists(path) else "max"
        if text.isdigit():
            yield int(text), int(Path(folder, used).read_text())
