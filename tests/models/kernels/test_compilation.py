"""Compiling for real, on the CPU: same numbers, same names, one graph for all layers, and breaks that are told."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import conftest
import pytest
import torch
import transformers
from conftest import TINY, composed, no_hooks, prepared
from fixtures import versions
from peft import LoraConfig, get_peft_model

from runner.config.bind import config_dir, find_faults
from runner.config.schema import Memory
from runner.errors import ConfigError
from runner.models import dtypes
from runner.models.kernels import activation_checkpointing, compilation, lora_linear, varlen_attention
from runner.tasks import cross_entropy
from runner.tracking import manifest
from runner.tracking.rundir import RunDir
from runner.train import build, estimate, evaluation, inputs, loop, text_generation, throughput, worker
from runner.train.checkpoint import Progress
from runner.train.options import Options

OPTIONS = sorted(path.stem for path in config_dir().glob("compile/*.yaml"))
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")

option = functools.partial(conftest.option, "compile")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def llama(layers: int = 3) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def with_lora(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def batches() -> list[dict[str, torch.Tensor]]:
    """Packed rows of 16 tokens whose documents and trained positions differ from batch to batch."""
    made = []
    for cut in (3, 5, 8, 11):
        ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(cut))
        positions = torch.cat([torch.arange(cut), torch.arange(16 - cut)]).repeat(2, 1)
        labels = ids.roll(-1, 1).masked_fill(torch.arange(16) > cut, cross_entropy.IGNORED)
        made.append({"input_ids": ids, "position_ids": positions, "labels": labels})
    return made


def losses_and_gradients(model: torch.nn.Module) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    losses = []
    for batch in batches():
        result = cross_entropy.sums(model, batch)
        result["loss"].backward()
        losses.append(result["loss"].detach())
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_compiles(name: str, layers: int) -> None:
    plain, model = with_lora(llama(layers)), with_lora(llama(layers))
    names = [name for name, _ in model.named_parameters()]
    assert option(name, fullgraph=True)(model) is model
    assert [name for name, _ in model.named_parameters()] == names
    expected = losses_and_gradients(plain)
    torch.testing.assert_close(losses_and_gradients(model), expected, atol=1e-4, rtol=1e-4)
    assert compilation.graph_breaks() == []


def traced(model: Any, *, mode: compilation.Mode, dynamic: bool | None, fullgraph: bool) -> Any:
    """compile=regional up to the graphs, forward and backward, which then compute as they are: no C++ compiler."""
    for layer in compilation.decoder_layers(model):
        layer.compile(backend="aot_eager", dynamic=dynamic, fullgraph=fullgraph)
    return model


@needs_compiler
@pytest.mark.slow
def test_regional_compiles_one_layer_for_all() -> None:
    assert_compiles("regional", 3)
    assert compilation.graphs() <= 2, "the first layer has an input without a gradient; the others share a graph"


@pytest.mark.slow
def test_answers_leave_the_compiled_layers_to_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """More layers than Dynamo compiles variants of a function: what generation asks of them must not use them up."""
    monkeypatch.setattr(compilation, "regional", traced)
    model, asked = with_lora(llama(10)), Tokenizer()
    option("regional", fullgraph=True)(model)
    losses_and_gradients(model)
    graphs = compilation.graphs()
    assert len(text_generation.generate(model, asked, ["a", "bc"], max_new_tokens=3)) == 2
    losses_and_gradients(model)
    assert compilation.graphs() == graphs
    with torch.profiler.profile() as profile:
        cross_entropy.sums(model, batches()[0])["loss"].backward()
    compiled = sum(event.count for event in profile.key_averages() if event.key == "CompiledFunction")
    assert compiled == 10, "a call for each layer"


class Tokenizer:
    """Letters; what ``samples.generate`` asks of a tokenizer."""

    padding_side, pad_token_id = "right", 0

    def __call__(self, texts: list[str], **_: Any) -> dict[str, torch.Tensor]:
        length = max(map(len, texts))
        ids = torch.tensor([[ord(letter) % 64 for letter in text.rjust(length)] for text in texts])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def batch_decode(self, ids: torch.Tensor, **_: Any) -> list[str]:
        return ["".join(chr(64 + token) for token in row) for row in ids.tolist()]


COMPILE = """
import torch, conftest
from torch._dynamo.utils import counters
model = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.LayerNorm(64)]))
conftest.option("compile", "regional")(model)
model[0][0](torch.ones(64, 64, requires_grad=True)).sum().backward()
print(counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"])
"""


@needs_compiler
@pytest.mark.slow
def test_what_one_run_compiled_the_next_one_finds(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    environment |= {
        "RUNNER_CACHE": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]]),
    }
    said = [
        subprocess.check_output([sys.executable, "-c", COMPILE], env=environment, text=True).split() for _ in range(2)
    ]
    assert [int(word) > 0 for word in said[0]] == [True, False], said
    assert [int(word) > 0 for word in said[1]] == [False, True], said


@needs_compiler
@pytest.mark.slow
def test_default_compiles_the_decoder_once() -> None:
    assert_compiles("default", 1)
    assert compilation.graphs() == 1


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["balanced", "min"])
def test_computing_layers_again_goes_along(
    memory: activation_checkpointing.Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "regional", traced)
    plain, model = with_lora(llama(2)), with_lora(llama(2))
    activation_checkpointing.arrange(model, memory, eager=False)
    option("regional", fullgraph=True)(model)
    torch.testing.assert_close(losses_and_gradients(model), losses_and_gradients(plain), atol=1e-4, rtol=1e-4)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_layers(bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4-bit layers compile whole; 8-bit ones break in evaluation, which is told, and give the same numbers."""
    llama().save_pretrained(tmp_path)
    quant = conftest.option("quant", f"{bits}bit")()

    def loaded() -> torch.nn.Module:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=quant.library_config("cpu"), dtype=torch.float32, device_map={"": "cpu"}
        )
        quant.after_load(model)
        model.quant = quant
        return with_lora(model).train()

    plain, model = loaded(), loaded()
    if bits == 8:
        with pytest.raises(ConfigError, match="8-bit layers of bitsandbytes cause graph breaks"):
            option("regional", fullgraph=True)(model)
        monkeypatch.setattr(compilation, "regional", traced)
    option("regional", fullgraph=bits == 4)(model)
    torch.testing.assert_close(losses_and_gradients(model), losses_and_gradients(plain), atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(
            cross_entropy.sums(model.eval(), batches()[0]), cross_entropy.sums(plain.eval(), batches()[0])
        )
    assert bool(compilation.graph_breaks()) == (bits == 8)


def test_a_graph_break_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "regional", traced)

    class Layer(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return super().forward(x)

    model = torch.nn.Sequential(torch.nn.ModuleList([Layer(4, 4), Layer(4, 4)]))
    option("regional")(model)
    with torch.no_grad():
        model[0][1](model[0][0](torch.zeros(2, 4)))
    [told] = compilation.graph_breaks()
    assert "graph_break" in told


def test_none_changes_nothing() -> None:
    model = llama()
    assert option("none")(model) is model
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_decoder_layers_are_found_inside_lora() -> None:
    model = llama()
    layers = list(model.model.layers)
    assert compilation.decoder_layers(model) == layers
    assert compilation.decoder_layers(with_lora(model)) == layers
    with pytest.raises(ConfigError, match="no list of decoder layers of one class"):
        compilation.decoder_layers(torch.nn.Linear(2, 2))


def test_cuda_graphs_are_refused_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match="CUDA graphs, but the model is on cpu\n    → use compile=regional"):
        option("reduce_overhead")(llama())


