"""The first minutes on a GPU: what must be true before anything is measured. Stops at the first wrong fact.

    python scripts/bench/gpu_facts.py [PART ...]

Parts, in this order: facts attention optimizer loss linears threads. Each fact is a line with OK, WRONG or "look" (a
number to look at). Exit code 1 after a wrong one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise, product
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from runner.data import boundaries
from runner.models.kernels import lora_products, varlen_attention
from runner.tasks import cross_entropy, logit_losses
from runner.train import devices, optim, throughput

GPU = torch.device("cuda", 0)
GIB = 2**30
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
Fact = tuple[bool | None, str]
"""(whether it is as it must be; None: a number to look at, text)."""


def facts() -> Iterator[Fact]:
    capability, architectures = torch.cuda.get_device_capability(0), torch.cuda.get_arch_list()
    name = torch.cuda.get_device_name(0)
    yield None, f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    yield devices.is_supported(capability, architectures), f"capability {capability} in {architectures}"
    a = torch.randn(8192, 8192, device=GPU, dtype=torch.bfloat16)
    rate = 2 * 8192**3 / _ms(lambda: a @ a) / 1e9
    peak = throughput.peak_flops(GPU, torch.bfloat16) / 1e12
    yield 0.5 < rate / peak < 1.05, f"bfloat16 products {rate:.0f} TFLOP/s; peak taken for the MFU {peak:.0f}"


def attention() -> Iterator[Fact]:
    """Outputs and gradients of both kernels against float32; the cost of short documents; repeatability."""
    lengths = [700, 1, 64, 333, 950]
    for dim, repeats, backend in product((64, 128, 256), (False, True), BACKENDS):
        qkv = _qkv(sum(lengths), 8, 2, dim)
        ends = _ends([*lengths, *[0] * (7 if repeats else 0)])
        what = f"{backend.name}, head size {dim}, {'documents of length 0' if repeats else 'plain'}"
        try:
            found = _attended(qkv, ends, [(len(ends) - 1, sum(lengths), 1024)], backend)
        except (RuntimeError, ValueError) as error:
            yield None, f"{what}: {str(error).splitlines()[0][:120]}"
            continue
        wanted = _reference(qkv, lengths)
        errors = [float((f.float() - w).abs().max() / w.abs().max()) for f, w in zip(found, wanted, strict=True)]
        yield all(error < 0.03 for error in errors), f"{what}: out, dq, dk, dv differ by {errors}"
    yield from _short_documents()
    yield from _repeatable()


def _short_documents() -> Iterator[Fact]:
    """Many short documents and a long one: as the product cuts them, and in one call."""
    packs = [[1200, 1300, 1400], [16] * 240]
    cut = boundaries.of_packs(packs, 4096, 4096)
    qkv = _qkv(8192, 32, 8, 128)
    ends = torch.from_numpy(cut.ends).to(GPU)
    whole = [(len(cut.ends) - 1, 8192, 4096)]
    for name, parts in (("in parts", list(cut.parts)), ("in one call", whole)):
        for backend in BACKENDS:

            def go(parts: Any = parts, backend: Any = backend) -> None:
                _attended(qkv, ends, parts, backend)

            gib, ms = _peak_gib(go), _ms(go, 5)
            holds = gib < 2 if name == "in parts" else None
            yield holds, f"254 short documents {name}, {backend.name}: {ms:.2f} ms, {gib:.2f} GiB"


def _repeatable() -> Iterator[Fact]:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    devices.choose_kernels(deterministic=True)
    try:
        qkv, ends = _qkv(8192, 32, 8, 128), _ends([4096, 4096])
        first = _attended(qkv, ends, [(2, 8192, 4096)], None)
        again = [_attended(qkv, ends, [(2, 8192, 4096)], None) for _ in range(5)]
        same = all(torch.equal(a, b) for each in again for a, b in zip(first, each, strict=True))
        yield same, "train.deterministic=true: attention and its gradients repeat bit for bit"
    finally:
        torch.use_deterministic_algorithms(False)
        devices.choose_kernels(deterministic=False)


def optimizer() -> Iterator[Fact]:
    """448 adapters of an 8B model: Python must not wait for the GPU."""
    modules = torch.nn.ModuleList(torch.nn.Linear(4096, 16, bias=False) for _ in range(448)).to(GPU)
    for parameter in modules.parameters():
        parameter.grad = torch.randn_like(parameter)
    groups = optim.parameter_groups(modules, 0.0)
    common: dict[str, Any] = {"learning_rate": 1e-4, "weight_decay": 0.0, "betas": [0.9, 0.999], "eps": 1e-8}
    for name, made in (
        ("adamw", optim.adamw(groups, fused="auto", **common)),
        ("adamw_8bit", optim.adamw_bnb(groups, bits=8, paged=False, **common)),
    ):
        made.step()
        torch.cuda.synchronize()
        torch.cuda._sleep(int(2e8))  # about 0.1 s of work in front: whoever waits, waits for it
        start = time.perf_counter()
        made.step()
        held = time.perf_counter() - start
        torch.cuda.synchronize()
        yield held < 0.05, f"{name}: a step holds Python for {held * 1e3:.1f} ms; {_ms(made.step, 5):.1f} ms on the GPU"


def loss() -> Iterator[Fact]:
    hidden = torch.randn(8192, 4096, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(128256, 4096, device=GPU, dtype=torch.bfloat16)
    targets = torch.randint(0, 128256, (8192,), device=GPU)

    def go() -> None:
        cross_entropy._LinearCrossEntropy.apply(hidden, weight, None, targets, logit_losses.PLAIN)[0].sum().backward()
        hidden.grad = None

    products = 2 * _ms(lambda: hidden.detach() @ weight.t(), 5)
    ms, gib = _ms(go, 5), _peak_gib(go)
    yield gib < 2, f"head and loss of 8192 x 128256: {ms:.1f} ms, its products {products:.1f} ms; {gib:.2f} GiB"


def linears() -> Iterator[Fact]:
    """LoRA's product, eager and compiled, against the bare one."""
    eager: Any = lora_products.InPlaceProduct.apply
    compiled: Any = torch.compile(eager)
    for inner, outer in ((4096, 4096), (4096, 14336), (14336, 4096)):
        x = torch.randn(8192, inner, device=GPU, dtype=torch.bfloat16, requires_grad=True)
        w = torch.randn(outer, inner, device=GPU, dtype=torch.bfloat16)
        pair = [torch.randn(16, inner, device=GPU, requires_grad=True), torch.randn(outer, 16, device=GPU)]
        bare, lora, compiled_ms = (_linear_ms(f, x, w, pair) for f in (None, eager, compiled))
        yield None, f"{inner} → {outer}: bare {bare:.2f} ms, with LoRA eager {lora:.2f}, compiled {compiled_ms:.2f}"


