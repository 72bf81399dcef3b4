"""Keys of ``train`` and ``optim`` that other options keep from taking effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from runner.config import chat_template_file, user_code, user_function
from runner.config.bind import bind
from runner.errors import Fault

CALLBACKS = "train.callbacks"
ROUTERS = "router_aux_loss_coef"
LORAPLUS = "optim.loraplus_lr_ratio"
WITHOUT_LORA_B = Fault(LORAPLUS, "has no effect: no parameter is called lora_B", "set it to 1, or use lora=lora")


def faults(cfg: Mapping[str, Any]) -> Iterator[Fault]:
    if (alpha := cfg["train"].get("neftune_noise_alpha")) is not None:
        yield from _neftune_faults(cfg, alpha)
    if cfg["train"].get("ema") is not None and (start := cfg["train"].get("swa_start")) is not None:
        yield Fault("train.swa_start", "cannot be combined with train.ema: both are averages", "set one to null", start)
    if cfg["train"].get(ROUTERS) is not None and _option(cfg["compile"]) == "whole":
        problem = f"train.{ROUTERS} reads the routers from outside of the graph of the whole model"
        yield Fault("compile", problem, f"use compile=regional or compile=none, or set train.{ROUTERS}=null")
    if cfg["lora"].get("init_lora_weights") == "eva" and _option(cfg["parallel"]) == "fsdp":
        problem = "needs passes through the whole model before training, which parallel=fsdp shards"
        yield Fault("lora.init_lora_weights", problem, "use parallel=ddp, or set it to true", "eva")
    if cfg["train"]["memory"] == "offload" and _option(cfg["compile"]) in ("regional", "whole"):
        problem = "compiled layers cannot move their inputs to the memory of the CPU, as train.memory=offload asks"
        yield Fault("compile", problem, "use compile=none or compile=auto, or train.memory=min")
    if cfg["optim"].get("loraplus_lr_ratio", 1) != 1 and not _may_have_lora_b(cfg["lora"]):
        yield WITHOUT_LORA_B
    if cfg["model"].get("chat_template") is not None and not (task := bind(cfg["task"], "task")()).chats:
        yield Fault(chat_template_file.KEY, f"has no effect: task={task.name} has no conversations", "set it to null")
    yield from _profile_faults(cfg["train"])
    if cfg["train"].get("tf32") and (dtype := cfg["model"].get("dtype", "float32")) != "float32":
        problem = f"has no effect with model.dtype={dtype}: GPUs that have TF32 then compute in bfloat16"
        yield Fault("train.tf32", problem, "leave it out (bfloat16 is faster), or set model.dtype=float32", "true")
    names = cfg["train"].get("callbacks") or []
    for name in names:
        yield from user_function.faults(CALLBACKS, name, cfg.get(user_code.PATHS) or (), f"{CALLBACKS}=[lab.py:watch]")
    if twice := [name for name in names if names.count(name) > 1]:
        yield Fault(CALLBACKS, f"names {twice[0]} twice", "name each function once", names)


def _neftune_faults(cfg: Mapping[str, Any], alpha: float) -> Iterator[Fault]:
    key, task = "train.neftune_noise_alpha", bind(cfg["task"], "task")()
    if task.compares:
        problem = (
            f"task={task.name} compares the model with its own start or an earlier step, and noise makes both differ"
        )
        yield Fault(key, problem, "set it to null", alpha)
    elif task.prepare is not None:
        problem = f"task={task.name} makes the batches of a step itself, and they would have no noise"
        yield Fault(key, problem, "set it to null", alpha)
    if _option(cfg["compile"]) == "whole":
        problem = "noise differs at each step, so it cannot be part of the graph of the whole model"
        yield Fault("compile", problem, f"use compile=regional or compile=none, or set {key}=null")


def _profile_faults(train: Mapping[str, Any]) -> Iterator[Fault]:
    count, first, last = train.get("profile"), train.get("profile_start", 5), train["max_steps"]
    if count is None:
        for key, neutral in (("profile_start", 5), ("profile_memory", False)):
            if (value := train.get(key, neutral)) != neutral:
                yield Fault(f"train.{key}", "has no effect without train.profile", "set it too, such as to 3", value)
    elif last is not None and first + count - 1 > last:
        problem = f"the steps {first} to {first + count - 1} would be recorded, and the run has {last}"
        yield Fault("train.profile", problem, "lower it, or train.profile_start", count)


def _may_have_lora_b(lora: Mapping[str, Any]) -> bool:
    """Whether the option may give the model matrices lora_B; the optimizer looks again, at the model."""
    name = _option(lora)
    return name != "none" and (name != "peft" or "lora" in str(lora["method"]).lower())


def _option(node: Mapping[str, Any]) -> str:
    """The name of the function of an option."""
    return str(node["_target_"]).rpartition(".")[2]
