"""The GPUs of a process, through NVML."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from runner.tracking import machine


class Nvml(SimpleNamespace):
    """Four GPUs; the second one is busy, the fourth one reports nothing."""

    def nvmlInit(self) -> None: ...  # noqa: N802

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 4

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if index >= 4:
            raise ValueError
        return index

    def nvmlDeviceGetHandleByUUID(self, name: str) -> int:  # noqa: N802
        return {"GPU-aa": 1}[name]

    def nvmlDeviceGetUUID(self, handle: int) -> str | bytes:  # noqa: N802
        return b"GPU-aa" if handle == 1 else f"GPU-b{handle}-0123"

    def nvmlDeviceGetName(self, handle: int) -> str | bytes:  # noqa: N802
        return b"GPU one" if handle == 1 else f"GPU {handle}"

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[int]:  # noqa: N802
        if handle == 3:
            raise RuntimeError("not supported")
        return [17] if handle == 1 else []


@pytest.fixture(autouse=True)
def _nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [
        (None, ["0", "1", "2", "3"]),
        ("", []),
        ("2, 0", ["2", "0"]),
        ("GPU-aa,3", ["GPU-aa", "3"]),
        ("1,9", ["1"]),
        ("GPU-b2,GPU-c", ["GPU-b2"]),
    ],
)
def test_the_visible_gpus_are_those_of_the_environment_in_its_order(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, gpus: list[str]
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.visible_gpus() == gpus


def test_a_gpu_without_a_process_is_idle_and_so_is_one_that_reports_none() -> None:
    assert machine.idle_gpus() == ["0", "2", "3"]
    assert machine.gpu_names() == ["GPU 0", "GPU one", "GPU 2", "GPU 3"]
    assert list(machine.gpu_handles("GPU-aa,GPU-b3")) == [1, 3], "CUDA takes the beginning of a UUID, too"


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("no driver")

    monkeypatch.setattr(sys.modules["pynvml"], "nvmlInit", fail)
    assert (machine.visible_gpus(), machine.has_cuda()) == ([], False)
