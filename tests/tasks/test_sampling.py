"""Answers that depend on their prompt and their seed alone, with merged weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fixtures import two_models, versions
from fixtures.two_models import QUESTIONS

from runner.tasks import sampling


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, torch.nn.Module, Any]:
    return two_models.load(two_models.write(tmp_path_factory.mktemp("model") / "model"))


def test_an_answer_depends_on_its_prompt_and_its_seed_alone(models: Any) -> None:
    policy, _, tokenizer = models
    how = sampling.Sampling(12, 0.9, [tokenizer.eos_token_id], tokenizer.pad_token_id)
    prompts = [tokenizer(question)["input_ids"] for question, _, _ in QUESTIONS]
    chances = sampling.uniforms(5, [0, 1, 2, 3], 1, 12)
    with torch.no_grad():
        together = sampling.answers(policy, prompts, chances, how)
        alone = [sampling.answers(policy, [p], chances[n : n + 1], how)[0] for n, p in enumerate(prompts)]
        greedy = sampling.answers(policy, prompts[:1], None, how)[0]
        logits = policy(torch.tensor([prompts[0]])).logits[0, -1]
    assert together == alone
    assert len({tuple(answer) for answer in together}) == 4
    assert greedy[0] == int(logits.argmax())


@versions.begun_cache
def test_answers_to_a_prompt_that_is_computed_once_are_those_to_its_copies(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, _, tokenizer = models
    how = sampling.Sampling(12, 1.0, [tokenizer.eos_token_id], tokenizer.pad_token_id)
    prompts = [tokenizer(question)["input_ids"] for question, _, _ in QUESTIONS]
    chances = sampling.uniforms(3, [0, 1, 2, 3], 3, 12)
    rows: list[int] = []
    count = policy.register_forward_pre_hook(
        lambda _module, _args, given: rows.append(given["input_ids"].numel()), with_kwargs=True
    )
    with torch.no_grad(), count:
        shared = sampling.answers(policy, prompts, chances, how, 3)
        assert rows[:2] == [4 * (max(map(len, prompts)) - 1), 12], "the prompts once, then the last token of each copy"
        copies = sampling.answers(policy, [each for each in prompts for _ in range(3)], chances, how)
        monkeypatch.setattr(sampling, "KEYS_AND_VALUES", ())
        assert sampling.answers(policy, prompts, chances, how, 3) == copies
    assert shared == copies
    assert len({tuple(answer) for answer in shared}) == 12


def test_tokens_are_drawn_from_the_distribution() -> None:
    """The share of each token is its probability, within three standard deviations."""
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0])
    count = 20000
    chances = torch.from_numpy(sampling.uniforms(1, list(range(count)), 1, 1))
    choose = sampling._choose(chances, 3, 0.5)
    chosen = choose(torch.zeros(count, 3, dtype=torch.long), logits.repeat(count, 1)).argmax(-1)
    shares = torch.bincount(chosen, minlength=4) / count
    expected = (logits / 0.5).softmax(-1)
    assert ((shares - expected).abs() < 3 * (expected * (1 - expected) / count).sqrt()).all()


def test_merged_weights_compute_the_same_and_come_back_bit_for_bit(models: Any) -> None:
    from peft import LoraConfig, get_peft_model

    from runner.models.kernels import lora_linear

    base = two_models.load_one(models[0])
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    lora_linear.fuse(model)
    ids = torch.arange(40)[None]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(ids).logits
        with sampling.merged(model):
            layer = next(module for module in model.modules() if getattr(module, "merged_adapters", None))
            assert layer.merged
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(model(ids).logits, expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    sampling.merge(model)
    assert layer.merged
    assert not torch.equal(layer.base_layer.weight, before[f"{name_of(model, layer)}.base_layer.weight"])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


def name_of(model: torch.nn.Module, module: torch.nn.Module) -> str:
    return next(name for name, each in model.named_modules() if each is module)


@pytest.mark.parametrize(
    ("own", "stop", "expected"),
    [(2, 7, [2, 7]), ([2, 7], 7, [2, 7]), (None, 7, [7]), ([2], None, [2]), (None, None, [])],
)
def test_the_tokens_of_the_model_and_the_end_of_a_turn_end_an_answer(own: Any, stop: Any, expected: list[int]) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=own))
    assert sampling.end_tokens(model, stop) == expected
