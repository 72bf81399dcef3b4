"""Checkpoints: exact, atomic, the last N, and never trusted when damaged."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import pytest
import torch

from runner.errors import ResumeError, TrainingError
from runner.train.checkpoint import Checkpoints, Progress


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


def shown(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def saved(
    checkpoints: Checkpoints, model: torch.nn.Module, optimizer: torch.optim.Optimizer, progress: Progress
) -> Path:
    """Save and wait until it is written."""
    folder = checkpoints.save(model, optimizer, progress)
    checkpoints.finish()
    return folder


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_not_waited_for_and_what_follows_is_not_in_it(tmp_path: Path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(16))).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    x = torch.randn(64, 1024, device="cuda")
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        model(x).square().sum().backward()
        optimizer.step()
        expected = [parameter.clone() for parameter in model.parameters()]
        torch.cuda.synchronize()
        checkpoints.finish()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(x).square().sum().backward()  # so that the device is busy when the copy is asked for
            folder = checkpoints.save(model, optimizer, Progress(step=step))
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        checkpoints.finish()
        assert folder.name == f"step-{step:06d}"
        assert checkpoints.restore(model, optimizer).step == step
        assert all(torch.equal(a, b) for a, b in zip(expected, model.parameters(), strict=True))


def test_continuing_from_a_checkpoint_is_the_uninterrupted_run(tmp_path: Path):
    model, optimizer = small()
    take_steps(model, optimizer, 0, 6)
    expected = [p.clone() for p in model.parameters()]

    model, optimizer = small()
    take_steps(model, optimizer, 0, 3)
    checkpoints = Checkpoints(tmp_path, keep=2)
    saved(checkpoints, model, optimizer, Progress(step=3, tokens=7, window={"loss": 0.1}))
    model, optimizer = small(seed=0)
    progress = checkpoints.restore(model, optimizer)
    assert progress == Progress(step=3, tokens=7, window={"loss": 0.1})
    take_steps(model, optimizer, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(expected, model.parameters(), strict=True))


def test_training_goes_on_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What is written is the state at that step, whatever happens to the weights meanwhile."""
    model, optimizer = small()
    take_steps(model, optimizer, 0, 3)
    expected = [p.clone() for p in model.parameters()]
    checkpoints, may_write = Checkpoints(tmp_path, keep=1), threading.Event()
    write = Checkpoints._write
    monkeypatch.setattr(Checkpoints, "_write", lambda *args: may_write.wait() and write(*args))
    checkpoints.save(model, optimizer, Progress(step=3))
    assert not list(tmp_path.iterdir())
    take_steps(model, optimizer, 3, 6)
    may_write.set()
    again, other = small(seed=0)
    assert checkpoints.restore(again, other) == Progress(step=3), "it waits for what is being written"
    assert all(torch.equal(a, b) for a, b in zip(expected, again.parameters(), strict=True))


@pytest.mark.parametrize("copied_bytes", [0, 2**28], ids=["at once", "aside"])
def test_a_failed_write_is_raised_by_the_next_save_at_the_latest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied_bytes: int
):
    monkeypatch.setattr("runner.train.checkpoint.COPIED_BYTES", copied_bytes)
    model, optimizer = small()
    (tmp_path / "file").touch()
    checkpoints = Checkpoints(tmp_path / "file" / "below", keep=1)
    with contextlib.suppress(TrainingError) if copied_bytes == 0 else contextlib.nullcontext():
        checkpoints.save(model, optimizer, Progress(step=1))
    with pytest.raises(TrainingError, match="cannot write the checkpoint"):
        checkpoints.save(model, optimizer, Progress(step=2))


def test_only_trainable_weights_are_written(tmp_path: Path):
    from safetensors.torch import load_file

    model, optimizer = small()
    folder = saved(Checkpoints(tmp_path, keep=1), model, optimizer, Progress(step=1))
    assert set(load_file(folder / "trainable.safetensors")) == {"1.weight", "1.bias"}


