"""PEFT's methods and options, checked against PEFT itself before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import TINY, composed, no_hooks, prepared
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from runner.errors import ConfigError
from runner.models import peft_options, pretrained
from runner.tracking import manifest
from runner.train import build, estimate, inputs, loop, text_generation
from runner.train.checkpoint import Progress
from runner.train.options import Options


def faults(method: str, **options: Any) -> list[str]:
    return [str(fault) for fault in peft_options.faults(method, options)]


def test_every_method_of_peft_is_supported_or_refused_with_a_reason() -> None:
    everything = {str(getattr(kind, "value", kind)).lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    supported = set(peft_options.methods())
    assert {"lora", "ia3", "vera", "oft"} <= supported <= everything
    for method in everything - supported:
        (fault,) = faults(method)
        assert fault.startswith(f"method={method}: is not supported: ")
        assert "use one of " in fault


@pytest.mark.parametrize(
    ("method", "options", "text"),
    [
        ("loraa", {}, "PEFT has no such method"),
        ("ia3", {"rank": 3}, "rank=3: no such key"),
        ("lora", {"task_type": "CAUSAL_LM"}, "task_type=CAUSAL_LM: is set by the runner"),
        ("lora", {"loftq_config": {}}, "is not supported by this train loop"),
        ("lora", {"init_lora_weights": "eva"}, "it needs passes over the data before training"),
        ("lora", {"init_lora_weights": "loftq"}, "without the scale of the adapter"),
        ("lora", {"r": "many"}, "r=many: must be a whole number"),
    ],
)
def test_a_wrong_option_is_one_message(method: str, options: dict[str, Any], text: str) -> None:
    (fault,) = faults(method, **options)
    assert text in fault


@pytest.mark.parametrize("method", peft_options.PROMPTS)
def test_virtual_tokens_are_trained_with_the_loss_of_peft_and_read_back(
    method: str, cache: Path, tmp_path: Path
) -> None:
    options = ("lora=peft", f"lora.method={method}", "+lora.num_virtual_tokens=4", "data.packing=false")
    rundir = prepared(tmp_path, *TINY, *options, "optim.learning_rate=3e-2", "train.max_steps=4")
    given = inputs.inputs(Options(manifest.read_config(rundir)))
    expected = estimate.expect(given)
    assert not expected.unknown
    assert expected.counts["trainable"] == expected.counts["adapter"]
    parts = build.parts(given, rundir)
    (batch,) = parts.batches.step(0)
    labels = torch.nn.functional.pad(batch["labels"][:, :-1], (1, 0), value=-100)  # not shifted yet
    sums = parts.wrapped.forward(batch)
    own = parts.model(input_ids=batch["input_ids"], labels=labels).loss
    torch.testing.assert_close(sums["loss"] / sums["count"], own, atol=1e-5, rtol=1e-5)

    before = {name: p.detach().clone() for name, p in parts.model.named_parameters() if p.requires_grad}
    loop.train(parts, Progress(), no_hooks())
    assert all(not torch.equal(p, before[name]) for name, p in parts.model.named_parameters() if p.requires_grad)
    pretrained.save(parts.model, given.tokenizer, tmp_path / "model")
    base = transformers.AutoModelForCausalLM.from_pretrained(given.source.path)
    read = PeftModel.from_pretrained(base, tmp_path / "model").eval()
    ids = batch["input_ids"]
    torch.testing.assert_close(read(input_ids=ids).logits, parts.model.eval()(input_ids=ids).logits)
    assert text_generation.generate(read, given.tokenizer, ["Hi", "Hello you"], 3) == text_generation.generate(
        parts.model, given.tokenizer, ["Hi", "Hello you"], 3
    )


@pytest.mark.parametrize(
    ("method", "words", "said"),
    [
        ("prompt_tuning", (), "data.packing=True: lora.method=prompt_tuning puts virtual tokens before each row"),
        ("p_tuning", ("data.packing=false", "task=reward", "data=chitchat_pairs"), "does not work with task=reward"),
        ("prefix_tuning", ("data.packing=false", "train.memory=min"), "train.memory=min: cannot compute layers again"),
        ("prompt_tuning", ("data.packing=false", "quant=4bit"), "does not work on weights in nf4"),
    ],
)
def test_what_virtual_tokens_cannot_do_is_refused(method: str, words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        composed(*TINY, *words, "lora=peft", f"lora.method={method}", "+lora.num_virtual_tokens=4")
    assert said in str(refused.value)


def test_the_case_of_a_method_does_not_matter() -> None:
    assert faults("LoRA", r=8, target_modules=["q_proj"]) == []
    assert peft_options.config_class("LoRA") is peft_options.config_class("lora")
