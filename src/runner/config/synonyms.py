"""Keys and options of other programs, and what to write here instead.

From transformers' TrainingArguments, TRL, Axolotl, LLaMA-Factory, ms-swift, Lightning and Slurm. A word that is a key
or an option here is never looked up.
"""

from __future__ import annotations

from collections.abc import Sequence

DTYPE = "set model.dtype=bfloat16 or model.dtype=float32; auto takes what the hardware is fast in"
EXTRA = "sbatch options without a key of their own: +launcher.additional_parameters.{word}=…"
SCHEDULE = "choose it with schedule=cosine, schedule=linear, schedule=constant or schedule=wsd"
MODEL = "set model=local model.path=FOLDER (or a Hub id)"
OWN_TASK = "choose it with task=… (--help lists them); a loss of your own is a function: code=FILE.py task=NAME"
NO_TASK = "options here: {options}; a loss of your own is a function: code=FILE.py task=NAME"
MEMORY = "choose train.memory=min (computes layers again) or train.memory=balanced (less of them)"
FSDP = "write parallel=fsdp launcher=accelerate launcher.processes=N: it shards as ZeRO-3 does"
ZERO = ("zero_stage", "zero3", "deepspeed_config", "deepspeed_config_file", "fsdp_config")
OFFLOAD = "write train.memory=offload: layers are computed again from inputs that wait in CPU memory (GPUs only)"
ACTIVATION_OFFLOAD = (
    "activation_offloading", "activation_offload", "offload_activations", "enable_activation_offload",
    "activation_cpu_offload", "fsdp_offload_activations",
)  # fmt: skip
SHARDED = "not here: a layer is computed on one device; write parallel=fsdp, which shards the weights of all layers"
LAYERS_APART = (
    "tensor_parallel", "tensor_parallel_size", "tensor_model_parallel_size", "tp_size", "tp_plan", "pipeline_parallel",
    "pipeline_parallel_size", "pipeline_model_parallel_size", "pp_size", "expert_parallel_size",
    "expert_model_parallel_size", "ep_size",
)  # fmt: skip
LONG_ROWS = (
    "not here: a row is computed on one device; for long rows write train.memory=offload (GPUs only) or "
    "train.memory=min, with parallel=fsdp for large models"
)
ROWS_APART = (
    "context_parallel", "context_parallel_size", "context_parallel_degree", "cp_size", "sequence_parallel",
    "sequence_parallel_size", "sequence_parallel_degree", "sp_size", "ulysses_sequence_parallel_size", "ring_attn_size",
)  # fmt: skip
PUSH = "python -m runner export RUN --push OWNER/NAME uploads a trained model; leave the key out"
PEFT = "write lora=peft lora.method={word}"
TORCH = "write optim=torch optim.name={word}"

