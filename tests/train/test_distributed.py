"""Several ranks of one run against one process, in real processes over gloo: same numbers, same files, true endings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, composed, node, prepared
from safetensors.torch import load_file

from runner.config.bind import bind
from runner.errors import ConfigError
from runner.tracking import metrics_log
from runner.tracking.rundir import RunDir
from runner.train import torch_optim
from runner.train.distributed import parallel

SERVER = Path(__file__).parents[1] / "elastic_server.py"
TIMES = ("time", "train/tokens_per_second", "train/step_seconds", "train/data_wait_fraction", "train/mfu")
OPTIONS = (
    *TINY, "train.max_steps=6", "train.gradient_accumulation_steps=2", "train.per_device_batch_size=2",
    "train.eval_steps=3", "optim.learning_rate=1e-2",
)  # fmt: skip
DROPOUT = ("lora.lora_dropout=0.2",)
FULL = ("lora=none", "optim.learning_rate=1e-3")


def several(kind: str, processes: int = 2) -> tuple[str, ...]:
    return (f"parallel={kind}", "launcher=accelerate", f"launcher.processes={processes}")


def start(rundir: RunDir, *wrong: str, processes: int = 2) -> subprocess.Popen[str]:
    command = [sys.executable, str(SERVER), str(rundir.path), str(processes), *wrong]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())


def worked(rundir: RunDir, *wrong: str, processes: int = 2) -> tuple[int, str]:
    """The exit code of the launcher, and all that it and its ranks printed."""
    process = start(rundir, *wrong, processes=processes)
    out, err = process.communicate(timeout=240)
    return process.returncode, out + err


def completed(folder: Path, *overrides: str, processes: int = 2) -> RunDir:
    rundir = prepared(folder, *overrides)
    code, said = worked(rundir, processes=processes)
    assert (code, rundir.read_state().status) == (0, "completed"), said
    return rundir


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


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "runner")
ACCELERATE = (
    sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2",
    "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "runner",
)  # fmt: skip


# The same numbers


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    "options", [(), ("data.packing=false",), FULL], ids=["adapter, packed", "adapter, padded", "full, packed"]
)
def test_two_processes_train_what_one_trains(tmp_path: Path, cache: Path, kind: str, options: tuple[str, ...]):
    one = alone(tmp_path / "one", *OPTIONS, *options, "train.per_device_batch_size=4")
    two = completed(tmp_path / "two", *OPTIONS, *options, *several(kind))
    for name in ("train/loss", "train/grad_norm", "eval/loss", "eval/token_accuracy"):
        assert of(two, name) == pytest.approx(of(one, name), abs=1e-5), name
    assert of(two, "train/tokens") == of(one, "train/tokens")
    assert of(two, "train/epoch") == of(one, "train/epoch")
    found, expected = weights(two), weights(one)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape
        assert float((found[name] - tensor).abs().max()) < 1e-3, name
    assert of(one, "train/loss")[-1] < of(one, "train/loss")[0]


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
from conftest import option
from runner.models import pretrained
if __name__ == "__main__":
    from torch import distributed
    distributed.init_process_group("gloo")
    time.sleep(5 * (os.environ["RANK"] == "0"))
    pretrained.resolve(option("model", "tiny")())
    distributed.barrier()
"""


SHARDING = """
import copy
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from runner.models import shards
from runner.train import torch_optim

def trained(cls, sharded):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3, bias=False))
    if sharded:
        fully_shard(model)
    optimizer = cls(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.ones(2, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = copy.deepcopy(shards.optimizer_state(optimizer, keep=True))
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_() if isinstance(value, torch.Tensor) else None
    shards.load_optimizer_state(optimizer, found)
    again = shards.optimizer_state(optimizer, keep=True)
    return [shards.whole(p.detach()) for p in model.parameters()], found["state"], again["state"]

def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and torch.allclose(a, b, atol=1e-6)
    return a == b

distributed.init_process_group("gloo")
classes = {name.lower(): cls for name, cls in vars(torch.optim).items() if isinstance(cls, type)}
for name in torch_optim.SHARDABLE:
    weights, state, again = trained(classes[name], sharded=True)
    expected, expected_state, _ = trained(classes[name], sharded=False)
    assert all(map(same, weights, expected)), name
    assert state.keys() == expected_state.keys(), name
    for number, values in expected_state.items():
        for key, value in values.items():
            assert same(state[number][key], value), (name, key)
            assert same(again[number][key], value), (name, key)
    if distributed.get_rank() == 0:
        print("proven", name, flush=True)
distributed.barrier()
"""


