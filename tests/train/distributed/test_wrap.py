"""Several ranks against one process, in real processes over gloo: the same numbers and files."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed, option, prepared
from fixtures.ranks_of_a_run import OPTIONS, TORCHRUN, completed, environment, several, worked
from safetensors.torch import load_file, save_file

from runner.models import architecture
from runner.models.kernels import compilation
from runner.tracking import metrics_log
from runner.tracking.rundir import RunDir
from runner.train import build, inputs
from runner.train.distributed import wrap
from runner.train.distributed.ranks import ALONE
from runner.train.options import Options

TIMES = ("time", "train/tokens_per_second", "train/step_seconds", "train/data_wait_fraction", "train/mfu")
DROPOUT = ("lora.lora_dropout=0.2",)
FULL = ("lora=none", "optim.learning_rate=1e-3")
TRAINED = {
    "adapter, packed": (),
    "adapter, padded": ("data.packing=false",),
    "full, packed": FULL,
    "full, averaged, with noise": (*FULL, "train.ema=0.5", "train.neftune_noise_alpha=20"),
    "4 bits": ("quant=4bit",),
}


def alone(folder: Path, *overrides: str) -> RunDir:
    from runner.train import worker

    rundir = prepared(folder, *overrides)
    assert worker.work(rundir) == 0
    return rundir


def of(rundir: RunDir, name: str) -> list[float]:
    return [record[name] for record in metrics_log.read(rundir) if name in record]


def weights(rundir: RunDir) -> dict[str, Any]:
    (file,) = rundir.model.glob("*.safetensors")
    return load_file(file)


def outcome(rundir: RunDir) -> tuple[Any, ...]:
    """All that must not depend on what happened on the way."""
    records = [
        {k: v for k, v in record.items() if k not in TIMES and not k.startswith("memory/")}
        for record in metrics_log.read(rundir)
    ]
    (file,) = rundir.model.glob("*.safetensors")
    return records, file.read_bytes()


# The same numbers


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", TRAINED)
def test_two_processes_train_what_one_trains(tmp_path: Path, cache: Path, kind: str, name: str):
    options = TRAINED[name]
    one = alone(tmp_path / "one", *OPTIONS, *options, "train.per_device_batch_size=4")
    two = completed(tmp_path / "two", *OPTIONS, *options, *several(kind))
    for metric in ("train/loss", "train/grad_norm", "eval/loss", "eval/token_accuracy"):
        assert of(two, metric) == pytest.approx(of(one, metric), abs=1e-5), metric
    assert of(two, "train/tokens") == of(one, "train/tokens")
    assert of(two, "train/epoch") == of(one, "train/epoch")
    found, expected = weights(two), weights(one)
    assert found.keys() == expected.keys()
    for each, tensor in expected.items():
        assert found[each].shape == tensor.shape
        assert float((found[each] - tensor).abs().max()) < 1e-3, each
    assert of(one, "train/loss")[-1] < of(one, "train/loss")[0]


@pytest.mark.slow
def test_weights_that_are_gathered_in_bfloat16_train_in_float32(tmp_path: Path, cache: Path):
    whole = alone(tmp_path / "whole", *OPTIONS, *FULL, "train.per_device_batch_size=4")
    half = completed(tmp_path / "half", *OPTIONS, *FULL, *several("fsdp"), "parallel.param_dtype=bfloat16")
    assert of(half, "train/loss") == pytest.approx(of(whole, "train/loss"), rel=0.02)
    assert of(half, "train/loss") != of(whole, "train/loss")
    assert {str(each.dtype) for each in weights(half).values()} == {"torch.float32"}


@pytest.mark.slow
def test_bfloat16_files_are_widened_unit_by_unit_when_they_are_sharded(tmp_path: Path, cache: Path, monkeypatch: Any):
    """Until then they are mapped from the file, which the processes of a machine share."""
    files = in_bfloat16(tmp_path)
    made = inputs.inputs(Options(composed(*OPTIONS, *FULL, *files, "parallel=fsdp", *several("fsdp")[1:])))
    model = build.load_model(made, full=True)
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
    expected = {name: each.detach().float() for name, each in model.named_parameters()}
    wide: list[int] = []
    real = torch.distributed.fsdp.fully_shard

    def shard(module: torch.nn.Module, **options: Any) -> Any:
        whole = [each for each in model.parameters() if not hasattr(each, "device_mesh")]
        wide.append(sum(each.numel() for each in whole if each.dtype == torch.float32))
        return real(module, **options)

    monkeypatch.setattr(torch.distributed.fsdp, "fully_shard", shard)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrap.wrap(made.options.parallel, model, made.options.task, ALONE, made.device, None, torch.float32)
        found = {name: each.full_tensor() for name, each in model.named_parameters()}  # type: ignore[attr-defined]
    finally:
        torch.distributed.destroy_process_group()
    layer, others = (sum(each.numel() for name, each in expected.items() if part(name)) for part in
                     (lambda name: "layers.0." in name, lambda name: "layers." not in name))  # fmt: skip
    assert wide == [layer, layer, others], "of two layers and the rest, one at a time"
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.slow
def test_shards_of_bfloat16_files_train_what_one_process_trains(tmp_path: Path, cache: Path):
    files = in_bfloat16(tmp_path)
    one = alone(tmp_path / "one", *OPTIONS, *FULL, *files, "train.per_device_batch_size=4")
    two = completed(tmp_path / "two", *OPTIONS, *FULL, *files, *several("fsdp"))
    assert of(two, "train/loss") == pytest.approx(of(one, "train/loss"), abs=1e-5)
    assert {str(each.dtype) for each in weights(two).values()} == {"torch.float32"}


def in_bfloat16(folder: Path) -> tuple[str, str]:
    """Overrides for a copy of the tiny model whose files are bfloat16."""
    path = folder / "model"
    shutil.copytree(architecture.resolve(option("model", "tiny")()).path, path)
    tensors = load_file(path / "model.safetensors")
    save_file({name: each.bfloat16() for name, each in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    return "model=local", f"model.path={path}"


def test_ranks_that_have_no_row_left_take_part_all_the_same(tmp_path: Path, cache: Path):
    """Five rows in an epoch, two ranks of two rows: the last micro-batch of the epoch leaves one rank nothing."""
    few = (*OPTIONS, "data.packing=false", "data.train_rows=5", "data.eval_rows=3", "train.max_steps=null",
           "train.num_train_epochs=2", "train.gradient_accumulation_steps=1")  # fmt: skip
    one = alone(tmp_path / "one", *few, "train.per_device_batch_size=4")
    two = completed(tmp_path / "two", *few, *several("ddp"))
    assert of(two, "train/loss") == pytest.approx(of(one, "train/loss"), abs=1e-5)
    assert of(two, "eval/loss") == pytest.approx(of(one, "eval/loss"), abs=1e-5)


def test_dropout_differs_between_ranks_and_not_between_runs(tmp_path: Path, cache: Path):
    from runner.train.loop import derived_seed

    seeds = {derived_seed(0, step, rank) for step in range(50) for rank in range(8)}
    assert len(seeds) == 400
    assert derived_seed(0, 3) == derived_seed(0, 3, 0), "one process draws what rank 0 draws"


MAKING = """
import os, time
from pathlib import Path
from conftest import option
from runner.models import architecture
if __name__ == "__main__":
    from torch import distributed
    distributed.init_process_group("gloo")
    models = Path(os.environ["RUNNER_CACHE"], "models")
    while os.environ["RANK"] == "0" and not list(models.glob("random-*")):
        time.sleep(0.1)
    architecture.resolve(option("model", "tiny")())
    distributed.barrier()