KEYS = {
    # transformers
    "lr": "optim.learning_rate", "per_device_train_batch_size": "train.per_device_batch_size",
    "batch_size": "train.per_device_batch_size", "train_batch_size": "train.per_device_batch_size",
    "adam_epsilon": "optim.eps", "beta1": "optim.betas", "adam_beta1": "optim.betas", "adam_beta2": "optim.betas",
    "eval_strategy": "train.eval_steps", "evaluation_strategy": "train.eval_steps", "save_strategy": "train.save_steps",
    "logging_strategy": "train.logging_steps",
    "output_dir": "outputs_dir", "run_name": "name", "experiment_name": "tracking.experiment", "data_seed": "seed",
    "full_determinism": "train.deterministic", "ddp_find_unused_parameters": "parallel.find_unused_parameters",
    "tracking_uri": "tracking.uri", "max_train_samples": "data.train_rows", "max_eval_samples": "data.eval_rows",
    # TRL, Axolotl, LLaMA-Factory, ms-swift
    "max_seq_length": "data.max_length", "max_seq_len": "data.max_length", "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length", "block_size": "data.max_length", "model_max_length": "data.max_length",
    "sample_packing": "data.packing", "group_by_length": "data.packing", "val_set_size": "data.eval_fraction",
    "val_size": "data.eval_fraction", "split_dataset_ratio": "data.eval_fraction", "max_samples": "data.train_rows",
    "attn_implementation": "model.attention", "flash_attention": "model.attention", "flash_attn": "model.attention",
    "train_on_inputs": "task.train_on", "assistant_only_loss": "task.train_on", "completion_only_loss": "task.train_on",
    "rank": "lora.r", "lora_r": "lora.r", "lora_rank": "lora.r", "alpha": "lora.lora_alpha",
    "pref_beta": "task.beta", "rl_beta": "task.beta", "dpo_beta": "task.beta", "pref_loss": "task.loss_type",
    "label_smoothing_factor": "task.label_smoothing",
    "noisy_embedding_alpha": "train.neftune_noise_alpha", "neftune_alpha": "train.neftune_noise_alpha",
    "callback": "train.callbacks", "ema_decay": "train.ema", "use_ema": "train.ema", "weight_averaging": "train.ema",
    "swa": "train.swa_start", "swa_epoch_start": "train.swa_start", "use_swa": "train.swa_start",
    "default_system": "data.system_prompt", "default_system_message": "data.system_prompt",
    "chat_template_path": "model.chat_template", "chat_template_jinja": "model.chat_template",
    "lora_plus_lr_ratio": "optim.loraplus_lr_ratio", "unfrozen_parameters": "lora.trainable",
    "freeze_trainable_layers": "lora.trainable_layers",
    "simpo_gamma": "task.gamma", "pref_ftx": "task.sft_weight", "cpo_alpha": "task.sft_weight",
    "rpo_alpha": "task.sft_weight", "adapter_name_or_path": "lora.start", "adapters": "lora.start",
    "lora_model_dir": "lora.start", "teacher_model": "task.teacher", "teacher_model_name_or_path": "task.teacher",
    "kd_alpha": "task.alpha", "kd_temperature": "task.temperature", "kd_ratio": "task.alpha",
    "dropout": "lora.lora_dropout", "lora_target": "lora.target_modules", "lora_target_modules": "lora.target_modules",
    "lora_target_linear": "lora.target_modules", "wandb_project": "tracking.experiment",
    "description": "tracking.notes", "wandb_notes": "tracking.notes", "wandb_tags": "tracking.tags",
    # Lightning
    "accumulate_grad_batches": "train.gradient_accumulation_steps", "gradient_clip_val": "train.max_grad_norm",
    "max_norm": "train.max_grad_norm", "grad_clip": "train.max_grad_norm", "val_check_interval": "train.eval_steps",
    "log_every_n_steps": "train.logging_steps", "limit_train_batches": "data.train_rows", "num_nodes": "launcher.nodes",
    "limit_val_batches": "data.eval_rows", "default_root_dir": "outputs_dir", "num_workers": "launcher.threads",
    # Slurm
    "time": "launcher.timeout_min", "ntasks_per_node": "launcher.tasks_per_node", "mem": "launcher.mem_gb",
    "gres": "launcher.gpus_per_node", "gpus": "launcher.gpus_per_node", "cpus": "launcher.cpus_per_task",
    "num_gpus": "launcher.gpus_per_node", "array": "launcher.array_parallelism", "num_processes": "launcher.processes",
    "nproc_per_node": "launcher.processes",
}  # fmt: skip
"""A word of another program → the key of the same meaning."""

