"""The weights of the start, for tasks that compare with them before each step."""

from __future__ import annotations

import torch

from runner.train import step_batches


def test_the_start_is_there_for_a_moment_and_the_trained_weights_come_back_bit_for_bit() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    model[0].requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start = step_batches.start_of(model)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    assert not torch.equal(trained["1.weight"], before["1.weight"])
    with start() as first:
        assert all(torch.equal(value, before[name]) for name, value in first.state_dict().items())
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
