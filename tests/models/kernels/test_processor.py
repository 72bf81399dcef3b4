"""What is read about the processor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.models.kernels import processor


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    processor._words.cache_clear()
    yield
    processor._words.cache_clear()


@pytest.mark.parametrize(("vendor", "is_amd"), [("AuthenticAMD", True), ("GenuineIntel", False)])
def test_vendor_and_instruction_sets(
    vendor: str, is_amd: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpuinfo").write_text(f"vendor_id\t: {vendor}\nflags\t\t: sse2 amx_tile avx512_bf16\n")
    monkeypatch.setattr(processor, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert processor.is_amd() == is_amd
    assert processor.flags() == {"sse2", "amx_tile", "avx512_bf16"}
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")
    assert processor.flags() == {"sse2"}


def test_without_the_file_of_linux_nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processor, "CPU_INFO", tmp_path / "none")
    assert (processor.is_amd(), processor.flags()) == (False, frozenset())