SENTENCES = {
    "device_map": "device_map=auto is for inference only: training places the whole model on its own device; "
    "leave the key out",
    "load_in_4bit": "choose the quantization with quant=4bit",
    "load_in_8bit": "choose the quantization with quant=8bit",
    "quantization_bit": "choose the quantization with quant=4bit or quant=8bit",
    "quant_bits": "choose the quantization with quant=4bit or quant=8bit",
    "epochs": "did you mean train.num_train_epochs (with train.max_steps=null)?",
    "num_epochs": "did you mean train.num_train_epochs (with train.max_steps=null)?",
    "max_epochs": "did you mean train.num_train_epochs (with train.max_steps=null)?",
    "outlier_threshold": "it went: 8-bit weights are multiplied in the dtype of the activations; leave the key out",
    "gradient_checkpointing": MEMORY, "activation_checkpointing": MEMORY, "use_gradient_checkpointing": MEMORY,
    **dict.fromkeys(ACTIVATION_OFFLOAD, OFFLOAD), **dict.fromkeys(LAYERS_APART, SHARDED),
    **dict.fromkeys(ROWS_APART, LONG_ROWS), **dict.fromkeys(ZERO, FSDP),
    "bf16": DTYPE, "fp16": DTYPE, "fp32": DTYPE, "precision": DTYPE, "torch_dtype": DTYPE,
    "mixed_precision": DTYPE,
    "lr_scheduler_type": SCHEDULE, "lr_scheduler": SCHEDULE, "scheduler": SCHEDULE, "scheduler_type": SCHEDULE,
    "optimizer": "choose it with optim=adamw, optim=lion, optim=muon, … or optim=torch optim.name=CLASS",
    "optim": "choose it with optim=adamw, optim=lion, optim=muon, … or optim=torch optim.name=CLASS",
    "resume_from_checkpoint": "write resume=auto (the latest unfinished run) or resume=RUN",
    "ckpt_path": "write resume=auto (the latest unfinished run) or resume=RUN",
    "model_name_or_path": MODEL, "name_or_path": MODEL, "model_name": MODEL, "base_model": MODEL, "model_id": MODEL,
    "model_type": MODEL,
    "dataset": "choose the data with data=local data.path=FILE or data=hub data.path=OWNER/NAME",
    "dataset_name": "choose the data with data=hub data.path=OWNER/NAME",
    "datasets": "choose the data with data=local data.path=FILE or data=hub data.path=OWNER/NAME",
    "train_file": "choose the data with data=local data.path=FILE",
    "validation_file": "name it with data=local data.eval_path=FILE",
    "dataset_text_field": "write data/format=text data.format.key=NAME",
    "template": "the chat template is that of the model; another one: model.chat_template=FILE",
    "stage": OWN_TASK, "rl": OWN_TASK, "rlhf_type": OWN_TASK,
    "use_peft": "write lora=lora, or lora=none for full fine-tuning",
    "adapter": "write lora=lora (with quant=4bit: QLoRA), or lora=none for full fine-tuning",
    "finetuning_type": "write lora=lora, or lora=none for full fine-tuning",
    "train_type": "write lora=lora, or lora=none for full fine-tuning",
    "tuner_type": "write lora=lora, or lora=none for full fine-tuning",
    "torch_compile": "write compile=regional, or compile=none",
    "report_to": "runs are in MLflow; other trackers: tracking.also=[tensorboard], [wandb] or [trackio]",
    "logger": "runs are in MLflow; other trackers: tracking.also=[tensorboard], [wandb] or [trackio]",
    "fsdp": "write parallel=fsdp launcher=accelerate launcher.processes=N",
    "deepspeed": FSDP,
    "strategy": "write parallel=ddp or parallel=fsdp",
    "devices": "write launcher=accelerate launcher.processes=N, or launcher=slurm launcher.gpus_per_node=N",
    "accelerator": "a GPU is used when there is one; leave the key out (CUDA_VISIBLE_DEVICES= hides the GPUs)",
    "overwrite_output_dir": "every run gets a folder of its own; leave the key out",
    "load_best_model_at_end": "set train.metric_for_best_model, for example to eval/loss, and train.eval_steps",
    "push_to_hub": PUSH,
    **dict.fromkeys(("hub_model_id", "hub_token", "hub_private_repo"), PUSH),
    "logging_dir": "write tracking.also=[tensorboard]: its file is in the folder of the run",
    "dataloader_num_workers": "batches are made ahead in a thread of the run; leave the key out",
    "remove_unused_columns": "columns without a meaning here are left alone; leave the key out",
    "do_train": "python -m runner trains, python -m runner evaluate RUN evaluates; leave the key out",
    "do_eval": "the held-out rows are evaluated before and after; more often with train.eval_steps",
    "job_name": "write name=… (a run) or sweep=… (a sweep): Slurm's name of the job contains it",
    "fast_dev_run": "write experiment=smoke, or python -m runner plan",
    **{word: EXTRA.format(word=word) for word in ("comment", "mail_type", "mail_user", "dependency", "licenses")},
}  # fmt: skip
"""A word of another program → what to do instead, where no single key has its meaning."""

