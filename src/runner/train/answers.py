"""Metrics of the answers that the model writes to held-out prompts at each evaluation: ``train.metrics``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from runner.config import eval_metrics
from runner.config.schema import TrainSettings
from runner.data.batches import Batches
from runner.data.packing import IGNORED
from runner.errors import ConfigError, Fault
from runner.tasks import code_tests, rollout, sampling
from runner.tasks.reward_functions import Rewards
from runner.tasks.sampling import Sampling
from runner.train.distributed.ranks import Ranks
from runner.train.distributed.wrap import Wrapped


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt."""

    ids: list[int]
    columns: dict[str, Any]
    """What the functions are given of the row: ``reference``, and with prompts as data its other columns."""


@dataclass(frozen=True)
class Metric:
    """A number of an evaluation."""

    name: str
    function: int
    """The number of its function."""
    k: int | None
    """Of ``pass_at_K``; None: the mean score of all answers."""

    def of(self, scores: np.ndarray, samples: int) -> np.ndarray:
        """The numbers to average, NaN where there is none; ``scores``: (prompts * samples, functions)."""
        column = scores[:, self.function]
        return column if self.k is None else code_tests.pass_at_k(column.reshape(-1, samples), self.k)


@dataclass(frozen=True)
class Questions:
    """The held-out prompts, and the functions that score the answers to them."""

    prompts: list[Prompt]
    functions: Rewards
    most_tokens: int
    at_a_time: int
    """Prompts of a batch."""
    metrics: tuple[Metric, ...] = ()
    samples: int = 1
    """Answers to each prompt; 1: the most likely tokens."""
    temperature: float = 1.0
    seed: int = 0

    def rounds(self, ranks: Ranks) -> int:
        """How many batches each rank answers: equally many, as the ranks of a sharded model need each other."""
        of_rank = -(-len(self.prompts) // ranks.world)
        return -(-of_rank // self.at_a_time)

    def scored(self, prompts: Sequence[Prompt], answers: Sequence[list[int]], tokenizer: Any) -> tuple[list[str], Any]:
        """(texts of the answers, scores (answers, functions))."""
        texts = [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
        if not prompts:
            return texts, np.zeros((0, len(self.functions.references)))
        names = dict.fromkeys(name for prompt in self.prompts for name in prompt.columns)  # the same on all ranks
        columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
        shown = [tokenizer.decode(prompt.ids) for prompt in prompts]
        return texts, self.functions.of(shown, texts, list(map(list, answers)), columns)


def questions(settings: TrainSettings, code: Sequence[str], evaluation: Batches, tokenizer: Any) -> Questions:
    """The first ``train.metric_rows`` held-out prompts.

    Raises:
        ConfigError, DataError: no row has a prompt, or a function does not score the references.
    """
    listed = [eval_metrics.function_of(name) for name in settings.metrics]
    references = list(dict.fromkeys(listed))  # several pass_at_K test each answer once
    functions = Rewards(
        references, tuple(code), [1.0] * len(references), settings.metric_timeout_s, eval_metrics.METRICS,
        "train.metric_timeout_s",
    )  # fmt: skip
    prompts = _prompts(evaluation, tokenizer, settings.metric_rows) if references else []
    if references and not prompts:
        problem = "no held-out row has a prompt with an answer after it"
        raise ConfigError(Fault(eval_metrics.METRICS, problem, "set it to []", settings.metrics))
    named = zip(settings.metrics, listed, strict=True)
    metrics = (
        Metric(eval_metrics.name_of(name), references.index(each), eval_metrics.pass_at(name)) for name, each in named
    )
    samples = settings.metric_samples
    return Questions(
        prompts, functions, settings.metric_tokens, max(1, settings.rows_at_a_time // samples), tuple(metrics),
        samples, settings.metric_temperature, evaluation.order.seed,
    )  # fmt: skip


def note(questions: Questions, tokenizer: Any) -> list[tuple[str, str]]:
    """What the functions give for the reference answer to the first prompt, for ``plan``: each is called once.

    The answer is given twice: a function that returns one number for all answers is refused here.
    """
    if not questions.prompts:
        return []
    first = questions.prompts[0]
    reference = tokenizer(str(first.columns["reference"] or ""), add_special_tokens=False)["input_ids"]
    _, scores = questions.scored([first] * 2, [reference] * 2, tokenizer)
    named = zip(questions.functions.names, scores[0], strict=True)
    listed = ", ".join(f"{name} {value:g}" for name, value in named)
    return [("metrics", f"{listed} for the reference answer to the first of {len(questions.prompts)} prompts")]


def _prompts(evaluation: Batches, tokenizer: Any, count: int) -> list[Prompt]:
    """The tokens before the first trained one of each unit of rows, and the text of the answer that begins there.

    An answer that may be cut at ``data.max_length`` is no reference: its row is left out.
    """
    rows, prompts = evaluation.rows, list[Prompt]()
    for row in range(0, len(rows), rows.unit):
        ids, labels = rows[row]
        trained = np.flatnonzero(labels != IGNORED)
        if rows.records is not None:
            record = json.loads(rows.records[row])
            prompts.append(Prompt(ids.tolist(), {**record["columns"], "reference": record["answer"]}))
        elif len(trained) and trained[0] > 0:
            gaps = np.flatnonzero(np.diff(trained) > 1)
            end = trained[gaps[0]] if len(gaps) else trained[-1]
            if end == evaluation.max_length - 1:
                continue
            text = tokenizer.decode(ids[trained[0] : end + 1].tolist(), skip_special_tokens=True).strip()
            prompts.append(Prompt(ids[: trained[0]].tolist(), {"reference": text}))
        if len(prompts) == count:
            break
    return prompts


@dataclass(frozen=True)
class Answering:
    """Answers the prompts with the model as it is, on all ranks."""

    questions: Questions
    model: Any
    tokenizer: Any
    wrapped: Wrapped
    ranks: Ranks
    show: Callable[[int, list[dict[str, Any]]], None]
    """(step, table) → None."""

    @property
    def rounds(self) -> int:
        return self.questions.rounds(self.ranks)

    @torch.no_grad()
    def metrics(self, step: int, before: Callable[[int], None]) -> dict[str, float]:
        """Each metric, of the answers that its function scores; ``before`` each batch with its number."""
        if not self.rounds:
            return {}
        asked, count = self.questions, self.questions.samples
        own, size = asked.prompts[self.ranks.rank :: self.ranks.world], asked.at_a_time
        places = list(range(self.ranks.rank, len(asked.prompts), self.ranks.world))
        ends = rollout.ends(self.model, self.tokenizer)
        how = Sampling(asked.most_tokens, asked.temperature, ends, self.tokenizer.pad_token_id)
        self.model.eval()
        answers = list[list[int]]()
        with sampling.merged(self.model), self.wrapped.autocasting():
            for number in range(self.rounds):
                before(number)
                part = slice(number * size, (number + 1) * size)
                chances = sampling.uniforms(asked.seed, places[part], count, how.most_tokens) if count > 1 else None
                answers += sampling.answers(self.model, [prompt.ids for prompt in own[part]], chances, how, count)
        texts, scores = asked.scored([prompt for prompt in own for _ in range(count)], answers, self.tokenizer)
        shown = zip(own[: rollout.SHOWN], texts[::count], scores[::count], strict=False)
        self.show(step, [self._sample(*each) for each in shown])
        values = [metric.of(scores, count) for metric in asked.metrics]
        sums = [*map(np.nansum, values), *((~np.isnan(each)).sum() for each in values)]
        totals = self.ranks.agree(lambda: None, *map(float, sums))
        pairs = zip(asked.metrics, totals[: len(values)], totals[len(values) :], strict=True)
        return {metric.name: total / found for metric, total, found in pairs if found}

    def _sample(self, prompt: Prompt, text: str, scores: np.ndarray) -> dict[str, Any]:
        named = zip(self.questions.functions.names, scores, strict=True)
        shown = {name: None if np.isnan(score) else float(score) for name, score in named}
        reference = prompt.columns["reference"]
        return {"prompt": self.tokenizer.decode(prompt.ids), "reference": reference, "answer": text, **shown}
