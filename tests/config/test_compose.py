"""Jobs are composed once and fast, and come out as Hydra itself would compose them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fixtures.composed_jobs import jobs_of
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from runner.cli import jobs as cli_jobs
from runner.config import compose
from runner.config.bind import config_dir
from runner.errors import ConfigError

GRIDS = (
    ["lora.r=4,8", "seed=1"],
    ["quant=none,4bit", "lora.r=4,8,16", "optim=lion", "optim.learning_rate=1e-4,3e-4"],
    ["experiment=qlora,smoke", "lora.r=32"],
    ["lora=lora,dora", "lora.target_modules=[q_proj],[q_proj,v_proj]", "train.max_steps=3"],
    ["data=local", "data/format=alpaca,messages", "data.path=a.jsonl", "lora.lora_alpha=choice(1,2)"],
    ["lora=peft", "lora.method=LoKr", "+lora.rank=2,4", "seed=range(2)"],
)


@pytest.mark.parametrize("arguments", GRIDS, ids=lambda grid: " ".join(grid)[:40])
def test_each_job_is_what_hydra_composes(arguments: list[str]):
    jobs = jobs_of(arguments)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        for job in jobs:
            expected = OmegaConf.to_container(hydra_compose("config", job.overrides), resolve=True)
            assert isinstance(expected, dict)
            expected.pop("experiment", None)
            assert {**job.cfg, "sweep": None} == expected


def test_the_defaults_list_is_built_once_for_each_choice_of_groups(monkeypatch: pytest.MonkeyPatch):
    from hydra._internal.hydra import Hydra

    composed, original = [], Hydra.compose_config

    def counted(self: Hydra, *args: object, **kwargs: object) -> object:
        composed.append(args)
        return original(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Hydra, "compose_config", counted)
    assert len(jobs_of(["quant=none,4bit", "seed=range(40)"])) == 80
    assert len(composed) == 2


def test_what_refers_to_hydra_is_of_its_own_job():
    named = "name='${hydra:runtime.choices.quant}-${hydra:job.num}-r${lora.r}'"
    folder = "hydra.sweep.subdir=${hydra.job.override_dirname}"
    jobs = jobs_of(["lora.r=4,8", "quant=none,8bit", named, folder])
    assert [job.cfg["name"] for job in jobs] == ["none-0-r4", "8bit-1-r4", "none-2-r8", "8bit-3-r8"]
    assert len({job.folder for job in jobs}) == 4
    assert all(f"lora.r={job.cfg['lora']['r']}" in job.folder for job in jobs)
    jobs = jobs_of(["lora.r=4,8", "sweep='${hydra:runtime.choices.quant}'"])
    assert [job.cfg["sweep"] for job in jobs] == ["none", "none"]


def test_a_folder_may_contain_the_number_of_its_job():
    with cli_jobs.composed(["-m", "model=tiny", "seed=1,2", "sweep=s", "hydra.sweep.subdir=x/${hydra.job.num}"]) as (
        _,
        both,
    ):
        assert [job.folder.partition("/s/")[2] for job in both] == ["x/0", "x/1"]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["quant=none,4bit", "lora.r=4,8"], "lora.r+quant"),
        (["lora.r=8,4,2", "quant=4bit,none", "seed=3"], "lora.r+quant"),
        (["data/format=alpaca,messages", "data=local", "data.path=x"], "data.format"),
        (["seed=1,2", "sweep=mine"], "mine"),
    ],
)
def test_a_sweep_is_named_by_its_swept_keys(arguments: list[str], name: str):
    jobs = jobs_of(arguments)
    assert {job.cfg["sweep"] for job in jobs} == {name}
    assert {Path(job.sweep_dir).name for job in jobs} == {name}


def test_long_names_of_sweeps_differ_with_their_keys():
    keys = [f"group.some_long_key_{number}" for number in range(20)]
    names = {compose.named_by(keys), compose.named_by(keys[:-1]), compose.named_by(reversed(keys))}
    assert len(names) == 2
    assert {len(name) for name in names} == {120}


def test_the_folder_of_a_sweep_is_resolved_once(monkeypatch: pytest.MonkeyPatch):
    jobs = jobs_of(["seed=range(30)", "hydra.sweep.dir=/tmp/x/${now:%f}"])
    assert len({job.sweep_dir for job in jobs}) == 1


def preset(folder: Path, name: str, text: str) -> None:
    (folder / "experiment").mkdir(parents=True, exist_ok=True)
    (folder / "experiment" / f"{name}.yaml").write_text(f"# @package _global_\n{text}\n")


@pytest.mark.parametrize(
    ("text", "key"),
    [("defaults: [override /search: random]", "search"), ("sweep: mine", "sweep"), ("retry: true", "retry"),
     ("outputs_dir: elsewhere", "outputs_dir"), ("resume: auto", "resume"),
     ("hydra: {sweep: {dir: elsewhere}}", "hydra.sweep.dir")],
)  # fmt: skip
@pytest.mark.parametrize("order", ["own,qlora", "qlora,own"])
def test_a_swept_preset_cannot_set_what_is_the_whole_sweeps(text: str, key: str, order: str, tmp_path: Path):
    preset(tmp_path, "own", text)
    with pytest.raises(ConfigError) as caught:
        jobs_of([f"experiment={order}"], "--config-dir", str(tmp_path))
    assert key in [fault.key for fault in caught.value.faults]
    assert "on the command line" in str(caught.value)


def test_what_all_swept_presets_say_alike_is_the_sweeps(tmp_path: Path):
    for name in ("one", "two"):
        preset(tmp_path, name, f"retry: true\noutputs_dir: elsewhere\nname: {name}")
    jobs = jobs_of(["experiment=one,two"], "--config-dir", str(tmp_path))
    assert [(job.cfg["retry"], job.cfg["name"]) for job in jobs] == [(True, "one"), (True, "two")]
    assert {Path(job.sweep_dir).parts[-3] for job in jobs} == {"elsewhere"}


@pytest.mark.parametrize("form", ["${hydra:job.num}", "${hydra.job.num}"])
def test_folders_of_jobs_may_be_their_numbers(form: str):
    jobs = jobs_of(["seed=1,2", "sweep=one", f"hydra.sweep.subdir={form}"])
    assert [Path(job.folder).name for job in jobs] == ["0", "1"]


def test_what_a_sweep_asks_of_hydra_does_not_grow_with_its_jobs(monkeypatch: pytest.MonkeyPatch):
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    asked, original = [], ConfigLoaderImpl.get_group_options

    def counted(self: ConfigLoaderImpl, group: str, *args: object, **kwargs: object) -> object:
        asked.append(group)
        return original(self, group, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(ConfigLoaderImpl, "get_group_options", counted)
    assert len(jobs_of(["quant=none,4bit", "lora=lora", "seed=range(10)"])) == 20
    assert asked.count("quant") == asked.count("lora") == 1


def test_jobs_share_nothing_that_changes():
    one, other = jobs_of(["seed=1,2"])
    one.cfg["train"]["max_steps"] = one.unresolved["train"]["max_steps"] = 7
    one.hydra["runtime"]["output_dir"] = "elsewhere"
    assert other.cfg["train"]["max_steps"] == other.unresolved["train"]["max_steps"] == 30
    assert other.hydra["runtime"]["output_dir"] != "elsewhere"


@pytest.mark.parametrize(
    "arguments", [*GRIDS, ["seed=1,2", "hydra.output_subdir=x", "+data.extra=1", "~lora.r"]], ids=str
)
def test_what_a_job_copies_from_its_base_is_what_it_has(arguments: list[str], monkeypatch: pytest.MonkeyPatch):
    compared, original = [], compose.Composer._unresolved

    def comparing(self: compose.Composer, composed: Any, *others: Any) -> Any:
        made = original(self, composed, *others)
        compared.append(made == OmegaConf.to_container(composed, resolve=False, enum_to_str=True))
        return made

    monkeypatch.setattr(compose.Composer, "_unresolved", comparing)
    assert len(jobs_of(arguments)) == len(compared)
    assert all(compared)