@pytest.mark.slow
def test_every_optimizer_that_is_offered_for_shards_trains_them_as_the_whole(tmp_path: Path):
    script = tmp_path / "sharding.py"
    script.write_text(SHARDING)
    words = [*TORCHRUN[:5], str(script)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=240, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    for name in torch_optim.SHARDABLE:
        assert f"proven {name}\n" in done.stdout


@pytest.mark.slow
def test_a_rank_beyond_0_makes_a_whole_model_too(tmp_path: Path):
    """transformers saves nothing but on rank 0; each machine may have a cache of its own."""
    script = tmp_path / "making.py"
    script.write_text(MAKING)
    words = [*TORCHRUN[:5], str(script)]
    env = {**environment(), "RUNNER_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=240, env=env)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "cache" / "models").glob("random-*")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}


# Stopped, killed, continued


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("end", ["die", "term"])
def test_a_run_that_was_stopped_or_killed_ends_with_the_same_weights(tmp_path: Path, cache: Path, kind: str, end: str):
    options = (*OPTIONS, *DROPOUT, *several(kind), "train.save_steps=2", "train.sample_prompts=1")
    undisturbed = completed(tmp_path / "whole", *options)
    rundir = prepared(tmp_path / "halves", *options)
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
    assert outcome(rundir) == outcome(undisturbed)


@pytest.mark.parametrize(
    ("end", "code", "status", "reason"),
    [
        ("die", 1, "killed", "one of the 2 ranks was killed (SIGKILL or out of memory); "),
        pytest.param("drop", 75, "preempted", "stopped by SIGTERM; ", marks=pytest.mark.slow),
    ],
)
def test_the_launcher_writes_down_the_end_of_a_rank_0_that_said_nothing(
    tmp_path: Path, cache: Path, end: str, code: int, status: str, reason: str
):
    rundir = prepared(tmp_path / "run", *OPTIONS, *several("ddp"))
    found, said = worked(rundir, end, "3", "0")
    state = rundir.read_state()
    assert (found, state.status) == (code, status), said
    assert state.reason == f"{reason}nothing was trained yet"
    assert not rundir.is_alive()
    assert "Traceback" not in said


def test_a_run_that_was_given_up_is_so_for_all_ranks(tmp_path: Path, cache: Path):
    rundir = prepared(tmp_path / "run", *OPTIONS, *several("ddp"))
    rundir.prune_request.write_text("given up at step 3")
    code, said = worked(rundir)
    assert (code, rundir.read_state().status) == (0, "pruned"), said
    assert "Traceback" not in said


def test_ctrl_c_saves_once_and_says_so(tmp_path: Path, cache: Path):
    rundir = prepared(tmp_path / "run", *OPTIONS, *several("ddp"), "train.max_steps=500")
    code, said = worked(rundir, "interrupt", "3", "1")
    state = rundir.read_state()
    assert (code, state.status) == (130, "killed"), said
    assert state.reason == f"interrupted; the state is saved at step {state.step}"
    assert "Traceback" not in said
    assert said.count(f"resume={rundir.path}") == 1, "only rank 0 speaks"


def test_ranks_of_a_run_that_was_cancelled_meanwhile_train_nothing(tmp_path: Path, cache: Path):
    rundir = prepared(tmp_path / "run", *OPTIONS, *several("ddp"))
    rundir.cancel_request.write_text("cancelled before it started by me")  # seconds pass until rank 0 holds the folder
    rundir.write_state(status="killed", reason="cancelled before it started by me")
    code, said = worked(rundir)
    assert code == 130, said
    assert (rundir.read_state().status, rundir.read_state().attempt) == ("killed", 0)
    assert said.count("is not started: cancelled before it started by me") == 1


def test_a_rank_that_raises_is_the_reason(tmp_path: Path, cache: Path):
    rundir = prepared(tmp_path / "run", *OPTIONS, *several("ddp"))
    code, said = worked(rundir, "raise", "2", "1")
    state = rundir.read_state()
    assert (code, state.status) == (1, "failed"), said
    assert state.reason == "rank 1: ZeroDivisionError: too deep a thought"
    assert "Traceback" not in said
    assert "Traceback" in rundir.rank_log(1).read_text()
    code, said = worked(rundir)
    assert (code, rundir.read_state().status) == (0, "completed"), said
    assert not rundir.rank_failure(1).exists()
    assert "too deep a thought" in rundir.rank_log(1).read_text(), "the log of the first attempt is kept"


def test_rank_0_that_raises_is_the_reason_itself(tmp_path: Path, cache: Path):
    rundir = prepared(tmp_path / "run", *OPTIONS, *several("ddp"))
    code, said = worked(rundir, "raise", "2", "0")
    state = rundir.read_state()
    assert (code, state.status, state.reason) == (1, "failed", "ZeroDivisionError: too deep a thought"), said


# Started by somebody else


@pytest.mark.slow
def test_accelerate_that_started_one_of_several_is_refused(tmp_path: Path):
    command = [word for word in ACCELERATE if word != "--multi_gpu"]
    done = subprocess.run([*command, "model=tiny"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "accelerate launch found no GPU and started 1 process instead of 2" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("command", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_processes_started_by_others_leave_one_folder_and_one_run(
    tmp_path: Path, cache: Path, command: tuple[str, ...]
):
    import mlflow

    options = [option for option in OPTIONS if not option.startswith("tracking")]
    words = [*command, *options, f"outputs_dir={tmp_path}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=240, env=environment())
    assert done.returncode == 0, done.stderr
    (state,) = tmp_path.rglob("state.json")
    rundir = RunDir(state.parent)
    assert rundir.read_state().status == "completed"
    assert done.stdout.count(f"run      {rundir.path}  completed") == 1
    assert done.stderr.count("step 6/6  loss") == 1
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert [run.info.status for run in runs] == ["FINISHED"]
    assert len(client.get_metric_history(runs[0].info.run_id, "train/loss")) == 6


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("trian.max_steps=3", "did you mean 'train.max_steps'?"),
        pytest.param("parallel=none", "the launcher starts 2 processes", marks=pytest.mark.slow),
        pytest.param(
            "launcher=local", "torchrun or accelerate launch has started 2 processes already", marks=pytest.mark.slow
        ),
    ],
)
def test_a_refusal_among_several_is_one_message(tmp_path: Path, cache: Path, wrong: str, message: str):
    words = [*TORCHRUN, *OPTIONS, f"outputs_dir={tmp_path / 'out'}", wrong]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=240, env=environment())
    assert done.returncode != 0
    assert done.stderr.count(message) == 1, done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_a_run_is_refused_by_other_than_its_number_of_processes(tmp_path: Path, cache: Path):
    from runner.train import worker

    rundir = prepared(tmp_path / "run", *OPTIONS, *several("ddp"))
    assert worker.work(rundir) == 2
    assert not rundir.path.exists() or not list(rundir.path.iterdir())
    rundir = prepared(tmp_path / "one", *OPTIONS)
    code, said = worked(rundir)
    assert code == 2
    assert said.count("this run needs 1 process, but 2 processes started") == 1


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
    ["quant=4bit", "optim=adamw_8bit", "optim=paged_adamw_8bit", "optim=lion", "optim=muon", "compile=default"],
)
def test_what_cannot_be_sharded_is_refused(option: str):
    with pytest.raises(
        ConfigError, match=r"parallel=fsdp: .*(shard|gathers weights layer by layer|does not support quantized weights)"
    ):
        composed(*OPTIONS, *several("fsdp"), option)
    composed(*OPTIONS, *several("ddp"), option)
