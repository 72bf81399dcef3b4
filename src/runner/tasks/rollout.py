"""Rollouts: the model answers the prompts of a step, reward functions score the answers, a group is compared."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from runner.data.collator import Batch
from runner.data.packing import IGNORED
from runner.data.texts import Texts
from runner.tasks import sampling
from runner.tasks.logit_losses import Shaping
from runner.tasks.reward_functions import Rewards
from runner.tasks.sampling import Sampling
from runner.tasks.step_context import StepContext
from runner.tasks.task import Measures, token_losses

Scale = Literal["group", "batch", "none"]
STATISTICS = "statistics"
"""The name of the sums for metrics in a batch."""
SHOWN = 8
"""Answers of an evaluation that are kept for people to read."""
LENGTHS = tuple(f"completions/{name}" for name in ("mean_length", "min_length", "max_length", "clipped_ratio"))
METRICS = ("reward", "reward_std", "frac_reward_zero_std", *LENGTHS, "entropy")
OF_ANSWERS: Measures = {"loss": "minimize", "reward": "maximize", **dict.fromkeys(LENGTHS)}
"""Of an evaluation, where each prompt has one answer."""
MAXIMA = ("longest", "shortest_negative")
"""The sums that are maxima: of the tokens of an answer, and of these negated."""
SMALL = 1e-4
"""Added to a standard deviation before dividing by it, as in TRL."""
log = logging.getLogger("runner")


@dataclass(frozen=True)
class Rollout:
    """How answers are written, scored and compared."""

    rewards: Rewards
    per_row: int
    most_tokens: int
    temperature: float
    baseline: Literal["mean", "others"]
    """The number that is subtracted from a reward: the mean of its group, or of the other rewards in it."""
    scale: Scale
    """The standard deviation by which advantages are divided."""
    kl_in_reward: float
    mask_truncated: bool
    needs_old: bool
    """Whether the loss compares with the policy that wrote the answers."""
    needs_reference: bool

    def prepare(self, context: StepContext) -> list[Batch]:
        """The answers of each micro-batch with their advantages; of an evaluation: what its metrics need."""
        written = self._written(context)
        if not context.trains:
            context.show([sample for answers in written for sample in answers.samples(self.rewards)][:SHOWN])
            return [{STATISTICS: answers.statistics(self.rewards)} for answers in written]
        batches = [self._batch(context, answers) for answers in written]
        shaping = Shaping(temperature=self.temperature)
        if self.needs_old or self.kl_in_reward:
            for batch in batches:
                batch["old"] = -token_losses(context.model, batch, shaping).nll
        if self.needs_reference or self.kl_in_reward:
            with context.start() as start:
                for batch in batches:
                    batch["start"] = -token_losses(start, batch, shaping).nll
        return self._compared(context, written, batches)

    def _written(self, context: StepContext) -> list[Answers]:
        """The answers of each micro-batch, sampled in training and the most likely ones in an evaluation."""
        rows, tokenizer = context.batches.rows, context.tokenizer
        how = Sampling(self.most_tokens, self.temperature, ends(context.model, tokenizer), tokenizer.pad_token_id)
        copies, written = self.per_row if context.trains else 1, []
        with sampling.merged(context.model):
            for part in context.rows:
                context.agree()
                prompts = [rows[row][0].tolist() for row in part]
                chances = sampling.uniforms(context.seed, part, copies, self.most_tokens) if context.trains else None
                answers = sampling.answers(context.model, prompts, chances, how, copies)
                prompts = [prompt for prompt in prompts for _ in range(copies)]
                assert rows.records is not None
                records = [record_of(rows.records, row) for row in part for _ in range(copies)]
                written.append(Answers.of(prompts, answers, records, self.rewards, tokenizer, how))
        return written

    def _batch(self, context: StepContext, answers: Answers) -> Batch:
        documents = []
        for prompt, answer, is_cut in zip(answers.prompts, answers.ids, answers.is_cut, strict=True):
            labels = [IGNORED] * len(answer) if is_cut and self.mask_truncated else answer
            documents.append((np.array([*prompt, *answer]), np.array([*[IGNORED] * len(prompt), *labels])))
        batch = context.batch(documents, context.batches.longest_document, self.per_row)
        return {**batch, STATISTICS: answers.statistics(self.rewards, self.per_row)}

    def _compared(self, context: StepContext, written: list[Answers], batches: list[Batch]) -> list[Batch]:
        """The batches with ``advantage`` of each document."""
        groups = []
        for answers, batch in zip(written, batches, strict=True):
            totals = answers.totals
            if self.kl_in_reward:
                kl = torch.segment_reduce(batch["old"] - batch["start"], "sum", lengths=batch["labels_per_document"])
                totals = totals - self.kl_in_reward * kl.double().cpu().numpy()
            groups.append(totals.reshape(-1, self.per_row))
        known = np.concatenate([group.ravel() for group in groups])
        known = known[~np.isnan(known)]
        zero = sum(float((_spread(group) == 0).sum()) for group in groups)
        count, total, squares, flat, number = context.agree(
            len(known), known.sum(), (known**2).sum(), zero, sum(map(len, groups))
        )
        if number and flat == number:
            log.warning("all answers to each prompt of a step have the same reward: the step learns nothing from them")
        spread = np.sqrt(max(squares - total**2 / max(count, 1), 0.0) / max(count - 1, 1))
        for group, batch in zip(groups, batches, strict=True):
            advantage = torch.from_numpy(self.advantages(group, spread).ravel())
            batch["advantage"] = advantage.to(batch["labels"].device, torch.float32)
        return batches

    def advantages(self, rewards: np.ndarray, spread: float) -> np.ndarray:
        """(prompts, answers) → the same: how much better than its group an answer is; ``spread`` of the whole step."""
        count = (~np.isnan(rewards)).sum(1, keepdims=True)
        total = np.nansum(rewards, 1, keepdims=True)
        if self.baseline == "others":
            difference = np.where(count > 1, rewards - (total - rewards) / np.maximum(count - 1, 1), 0.0)
        else:
            difference = rewards - total / np.maximum(count, 1)
        if self.scale != "none":
            difference = difference / ((_spread(rewards)[:, None] if self.scale == "group" else spread) + SMALL)
        return np.nan_to_num(difference, nan=0.0)


@dataclass(frozen=True)
class Answers:
    """The answers of a micro-batch with their rewards."""

    prompts: list[list[int]]
    ids: list[list[int]]
    texts: list[str]
    records: list[dict[str, Any]]
    is_cut: list[bool]
    """Whether the answer had no end within the limit."""
    scores: np.ndarray  # (answers, functions)
    totals: np.ndarray  # (answers,)

    @classmethod
    def of(
        cls,
        prompts: list[list[int]],
        ids: list[list[int]],
        records: list[dict[str, Any]],
        rewards: Rewards,
        tokenizer: Any,
        how: Sampling,
    ) -> Answers:
        """Score the answers."""
        texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in ids]
        scores = scored(rewards, records, texts, ids)
        is_cut = [answer[-1:] == [] or answer[-1] not in how.ends for answer in ids]
        return cls(prompts, ids, texts, records, is_cut, scores, rewards.total(scores))

    def statistics(self, rewards: Rewards, per_row: int | None = None) -> dict[str, float]:
        """Sums for the metrics; ``per_row``: the size of a group, if the answers are in groups."""
        spreads: Any = _spread(self.totals.reshape(-1, per_row)) if per_row is not None else []
        lengths = [*map(len, self.ids)]
        named: dict[str, float] = {}
        for name, of_function in zip(rewards.names, self.scores.T, strict=True):
            named |= {f"rewards/{name}": np.nansum(of_function), f"scored/{name}": (~np.isnan(of_function)).sum()}
        return {
            "answers": len(self.ids),
            "groups": len(spreads),
            "scored": (~np.isnan(self.totals)).sum(),
            "reward": np.nansum(self.totals),
            "reward_std": sum(spreads),
            "frac_reward_zero_std": sum(spread == 0 for spread in spreads),
            "completions/mean_length": sum(lengths),
            "longest": max(lengths, default=-np.inf),
            "shortest_negative": -min(lengths, default=np.inf),
            "completions/clipped_ratio": sum(self.is_cut),
            **named,
        }

    def samples(self, rewards: Rewards) -> list[dict[str, Any]]:
        """One row for each answer: prompt, answer, its reward and that of each function."""
        return [
            {"prompt": record["prompt"], "answer": text, "reward": _shown(total)}
            | {name: _shown(score) for name, score in zip(rewards.names, scores, strict=True)}
            for record, text, total, scores in zip(self.records, self.texts, self.totals, self.scores, strict=True)
        ]


def record_of(records: Texts, row: int) -> dict[str, Any]:
    """The record of a row, with the columns of all rows: functions get them whichever rows they score together."""
    record: dict[str, Any] = json.loads(records[row])
    return {**record, "columns": dict.fromkeys(records.columns) | record["columns"]}


def scored(rewards: Rewards, records: list[dict[str, Any]], texts: list[str], ids: list[list[int]]) -> np.ndarray:
    """The rewards of answers to prompts with these records, (answers, functions)."""
    if not records:
        return np.zeros((0, len(rewards.references)))
    names = dict.fromkeys(name for record in records for name in record["columns"])
    columns = {name: [record["columns"].get(name) for record in records] for name in names}
    chats = [isinstance(record["prompt"], list) for record in records]
    answers = [
        [{"role": "assistant", "content": text}] if chat else text for chat, text in zip(chats, texts, strict=True)
    ]
    return rewards.of([record["prompt"] for record in records], answers, ids, columns)


def metrics(sums: dict[str, float]) -> dict[str, float]:
    """Means over answers, groups and tokens; the loss of an evaluation is the reward of its answers, negated."""
    per = {"reward": "scored", "reward_std": "groups", "frac_reward_zero_std": "groups"}
    per |= dict.fromkeys(("completions/mean_length", "completions/clipped_ratio"), "answers")
    per |= dict.fromkeys(("entropy", "kl", "clip_ratio"), "tokens")
    per |= {name: name.replace("rewards/", "scored/") for name in sums if name.startswith("rewards/")}
    means = {name: sums[name] / sums[count] for name, count in per.items() if name in sums and sums.get(count)}
    if sums.get("answers"):
        means |= {"completions/max_length": sums["longest"], "completions/min_length": -sums["shortest_negative"]}
    loss = sums["loss"] / max(sums["loss_count"], 1.0) if "loss" in sums else 0.0 - means.get("reward", 0.0)
    return {"loss": loss, **means}


def ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the model's own, the tokenizer's, and the end of a turn."""
    from runner.data import chat_template

    return sampling.end_tokens(model, tokenizer.eos_token_id, chat_template.end_of_turn(tokenizer))


def _spread(rewards: np.ndarray) -> np.ndarray:
    """The standard deviation of each group (groups,), unbiased; 0 with fewer than two scored answers."""
    count = (~np.isnan(rewards)).sum(1)
    mean = np.nansum(rewards, 1) / np.maximum(count, 1)
    squares = np.nansum((rewards - mean[:, None]) ** 2, 1)
    return np.sqrt(squares / np.maximum(count - 1, 1))


def _shown(number: float) -> float | None:
    return None if np.isnan(number) else round(float(number), 6)
