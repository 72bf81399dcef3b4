"""Every key of every option with odd values: a refusal with a remedy, or a configuration that makes sense.

In process, up to the checks before a run folder is written: nothing is loaded, nothing is trained.
"""

from __future__ import annotations

import copy
import functools
import math
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from test_yaml import OPTIONS, TOGETHER, WANTED, name_of

from runner.cli import jobs
from runner.config import bind, command_line, compose
from runner.config.job import Job
from runner.errors import ConfigError, RunnerError
from runner.launch import prepare

ODD = (
    "", "' '", "null", "true", "[]", "[1,2]", "{}", "{a:1}", "-1", "0", "0.5", "1e-300", "1e300", "inf", "nan",
    "9" * 350, "..", "../../x", "/nowhere/x", "'\t'", "-0.0", "[[[]]]", "ünïcödé", "[null]", "['']",
)  # fmt: skip
"""As they are written in overrides."""
SEED, PER_KEY, PER_WORD = 20261129, 20, 6
"""Which of the odd values each key gets."""


def leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")


def is_nonsense(value: object) -> bool:
    """Whether no key can mean this value: an empty text, no number, or one that float32 cannot compute with."""
    if isinstance(value, str):
        return not value.strip() or "\t" in value
    if isinstance(value, bool) or value is None:
        return False
    if isinstance(value, int | float):
        return abs(value) > 2**63 or not math.isfinite(value)  # an int may be too large for a float
    return any(map(is_nonsense, value.values() if isinstance(value, Mapping) else value))  # type: ignore[call-overload]


@pytest.fixture(autouse=True)
def _in_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "rows.jsonl").write_text('{"text": "a row"}\n')
    (folder / "rows.py").write_text("def to_text(row):\n    return row['text']\n")
    return {"rows": folder / "rows.jsonl", "function": folder / "rows.py"}


def admitted(job: Job) -> dict[str, Any]:
    """The configuration as it would be frozen, after all checks before anything is written."""
    prepare.admit([job])
    prepare.launcher_of(job.cfg)
    return job.cfg


@functools.cache
def parsed(text: str) -> Any:
    """The value as Hydra reads it."""
    return OverridesParser.create().parse_override(f"name={text}").value()


def outcome(job: Job, key: str, text: str) -> str:
    """What is wrong with how ``key=text`` is taken; empty if it is refused clearly, or makes sense."""
    word = f"{key}={text}"
    try:
        value = parsed(text)
        changed = copy.copy(job)
        changed.cfg = copy.deepcopy(job.cfg)
        *above, last = key.split(".")
        node = changed.cfg
        for part in above:
            node = node[part]
        node[last] = copy.deepcopy(value)
        admitted(changed)
    except HydraException:
        return ""  # is refused before: see the words below
    except RunnerError as error:
        unclear = [fault for fault in error.faults if not fault.remedy or not fault.problem]
        return f"{word}: refused without a remedy: {error}" if unclear or error.exit_code != 2 else ""
    except Exception as error:
        return f"{word}: {type(error).__name__}: {error}"[:300]
    return f"{word}: accepted" if is_nonsense(node[last]) else ""


SEVERAL = {f"parallel={name}": ["launcher=accelerate", "launcher.processes=2"] for name in ("ddp", "fsdp")}
GROUPS = sorted({path.parent for path in OPTIONS})


@pytest.mark.parametrize("folder", GROUPS, ids=lambda folder: "-".join(folder.relative_to(bind.config_dir()).parts))
def test_every_key_of_a_group_refuses_nonsense(folder: Path, rows: dict[str, Path]):
    seen: set[str] = set()
    told = [line for path in OPTIONS if path.parent == folder for line in told_of(name_of(path), rows, seen)]
    assert seen or all(len(bind.option(*_of(path))) == 1 for path in OPTIONS if path.parent == folder)
    assert told == []


def _of(path: Path) -> tuple[str, str]:
    return str(path.parent.relative_to(bind.config_dir())), path.stem


def told_of(choice: str, rows: dict[str, Path], seen: set[str]) -> list[str]:
    """What is wrong with this option; keys of a function that is in ``seen`` were tried with another option."""
    values = [value.format(**rows) for value in {**WANTED, **TOGETHER, **SEVERAL}.get(choice, [])]
    place = choice.partition("=")[0].replace("/", ".")
    args = command_line.parse([*(["-m"] if place == "search" else []), choice, *values])
    dice = random.Random(f"{SEED} {choice}")
    with command_line.opened(args) as hydra:
        composer = compose.Composer(hydra, args)
        (job,) = composer.jobs([args.overrides])
        admitted(copy.deepcopy(job))
        node: Any = job.cfg
        for part in place.split("."):
            node = node[part]
        marked = {f"{place}.{key}": f"{node.get(bind.TARGET)} {key}" for key in leaves(node)}
        if choice == "task=sft":
            marked |= {key: key for key in job.cfg if not isinstance(job.cfg[key], Mapping)}
        keys = [key for key, mark in marked.items() if mark not in seen and not key.endswith(bind.TARGET)]
        seen |= {marked[key] for key in keys}
        told = [outcome(job, key, text) for key in keys for text in dice.sample(ODD, PER_KEY)]
    return [line for line in told if line]


WORDS = (
    "{key}=", "{key}=[1,2]", "~{key}", "{key}=null", "{key}={{a:1}}", "+{key}=1", "++{key}=[]", "{key}=5",
    "{key}=${{x}}",
    "{key}=" + "[" * 60 + "]" * 60, "{key}=" + "[" * 5000, "{key}=" + "9" * 5000, "{key}=1e" + "9" * 20, "{key}=\udcff",
    "{key}=\x1b[31m", "{key}='", "{key}=a,b", "{key}=range(1)", "{key}=choice()", "{key}.x.y=1", "{key}/x=y", "={key}",
)  # fmt: skip
"""Whole words of a command line."""


def test_every_group_and_top_level_key_refuses_odd_words():
    dice = random.Random(SEED)
    with jobs.composed([]) as (_, found):
        keys = [*found[0].cfg, "experiment", "data/format", "hydra", "hydra.run.dir", "hydra.sweep.dir", "hydra.mode",
                "hydra.output_subdir", "hydra.sweep.subdir", "hydra/launcher", "hydra.sweeper"]  # fmt: skip
    told = [
        fault for key in keys for word in dice.sample(WORDS, PER_WORD) for fault in _word_faults(word.format(key=key))
    ]
    assert told == []


MAY_BE = {"++seed=[]", "+retry=1", "++code=[]"}


def _word_faults(word: str) -> Iterator[str]:
    try:
        with jobs.composed([word]) as (_, found):
            bad = [key for key in found[0].cfg if is_nonsense(found[0].cfg[key])]
    except RunnerError as error:
        if error.exit_code != 2 or not isinstance(error, ConfigError):
            yield f"{word[:80]}: {error}"
        str(error).encode()
    except Exception as error:
        yield f"{word[:80]}: {type(error).__name__}: {error}"[:300]
    else:
        yield from (f"{word[:80]}: accepted: {key}" for key in bad if not isinstance(found[0].cfg[key], Mapping))
