"""Greedy and sampled continuations of several prompts."""

from __future__ import annotations

from pathlib import Path

import torch
from fixtures import two_models

from runner.train import text_generation

PROMPTS = ["What is the capital of France?", "Hi"]


def test_prompts_of_several_lengths_are_continued_as_alone(tmp_path: Path):
    policy, _, tokenizer = two_models.load(two_models.write(tmp_path / "model"))
    policy.train()
    side, calls = tokenizer.padding_side, []
    together = text_generation.generate(policy, tokenizer, PROMPTS, 6, progress=lambda *counts: calls.append(counts))
    assert together == [text_generation.generate(policy, tokenizer, [prompt], 6)[0] for prompt in PROMPTS]
    assert calls == [(number, 6) for number in range(1, 7)]
    assert policy.training
    assert tokenizer.padding_side == side
    assert text_generation.generate(policy, tokenizer, [], 6) == []


def test_sampled_texts_follow_torchs_random_state(tmp_path: Path):
    policy, _, tokenizer = two_models.load(two_models.write(tmp_path / "model"))

    def sampled(seed: int) -> list[str]:
        torch.manual_seed(seed)
        return text_generation.generate(policy, tokenizer, PROMPTS, 8, temperature=1.0)

    assert sampled(1) == sampled(1) != sampled(2)
