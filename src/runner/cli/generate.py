"""The verb ``generate``: prompt or chat with a trained model, and optionally with its base model to compare."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le

from runner import streams, terminal
from runner.cli import serving
from runner.cli.args import MODEL_PATH, RUN, Args, Option, Verb, trained_run
from runner.cli.local_server import LAST_PORT
from runner.config import schema
from runner.data import images
from runner.data.images import Reference
from runner.errors import ConfigError, DataError, Fault, RunnerError, refuse
from runner.train import trained_model
from runner.train.run_summary import NOTHING
from runner.train.trained_model import Trained

VERB = Verb(
    "generate RUN [PROMPT|-]",
    f"""Generates answers with the model of a run: the base model, quantized as in training, with the adapter and the
chat template of the run.

  python -m runner generate outputs/2026-01-31/12-00-00 "What is a sweep?"
  python -m runner generate first --compare "What is a sweep?"     base and fine-tuned model side by side
  python -m runner generate first --image a.png "What is this?"    a question about an image
  cat question.txt | python -m runner generate first -
  python -m runner generate first                                  a chat: /reset clears it, /quit or Ctrl-D ends it
  python -m runner generate first --serve                          OpenAI's API on this machine, until Ctrl-C

{RUN}.
After -- a PROMPT may begin with -.""",
    Option("--compare", "the base model as well; the weights are loaded once"),
    Option("--system TEXT", "a system prompt; default: data.system_prompt of the run"),
    Option("--image FILE", "an image for the model to look at, before the PROMPT"),
    Option("--max-new-tokens N", "maximum tokens of an answer", schema.Count, 256),
    Option("--temperature T", "0: greedy decoding; above 0: sampling", schema.NotNegative, 0.0),
    Option("--seed N", "seed of the sampling", schema.Seed),
    Option("--serve", "serve the model with OpenAI's API: by vLLM where it is installed, else by transformers"),
    Option("--port N", "of --serve; default: 8000, or the next free port", Annotated[int, Ge(1), Le(LAST_PORT)]),
    MODEL_PATH,
)

BASE, TUNED = "base", "fine-tuned"
Turn = dict[str, str]


@streams.piped()
def main(argv: list[str]) -> int:
    """The verb; returns the exit code.

    Raises:
        ConfigError: no RUN, a run without a model, or an option without effect.
        DataError: a prompt that is too long for the model.
    """
    args = VERB.read(argv)
    settings = _settings(args)
    run, others = trained_run(VERB, args)
    if run.scores:
        remedy = f"evaluate it: python -m runner evaluate {terminal.typed(terminal.nearest(run.rundir.path))}"
        raise ConfigError(Fault("generate", "the model of this run gives scores, not text", remedy))
    if args["--serve"]:
        refuse(_without_effect(args, others))
        return serving.serve(run, args["--port"])
    if args["--port"]:
        raise ConfigError(Fault("--port", "has no effect without --serve", "leave it out, or add --serve"))
    if len(others) > 1:
        raise ConfigError(Fault("generate", "takes one prompt", "put it in quotes", " ".join(others)))
    prompt = sys.stdin.read() if others == ["-"] else others[0] if others else None
    if prompt is not None and not prompt.strip():
        raise ConfigError(Fault("PROMPT", "is empty", "give a text, or no PROMPT for a chat"))
    if args["--image"]:
        settings = replace(settings, image=_image(run, args["--image"], prompt))
    if settings.system is not None and not run.is_chat:
        raise ConfigError(Fault("--system", "has no effect: this run continues plain text", "leave it out"))
    if settings.system is None and run.is_chat:
        settings = replace(settings, system=run.cfg["data"].get("system_prompt"))
    prompts = _prompts() if prompt is None else iter(())
    models = _load(run, compare=args["--compare"])
    if prompt is None:
        _chat(run, models, settings, prompts)
    else:
        _answer(run, models, settings, [_History(settings.system) for _ in models], prompt)
    return 0


def _without_effect(args: Args, others: list[str]) -> Iterator[Fault]:
    """What a server takes from each request instead."""
    remedy = "leave it out: each request has its own"
    if others:
        yield Fault("PROMPT", "has no effect with --serve", remedy, " ".join(others))
    for option in ("--compare", "--image", "--system", "--max-new-tokens", "--temperature", "--seed"):
        default = next(each.default for each in VERB.options if each.names[-1] == option)
        if args[option] not in (None, False, default):
            yield Fault(option, "has no effect with --serve", remedy)


@dataclass(frozen=True)
class Settings:
    """How answers are generated."""

    system: str | None
    max_new_tokens: int
    temperature: float
    seed: int
    image: Reference | None = None
    """An image before the prompt."""


@dataclass(frozen=True)
class _Model:
    """A model to prompt: its title, and a context manager that yields the model."""

    name: str
    active: Callable[[], AbstractContextManager[Any]]


@dataclass
class _History:
    """The conversation with one model."""

    system: str | None
    turns: list[Turn] = field(default_factory=list)

    def messages(self, prompt: str) -> list[Turn]:
        first = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*first, *self.turns, {"role": "user", "content": prompt}]


def prompt_text(run: Trained, messages: list[Turn]) -> str:
    """The input text: the chat template applied to the messages; for a pretrain run, the last message alone."""
    from runner.data import chat_template

    if run.is_chat:
        return chat_template.prompt(messages, run.tokenizer)
    text, bos = messages[-1]["content"], run.tokenizer.bos_token_id
    adds_bos = bos is not None and run.tokenizer("a")["input_ids"][:1] == [bos]
    return f"{run.tokenizer.bos_token}{text}" if adds_bos else text


def _settings(args: Args) -> Settings:
    if args["--seed"] is not None and not args["--temperature"]:
        problem = "has no effect without --temperature: greedy decoding is deterministic"
        raise ConfigError(Fault("--seed", problem, "add --temperature 0.7, or leave it out"))
    return Settings(args["--system"], args["--max-new-tokens"], args["--temperature"], args["--seed"] or 0)


def _load(run: Trained, *, compare: bool) -> list[_Model]:
    from runner.tasks import sampling
    from runner.train import devices

    trained_model.quiet()
    device = devices.pick()
    model = trained_model.load(run, device)
    tuned = _Model(TUNED, lambda: nullcontext(model))
    if not compare:
        if run.is_adapter:
            sampling.merge(model)
        return [tuned]
    if trained_model.has_base_inside(model):
        return [_Model(BASE, lambda: trained_model.without_adapter(model)), tuned]
    base = trained_model.load_base(run, device)
    return [_Model(BASE, lambda: nullcontext(base)), tuned]


def _answer(
    run: Trained, models: list[_Model], settings: Settings, histories: list[_History], prompt: str
) -> list[str]:
    """The answer of each model: one model is streamed, several are printed side by side. Histories do not change."""
    alone = len(models) == 1
    answers = []
    for each, history in zip(models, histories, strict=True):
        with each.active() as model:
            answers.append(_generate(run, model, settings, history.messages(prompt), streams=alone))
    if not alone:
        terminal.table("", [each.name for each in models], [[answer or NOTHING for answer in answers]])
    elif not answers[0]:
        print(NOTHING, file=sys.stderr)
    return answers


def _generate(run: Trained, model: Any, settings: Settings, messages: list[Turn], *, streams: bool) -> str:
    import torch
    from transformers import TextStreamer

    from runner.data import chat_template
    from runner.train import text_generation

    pictures = [settings.image] if settings.image is not None else []
    if pictures:
        messages = [*messages[:-1], {**messages[-1], "content": images.MARK + messages[-1]["content"]}]
    text = prompt_text(run, messages)
    limit = _max_new_tokens(model, len(run.tokenizer(text, add_special_tokens=False)["input_ids"]))
    streamer = TextStreamer(run.tokenizer, skip_prompt=True, skip_special_tokens=True) if streams else None
    stop = None if not run.is_chat else chat_template.end_of_turn(run.tokenizer)
    torch.manual_seed(settings.seed)
    (answer,) = text_generation.generate(
        model,
        run.tokenizer,
        [text],
        min(settings.max_new_tokens, limit),
        temperature=settings.temperature,
        stop=stop,
        streamer=streamer,
        pictures=pictures,
    )
    return answer


def _image(run: Trained, path: str, prompt: str | None) -> Reference:
    """The image of ``--image``.

    Raises:
        ConfigError: the model reads text alone, or there is no PROMPT.
        DataError: there is no such image.
    """
    if not run.reads_images:
        raise ConfigError(Fault("--image", "has no effect: the model reads text alone", "leave it out", path))
    if prompt is None:
        raise ConfigError(Fault("--image", "needs a PROMPT, which is asked about it", 'add one: "What is this?"', path))
    reference = images.settled({"path": path}, Path.cwd())
    images.opened(reference)
    return reference


def _max_new_tokens(model: Any, prompt_tokens: int) -> int:
    """How many tokens fit into the model's positions after the prompt.

    Raises:
        DataError: the prompt uses all positions.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    if prompt_tokens >= limit:
        problem = f"the prompt has {prompt_tokens} tokens, but the model has only {limit} positions"
        raise DataError(Fault("", problem, "shorten the prompt; in a chat, /reset clears the history"))
    return int(limit - prompt_tokens)


