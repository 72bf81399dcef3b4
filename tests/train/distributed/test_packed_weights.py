"""Quantized weights in the shards of FSDP: the same numbers, and no more bytes than a share of them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import option
from fixtures.ranks_of_a_run import TORCHRUN, environment
from fixtures.versions import byte_shards

from runner.models import architecture, parameters, pretrained
from runner.models.kernels import activation_checkpointing, lora_linear
from runner.train.distributed import packed_weights, parallel, ranks, wrap

pytestmark = byte_shards


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone: it gathers, shards and frees as any other."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def loaded(quant: Any, memory: Any = "speed") -> Any:
    torch.manual_seed(0)
    base = pretrained.load(architecture.resolve(option("model", "tiny")()), quant, "cpu")
    torch.manual_seed(0)
    model = option("lora", "lora")(base)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # else the gradients of A are zero
            torch.nn.init.normal_(parameter)
    lora_linear.fuse(model)
    activation_checkpointing.arrange(model, memory)
    return model


def sharded(model: Any, rank: ranks.Ranks = ranks.ALONE, device: str = "cpu", **changes: Any) -> list[Any]:
    """Shard the model; returns the quantized weights of its layers."""
    weights = list(packed_weights.of(model).values())
    settled = parallel.fsdp(processes=rank.world, **{"reshard_after_forward": True, **changes})
    wrap._shard(settled, model, rank, torch.device(device), None)
    return weights


def trained(model: Any, whole: Any = lambda gradient: gradient) -> list[torch.Tensor]:
    """The loss of a batch, and its gradients."""
    device = model.get_input_embeddings().weight.device
    ids = torch.randint(0, 255, (2, 32), generator=torch.Generator().manual_seed(1)).to(device)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(whole(p.grad) for p in model.parameters() if p.grad is not None)]


def held(tensors: list[Any]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize(
    ("name", "double", "memory"),
    [("4bit", True, "speed"), ("4bit", False, "min"), ("fp4", False, "balanced"), ("fp4", True, "speed")],
)
def test_sharded_bytes_train_what_whole_ones_train(
    group: None, cache: Path, name: str, double: bool, memory: str
) -> None:
    quant = option("quant", name, double=double)()
    expected = trained(loaded(quant, memory))
    model = loaded(quant, memory)
    counts = parameters.describe(model)
    weights = sharded(model)
    assert len(weights) == 14
    for _ in range(2):
        assert held(weights) == 0, "between two passes nothing is gathered"
        found = trained(model, lambda gradient: gradient.full_tensor())
        assert all(map(torch.equal, found, expected))
        model.zero_grad()
    assert parameters.describe(model) == counts


def test_layers_that_stay_gathered_are_freed_after_the_backward_pass(group: None, cache: Path) -> None:
    model = loaded(option("quant", "4bit")())
    weights = sharded(model, reshard_after_forward=False)
    model(input_ids=torch.tensor([[1, 2]])).logits.sum().backward()
    assert held(weights) == 0
    model(input_ids=torch.tensor([[1, 2]]))
    assert held(weights) > 0


def test_a_quantized_weight_outside_of_the_layers_stays_whole(group: None, cache: Path) -> None:
    model = loaded(option("quant", "4bit")())
    layer = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    model.outside = type(layer)(64, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    x = torch.randn(3, 64)
    before = model.outside(x)
    weights = sharded(model)
    assert weights[-1] is model.outside.weight
    assert torch.equal(model.outside(x), before)
    assert held(weights[:-1]) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_what_is_loaded_on_the_cpu_is_sharded_on_a_gpu(tmp_path: Path, cache: Path) -> None:
    with option("quant", "4bit", compute_dtype="float32")().loading_for(torch.device("cuda")) as quant:
        expected = trained(loaded(quant).to("cuda"))
        model = loaded(quant)
    assert {weight.device.type for weight in packed_weights.of(model).values()} == {"cpu"}
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl", init_method=store, rank=0, world_size=1)
    try:
        weights = sharded(model, device="cuda")
        for _ in range(2):
            found = trained(model, lambda gradient: gradient.full_tensor())
            assert {each.device.type for each in weights} == {"cuda"}
            assert held(weights) == 0
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
            model.zero_grad()
    finally:
        torch.distributed.destroy_process_group()


SHARES = """
from test_packed_weights import *

if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    rank = ranks.of_environment()
    quant = option("quant", "4bit")()
    expected = trained(loaded(quant))
    model = loaded(quant)
    before = sum(place.get().nbytes for m in packed_weights.of(model) for place in quant.places(m).sharded)
    weights = sharded(model, rank)
    shares = [p.to_local() for name, p in model.named_parameters() if name.endswith(parameters.PACKED)]
    assert (len(shares), held(weights)) == (2, 0)
    assert before / 2 <= held(shares) <= 1.05 * before / 2, (before, held(shares))
    found = trained(model, lambda gradient: gradient.full_tensor())
    assert all(map(torch.equal, found, expected)), "the mean of two equal gradients is exact"
    assert held(weights) == 0
    if rank.rank == 0:
        print("proven", flush=True)
    torch.distributed.barrier()
"""


@pytest.mark.slow
def test_each_of_two_ranks_has_half_of_the_bytes(tmp_path: Path, cache: Path) -> None:
    architecture.resolve(option("model", "tiny")())  # else both ranks write it
    script = tmp_path / "shares.py"
    script.write_text(SHARES)
    env = environment()
    env["PYTHONPATH"] = f"{Path(__file__).parent}:{env['PYTHONPATH']}"
    done = subprocess.run([*TORCHRUN[:5], str(script)], capture_output=True, text=True, check=False, env=env)
    assert (done.returncode, done.stdout.strip()) == (0, "proven"), done.stderr
