"""Write the model card of an exported model: usage, evaluation, training data, training."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from runner.models import hub, loftq_base
from runner.models.kernels import compat
from runner.models.kernels.score_head import ScoreHead
from runner.secrets import redact, redact_tree
from runner.tracking import metrics_log, naming, origin
from runner.tracking.manifest import RUN_TIME_KEYS, read_config
from runner.tracking.rundir import RunDir

Kind = Literal["adapter", "model", "gguf"]

LOAD = {
    "adapter": """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # the folder of this card
{base}
model = PeftModel.from_pretrained(base, folder)
tokenizer = AutoTokenizer.from_pretrained(folder)""",
    "model": """from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # the folder of this card
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(folder)""",
}
SCORES = """
scores = model.eval()(**inputs).logits[0]{function}
print(dict(zip(model.config.id2label.values(), scores.tolist())))"""
SCORED_CHAT = """
messages = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi, how are you?"}]
inputs = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")"""
SCORED_TEXT = """
inputs = tokenizer("Once upon a time", return_tensors="pt")"""
OF_PROBLEM = {"single_label_classification": ".softmax(-1)", "multi_label_classification": ".sigmoid()"}
CONFIGURED = """config = AutoConfig.from_pretrained(folder)  # with positions, head and padding token of this model
"""
QUANTIZED = """from transformers import BitsAndBytesConfig

# The adapter corrects the error of 4-bit weights (LoftQ): on other weights it would add that error."""
UNPACKED = """
# transformers does not quantize GGUF files: write the weights to a folder first
del base.config.quantization_config
plain = AutoModelForCausalLM.from_config(base.config)
plain.load_state_dict(base.state_dict())
plain.save_pretrained("base")
base = AutoModelForCausalLM.from_pretrained("base")"""
RESIZED = """
tokenizer = AutoTokenizer.from_pretrained(folder)  # with the new tokens
base.resize_token_embeddings(max(len(tokenizer), base.config.vocab_size))"""
PACKAGED = """from importlib.util import find_spec
package = find_spec({package!r}).submodule_search_locations[0]
base = AutoModelForCausalLM.from_pretrained(package, gguf_file={file!r})"""
LOCAL = re.compile(r"(?:file://)?(?<![\w:/.<])/(?:[\w.@+~-]+/)+([\w.@+~-]+)")
"""An absolute path; the card contains only its last part."""
DTYPE = 'dtype="auto"'
"""In the code of the card, which names the argument as the installed transformers does."""
LONGEST = 5000
"""Longest description of a model version that MLflow's databases take."""
ASK = """
messages = [{"role": "user", "content": "Hello!"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""
CONTINUE = """
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0], skip_special_tokens=True))"""


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
        *map(
            _with_processor if reads_images else str,
            _loading(kinds, _base_code(base, base_name, cfg["model"], rundir), is_chat, head),
        ),
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
    written = "\n\n".join(parts).replace(DTYPE, f'{compat.dtype_keyword()}="auto"')
    return LOCAL.sub(r"…/\1", written) + "\n"


def description(card: str) -> str:
    """The card without front matter and full configuration, at most LONGEST characters, for MLflow's registry."""
    text = re.sub(r"(?s)\A---\n.*?\n---\n+|<details>.*?</details>\n+", "", card)
    return text if len(text) <= LONGEST else text[:LONGEST].rpartition("\n")[0]


def _with_processor(code: str) -> str:
    """The code for a model that reads images: its classes, and a question with an image."""
    code = code.replace("AutoModelForCausalLM", "AutoModelForImageTextToText").replace("AutoTokenizer", "AutoProcessor")
    content = '[{"type": "image", "path": "a.png"}, {"type": "text", "text": "What is this?"}]'
    code = code.replace("add_generation_prompt=True,", "add_generation_prompt=True, tokenize=True,")
    return code.replace("tokenizer", "processor").replace('"Hello!"', content)


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


def _base_code(base: str, name: str, model: Mapping[str, Any], rundir: RunDir) -> str:
    """The lines of Python that load the base model, with the configuration in the adapter's folder if there is one."""
    where = "  # replace by the path of this base model" if _is_local(base) and "package" not in model else ""
    code = f"base = AutoModelForCausalLM.from_pretrained({(name if where else base)!r}){where}"
    if "package" in model:
        code = PACKAGED.format(package=model["package"], file=model["file"])
    if stored := loftq_base.library_code(rundir.model):
        code = f"{QUANTIZED}\nquantized = {stored}\n{code}{UNPACKED * ('package' in model)}"
        end = code.rindex(")")
        code = code[:end] + ", quantization_config=quantized" + code[end:]
    if (rundir.model / "config.json").is_file():
        end = code.rindex(")")
        code = CONFIGURED + code[:end] + ", config=config" + code[end:]
    return code + RESIZED * bool(model.get("new_tokens"))


def _loading(kinds: tuple[Kind, ...], base_code: str, is_chat: bool, head: ScoreHead | None) -> Iterator[str]:
    use = ASK if is_chat else CONTINUE
    if head is not None:
        use = (SCORED_CHAT if is_chat else SCORED_TEXT) + SCORES.format(function=OF_PROBLEM.get(head.problem, ""))
    for kind in kinds:
        if kind == "gguf":
            yield "Load the .gguf file with llama.cpp, or a program based on llama.cpp:\n\n    llama-cli -m FILE.gguf"
        else:
            code = LOAD[kind].format(base=base_code)
            if head is not None:
                code = code.replace("AutoModelForCausalLM", "AutoModelForSequenceClassification")
            if kind == "adapter" and "config=config" in code:
                code = code.replace("import Auto", "import AutoConfig, Auto", 1)
            yield "```python\n" + code + "\n" + use + "\n```"


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
