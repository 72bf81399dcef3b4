"""The verb ``generate``: ask a trained model, once or in a conversation, alone or beside what it was made from."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from runner import terminal
from runner.cli import args
from runner.errors import ConfigError, DataError, Fault, RunnerError
from runner.train import trained
from runner.train.report import NOTHING
from runner.train.trained import Trained

HELP = """python -m runner generate RUN [PROMPT|-] [--compare] [--system TEXT] [--max-new-tokens N] [--temperature T] [--seed N]

Asks the model that a run has trained: its base, quantized as in training, with its adapter, by its chat template.

  python -m runner generate outputs/2026-01-31/12-00-00 "What is a sweep?"
  python -m runner generate first --compare "What is a sweep?"     the base and the fine-tuned model, side by side
  cat question.txt | python -m runner generate first -
  python -m runner generate first                                  a conversation: /reset forgets it, /quit or Ctrl-D ends

RUN is a run folder, a name, or the beginning (4 characters or more) of an MLflow run id.
  --compare           ask the base as well; the model is loaded once
  --system TEXT       a system prompt
  --max-new-tokens N  the longest answer (256)
  --temperature T     0, the default, takes the likeliest token each time; above it, draw
  --seed N            of what is drawn (0)
  model.path=FOLDER   where the base model lies now, if not where it lay
  --                  what follows is a prompt, even if it begins with -"""  # noqa: E501

BASE, TUNED = "base", "fine-tuned"
Turn = dict[str, str]


def main(argv: list[str]) -> int:
    """The verb; returns the exit code.

    Raises:
        ConfigError: no RUN, one without a model, or an option that cannot take effect.
        DataError: a prompt that the model cannot take.
    """
    valued = ("--system", "--max-new-tokens", "--temperature", "--seed")
    words = args.read(argv, HELP, flags=("--compare",), valued=valued)
    if words is None:
        return 0
    settings = _settings(words)
    run, rest = args.trained_run(words, "generate", HELP.splitlines()[0])
    if len(rest) > 1:
        raise ConfigError(Fault("generate", "takes one prompt", "put it in quotes", " ".join(rest)))
    prompt = sys.stdin.read() if rest == ["-"] else rest[0] if rest else None
    if prompt is not None and not prompt.strip():
        raise ConfigError(Fault("PROMPT", "is empty", "give a text, or none for a conversation"))
    if settings.system is not None and run.task.name == "pretrain":
        raise ConfigError(Fault("--system", "has no effect: this run continues plain text", "leave it out"))
    prompts = _prompts() if prompt is None else iter(())
    speakers = _load(run, compare=words.has("--compare"))
    if prompt is None:
        _converse(run, speakers, settings, prompts)
    else:
        _answer(run, speakers, settings, [_History(settings.system) for _ in speakers], prompt)
    return 0


@dataclass(frozen=True)
class Settings:
    """How answers are made."""

    system: str | None
    max_new_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class _Speaker:
    """A model to be asked: what it is called, and the model while the block runs."""

    name: str
    speaking: Callable[[], AbstractContextManager[Any]]


@dataclass
class _History:
    """What one speaker was told and has said."""

    system: str | None
    turns: list[Turn] = field(default_factory=list)

    def messages(self, prompt: str) -> list[Turn]:
        first = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*first, *self.turns, {"role": "user", "content": prompt}]


def prompt_text(run: Trained, messages: list[Turn]) -> str:
    """What the model is given: the conversation by its chat template; of a run on plain text the last words alone."""
    from runner.data import chat_template

    if run.task.name != "pretrain":
        return chat_template.prompt(messages, run.tokenizer)
    text, start = messages[-1]["content"], run.tokenizer.bos_token_id
    begins = start is not None and run.tokenizer("a")["input_ids"][:1] == [start]
    return f"{run.tokenizer.bos_token}{text}" if begins else text


def _settings(words: args.Args) -> Settings:
    temperature = words.number("--temperature", 0, least=0, whole=False)
    if words.has("--seed") and not temperature:
        remedy = "add --temperature 0.7, or leave it out"
        raise ConfigError(Fault("--seed", "has no effect: without --temperature nothing is drawn", remedy))
    return Settings(
        words.options.get("--system"),
        int(words.number("--max-new-tokens", 256, least=1)),
        temperature,
        int(words.number("--seed", 0, least=0)),
    )


def _load(run: Trained, *, compare: bool) -> list[_Speaker]:
    from runner.train import inputs

    trained.quiet()
    device = inputs.pick_device()
    model = trained.load(run, device)
    tuned = _Speaker(TUNED, lambda: nullcontext(model))
    if not compare:
        return [tuned]
    if trained.has_base_inside(model):
        return [_Speaker(BASE, lambda: trained.without_adapter(model)), tuned]
    base = trained.load_base(run, device)
    return [_Speaker(BASE, lambda: nullcontext(base)), tuned]


def _answer(
    run: Trained, speakers: list[_Speaker], settings: Settings, histories: list[_History], prompt: str
) -> list[str]:
    """Each speaker's answer, shown as it comes, or side by side; the histories are not touched."""
    alone = len(speakers) == 1
    answers = []
    for speaker, history in zip(speakers, histories, strict=True):
        with speaker.speaking() as model:
            answers.append(_ask(run, model, settings, history.messages(prompt), streams=alone))
    if not alone:
        terminal.table("", [speaker.name for speaker in speakers], [[answer or NOTHING for answer in answers]])
    elif not answers[0]:
        print(NOTHING, file=sys.stderr)
    return answers