"""


@pytest.mark.slow
def test_a_rank_beyond_0_makes_a_whole_model_too(tmp_path: Path):
    """transformers saves nothing but on rank 0; each machine may have a cache of its own."""
    script = tmp_path / "making.py"
    script.write_text(MAKING)
    words = [*TORCHRUN[:5], str(script)]
    env = {**environment(), "RUNNER_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "cache" / "models").glob("random-*")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}


@pytest.mark.slow
def test_ddp_does_not_cut_a_compiled_layer(tmp_path: Path):
    """Its own optimizer would make a graph of each bucket: 25 MB hold one and a half of these products."""
    torch._dynamo.reset()
    compilation.regional(_Layers(), mode=None, dynamic=False, fullgraph=True)
    model, graphs = _Layers(), list[int]()

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return graph.forward

    for layer in model.layers:
        layer.compile(backend=backend, fullgraph=True)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=25)
        wrapped(torch.randn(2, 2048)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert graphs == [6, 6], "a graph for each layer"


class _Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.products = torch.nn.ModuleList(torch.nn.Linear(2048, 2048, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for product in self.products:
            x = torch.tanh(product(x))
        return x


class _Layers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(_Layer() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


# Stopped, killed, continued


KINDS = {
    "ddp": several("ddp"), "fsdp": several("fsdp"), "fsdp, 4 bits": (*several("fsdp"), "quant=4bit"),
}  # fmt: skip
DISTURBED = (*OPTIONS, *DROPOUT, "train.save_steps=2", "train.sample_prompts=1")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Callable[[str], tuple[Any, ...]]:
    """Kind → the outcome of the run that nothing stops."""
    return functools.cache(
        lambda kind: outcome(completed(tmp_path_factory.mktemp("whole") / "run", *DISTURBED, *KINDS[kind]))
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "end"),
    [("ddp", "die"), ("ddp", "term"), ("fsdp", "term"), ("fsdp, 4 bits", "die")],
)
def test_a_run_that_was_stopped_or_killed_ends_with_the_same_weights(
    tmp_path: Path, undisturbed: Callable[[str], tuple[Any, ...]], kind: str, end: str
):
    rundir = prepared(tmp_path / "halves", *DISTURBED, *KINDS[kind])
    code, said = worked(rundir, end, "3", "1")
    state = rundir.read_state()
    if end == "die":
        assert (code, state.status) == (1, "killed"), said
        assert state.reason.startswith("one of the 2 ranks was killed (SIGKILL or out of memory)")
    else:
        assert (code, state.status) == (75, "preempted"), said
        assert state.reason.startswith("stopped by SIGTERM; the state is saved at step ")
    assert "Traceback" not in said
    code, said = worked(rundir)
    assert (code, rundir.read_state().attempt) == (0, 2), said
    assert "resumed at step" in said
    assert outcome(rundir) == undisturbed(kind)
