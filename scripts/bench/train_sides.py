"""The sides of ``train.py``: what each one is started with, and which of them train on the same batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PADDED = {"per_device_train_batch_size": 4}
PACKED = {"per_device_train_batch_size": 1, "packing": True, "max_length": 1024}
FLOAT32 = {"bf16": False, "gradient_checkpointing": False}
PROMPTS, GENERATIONS, LONGEST_ANSWER = 2, 8, 64
ANSWERS = PROMPTS * GENERATIONS
"""Answers of a step of GRPO."""
TRL: dict[str, dict[str, Any]] = {
    "trl": PADDED,  # as shipped: bfloat16 autocast, activations recomputed
    "trl-float32": {**PADDED, **FLOAT32},
    "trl-speed": {**PADDED, "gradient_checkpointing": False},
    "trl-flat": {**PADDED, "padding_free": True, "gradient_checkpointing": False},
    "trl-packed": {**PACKED, "gradient_checkpointing": False},
    "trl-packed-float32": {**PACKED, **FLOAT32},
    "trl-compiled": {**PACKED, "gradient_checkpointing": False, "torch_compile": True},
    "trl-full": {**PADDED, **FLOAT32},
    "trl-dpo": {**PADDED, **FLOAT32},
    "trl-dpo-cached": {**PADDED, **FLOAT32, "precompute_ref_log_probs": True},
    "trl-reward": {**PADDED, **FLOAT32},
    "trl-grpo": {
        **FLOAT32,
        "per_device_train_batch_size": ANSWERS,
        "num_generations": GENERATIONS,
        "max_completion_length": LONGEST_ANSWER,
    },
}
DOCUMENTS = ["data.packing=false", "train.per_device_batch_size=4"]
PACKS = ["data.packing=true", "train.per_device_batch_size=1"]
PLAIN = ("peft",)
"""A loop of a dozen lines over PEFT's model, padded, in float32: what everybody begins with."""
OURS = {
    "ours": DOCUMENTS,
    "ours-balanced": [*DOCUMENTS, "train.memory=balanced"],
    "ours-compiled": [*DOCUMENTS, "compile=regional"],
    "ours-packed": PACKS,
    "ours-packed-compiled": [*PACKS, "compile=regional"],
    "ours-bfloat16": [*DOCUMENTS, "model.dtype=bfloat16"],
    "ours-packed-bfloat16": [*PACKS, "model.dtype=bfloat16"],
    "ours-packed-bfloat16-compiled": [*PACKS, "model.dtype=bfloat16", "compile=regional"],
    "ours-full": [*DOCUMENTS, "lora=none"],
    "ours-dpo": [*DOCUMENTS, "task=dpo"],
    "ours-reward": [*DOCUMENTS, "task=reward"],
    "ours-grpo": [
        "data.packing=false", f"train.per_device_batch_size={PROMPTS}", "task=grpo",
        "task.rewards=[runner.tasks.example_rewards:lowercase_share]", f"task.num_generations={GENERATIONS}",
        f"task.max_completion_length={LONGEST_ANSWER}",
    ],
}  # fmt: skip
DEFAULT = [
    "ours", "trl-float32", "ours-balanced", "ours-compiled", "ours-packed", "trl-packed-float32", "ours-bfloat16",
    "trl",
]  # fmt: skip
COMMON = [
    "data=local", "data.max_length=1024", "data.eval_rows=2", "tracking=mlflow",
    "optim.learning_rate=2e-4", "schedule=constant", "schedule.warmup_ratio=0", "train.save_steps=null",
    "train.sample_prompts=0", "parallel=none",
]  # fmt: skip
FORMATS = {"pairs": "preference", "rewards": "preference", "prompts": "prompts"}
"""The data format of each way to batch; else rows of a prompt and its completion."""


def ours(folder: Path, side: str, steps: int) -> list[str]:
    """The overrides of a side of runner's."""
    form = FORMATS.get(batching(side), "prompt_completion")
    data = [f"data/format={form}", f"data.path={folder / f'{form}.jsonl'}"]
    return [*COMMON, *OURS[side], *data, f"train.max_steps={steps}"]


def batching(side: str) -> str:
    """What the batches of a side are made of."""
    for word, name in {"dpo": "pairs", "reward": "rewards", "grpo": "prompts"}.items():
        if word in side:
            return name
    return "packed" if "packed" in side or side == "trl-compiled" else "documents"


def is_full(side: str) -> bool:
    """Whether a side trains all weights, and no adapter."""
    return side.endswith("-full")


def kind(side: str) -> tuple[str, bool, bool]:
    """What sides have in common whose losses can be compared: TRL computes in bfloat16 unless told otherwise."""
    return batching(side), is_full(side), TRL[side].get("bf16", True) if side in TRL else "bfloat16" in side
