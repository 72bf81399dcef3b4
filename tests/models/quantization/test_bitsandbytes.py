"""Quantized bases: what is stored in how many bits, that adapters really train on them, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import option

from runner.errors import ConfigError
from runner.models import architecture, dtypes, parameters, pretrained, tokenizer_files
from runner.models.quantization import bitsandbytes, none
from runner.models.sources import ModelSource

NAMES = {"8bit": "int8", "4bit": "nf4", "fp4": "fp4"}
QUANTIZED = tuple(NAMES)


@pytest.fixture(scope="module")
def source(cache: Path) -> ModelSource:
    return architecture.resolve(option("model", "tiny")())


def batch(rows: int = 2, length: int = 32) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 255, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def train(model: Any, inputs: dict[str, torch.Tensor], steps: int, learning_rate: float) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    losses = []
    for _ in range(steps):
        model.train()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", QUANTIZED)
def test_linear_layers_are_stored_in_few_bits_and_the_head_is_not(source: ModelSource, name: str) -> None:
    import bitsandbytes as bnb

    plain = pretrained.load(source, none.none(), "cpu")
    model = pretrained.load(source, option("quant", name)(), "cpu")
    expected = bnb.nn.Linear8bitLt if name == "8bit" else bnb.nn.Linear4bit
    linear = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert len(linear) == 14
    assert all(isinstance(module, expected) for module in linear)
    assert type(model.lm_head) is torch.nn.Linear
    counts, before = parameters.describe(model), parameters.describe(plain)
    assert counts["total"] == before["total"]
    assert counts["quantized"] == before["linear"] == counts["linear"]
    assert (counts["stored"], before["stored"]) == (f"{NAMES[name]} (bitsandbytes)", "float32")


@pytest.mark.parametrize("name", ["none", *QUANTIZED])
def test_an_empty_model_counts_like_the_real_one(source: ModelSource, name: str) -> None:
    chosen = option("quant", name)()
    model = pretrained.load(source, chosen, "cpu")
    stored = [
        tensor
        for key, tensor in model.state_dict().items()
        if "_proj." in key and key.endswith(("weight", "absmax", "SCB"))
    ]
    real = parameters.describe(option("lora", "lora")(model))
    assert parameters.describe(option("lora", "lora")(pretrained.empty(source, chosen))) == real
    assert real["adapted"] == real["linear"]
    if name != "none":
        assert real["quantized_bytes"] == pytest.approx(sum(tensor.nbytes for tensor in stored), rel=0.03)


@pytest.mark.parametrize("adapter", ["lora", "dora", "rslora"])
@pytest.mark.parametrize("name", ["none", *QUANTIZED])
def test_adapters_train_on_it(source: ModelSource, name: str, adapter: str) -> None:
    torch.manual_seed(0)
    model = option("lora", adapter)(pretrained.load(source, option("quant", name)(), "cpu"))
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = train(model, batch(), steps=6, learning_rate=1e-2)
    assert losses[-1] < losses[0] - 0.2
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if not p.requires_grad)
    model(**batch()).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_loss_is_near_that_of_the_whole_weights(source: ModelSource, name: str) -> None:
    with torch.no_grad():
        whole = pretrained.load(source, none.none(), "cpu").eval()(**batch()).loss
        stored = pretrained.load(source, option("quant", name)(), "cpu").eval()(**batch()).loss
    assert stored == pytest.approx(whole.item(), rel=0.02)
    assert stored != whole


@pytest.mark.parametrize("name", QUANTIZED)
def test_an_evaluation_does_not_change_the_gradients_that_follow(source: ModelSource, name: str) -> None:
    """On some CPUs bitsandbytes repacks 4-bit weights at the first evaluation, for a kernel without a backward."""

    def gradients(evaluate_first: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = option("lora", "lora")(pretrained.load(source, option("quant", name)(), "cpu"))
        if evaluate_first:
            with torch.no_grad():
                model.eval()(**batch())
        model.train()(**batch()).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, after = gradients(False), gradients(True)
    assert all(torch.equal(plain[n], after[n]) for n in plain)
    assert sum(float(g.abs().sum()) for g in after.values()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["8bit", "4bit"])
def test_smollm2_learns_on_it(cache: Path, name: str) -> None:
    """Without quantization: tests/train/test_golden.py; fp4 differs from 4bit by a table of sixteen numbers."""
    source = architecture.resolve(option("model", "smollm2")())
    tokenizer = tokenizer_files.load(source)
    talk = [{"role": "user", "content": "Who keeps the light?"}, {"role": "assistant", "content": "Old Maren, now."}]
    text = tokenizer.apply_chat_template(talk, tokenize=False)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    torch.manual_seed(0)
    model = option("lora", "lora")(pretrained.load(source, option("quant", name)(), "cpu"))
    losses = train(model, {"input_ids": ids, "labels": ids}, steps=6, learning_rate=1e-3)
    assert losses[0] < 7  # a random model: ln 49152 = 10.8
    assert losses[-1] < 0.75 * losses[0]
    with torch.no_grad():
        assert model.eval()(input_ids=ids, labels=ids).loss < losses[0]


def test_bytes_per_weight() -> None:
    """4 bits with double quantization: 4.127 bits a weight, https://arxiv.org/abs/2305.14314, section 3."""
    weights = 512 * 512
    assert option("quant", "8bit")().bytes_of(512, 512) == weights + 4 * 512
    assert option("quant", "4bit")().bytes_of(512, 512) / weights == pytest.approx((4 + 0.127) / 8, abs=1e-3)
    assert option("quant", "fp4")().bytes_of(512, 512) / weights == pytest.approx(4.5 / 8)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("4bit", {"kind": "nf5"}, "did you mean 'nf4'?"),
        ("4bit", {"double": "yes"}, "true or false"),
        ("4bit", {"compute_dtype": "float16"}, "use compute_dtype=bfloat16"),
        ("4bit", {"compute_dtyp": "auto"}, "did you mean 'compute_dtype'?"),
        ("8bit", {"load_in_8bit": True}, "quant=8bit"),
    ],
)
def test_bad_values_are_refused_before_anything_is_loaded(name: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        option("quant", name, **changes)
    assert said in str(refused.value)


def test_without_bitsandbytes_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name, _package=None: None)
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        option("quant", "4bit")