def _prompts() -> Iterator[str]:
    """The prompts of a chat: typed at the terminal, or one per line of stdin.

    Raises:
        ConfigError: stdin is empty.
    """
    if sys.stdin.isatty():
        return _typed()
    if not (first := sys.stdin.readline()):
        raise ConfigError(Fault("PROMPT", "stdin is empty", "give a PROMPT, or pipe in one prompt per line"))
    return chain([first], sys.stdin)


def _typed() -> Iterator[str]:
    import readline  # noqa: F401 (enables arrow keys in input())

    with suppress(EOFError):
        while True:
            yield input("> ")


def _chat(run: Trained, models: list[_Model], settings: Settings, prompts: Iterator[str]) -> None:
    """Chat until the prompts end; each model has its own history."""
    if sys.stdin.isatty():
        print(f"{terminal.nearest(run.rundir.path)}: /reset clears the conversation, /quit ends it", file=sys.stderr)
    histories = [_History(settings.system) for _ in models]
    for prompt in map(str.strip, prompts):
        if prompt == "/quit":
            return
        if prompt == "/reset":
            histories = [_History(settings.system) for _ in models]
        elif prompt.startswith("/"):
            print(f"{prompt.split()[0]}: no such command; use /reset or /quit", file=sys.stderr)
        elif prompt:
            _exchange(run, models, settings, histories, prompt)


def _exchange(run: Trained, models: list[_Model], settings: Settings, histories: list[_History], prompt: str) -> None:
    """One prompt and its answers; an interrupted or refused prompt is not added to the history."""
    try:
        answers = _answer(run, models, settings, histories, prompt)
    except KeyboardInterrupt:
        print("\ninterrupted; this prompt is not kept in the history", file=sys.stderr)
        return
    except RunnerError as error:
        print(error, file=sys.stderr)
        return
    for history, answer in zip(histories, answers, strict=True):
        history.turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
