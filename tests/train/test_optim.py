"""Optimizers: against torch's own, against the formula, and against themselves after a save in the middle."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import conftest
import pytest
import torch
from fixtures import versions
from torch import nn

from runner.config.bind import find_faults
from runner.errors import ConfigError
from runner.train import optim

CONF = Path(__file__).parents[2] / "conf" / "optim"
ON_CPU = ["adamw", "adamw_8bit", "lion", "muon", "adafactor", "schedule_free", "galore", "apollo", "torch"]
LOW_RANK = {"galore": {"rank": 8, "update_proj_gap": 2}, "apollo": {"rank": 8, "update_proj_gap": 2}}


def option(name: str, /, **changes: Any) -> Any:
    """The option, whose rank is below the sizes of ``tiny``."""
    return conftest.option("optim", name, **{**LOW_RANK.get(name, {}), **changes})


def tiny() -> nn.Module:
    """Embedding 2048 values, matrix 8192 (over bitsandbytes' 4096), norm, head 2048: one of each kind."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(32, 64), nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 16, bias=False))


def step(model: nn.Module, optimizer: Any, seed: int, then: Any = None) -> None:
    ids = torch.randint(0, 32, (8,), generator=torch.Generator().manual_seed(seed))
    nn.functional.cross_entropy(model(ids), ids % 16).backward()
    optimizer.step()
    if then:
        then.step()
    model.zero_grad()


def trained(build, seeds: range) -> nn.Module:
    model = tiny()
    optimizer = build(optim.parameter_groups(model, 0.1))
    for seed in seeds:
        step(model, optimizer, seed)
    return model


def assert_same(one: nn.Module, other: nn.Module, tolerance: float = 0.0) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ON_CPU)
def test_resumes_bit_for_bit(name: str) -> None:
    assert_resumes(option(name))


def assert_resumes(build) -> None:
    whole = trained(build, range(6))
    half = tiny()
    first = build(optim.parameter_groups(half, 0.1))
    for seed in range(3):
        step(half, first, seed)
    file = io.BytesIO()
    torch.save({"model": half.state_dict(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = tiny()
    again.load_state_dict(saved["model"])
    second = build(optim.parameter_groups(again, 0.1))
    second.load_state_dict(saved["optimizer"])
    for seed in range(3, 6):
        step(again, second, seed)
    assert_same(whole, again)


@pytest.mark.parametrize("name", ON_CPU)
def test_the_learning_rate_in_the_groups_is_obeyed(name: str) -> None:
    model = tiny()
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = option(name)(optim.parameter_groups(model, 0.1))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    step(model, optimizer, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("fused", ["auto", True, False])
def test_adamw_is_torchs_own(fused: object) -> None:
    ours = trained(option("adamw", fused=fused, learning_rate=1e-2), range(5))
    theirs = tiny()
    decayed = [p for p in theirs.parameters() if p.ndim >= 2]
    rest = [p for p in theirs.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=False)
    for seed in range(5):
        step(theirs, optimizer, seed)
    assert_same(ours, theirs, 1e-6)


def test_adafactor_is_that_of_transformers() -> None:
    from transformers.optimization import Adafactor

    theirs = tiny()
    decayed, rest = ([p for p in theirs.parameters() if (p.ndim >= 2) is wide] for wide in (True, False))
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = Adafactor(groups, lr=1e-2, relative_step=False, scale_parameter=True)
    for seed in range(4):
        step(theirs, optimizer, seed)
    assert_same(trained(option("adafactor", learning_rate=1e-2, scale_parameter=True), range(4)), theirs)


def test_8bit_adamw_follows_adamw() -> None:
    """Quantized moments: the weights stay within a few per cent of what AdamW moved them."""
    exact, rough, start = trained(option("adamw"), range(5)), trained(option("adamw_8bit"), range(5)), tiny()
    for a, b, origin in zip(exact.parameters(), rough.parameters(), start.parameters(), strict=True):
        assert (a - b).norm() < 0.1 * (a - origin).norm()


def test_8bit_adamw_keeps_its_state_in_8_bits() -> None:
    model = tiny()
    optimizer = option("adamw_8bit")(optim.parameter_groups(model, 0.1))
    step(model, optimizer, 0)
    assert optimizer.state[model[1].weight]["state1"].dtype == torch.uint8
    assert optimizer.state[model[2].weight]["state1"].dtype == torch.float32, "under 4096 values"


def test_lion_is_the_formula() -> None:
    model = tiny()
    start = model[1].weight.detach().clone()
    optimizer = option("lion", bits=32, learning_rate=1e-2)(optim.parameter_groups(model, 0.1))
    step(model, optimizer, 0)
    gradient = tiny()
    ids = torch.randint(0, 32, (8,), generator=torch.Generator().manual_seed(0))
    nn.functional.cross_entropy(gradient(ids), ids % 16).backward()
    expected = start * (1 - 1e-2 * 0.1) - 1e-2 * gradient[1].weight.grad.sign()
    torch.testing.assert_close(model[1].weight.detach(), expected)


@versions.muon
def test_muon_is_torchs_muon_and_torchs_adamw_side_by_side() -> None:
    theirs = tiny()
    embedding, matrix, norm, head = theirs
    muon = torch.optim.Muon(
        [matrix.weight, head.weight], lr=2e-4, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    groups = [{"params": [embedding.weight], "weight_decay": 0.1}]
    groups.append({"params": [matrix.bias, *norm.parameters()], "weight_decay": 0.0})
    adamw = torch.optim.AdamW(groups, lr=2e-4, fused=True)
    for seed in range(4):
        step(theirs, adamw, seed, then=muon)
    assert_same(trained(option("muon", learning_rate=2e-4), range(4)), theirs)


def test_muon_is_one_optimizer() -> None:
    model = tiny()
    optimizer = option("muon")(optim.parameter_groups(model, 0.1))
    step(model, optimizer, 0)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert [group["kind"] for group in optimizer.param_groups] == ["matrix", "embedding", "vector"]
    assert len(optimizer.state) == len(list(model.parameters()))


def test_muon_refuses_experts_in_one_tensor() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(4, 8, 8))], "weight_decay": 0.0, "kind": "matrix"}]
    with pytest.raises(ConfigError, match=r"\(experts, convolutions\) have 3 dimensions\n    → use optim=adamw"):
        option("muon")(groups)


def test_muon_without_matrices_is_refused() -> None:
    model = nn.LayerNorm(8)
    with pytest.raises(ConfigError, match="optim=adamw"):
        option("muon")(optim.parameter_groups(model, 0.0))


def test_paging_needs_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r"optim\.paged=True: needs a CUDA GPU"):
        option("paged_adamw_8bit")(optim.parameter_groups(tiny(), 0.1))