OPTIONS = {
    "task=ppo": NO_TASK,
    **{f"task={word}": "write task=reward" for word in ("rm", "reward_model")},
    **{f"task={word}": "write task=classify" for word in ("cls", "seq_cls", "classification", "classifier")},
    "task=regression": "write task=classify task.kind=regression",
    "task=pt": "write task=pretrain", "task=clm": "write task=pretrain", "task=chat": "write task=sft",
    **{f"optim={name.lower()}": TORCH.format(word=name)
       for name in ("SGD", "Adam", "Adagrad", "Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop")},
    "optim=adamw_torch": "write optim=adamw", "optim=adamw_torch_fused": "write optim=adamw",
    "optim=schedule_free_adamw": "write optim=schedule_free schedule=constant",
    "optim=adamw_hf": "write optim=adamw", "optim=adamw_bnb_8bit": "write optim=adamw_8bit",
    "optim=lion_8bit": "write optim=lion", "optim=paged_adamw_32bit": "write optim=paged_adamw_8bit optim.bits=32",
    **{f"quant={name}": "write quant=4bit (nf4) or quant=fp4" for name in ("nf4", "int4", "bnb", "bitsandbytes", "4")},
    **{f"quant={name}": "write quant=8bit" for name in ("int8", "llm_int8", "8")},
    "lora=qlora": "write quant=4bit lora=lora, or experiment=qlora",
    **{f"{group}={name}": "write lora=lora_fa" for group in ("lora", "optim") for name in ("lorafa", "lora-fa")},
    "lora=full": "write lora=none: all weights are trained", "lora=false": "write lora=none",
    "lora=loftq": "write quant=4bit lora.init_lora_weights=loftq", "lora=eva": "write lora.init_lora_weights=eva",
    "lora=true": "write lora=lora", "lora=olora": "write lora=lora lora.init_lora_weights=olora",
    **{f"lora={name}": PEFT.format(word=name) for name in ("ia3", "vera", "oft", "boft", "loha", "lokr", "hra")},
    **{f"lora={name}": f"write lora=peft lora.method={name} +lora.num_virtual_tokens=16 data.packing=false"
       for name in ("prompt_tuning", "p_tuning", "prefix_tuning")},
    "schedule=constant_with_warmup": "write schedule=constant", "schedule=warmup_stable_decay": "write schedule=wsd",
    "schedule=none": "write schedule=constant schedule.warmup_ratio=0",
    "launcher=torchrun": "write launcher=accelerate launcher.processes=N",
    "launcher=ddp": "write launcher=accelerate launcher.processes=N",
    "launcher=submitit": "write launcher=slurm", "launcher=submitit_slurm": "write launcher=slurm",
    "launcher=sbatch": "write launcher=slurm",
    **{f"parallel={name}": FSDP for name in ("deepspeed", "zero", "zero1", "zero2", "zero3", "fsdp2", "hsdp")},
    **{f"parallel={name}": SHARDED for name in ("tp", "tensor", "tensor_parallel", "pp", "pipeline", "megatron", "ep")},
    **{f"parallel={name}": LONG_ROWS
       for name in ("cp", "context", "context_parallel", "sp", "sequence", "sequence_parallel", "ulysses", "ring")},
    **{f"tracking={name}": f"write tracking.also=[{name}]: it gets the records that MLflow gets"
       for name in ("wandb", "tensorboard", "trackio")},
    **{f"tracking={name}": "write tracking=mlflow, and tracking.also=[…] for tensorboard, wandb or trackio"
       for name in ("comet", "clearml", "neptune", "swanlab")},
    "tracking=none": "write tracking=offline", "search=optuna": "write search=tpe",
    "search=hyperband": "write search=asha", "search=bayes": "write search=tpe",
    **{f"data={name}": "write data=local data.path=FILE" for name in ("json", "jsonl", "csv", "parquet", "file")},
    "data/format=chatml": "write data/format=messages", "data/format=openai": "write data/format=messages",
    "compile=true": "write compile=regional", "compile=false": "write compile=none",
}  # fmt: skip
"""``group=option`` of another program → what to write here."""

ANSWERS = {
    "overrides train, without a word: model=… data=…": "train fit run start finetune fine-tune launch",
    "write evaluate RUN": "eval test validate benchmark",
    "write generate RUN": "chat infer inference predict complete",
    "write generate RUN --serve": "serve api deploy",
    "write export RUN --merged": "merge",
    "write export RUN --push OWNER/NAME": "push",
    "write resume=RUN, or resume=auto with the same overrides": "resume continue requeue",
    "write -m key=value,value": "sweep multirun grid ablate",
    "write -m search=tpe search.trials=20 …": "tune search hpo optimize",
    "write status": "ls list ps squeue sacct jobs runs top watch",
    "write cancel RUN": "stop kill scancel abort",
    "write logs RUN -f": "tail",
    "write launcher=slurm and overrides": "submit sbatch srun queue",
    "write plan and overrides": "dryrun dry-run check estimate preview",
    "write --cfg job and overrides": "config cfg show",
    "write ui": "mlflow tensorboard dashboard board web",
    "write compare": "results leaderboard report table plot",
    "write --help": "help",
    "write --version": "version",
    **{f"write task={name}": name for name in ("sft", "dpo", "grpo", "kto", "orpo", "reward", "pretrain", "distill")},
}
WORDS = {word: answer for answer, words in ANSWERS.items() for word in words.split()}
"""First words of other programs → what to write here after ``python -m runner``."""
PRESET = "write its keys as overrides; or --config-dir FOLDER experiment=NAME, if it is FOLDER/experiment/NAME.yaml"


def word_hint(word: str) -> str:
    """What to write here instead of this first word; an empty string if no other program has it."""
    if word.lower().endswith((".yaml", ".yml", ".json")):
        return PRESET
    return WORDS.get(word.lower(), "")


def hint(word: str) -> str:
    """What to write here instead of this key; an empty string if no other program has it."""
    word = word.replace("-", "_")
    return f"did you mean {KEYS[word]}?" if word in KEYS else SENTENCES.get(word, "")


def option_hint(group: str, option: str, options: Sequence[str]) -> str:
    """What to write here instead of ``group=option``; an empty string if no other program has it."""
    return OPTIONS.get(f"{group}={option.lower()}", "").replace("{options}", ", ".join(options))
