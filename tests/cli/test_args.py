"""The command lines of the verbs."""

from __future__ import annotations

import importlib
from typing import Any, Literal

import pytest

from runner.cli import main
from runner.cli.args import Option, Verb
from runner.config import schema
from runner.errors import ConfigError

VERB = Verb(
    "show RUN",
    "Shows a run.",
    Option("--all", "everything"),
    Option("-f, --follow", "go on"),
    Option("--rank N", "the process", schema.Whole, 0),
    Option("--sort KEY", "the order"),
    Option("--dtype DTYPE", "the numbers", Literal["float32", "float16"]),
    Option("tracking.uri=URI, uri=URI", "the store"),
)


@pytest.mark.parametrize(
    ("argv", "words", "values"),
    [
        ([], [], {"--all": False, "--rank": 0, "--sort": None, "uri": None, "outputs_dir": "outputs"}),
        (["a", "--rank=2", "-f", "lora.r=8"], ["a", "lora.r=8"], {"--rank": 2, "--follow": True}),
        (["--rank", "2", "a", "--all", "b"], ["a", "b"], {"--rank": 2, "--all": True}),
        (["--sort", "-loss", "-"], ["-"], {"--sort": "-loss"}),
        (["uri=sqlite:///a=b", "a", "--follow"], ["a"], {"uri": "sqlite:///a=b", "--follow": True}),
        (["a", "tracking.uri=x", "outputs_dir=."], ["a"], {"uri": "x", "outputs_dir": "."}),
        (["a", "--all", "--", "--rank", "uri=x", "-b"], ["a", "--rank", "uri=x", "-b"], {"--rank": 0, "uri": None}),
        (["--dtype", "float16", ""], [""], {"--dtype": "float16"}),
    ],
)
def test_options_and_keys_may_be_anywhere(argv: list[str], words: list[str], values: dict[str, Any]):
    args = VERB.read(argv)
    assert args.words == words
    assert {name: args[name] for name in values} == values


@pytest.mark.parametrize(
    ("argv", "faults"),
    [
        (["--al"], ["--al: no such option\n    → did you mean '--all'?"]),
        (["--folow=x"], ["--folow=x: no such option\n    → did you mean '--follow'?"]),
        (["-x"], ["-x: no such option\n    → python -m runner show RUN [--all] [-f, --follow] [--rank N]"]),
        (["--rank"], ["--rank: needs a value\n    → --rank N: the process (a whole number >= 0; default: 0)"]),
        (["--rank", "--", "2"], ["--rank: needs a value"]),
        (["--sort", "--all"], ["--sort: needs a value"]),
        (["uri="], ["uri: needs a value\n    → tracking.uri=URI, uri=URI: the store"]),
        (["--rank", "-1"], ["--rank=-1: must be a whole number >= 0"]),
        (["--rank=1.5"], ["--rank=1.5: must be a whole number >= 0"]),
        (["--rank=inf"], ["--rank=inf: must be a whole number >= 0"]),
        (["--dtype=float61"], ["--dtype=float61: did you mean 'float16'? allowed: one of float32, float16"]),
        (["--sort", "a", "--sort=b"], ["--sort: is given more than once"]),
        (["uri=a", "tracking.uri=a"], ["uri: is given more than once"]),
        (["--all=yes"], ["--all: takes no value"]),
        (["-fx"], ["-f/--follow: takes no value"]),
        (["outputs_dir=no/where"], ["outputs_dir=no/where: is not a folder"]),
        (["--no", "--rank=x", "uri="], ["--no: no such option", "--rank=x: must be", "uri: needs a value"]),
    ],
)
def test_every_fault_has_a_message_of_ours(argv: list[str], faults: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ConfigError) as refused:
        VERB.read(argv)
    assert len(refused.value.faults) == len(faults)
    for fault, text in zip(refused.value.faults, faults, strict=True):
        assert str(fault).startswith(text)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", main.VERBS)
def test_the_help_of_a_verb(name: str, capsys: pytest.CaptureFixture[str]):
    verb = importlib.import_module(f"runner.cli.{name}").VERB
    assert main.run([name, "x", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"python -m runner {name} ")
    assert max(map(len, lines)) <= 120
    for option in verb.options:
        assert [line for line in lines if line.startswith(f"  {option.usage}  ")], option.usage
    assert len([line for line in lines if line.strip().startswith(f"python -m runner {name}")]) >= 2