def test_groups_of_a_model_with_lora_and_a_tied_head() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=True, **sizes))
    matrices, embeddings, vectors = optim.parameter_groups(model, 0.1)
    assert [group["weight_decay"] for group in (matrices, embeddings, vectors)] == [0.1, 0.1, 0.0]
    assert [tuple(p.shape) for p in embeddings["params"]] == [(64, 32)], "the tied head is counted once"
    assert len(vectors["params"]) == 5, "two norms a layer and the last"
    tuned = get_peft_model(model, LoraConfig(r=1, target_modules=["q_proj"]))
    [group] = optim.parameter_groups(tuned, 0.1)
    assert group["kind"] == "matrix"
    assert len(group["params"]) == 4


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="the model has no trainable parameter"):
        optim.parameter_groups(tiny().requires_grad_(False), 0.1)


@pytest.mark.parametrize(
    ("name", "changes", "key", "said"),
    [
        ("adamw", {"learning_rate": 0}, "learning_rate", "> 0"),
        ("adamw", {"lr": 1e-3}, "lr", "learning_rate"),
        ("adamw", {"betas": [0.9]}, "betas", "of length 2"),
        ("adamw", {"betas": [0.9, 1.0]}, "betas", "a list (each: a finite number >= 0 and < 1)"),
        ("adamw", {"fused": "yes"}, "fused", "one of auto or true or false"),
        ("adamw_8bit", {"bits": 4}, "bits", "one of 8, 32"),
        ("muon", {"momentum": 0}, "nesterov", "without momentum"),
        ("adafactor", {"decay_rate": 0.8}, "decay_rate", "< 0"),
        ("schedule_free", {"betas": [0.0, 0.99]}, "betas", "must be above 0"),
        ("torch", {"name": "adagrad"}, "name", "did you mean 'Adagrad'?"),
        ("torch", {"name": "LBFGS"}, "name", "several times per step"),
        ("torch", {"name": "SparseAdam"}, "name", "sparse gradients"),
        pytest.param("torch", {"name": "Muon"}, "name", "optim=muon", marks=versions.muon),
        ("torch", {"name": "Adagrad", "lr_decy": 0.1}, "lr_decy", "did you mean 'lr_decay'?"),
        ("torch", {"name": "Adagrad", "lr": 0.1}, "lr", "set optim.learning_rate"),
        ("torch", {"name": "SGD", "momentum": "high"}, "momentum", "must be a finite number"),
        pytest.param(
            "torch",
            {"name": "SGD", "nesterov": 1},
            "nesterov",
            "must be true or false",
            marks=versions.typed_optimizers,
        ),
        ("torch", {"name": "Rprop", "weight_decay": 0.1}, "weight_decay", "set optim.weight_decay=0"),
    ],
)
def test_faults_are_refused(name: str, changes: dict, key: str, said: str) -> None:
    [fault] = find_faults(conftest.node("optim", name, **changes), "optim")
    assert fault.key == f"optim.{key}"
    assert said in str(fault)


@pytest.mark.parametrize("name", ["adamw_8bit", "schedule_free", "galore", "apollo"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(name: str, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    [fault] = find_faults(conftest.node("optim", name), "optim")
    package = {"adamw_8bit": "bitsandbytes", "schedule_free": "schedulefree"}.get(name, f"{name}-torch")
    assert str(fault) == (
        f"optim: this optimizer needs {package}, which is not installed\n"
        f"    → uv pip install {package}, or use optim=adamw"
    )


def test_checking_an_option_loads_no_torch() -> None:
    script = (
        "import sys, yaml, pathlib; from runner.config.bind import bind\n"
        f"for path in pathlib.Path({str(CONF)!r}).glob('*.yaml'): bind(yaml.safe_load(path.read_text()))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_head_learns_faster_than_the_rest_of_its_group() -> None:
    model: Any = torch.nn.ModuleDict({"body": torch.nn.Linear(2, 3), "score": torch.nn.Linear(3, 1)})
    model.head_names = ["score"]
    matrices, biases = ([getattr(layer, name) for layer in model.values()] for name in ("weight", "bias"))
    groups = [{"params": matrices, "kind": "matrix"}, {"params": biases, "lr": 0.5}, {"params": [], "lr": 1.0}]
    found = optim.with_faster_head(groups, model, 0.1, 4)
    assert [(group["lr"], len(group["params"])) for group in found] == [(0.1, 1), (0.4, 1), (0.5, 1), (2.0, 1)]
    assert found[1]["params"] == matrices[1:]
    assert [group.get("kind") for group in found] == ["matrix", "matrix", None, None]