def _linear_ms(product_of: Any, x: Tensor, w: Tensor, pair: list[Tensor]) -> float:
    a, b = (each.requires_grad_() for each in pair)
    gradient = torch.randn(len(x), len(w), device=GPU, dtype=x.dtype)
    if product_of is None:
        return _ms(lambda: torch.autograd.grad(x @ w.t(), x, gradient))
    return _ms(lambda: torch.autograd.grad(product_of(x, w, None, a, b, 2.0), (x, a, b), gradient))


def threads() -> Iterator[Fact]:
    """A rank on GPU 1 must not hold memory on GPU 0."""
    if torch.cuda.device_count() < 2:
        yield None, "one GPU: what a rank leaves on GPU 0 cannot be seen"
        return
    done = subprocess.run([sys.executable, "-c", ON_GPU_1], capture_output=True, text=True, check=False)
    yield (
        done.stdout.strip() == "1",
        f"a rank on GPU 1 has contexts on {done.stdout.strip() or done.stderr[-200:]} GPU(s)",
    )


ON_GPU_1 = """
import os, pynvml, torch
from runner.train.prefetch import Prefetcher
class Batches:
    def step(self, i):
        return [{"input_ids": torch.zeros(1, 8)}]
device = torch.device("cuda", 1)
torch.cuda.set_device(device)
ahead = Prefetcher(Batches(), device, 3)
for step in range(3):
    ahead.step(step)
pynvml.nvmlInit()
handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
held = [os.getpid() in [each.pid for each in pynvml.nvmlDeviceGetComputeRunningProcesses(h)] for h in handles]
print(sum(held))
"""


def _qkv(tokens: int, heads: int, kv_heads: int, dim: int) -> tuple[Tensor, ...]:
    generator = torch.Generator(GPU).manual_seed(0)
    shapes = [(tokens, count, dim) for count in (heads, kv_heads, kv_heads)]
    made = [torch.randn(*shape, device=GPU, dtype=torch.bfloat16, generator=generator) for shape in shapes]
    return tuple(each.requires_grad_() for each in made)


def _ends(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=GPU)


def _attended(
    qkv: tuple[Tensor, ...], ends: Tensor, parts: list[Any], backend: SDPBackend | None
) -> tuple[Tensor, ...]:
    """Output and gradients of the product's attention."""
    query, key, value = (each.transpose(0, 1)[None] for each in qkv)
    longest = max(part[2] for part in parts)
    options: dict[str, Any] = {"cu_seq_lens_q": ends, "max_length_q": longest, "attention_parts": tuple(parts)}
    with sdpa_kernel(backend if backend is not None else list(BACKENDS)):
        out, _ = varlen_attention.attend(torch.nn.Module(), query, key, value, None, **options)
    return (out[0], *torch.autograd.grad(out.float().square().sum(), qkv))


def _reference(qkv: tuple[Tensor, ...], lengths: list[int]) -> tuple[Tensor, ...]:
    """The same in float32, one document at a time."""
    q, k, v = (each.detach().float().requires_grad_() for each in qkv)
    groups, outs = q.shape[1] // k.shape[1], []
    for start, end in pairwise([0, *accumulate(lengths)]):
        wide = (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
        query, key, value = (each[start:end].transpose(0, 1)[None] for each in wide)
        with sdpa_kernel(SDPBackend.MATH):
            out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        outs.append(out[0].transpose(0, 1))
    out = torch.cat(outs)
    return (out, *torch.autograd.grad(out.square().sum(), (q, k, v)))


def _ms(do: Callable[[], Any], rounds: int = 20) -> float:
    for _ in range(3):
        do()
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(rounds):
        do()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / rounds


def _peak_gib(do: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    do()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - held) / GIB


PARTS = (facts, attention, optimizer, loss, linears, threads)


def main(names: list[str]) -> int:
    varlen_attention._register()  # asks torch what its attention takes
    for part in PARTS:
        if names and part.__name__ not in names:
            continue
        print(f"== {part.__name__}", flush=True)
        for holds, text in part():
            print(f"{'look ' if holds is None else 'OK   ' if holds else 'WRONG'} {text}", flush=True)
            if holds is False:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
