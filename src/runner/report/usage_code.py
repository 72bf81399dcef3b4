"""The Python code of a model card, put together from its parts: load a model, and use it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from runner.models.kernels import compat
from runner.models.kernels.score_head import ScoreHead

OF_PROBLEM = {"single_label_classification": ".softmax(-1)", "multi_label_classification": ".sigmoid()"}


@dataclass(frozen=True)
class Use:
    """What a model is for: it answers messages, or continues a text; with a head it scores them; it may read images."""

    is_chat: bool
    head: ScoreHead | None = None
    reads_images: bool = False

    @property
    def model_class(self) -> str:
        """The class of transformers that loads it."""
        if self.head is not None:
            return "AutoModelForSequenceClassification"
        return "AutoModelForImageTextToText" if self.reads_images else "AutoModelForCausalLM"

    @property
    def reader(self) -> str:
        """What turns messages into tokens, the name of its variable."""
        return "processor" if self.reads_images else "tokenizer"

    @property
    def reader_class(self) -> str:
        return f"Auto{self.reader.capitalize()}"


@dataclass(frozen=True)
class Base:
    """The base model of an adapter."""

    name: str
    """Its Hub id, or the name of its folder."""
    is_local: bool = False
    package: tuple[str, str] | None = None
    """The Python package and the GGUF file in it, if it is there."""
    quantization: str = ""
    """The configuration of its quantization as Python, if the adapter is right for quantized weights alone (LoftQ)."""
    is_configured: bool = False
    """Whether the folder of the adapter has its configuration."""
    is_resized: bool = False
    """Whether it has new tokens."""


def model(use: Use) -> str:
    """The code for a model of its own."""
    loads = f'model = {use.model_class}.from_pretrained(folder, {compat.dtype_keyword()}="auto")'
    return "\n".join([*_head([use.model_class, use.reader_class]), loads, _reader(use), "", *_question(use)])


def adapter(use: Use, base: Base) -> str:
    """The code for an adapter on its base."""
    classes = [use.model_class, use.reader_class]
    classes += ["AutoConfig"] * base.is_configured + ["BitsAndBytesConfig"] * bool(base.quantization)
    lines = [*(["from importlib.util import find_spec"] if base.package else []), "from peft import PeftModel"]
    lines += [*_head(classes), *_base(use, base), "model = PeftModel.from_pretrained(base, folder)"]
    return "\n".join([*lines, _reader(use), "", *_question(use)])


def _head(classes: list[str]) -> list[str]:
    return [f"from transformers import {', '.join(sorted(classes))}", "", 'folder = "."  # the folder of this card']


def _reader(use: Use) -> str:
    return f"{use.reader} = {use.reader_class}.from_pretrained(folder)"


def _base(use: Use, base: Base) -> Iterator[str]:
    """The lines that load the base as ``base``."""
    options = ""
    if base.is_configured:
        yield "config = AutoConfig.from_pretrained(folder)  # with positions, head and padding token of this model"
        options = ", config=config"
    if base.quantization:
        yield "# The adapter corrects the error of 4-bit weights (LoftQ): on other weights it would add that error."
        yield f"quantized = {base.quantization}"
        options = f", quantization_config=quantized{options}"
    load = f"base = {use.model_class}.from_pretrained"
    if base.package is None:
        note = "  # replace by the path of this base model" if base.is_local else ""
        yield f"{load}({base.name!r}{options}){note}"
    else:
        package, file = base.package
        yield f"package = find_spec({package!r}).submodule_search_locations[0]"
        yield f"{load}(package, gguf_file={file!r}{'' if base.quantization else options})"
        yield from _unpacked(use, f'{load}("base"{options})') if base.quantization else ()
    if base.is_resized:
        yield f"{_reader(use)}  # with the new tokens"
        tokens = use.reader if use.reader == "tokenizer" else f"{use.reader}.tokenizer"
        yield f"base.resize_token_embeddings(max(len({tokens}), base.config.vocab_size))"


def _unpacked(use: Use, load: str) -> Iterator[str]:
    """The lines that write a GGUF file as plain weights, and load these."""
    yield "# transformers does not quantize GGUF files: write the weights to a folder first"
    yield "del base.config.quantization_config"
    yield f"plain = {use.model_class}.from_config(base.config)"
    yield "plain.load_state_dict(base.state_dict())"
    yield 'plain.save_pretrained("base")'
    yield load


def _question(use: Use) -> Iterator[str]:
    """The lines that ask the model, and print what it answers."""
    asked, tokenize = '"Hello!"', ""
    if use.reads_images:
        asked = '[{"type": "image", "path": "a.png"}, {"type": "text", "text": "What is this?"}]'
        tokenize = "tokenize=True, "
    turns = [f'{{"role": "user", "content": {asked}}}']
    turns += ['{"role": "assistant", "content": "Hi, how are you?"}'] * (use.head is not None)
    prompt = "" if use.head is not None else "add_generation_prompt=True, "
    if use.is_chat:
        yield f"messages = [{', '.join(turns)}]"
        options = f'{prompt}{tokenize}return_dict=True, return_tensors="pt"'
        yield f"inputs = {use.reader}.apply_chat_template(messages, {options})"
    else:
        yield f'inputs = {use.reader}("Once upon a time", return_tensors="pt")'
    if use.head is not None:
        yield f"scores = model.eval()(**inputs).logits[0]{OF_PROBLEM.get(use.head.problem, '')}"
        yield "print(dict(zip(model.config.id2label.values(), scores.tolist())))"
    elif use.is_chat:
        yield "answer = model.generate(**inputs, max_new_tokens=100)"
        yield f'print({use.reader}.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))'
    else:
        yield f"print({use.reader}.decode(model.generate(**inputs, max_new_tokens=100)[0], skip_special_tokens=True))"
