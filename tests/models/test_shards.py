"""Every optimizer that is offered for shards trains them as the whole."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from fixtures.ranks_of_a_run import TORCHRUN, environment

from runner.train import torch_optim

SHARDING = """
import copy
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from runner.models import shards
from runner.train import torch_optim

def trained(cls, sharded):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3, bias=False))
    if sharded:
        fully_shard(model)
    optimizer = cls(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.ones(2, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = copy.deepcopy(shards.optimizer_state(optimizer, keep=True))
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_() if isinstance(value, torch.Tensor) else None
    shards.load_optimizer_state(optimizer, found)
    again = shards.optimizer_state(optimizer, keep=True)
    return [shards.whole(p.detach()) for p in model.parameters()], found["state"], again["state"]

def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and torch.allclose(a, b, atol=1e-6)
    return a == b

distributed.init_process_group("gloo")
classes = {name.lower(): cls for name, cls in vars(torch.optim).items() if isinstance(cls, type)}
for name in torch_optim.SHARDABLE:
    weights, state, again = trained(classes[name], sharded=True)
    expected, expected_state, _ = trained(classes[name], sharded=False)
    assert all(map(same, weights, expected)), name
    assert state.keys() == expected_state.keys(), name
    for number, values in expected_state.items():
        for key, value in values.items():
            assert same(state[number][key], value), (name, key)
            assert same(again[number][key], value), (name, key)
    if distributed.get_rank() == 0:
        print("proven", name, flush=True)
distributed.barrier()
"""


@pytest.mark.slow
def test_every_optimizer_that_is_offered_for_shards_trains_them_as_the_whole(tmp_path: Path):
    script = tmp_path / "sharding.py"
    script.write_text(SHARDING)
    words = [*TORCHRUN[:5], str(script)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    for name in torch_optim.SHARDABLE:
        assert f"proven {name}\n" in done.stdout
