"""What a worker records of its run: graph breaks and graphs that were compiled late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import prepared
from fixtures import versions
from fixtures.stopped_runs import SHORT

from runner.models.kernels import compilation, cpu_products
from runner.train import run_facts, worker


def eager(model: Any, *, mode: compilation.Mode, dynamic: bool | None, fullgraph: bool) -> Any:
    """compile=regional with Dynamo's own backend, which needs no compiler and no minute."""
    for layer in compilation.decoder_layers(model):
        layer.compile(backend="eager", dynamic=dynamic, fullgraph=fullgraph)
    return model


@pytest.mark.slow
def test_graph_breaks_are_logged_and_counted(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    import torch
    from torch._dynamo.utils import counters
    from transformers.models.llama.modeling_llama import LlamaMLP

    torch._dynamo.reset()
    counters.clear()
    forward = LlamaMLP.forward

    def broken(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", broken)
    monkeypatch.setattr(compilation, "regional", eager)
    rundir = prepared(tmp_path / "run", *SHORT, "compile=regional", "data.packing=true")
    assert worker.work(rundir) == 0
    summary = rundir.read_state().summary
    assert summary["compile/graph_breaks"] == 1
    assert 0 <= summary["compile/graphs_after_first_step"] < compilation.graphs()
    assert rundir.log.read_text().count("WARNING runner: graph break: ") == 1


def test_a_run_that_goes_on_with_another_library_for_its_products_is_warned(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rundir = prepared(tmp_path / "run", *SHORT)
    assert worker.work(rundir) == 0
    began = rundir.read_manifest()["hardware"]["products"]
    run_facts.warn_of_products(rundir)
    assert "products" not in caplog.text
    monkeypatch.setattr(cpu_products, "is_used", lambda: began == "MKL")
    run_facts.warn_of_products(rundir)
    assert f"computed by {cpu_products.library()}, and the run began with {began}" in caplog.text


@versions.late_graphs
def test_graphs_that_come_late_are_logged_and_counted(caplog: pytest.LogCaptureFixture):
    import torch
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = torch.nn.Linear(3, 3)
    model.compile(backend="eager", dynamic=False)
    model(torch.zeros(2, 3))
    warm = compilation.graphs()
    assert run_facts.compiled(model, warm) == {"compile/graph_breaks": 0, "compile/graphs_after_first_step": 0}
    assert "after the first step" not in caplog.text
    model(torch.zeros(4, 3))
    assert run_facts.compiled(model, warm) == {"compile/graph_breaks": 0, "compile/graphs_after_first_step": 1}
    assert "graphs compiled after the first step: 1" in caplog.text


def test_nothing_is_recorded_of_compiling_where_nothing_was_compiled(tmp_path: Path, cache: Path):
    rundir = prepared(tmp_path / "run", *SHORT)
    assert worker.work(rundir) == 0
    assert not [name for name in rundir.read_state().summary if name.startswith("compile/")]