def test_a_gpu_with_bfloat16_computes_in_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtypes, "_is_fast_in_bfloat16", lambda _device: True)
    slow = bitsandbytes.four_bit(kind="nf4", double=True, compute_dtype="float32")
    with pytest.raises(ConfigError, match="computes 4-bit layers in bfloat16"):
        slow.library_config("cuda")
    assert option("quant", "4bit")().library_config("cuda").bnb_4bit_compute_dtype == torch.bfloat16


def test_binding_imports_no_heavy_library() -> None:
    code = (
        "import contextlib, sys, yaml; from runner.config import bind; from runner.errors import ConfigError\n"
        "d = bind.config_dir()\n"
        "for path in [*d.glob('quant/*.yaml'), *d.glob('model/*.yaml'), *d.glob('lora/*.yaml')]:\n"
        "    node = yaml.safe_load(path.read_text())\n"
        "    if path.stem not in ('local', 'peft') and 'defaults' not in node:\n"
        "        with contextlib.suppress(ConfigError):  # it needs a later version\n"
        "            bind.bind(node)() if path.parent.name != 'lora' else bind.bind(node)\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'bitsandbytes', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_is_loaded_for_another_device_is_quantized_there(source: ModelSource, monkeypatch: pytest.MonkeyPatch):
    """Here the other device is the CPU, too: the weights come back as they would be without it."""
    import bitsandbytes as bnb

    quant, original, devices = option("quant", "4bit")(), bnb.nn.Params4bit._quantize, list[Any]()

    def watched(weight: Any, device: Any) -> Any:
        devices.append(device)
        return original(weight, device)

    monkeypatch.setattr(bnb.nn.Params4bit, "_quantize", watched)
    with quant.loading_for(torch.device("cpu", 0)) as settled:
        model = pretrained.load(source, settled, "cpu")
    assert devices == [torch.device("cpu", 0)] * 14
    assert bnb.nn.Params4bit._quantize is watched
    assert settled.compute_dtype == str(dtypes.dtype_for("auto", "cpu")).removeprefix("torch.")
    expected = dict(pretrained.load(source, quant, "cpu").named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name])
        assert parameter.device == torch.device("cpu")
