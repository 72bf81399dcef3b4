"""GPUs that this torch cannot use, and the kernels that it may choose, without a GPU."""

from __future__ import annotations

import pytest
import torch

from runner.errors import ConfigError
from runner.tracking import machine
from runner.train import devices

BUILT = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "supported"),
    [
        ((7, 0), False),
        ((7, 5), True),
        ((8, 0), True),
        ((8, 9), True),
        ((9, 0), True),
        ((11, 0), False),
        ((12, 1), True),
    ],
)
def test_a_gpu_is_supported_by_builds_of_its_major_version_and_by_earlier_ptx(capability, supported) -> None:
    assert devices.is_supported(capability, BUILT) == supported


def test_an_old_gpu_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: BUILT)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100-SXM2-16GB")
    with pytest.raises(ConfigError, match=r"no kernels for the GPU Tesla V100.* \(compute capability 7\.0\)"):
        devices.pick()


def test_a_gpu_that_torch_cannot_use_is_not_replaced_by_the_cpu_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "gpu_names", lambda: ["NVIDIA H200"])
    with pytest.raises(ConfigError, match=r"has the GPU NVIDIA H200, but torch .* cannot use it") as refused:
        devices.pick()
    assert "CUDA_VISIBLE_DEVICES=" in str(refused.value)
    monkeypatch.setattr(machine, "gpu_names", list)
    assert devices.pick() == torch.device("cpu")


@pytest.mark.parametrize(
    ("deterministic", "cudnn", "allowed"),
    [(False, 92600, True), (False, 92500, True), (False, 92200, False), (False, None, False), (True, 92600, False)],
)
def test_cudnn_is_left_out_where_it_is_wrong_or_not_deterministic(
    deterministic: bool, cudnn: int | None, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        devices.choose_kernels(deterministic)
        assert torch.backends.cuda.cudnn_sdp_enabled() == allowed
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_names_match_as_whole_words() -> None:
    assert devices.matches("NVIDIA A10", "A10")
    assert not devices.matches("NVIDIA RTX A1000", "A10")
    assert not devices.matches("NVIDIA T400", "T4")
    assert not devices.matches("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "H100"), "a seventh of the GPU"


def test_tf32_is_refused_on_a_device_that_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    for device, name in ((gpu, "Tesla T4"), (torch.device("cpu"), "a CPU")):
        devices.check_tf32(False, device)
        with pytest.raises(ConfigError, match=rf"train\.tf32=true: has no effect on {name}"):
            devices.check_tf32(True, device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    devices.check_tf32(True, gpu)


def test_activations_move_to_the_memory_of_the_cpu_only_from_another() -> None:
    devices.check_offload("offload", torch.device("cuda"))
    devices.check_offload("min", torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"train\.memory=offload: has no effect without a GPU(.|\n)*memory=min"):
        devices.check_offload("offload", torch.device("cpu"))


@pytest.mark.parametrize(("tf32", "precision"), [(True, "high"), (False, "highest")])
def test_float32_is_multiplied_in_tf32_only_if_asked(tf32: bool, precision: str) -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        devices.choose_kernels(False, tf32)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize(
    ("device", "graphs", "variable", "grows"),
    [
        ("cuda", False, "", True),
        ("cuda", True, "", False),
        ("cuda", False, "backend:native", False),
        ("cpu", False, "", False),
    ],
)
def test_segments_grow_unless_the_user_or_graphs_say_otherwise(
    device: str, graphs: bool, variable: str, grows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    for name in devices.ALLOCATOR_VARIABLES:
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", variable)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append, raising=False)
    assert devices.choose_allocator(torch.device(device), graphs=graphs) == grows
    assert told == ["expandable_segments:True"] * grows
