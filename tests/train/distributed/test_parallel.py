"""Options of the group parallel: what goes with what."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import composed, node
from fixtures.ranks_of_a_run import OPTIONS, several
from fixtures.versions import byte_shards

from runner.config.bind import bind
from runner.errors import ConfigError
from runner.train.distributed import parallel

# What goes with what


@pytest.mark.parametrize(
    ("chosen", "processes", "settled"),
    [("auto", 1, "none"), ("auto", 3, "ddp"), ("none", 1, "none"), ("ddp", 2, "ddp"), ("fsdp", 2, "fsdp")],
)
def test_parallel_follows_from_the_launcher(chosen: str, processes: int, settled: str):
    found = parallel.resolve(node("parallel", chosen), processes)
    bound = bind(found, "parallel")()
    assert (bound.kind, bound.processes) == (settled, processes)
    assert ("processes" in found) == (settled != "none"), "one process has the signature it always had"


@pytest.mark.parametrize(
    ("chosen", "given", "processes", "remedy"),
    [
        ("none", {}, 2, "parallel=ddp"),
        ("ddp", {}, 1, "launcher=accelerate launcher.processes=2"),
        ("fsdp", {"processes": 4}, 1, "launcher=accelerate launcher.processes=4"),
        ("ddp", {"processes": 4}, 2, "remove this override: the launcher sets the number of processes"),
    ],
)
def test_what_contradicts_the_launcher_is_refused(chosen: str, given: dict[str, int], processes: int, remedy: str):
    with pytest.raises(ConfigError, match=remedy):
        parallel.resolve(node("parallel", chosen, **given), processes)


@pytest.mark.parametrize(
    "option",
    ["quant=8bit", "optim=adamw_8bit", "optim=paged_adamw_8bit", "optim=lion", "optim=muon", "compile=default"],
)
def test_what_cannot_be_sharded_is_refused(option: str):
    with pytest.raises(
        ConfigError, match=r"parallel=fsdp: .*(shard|gathers weights layer by layer|does not shard weights in int8)"
    ):
        composed(*OPTIONS, *several("fsdp"), option)
    composed(*OPTIONS, *several("ddp"), option)


def test_weights_in_bfloat16_are_gathered_as_they_are():
    words = (*OPTIONS, *several("fsdp"), "lora=none", "parallel.param_dtype=bfloat16")
    assert bind(composed(*words)["parallel"], "parallel")().param_dtype == "bfloat16"
    with pytest.raises(ConfigError, match=r"parallel.param_dtype=bfloat16: has no effect with model.dtype=bfloat16"):
        composed(*words, "model.dtype=bfloat16")


@byte_shards
def test_weights_in_4_bits_are_sharded(monkeypatch: pytest.MonkeyPatch):
    cfg = composed(*OPTIONS, *several("fsdp"), "quant=4bit")

    def faults(**changes: Any) -> list[str]:
        return [f"{each.key}: {each.problem}; {each.remedy}" for each in parallel.check_combination({**cfg, **changes})]

    assert faults() == faults(quant=node("quant", "fp4")) == faults(compile=node("compile", "regional")) == []
    (fault,) = faults(parallel={**cfg["parallel"], "param_dtype": "bfloat16"})
    assert fault.startswith("parallel.param_dtype: has no effect with weights in nf4 (bitsandbytes)")
    monkeypatch.setattr(parallel, "SHARDS_BYTES", "99.1")
    (fault,) = faults()
    assert fault.startswith(
        "parallel: parallel=fsdp with weights in nf4 (bitsandbytes) needs torch 99.1; install torch"
    )
    assert fault.endswith("or use parallel=ddp")
