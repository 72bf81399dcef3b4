"""The dtype of weights and computation, by hardware."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures.model_folders import folder, local, source

from runner.models import dtypes, pretrained
from runner.models.kernels import processor
from runner.models.quantization import none


def test_dtype_is_what_was_asked(folder: Path) -> None:
    model = pretrained.load(local(folder, dtype="bfloat16"), none.none(), "cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("flags", ["", "avx512_bf16", "amx_bf16 avx512_bf16"])
def test_auto_is_bfloat16_only_where_the_cpu_is_fast_in_it(
    flags: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor: 0\nflags\t\t: fpu sse2 {flags}\n")
    monkeypatch.setattr(processor, "CPU_INFO", info)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    processor._words.cache_clear()
    try:
        auto = dtypes.dtype_for("auto", "cpu")
        assert auto == (torch.bfloat16 if "amx" in flags else torch.float32)
        assert dtypes.dtype_for("bfloat16", "cpu") == torch.bfloat16
        assert ("30 to 60 times slower" in caplog.text) == (flags == "")
        caplog.clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert dtypes.dtype_for("bfloat16", "cpu") == torch.bfloat16
        assert "slower" not in caplog.text, "a model that is only loaded there, for a GPU"
    finally:
        processor._words.cache_clear()


@pytest.mark.parametrize(("capability", "says"), [((7, 5), True), ((8, 0), False)])
def test_a_gpu_without_bfloat16_is_named_in_the_plan(
    capability: tuple[int, int], says: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    gpu = torch.device("cuda", 0)
    assert ("has no bfloat16" in dtypes.slow_gpu(torch.float32, gpu)) == says
    assert not dtypes.slow_gpu(torch.bfloat16, gpu)
    assert not dtypes.slow_gpu(torch.float32, torch.device("cpu"))
