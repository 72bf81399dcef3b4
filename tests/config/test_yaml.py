"""Every YAML of conf/: it composes, it passes every check, it says how it is used and what each key means."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from runner.config import bind, check, data_nodes

CONF = bind.config_dir()
PRESETS = sorted(CONF.glob("experiment/*.yaml"))
FILES = sorted(path for path in CONF.rglob("*.yaml") if path.name != "config.yaml" and path not in PRESETS)
OPTIONS = [path for path in FILES if path.stem != "base"]
SOURCES = [path.stem for path in OPTIONS if path.parent == CONF / "data"]
FORMATS = [path.stem for path in OPTIONS if path.parent == CONF / "data" / "format"]

WANTED = {
    "data=local": ["data.path={rows}"],
    "data=hub": ["data.path=OWNER/NAME"],
    "data=mix": ["+data.sources.one.path={rows}"],
    "task=grpo": ["task.rewards=[{function}:to_text]", "data.packing=false"],
    "data/format=custom": ["data.format.function={function}:to_text"],
    "model=local": ["model.path=OWNER/NAME"],
    "lora=peft": ["lora.method=ia3"],
    "tracking=server": ["tracking.uri=http://127.0.0.1:5000"],
}
"""What the options need that leave a value open (``???``)."""
TOGETHER = {
    "search=asha": ["train.eval_steps=5"],
    "optim=schedule_free": ["schedule=constant"],
    "task=distill": ["quant=4bit"],
    "task=rloo": ["task.rewards=[{function}:to_text]", "data.packing=false"],
}
"""What options need that do not go with every default."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    rows, function = folder / "rows.jsonl", folder / "rows.py"
    rows.write_text('{"text": "a row"}\n')
    function.write_text("def to_text(row):\n    return row['text']\n")
    return {"rows": rows, "function": function}


def name_of(path: Path) -> str:
    """``data/format=text``: what the command line calls an option."""
    return f"{path.parent.relative_to(CONF)}={path.stem}"


def composed(files: dict[str, Path], *choices: str) -> dict[str, Any]:
    """The configuration of these choices, plain, with the values that they leave open."""
    values = [value.format(**files) for choice in choices for value in {**WANTED, **TOGETHER}.get(choice, [])]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        made = compose("config", [*choices, *values])
    assert isinstance(made, DictConfig)
    plain = bind.to_plain(OmegaConf.masked_copy(made, [key for key in made if key != "experiment"]))
    return {**plain, "data": data_nodes.completed(plain["data"])}


@pytest.mark.parametrize("path", OPTIONS, ids=name_of)
def test_every_option_composes_and_passes_every_check(path: Path, files: dict[str, Path]) -> None:
    cfg = composed(files, name_of(path))
    assert check.faults_of(cfg) == []
    for key in path.parent.relative_to(CONF).parts:
        cfg = cfg[key]
    assert _content(path).get(bind.TARGET) in (cfg.get(bind.TARGET), None), "none of its own: it builds on another"


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("form", FORMATS)
def test_every_source_goes_with_every_format(source: str, form: str, files: dict[str, Path]) -> None:
    assert check.faults_of(composed(files, f"data={source}", f"data/format={form}")) == []


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_composes_and_changes_something(path: Path, files: dict[str, Path]) -> None:
    cfg = composed(files, name_of(path))
    assert check.faults_of(cfg) == []
    assert cfg != composed(files)


def test_the_list_of_open_values_is_true() -> None:
    left_open = {name_of(path) for path in FILES if re.search(r":\s*\?\?\?", path.read_text())}
    assert left_open == set(WANTED) - {"data=mix"}, "a mixture has no sources until they are named"


@pytest.mark.parametrize("path", [CONF / "config.yaml", *FILES, *PRESETS], ids=lambda p: str(p.relative_to(CONF)))
def test_every_file_opens_with_its_command(path: Path) -> None:
    first, second = path.read_text().splitlines()[:2]
    if path in PRESETS:
        assert first == "# @package _global_"
        assert second.startswith(f"# python -m runner {name_of(path)}")
        assert second.partition("      ")[2], "what it is for, and the metric it should reach"
    else:
        assert first.startswith("# python -m runner ")
    if path in OPTIONS:
        assert name_of(path) in first or f" {path.parent.name}." in first


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_key_says_what_it_means(path: Path) -> None:
    """Keys of a mapping are explained where the mapping begins; ``_target_`` and ``defaults`` are Hydra's."""
    keys = [line for line in path.read_text().splitlines() if re.match(r"[a-z]\w*:", line)]
    silent = [line for line in keys if not line.startswith("defaults:") and " # " not in line]
    assert not silent


def test_every_option_function_has_a_yaml() -> None:
    """An option is a public function with YAML keys; one that no YAML names is out of everybody's reach."""
    named = {str(node[bind.TARGET]) for node in map(_content, OPTIONS) if bind.TARGET in node}
    rooms = {target.rpartition(".")[0] for target in named}
    offered = {f"{room}.{name}" for room in rooms for name in _options(room)}
    assert len(offered) > 15
    assert offered <= named


def _content(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def _options(room: str) -> Iterator[str]:
    for name, function in inspect.getmembers(importlib.import_module(room), inspect.isfunction):
        if (
            function.__module__ == room
            and not name.startswith(("_", "check_", "like_", "state_values_"))
            and bind.keys_of(function)
        ):
            yield name


def test_the_readme_names_every_option():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    rows = {line.split("`")[1]: line for line in reversed(readme.splitlines()) if line.startswith("| `")}  # the first
    for path in sorted(CONF.rglob("*.yaml")):
        group = path.parent.relative_to(CONF).as_posix()
        if group in rows and group != "train" and path.stem != "base":
            assert f"`{path.stem}`" in rows[group], f"{group}={path.stem} is not in the README"
    assert {"task", "data", "data/format", "optim", "lora", "quant"} <= rows.keys()
