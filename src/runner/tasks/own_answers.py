"""On-policy distillation: in some steps the model learns on answers of its own (https://arxiv.org/abs/2306.13649)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from runner.data.batches import Batches
from runner.data.collator import Batch
from runner.data.packing import IGNORED
from runner.tasks import sampling
from runner.tasks.rollout import ends
from runner.tasks.sampling import Sampling
from runner.tasks.step_context import StepContext


@dataclass(frozen=True)
class OwnAnswers:
    """How often the model answers the prompts of a step itself, and how."""

    share: float
    """Of the steps; which ones depends on the seed alone."""
    most_tokens: int
    temperature: float

    def are_due(self, seed: int) -> bool:
        """Whether the model answers in the step with this seed."""
        return bool(np.random.PCG64([seed]).random_raw() * 2.0**-64 < self.share)

    def prepare(self, context: StepContext) -> list[Batch]:
        """The micro-batches with the model's own last answers; unchanged in an evaluation and in the other steps."""
        if not context.trains or not self.are_due(context.seed):
            return context.micro_batches
        rows, tokenizer = context.batches.rows, context.tokenizer
        how = Sampling(self.most_tokens, self.temperature, ends(context.model, tokenizer), tokenizer.pad_token_id)
        written = []
        with sampling.merged(context.model):
            for part in context.rows:
                context.agree()
                prompts = [rows[row][0][: last_answer(rows[row][1])].tolist() for row in part]
                chances = sampling.uniforms(context.seed, part, 1, self.most_tokens)
                answers = sampling.answers(context.model, prompts, chances, how)
                written.append(list(zip(prompts, answers, strict=True)))
        return [
            context.batch([_document(*pair) for pair in pairs], context.batches.longest_document) for pairs in written
        ]

    def inspect(self, training: Batches, evaluation: Batches, steps: int) -> list[tuple[str, str]]:  # noqa: ARG002
        """The line of ``plan``."""
        return [("own answers", f"in about {self.share:.0%} of the steps, of at most {self.most_tokens} tokens")]


def last_answer(labels: np.ndarray) -> int:
    """The position where the last answer begins: the last label that follows a token without one."""
    trained = np.asarray(labels) != IGNORED
    return int(np.flatnonzero(trained & ~np.concatenate([[False], trained[:-1]]))[-1])


def _document(prompt: list[int], answer: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([*prompt, *answer]), np.array([*[IGNORED] * len(prompt), *answer])