def _ask(run: Trained, model: Any, settings: Settings, messages: list[Turn], *, streams: bool) -> str:
    import torch
    from transformers import TextStreamer

    from runner.data import chat_template
    from runner.train import generate

    text = prompt_text(run, messages)
    room = _room(model, len(run.tokenizer(text, add_special_tokens=False)["input_ids"]))
    streamer = TextStreamer(run.tokenizer, skip_prompt=True, skip_special_tokens=True) if streams else None
    stop = None if run.task.name == "pretrain" else chat_template.end_of_turn(run.tokenizer)
    torch.manual_seed(settings.seed)
    (answer,) = generate.generate(
        model,
        run.tokenizer,
        [text],
        min(settings.max_new_tokens, room),
        temperature=settings.temperature,
        stop=stop,
        streamer=streamer,
    )
    return answer


def _room(model: Any, taken: int) -> int:
    """How many tokens may follow a prompt of so many.

    Raises:
        DataError: none.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    if taken >= limit:
        problem = f"the prompt has {taken} tokens, and the model was built for {limit} positions"
        raise DataError(Fault("", problem, "shorten it; in a conversation /reset begins anew"))
    return int(limit - taken)


def _prompts() -> Iterator[str]:
    """What is asked in a conversation: typed, or a line each of what is piped in, which has to begin with one.

    Raises:
        ConfigError: nothing is piped in.
    """
    if sys.stdin.isatty():
        return _typed()
    if not (first := sys.stdin.readline()):
        raise ConfigError(Fault("PROMPT", "nothing came from stdin", "give a text, or pipe in a question a line"))
    return chain([first], sys.stdin)


def _typed() -> Iterator[str]:
    import readline  # noqa: F401 (gives input() its arrow keys)

    with suppress(EOFError):
        while True:
            yield input("> ")


def _converse(run: Trained, speakers: list[_Speaker], settings: Settings, prompts: Iterator[str]) -> None:
    """A conversation; each speaker remembers its own answers."""
    if sys.stdin.isatty():
        print(f"{terminal.nearest(run.rundir.path)}: /reset forgets the conversation, /quit ends it", file=sys.stderr)
    histories = [_History(settings.system) for _ in speakers]
    for prompt in map(str.strip, prompts):
        if prompt == "/quit":
            return
        if prompt == "/reset":
            histories = [_History(settings.system) for _ in speakers]
        elif prompt.startswith("/"):
            print(f"{prompt.split()[0]}: no such command; /reset and /quit are", file=sys.stderr)
        elif prompt:
            _exchange(run, speakers, settings, histories, prompt)


def _exchange(
    run: Trained, speakers: list[_Speaker], settings: Settings, histories: list[_History], prompt: str
) -> None:
    """One question and its answers; one that was interrupted or refused is forgotten."""
    try:
        answers = _answer(run, speakers, settings, histories, prompt)
    except KeyboardInterrupt:
        print("\ninterrupted; this question is forgotten", file=sys.stderr)
        return
    except RunnerError as error:
        print(error, file=sys.stderr)
        return
    for history, answer in zip(histories, answers, strict=True):
        history.turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