def test_a_missing_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    for name in ("regional", "default", "max_autotune"):
        with pytest.raises(ConfigError, match="one of: no-such-compiler\n    → install one"):
            option(name)(llama())


def test_compilation_that_is_switched_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(ConfigError, match="switches compilation off\n    → unset the environment variable"):
        option("regional")(llama())


@pytest.mark.parametrize("name", OPTIONS)
def test_a_wrong_mode_is_refused(name: str) -> None:
    node = conftest.node("compile", name)
    assert not list(find_faults(node, "compile"))
    faults = list(find_faults({**node, "mode": "reduce_overhead"}, "compile"))
    assert [fault.key for fault in faults] == ["compile.mode"]
    assert name in ("auto", "none") or "did you mean 'reduce-overhead'?" in str(faults[0])


@pytest.mark.parametrize(
    "kept", ["speed", *(pytest.param(kept, marks=pytest.mark.slow) for kept in ("balanced", "min"))]
)
@pytest.mark.parametrize("quant", ["none", pytest.param("4bit", marks=pytest.mark.slow)])
@versions.by_document
def test_the_step_as_it_is_put_together_is_one_graph_a_layer(
    quant: str, kept: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused LoRA, attention by document, layers computed again, packed batches: no break, and nothing anew later."""
    monkeypatch.setattr(compilation, "regional", traced)
    options = (*TINY, "model.layers=3", f"quant={quant}", f"train.memory={kept}", "data.packing=true")
    cfg = composed(*options, "compile=regional", "compile.fullgraph=true", "train.max_steps=6", "train.eval_steps=2")
    made = inputs.inputs(Options(cfg))
    parts = build.parts(made, RunDir(tmp_path))
    assert varlen_attention.uses(parts.model)
    assert any(isinstance(module, lora_linear._Fused) for module in parts.model.modules())
    hooks = no_hooks()
    evaluation.evaluate(parts, 0, hooks)
    progress = Progress()
    loop.optimizer_step(parts, progress, hooks)
    warm = compilation.graphs()
    assert warm <= 3, "of evaluation, of the first layer, whose input has no gradient, and of all the others"
    for _ in range(4):
        loop.optimizer_step(parts, progress, hooks)
        evaluation.evaluate(parts, 0, hooks)
    assert (compilation.graphs(), compilation.graph_breaks()) == (warm, [])


@pytest.mark.parametrize("parts", [(), ((1, 8, 8), (2, 8, 4))])
def test_the_attention_of_a_gpu_is_no_break(parts: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced on tensors without content: Dynamo sees the code that runs on a GPU, forward and backward."""
    pytest.importorskip("torch.nn.attention.varlen")
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        assert varlen_attention._register()
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which does not know this device
    with torch.device("meta"):
        model = llama(2).to(torch.bfloat16)
        model.set_attn_implementation(varlen_attention.NAME)
        traced(model, mode=None, dynamic=None, fullgraph=True)
        ids, ends = torch.zeros(1, 16, dtype=torch.int64), torch.zeros(4, dtype=torch.int32)
        asked = {"input_ids": ids, "position_ids": ids, **varlen_attention.arguments(ends, 16, parts)}
        model(**asked, use_cache=False).logits.sum().backward()
    assert compilation.graphs() == 1
    assert compilation.graph_breaks() == []


@pytest.mark.slow
def test_ddp_does_not_cut_layers_that_are_compiled_one_by_one(tmp_path: Path) -> None:
    """Dynamo would cut each layer's graph where a bucket of DDP ends: here a bucket holds two of six matrices."""
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    store = f"file://{tmp_path}/store"
    done = subprocess.run([sys.executable, script, store], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["12", "12"], done.stderr


DDP = """
import sys, types, torch
from runner.models.kernels import compilation
torch.distributed.init_process_group("gloo", init_method=sys.argv[1], rank=0, world_size=1)

class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = torch.nn.ModuleList(torch.nn.Linear(512, 512, bias=False) for _ in range(6))

    def forward(self, x):
        for part in self.parts:
            x = torch.nn.functional.silu(part(x))
        return x

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.sum()

def backend(graph, example_inputs):
    print(sum(node.op == "call_function" for node in graph.graph.nodes))
    return graph.forward

model = Model()
compilation._check = lambda *_: None
compilation.decoder_layers = lambda model: [
    types.SimpleNamespace(compile=lambda layer=layer, **options: layer.compile(backend=backend, fullgraph=True))
    for layer in model.layers
]
compilation.regional(model, mode=None, dynamic=None, fullgraph=True)
wrapped = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=2)
wrapped(torch.randn(4, 512)).backward()
"""

GPU = torch.device("cuda", 0)


def settled(
    monkeypatch: pytest.MonkeyPatch,
    *overrides: str,
    seconds: float = 1e4,
    layers: int = 2,
    memory: Memory = "speed",
    **began: Any,
) -> compilation.Choice:
    """What compile=auto comes to on a GPU that has a compiler, for a training of so many seconds."""
    monkeypatch.setattr(compilation, "_check_compiler", lambda _: None)
    cfg = composed(*TINY, *overrides)
    made = inputs.inputs(Options(cfg))
    told = estimate.expect(made)
    monkeypatch.setattr(throughput, "peak_flops", lambda *_, **__: 1.0)
    flops = seconds * estimate.ASSUMED_UTILISATION / made.batches.tokens_at(made.total_steps)
    told = dataclasses.replace(told, layers=layers, flops_per_token=flops)
    monkeypatch.setattr(dtypes, "_is_fast_in_bfloat16", lambda _: True)
    made = dataclasses.replace(made, device=GPU, settings=dataclasses.replace(made.settings, memory=memory))
    found = build.resolve_compile(made, told, **began)
    monkeypatch.undo()
    return found


def test_auto_compiles_on_a_gpu_where_it_pays(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = settled(monkeypatch, seconds=compilation.PAYS_FROM_S + 1)
    assert (found.option.func, found.settled, found.reason) == (compilation.regional, "regional", "")
    found = settled(monkeypatch, seconds=compilation.PAYS_FROM_S - 1)
    assert (found.option.func, found.settled, found.reason) == (compilation.none, "none", "training is short")
    assert "train.memory=offload" in settled(monkeypatch, memory="offload").reason
    assert "8-bit" in settled(monkeypatch, "quant=8bit").reason
    assert settled(monkeypatch, "quant=4bit").settled == "regional"
    assert "no list of decoder layers of one class" in settled(monkeypatch, layers=0).reason
    asked_for = settled(monkeypatch, "compile=default", seconds=1)
    assert (asked_for.option.func, asked_for.settled) == (compilation.whole, "")


def test_options_that_record_cuda_graphs_are_known() -> None:
    assert {name for name in OPTIONS if compilation.records_graphs(option(name))} == {"reduce_overhead"}
    assert compilation.records_graphs(option("max_autotune", mode="max-autotune"))


def test_a_run_goes_on_compiled_as_it_began(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settled(monkeypatch, began="none").reason == "the run began without compilation"
    assert settled(monkeypatch, began="regional", seconds=1).settled == "regional"


def test_auto_without_a_compiler_computes_as_it_is(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "Triton" in compilation.obstacle(GPU, 2, graph_breaks="", in_shards=False)
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "no-such-compiler" in compilation.obstacle(GPU, 2, graph_breaks="", in_shards=False)


@pytest.mark.slow
def test_auto_is_no_other_run_wherever_it_is_settled(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The signature is that of ``auto``; what it came to stands in the manifest, and is what a resumed run does."""
    rundir = prepared(tmp_path / "cpu", *TINY, "train.max_steps=2")
    assert worker.work(rundir) == 0
    assert rundir.read_manifest()["compile"] == "none"
    assert rundir.read_manifest()["signature"] == manifest.signature(manifest.read_config(rundir))
    began = []

    def settle(made: Any, told: Any, began_as: Any = None, **named: Any) -> compilation.Choice:
        began.append(named.get("began", began_as))
        return compilation.Choice(conftest.option("compile", "regional"), "regional")

    monkeypatch.setattr(build, "resolve_compile", settle)
    monkeypatch.setattr(compilation, "regional", traced)
    compiled = prepared(tmp_path / "gpu", *TINY, "train.max_steps=2")
    assert worker.work(compiled) == 0
    assert compiled.read_manifest()["compile"] == "regional"
    assert compiled.read_manifest()["signature"] == rundir.read_manifest()["signature"]
    assert compiled.read_state().summary["compile/graph_breaks"] == 0
    compiled.write_state(status="killed")
    assert worker.work(compiled) == 0
    assert began == [None, "regional"]