def test_the_last_n_are_kept(tmp_path: Path):
    model, optimizer = small()
    for step in range(1, 6):
        saved(Checkpoints(tmp_path, keep=2), model, optimizer, Progress(step=step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000004", "step-000005"]


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.pt", "progress.json", "checksums.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_checkpoint_is_skipped_and_the_one_before_is_used(tmp_path: Path, name: str, damage: str):
    model, optimizer = small()
    checkpoints = Checkpoints(tmp_path, keep=5)
    saved(checkpoints, model, optimizer, Progress(step=1))
    broken = saved(checkpoints, model, optimizer, Progress(step=2)) / name
    content = bytearray(broken.read_bytes())
    if damage == "cut":
        broken.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        broken.write_bytes(content)
    else:
        broken.unlink()
    with pytest.warns(UserWarning, match="skipping checkpoint step-000002"):
        assert checkpoints.restore(*small()).step == 1
    assert shown(tmp_path) == ["step-000001"]


def test_a_damaged_checkpoint_never_outlives_a_good_one(tmp_path: Path):
    model, optimizer = small()
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (10, 20):
        broken = saved(checkpoints, model, optimizer, Progress(step=step))
    (broken / "optimizer.pt").write_bytes(b"")
    checkpoints = Checkpoints(tmp_path, keep=1)
    with pytest.warns(UserWarning, match="skipping checkpoint step-000020"):
        assert checkpoints.restore(*small()).step == 10
    saved(checkpoints, model, optimizer, Progress(step=15))
    assert shown(tmp_path) == ["step-000015"]
    assert checkpoints.restore(*small()).step == 15
    saved(checkpoints, model, optimizer, Progress(step=20))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000020"], "what was put aside is gone too"


def test_pruning_counts_steps_and_leaves_later_ones(tmp_path: Path):
    model, optimizer = small()
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (999_998, 1_000_001, 999_999, 1_000_000):
        saved(checkpoints, model, optimizer, Progress(step=step))
    assert shown(tmp_path) == ["step-1000000", "step-1000001", "step-999999"]
    assert checkpoints.restore(*small()).step == 1_000_001


def test_a_step_is_saved_again_without_a_moment_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A kill at any of the renames leaves the old state or the new one."""
    model, optimizer = small()
    rename = Path.rename
    for survived in (0, 1, 2):
        folder = tmp_path / str(survived)
        checkpoints = Checkpoints(folder, keep=1)
        saved(checkpoints, model, optimizer, Progress(step=5, evaluated=False))
        left = [survived]

        def killed(path: Path, target: Path, left: list[int] = left) -> Path:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return rename(path, target)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", killed)
            with contextlib.suppress(KeyboardInterrupt):
                saved(checkpoints, model, optimizer, Progress(step=5, evaluated=True))
        assert checkpoints.restore(*small()) == Progress(step=5, evaluated=survived == 2)
        assert [path.name for path in folder.iterdir()] == ["step-000005"]


def test_what_cannot_be_renamed_into_place_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, optimizer = small()
    checkpoints = Checkpoints(tmp_path, keep=1)
    saved(checkpoints, model, optimizer, Progress(step=5, tokens=1))
    rename = Path.rename

    def refused(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(TrainingError, match="Input/output error"):
        saved(checkpoints, model, optimizer, Progress(step=5, tokens=2))
    assert checkpoints.restore(*small()).tokens == 1


def test_what_was_cut_short_while_being_written_is_never_seen(tmp_path: Path):
    model, optimizer = small()
    checkpoints = Checkpoints(tmp_path, keep=2)
    saved(checkpoints, model, optimizer, Progress(step=1)).rename(tmp_path / ".step-000002.partial")
    assert checkpoints.restore(model, optimizer) == Progress()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_and_earlier_checkpoints_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, optimizer = small()
    checkpoints = Checkpoints(tmp_path, keep=2)
    saved(checkpoints, model, optimizer, Progress(step=1))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match="No space left"):
        saved(checkpoints, model, optimizer, Progress(step=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001"]


def test_other_weights_than_trained_are_refused(tmp_path: Path):
    model, optimizer = small()
    checkpoints = Checkpoints(tmp_path, keep=2)
    saved(checkpoints, model, optimizer, Progress(step=1))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with pytest.raises(ResumeError, match="does not match the trainable parameters"):
        checkpoints.restore(model, optimizer)
