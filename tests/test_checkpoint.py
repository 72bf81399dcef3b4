"""Checkpoints: exact, atomic, the last N, and never trusted when damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from runner.checkpoint import Checkpoints, Progress
from runner.errors import ResumeError, TrainingError


def small(seed: int = 0) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)


def take_steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        torch.manual_seed(step)
        model(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_continuing_from_a_checkpoint_is_the_uninterrupted_run(tmp_path: Path):
    model, optimizer = small()
    take_steps(model, optimizer, 0, 6)
    expected = [p.clone() for p in model.parameters()]

    model, optimizer = small()
    take_steps(model, optimizer, 0, 3)
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(model, optimizer, Progress(step=3, tokens=7, window={"loss": 0.1}))
    model, optimizer = small(seed=0)
    progress = checkpoints.restore(model, optimizer)
    assert progress == Progress(step=3, tokens=7, window={"loss": 0.1})
    take_steps(model, optimizer, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(expected, model.parameters(), strict=True))


def test_only_trainable_weights_are_written(tmp_path: Path):
    from safetensors.torch import load_file

    model, optimizer = small()
    folder = Checkpoints(tmp_path, keep=1).save(model, optimizer, Progress(step=1))
    assert set(load_file(folder / "trainable.safetensors")) == {"1.weight", "1.bias"}


def test_the_last_n_are_kept(tmp_path: Path):
    model, optimizer = small()
    for step in range(1, 6):
        Checkpoints(tmp_path, keep=2).save(model, optimizer, Progress(step=step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000004", "step-000005"]


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.pt", "progress.json", "checksums.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_checkpoint_is_skipped_and_the_one_before_is_used(tmp_path: Path, name: str, damage: str):
    model, optimizer = small()
    checkpoints = Checkpoints(tmp_path, keep=5)
    checkpoints.save(model, optimizer, Progress(step=1))
    broken = checkpoints.save(model, optimizer, Progress(step=2)) / name
    content = bytearray(broken.read_bytes())
    if damage == "cut":
        broken.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        broken.write_bytes(content)
    else:
        broken.unlink()
    with pytest.warns(UserWarning, match="step-000002 is skipped"):
        assert checkpoints.restore(*small()).step == 1
    assert checkpoints.last_step() == 1


def test_what_was_cut_short_while_being_written_is_never_seen(tmp_path: Path):
    model, optimizer = small()
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(model, optimizer, Progress(step=1)).rename(tmp_path / ".step-000002.partial")
    assert checkpoints.restore(model, optimizer) == Progress()
    assert checkpoints.last_step() is None


def test_no_space_left_is_told_and_earlier_checkpoints_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, optimizer = small()
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(model, optimizer, Progress(step=1))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match="No space left"):
        checkpoints.save(model, optimizer, Progress(step=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001"]


def test_other_weights_than_trained_are_refused(tmp_path: Path):
    model, optimizer = small()
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(model, optimizer, Progress(step=1))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with pytest.raises(ResumeError, match="other weights"):
        checkpoints.restore(model, optimizer)
