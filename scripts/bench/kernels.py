"""The parts of a training step by themselves, against what they replace and against the hardware.

    python scripts/bench/kernels.py [--rows N] [--rounds N]

Shapes of SmolLM2-135M on a CPU, of Llama-3.1-8B on a GPU. Every row is forward and backward; the limit is the time its
matrix products alone would take at the rate measured at those shapes here, in this run. Best of the rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runner.models.kernels import lora_linear, varlen_attention
from runner.tasks import cross_entropy, logit_losses

Pass = Callable[[], Any]


@dataclass(frozen=True)
class Shapes:
    hidden: int
    wide: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


SMALL = Shapes(576, 1536, 9, 3, 64, 49152)
LARGE = Shapes(4096, 14336, 32, 8, 128, 128256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024, help="tokens of a micro-batch")
    parser.add_argument("--rounds", type=int, default=15)
    words = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype, shapes = (torch.bfloat16, LARGE) if on_gpu else (torch.float32, SMALL)
    torch.manual_seed(0)
    varlen_attention._register()  # asks torch what its attention takes
    bench = Bench(device, dtype, shapes, words.rows, words.rounds)
    print(f"{device}, {dtype}, {torch.get_num_threads()} threads, {words.rows} tokens, torch {torch.__version__}\n")
    print("| what | ms | of the limit | largest difference |")
    print("|---|---|---|---|")
    bench.lora()
    bench.lora_4bit()
    bench.attention()
    bench.loss()


@dataclass(frozen=True)
class Bench:
    device: torch.device
    dtype: torch.dtype
    shapes: Shapes
    rows: int
    rounds: int

    def lora(self) -> None:
        """The gate projection with an adapter: PEFT's layer, and the same fused."""
        layer = self._adapted(nn.Linear(self.shapes.hidden, self.shapes.wide, bias=False))
        self._compare_lora("LoRA, gate projection", layer)

    def lora_4bit(self) -> None:
        import bitsandbytes as bnb

        base = bnb.nn.Linear4bit(
            self.shapes.hidden, self.shapes.wide, bias=False, quant_type="nf4", compute_dtype=self.dtype
        )
        base.weight.data = base.weight.data.to(self.dtype)  # which it is unpacked to, as transformers loads it
        self._compare_lora("the same in 4 bits", self._adapted(base))

    def attention(self) -> None:
        """Four documents of uneven length in one row."""
        ends = torch.tensor([0, *(self.rows * part // 16 for part in (2, 7, 11, 16))], dtype=torch.int32)
        longest = int(ends.diff().max())
        shapes, device = self.shapes, self.device
        query, key, value = (
            torch.randn(1, self.rows, heads, shapes.head_dim, device=device, dtype=self.dtype)
            .transpose(1, 2)
            .requires_grad_()
            for heads in (shapes.heads, shapes.kv_heads, shapes.kv_heads)
        )
        document = torch.bucketize(torch.arange(self.rows), ends[1:], right=True).to(device)
        causal = torch.ones(self.rows, self.rows, dtype=torch.bool, device=device).tril()
        mask = (document[:, None] == document[None]) & causal
        module, ends = nn.Module(), ends.to(device)

        def masked() -> Tensor:
            attention = nn.functional.scaled_dot_product_attention
            if device.type == "cpu":
                return attention(query, key, value, attn_mask=mask, enable_gqa=True).transpose(1, 2)
            # As transformers does it: no fast kernel of a GPU takes both shared heads and a mask.
            wide = (tensor.repeat_interleave(shapes.heads // shapes.kv_heads, 1) for tensor in (key, value))
            return attention(query, *wide, attn_mask=mask).transpose(1, 2)

        def by_document() -> Tensor:
            return varlen_attention.attend(module, query, key, value, None, cu_seq_lens_q=ends, max_length_q=longest)[0]

        spans = ends.diff().double()
        flops = 3.5 * 2 * float((spans**2).sum()) * shapes.heads * shapes.head_dim
        limit = flops / self._rate(self.rows, shapes.head_dim, self.rows)
        inputs = (query, key, value)
        self._show("attention, one mask for the row", self._both(masked, inputs), limit)
        self._show(
            "attention by document", self._both(by_document, inputs), limit, self._apart(masked, by_document, inputs)
        )

    def loss(self) -> None:
        """Head and cross entropy on half of the positions."""
        shapes = self.shapes
        hidden = torch.randn(self.rows, shapes.hidden, device=self.device, dtype=self.dtype, requires_grad=True)
        head = torch.randn(shapes.vocabulary, shapes.hidden, device=self.device, dtype=self.dtype) / shapes.hidden**0.5
        labels = torch.randint(0, shapes.vocabulary, (self.rows,), device=self.device)
        labels[::2] = -100
        kept = labels[labels != -100]

        def full() -> Tensor:
            return nn.functional.cross_entropy((hidden @ head.t()).float(), labels, reduction="sum")

        def trained_rows() -> Tensor:
            logits = hidden[labels != -100] @ head.t()
            return cross_entropy._CrossEntropy.apply(logits, kept, logit_losses.PLAIN)[0]

        def torch_own() -> Tensor:
            return nn.functional.linear_cross_entropy(hidden[labels != -100], head, kept, reduction="sum")

        limit = 2 * 2 * len(kept) * shapes.hidden * shapes.vocabulary / self._rate(len(kept), shapes.hidden, 8192)
        self._show("loss, all logits in float32", self._both(full, (hidden,)), limit)
        sides = {"loss on trained rows": trained_rows}
        if hasattr(nn.functional, "linear_cross_entropy"):
            sides["torch's linear_cross_entropy on them"] = torch_own
        for name, side in sides.items():
            self._show(name, self._both(side, (hidden,)), limit, self._apart(full, side, (hidden,)))

    def _adapted(self, base: nn.Module) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=8, target_modules=["0"], init_lora_weights=False)
        return get_peft_model(nn.Sequential(base).to(self.device, self.dtype), config)  # type: ignore[arg-type]

    def _compare_lora(self, name: str, model: nn.Module) -> None:
        x = torch.randn(self.rows, self.shapes.hidden, device=self.device, dtype=self.dtype, requires_grad=True)
        inputs = (x, *(parameter for parameter in model.parameters() if parameter.requires_grad))
        limit = 2 * 2 * self.rows * self.shapes.hidden * self.shapes.wide
        limit /= self._rate(self.rows, self.shapes.hidden, self.shapes.wide)
        grad = torch.randn(self.rows, self.shapes.wide, device=self.device, dtype=self.dtype)

        def side() -> Tensor:
            return (model(x) * grad).sum()

        expected = torch.autograd.grad(side(), inputs)
        self._show(f"{name}, PEFT", self._both(lambda: model(x), inputs, grad), limit)
        lora_linear.fuse(model)
        found = torch.autograd.grad(side(), inputs)
        apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))
        self._show(f"{name}, fused", self._both(lambda: model(x), inputs, grad), limit, apart)

    def _both(self, forward: Pass, inputs: tuple[Tensor, ...], grad: Tensor | None = None) -> float:
        """Seconds of forward and backward."""

        def once() -> None:
            out = forward()
            torch.autograd.grad(out, inputs, grad if out.dim() and grad is not None else torch.ones_like(out))

        return self._best(once)

    def _apart(self, one: Pass, other: Pass, inputs: tuple[Tensor, ...]) -> float:
        """The largest difference of results and gradients, relative to the largest value."""

        def values(side: Pass) -> list[Tensor]:
            out = side()
            return [out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))]

        pairs = zip(values(one), values(other), strict=True)
        return max((a.float() - b.float()).abs().max().item() / a.float().abs().max().item() for a, b in pairs)

    def _rate(self, m: int, k: int, n: int) -> float:
        a = torch.randn(m, k, device=self.device, dtype=self.dtype)
        b = torch.randn(n, k, device=self.device, dtype=self.dtype)
        return 2 * m * k * n / self._best(lambda: a @ b.t())

    def _best(self, once: Pass) -> float:
        once()
        times = []
        for _ in range(self.rounds):
            self._wait()
            began = time.perf_counter()
            once()
            self._wait()
            times.append(time.perf_counter() - began)
        return min(times)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _show(self, name: str, seconds: float, limit: float, apart: float | None = None) -> None:
        difference = "" if apart is None else f"{apart:.1e}"
        print(f"| {name} | {seconds * 1e3:.2f} | {limit / seconds:.0%} | {difference} |", flush=True)


if __name__ == "__main__":
    main()
