"""Jobs are composed once and fast, and come out as Hydra itself would compose them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from runner.config import compose
from runner.config.bind import config_dir
from runner.config.job import Job, write_hydra
from runner.errors import ConfigError

GRIDS = (
    ["lora.r=4,8", "seed=1"],
    ["quant=none,4bit", "lora.r=4,8,16", "optim=lion", "optim.learning_rate=1e-4,3e-4"],
    ["experiment=qlora,smoke", "lora.r=32"],
    ["lora=lora,dora", "lora.target_modules=[q_proj],[q_proj,v_proj]", "train.max_steps=3"],
    ["data=local", "data/format=alpaca,messages", "data.path=a.jsonl", "lora.lora_alpha=choice(1,2)"],
    ["lora=peft", "lora.method=LoKr", "+lora.rank=2,4", "seed=range(2)"],
)


def jobs_of(arguments: Sequence[str], *flags: str) -> list[Job]:
    args = compose.parse(["-m", *flags, *arguments])
    with compose.opened(args) as hydra:
        composer = compose.Composer(hydra, args)
        return composer.jobs(composer.grid(args.overrides))


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


def test_what_hydra_writes_of_itself_can_be_read_back_by_it(tmp_path: Path):
    [only] = jobs_of(["lora.r=4", 'name="1e3"', f"outputs_dir={tmp_path}"])
    write_hydra(only, tmp_path)
    config = OmegaConf.load(tmp_path / ".hydra" / "config.yaml")
    assert config.name == "1e3"
    assert config.lora.r == 4
    assert "hydra" not in config
    node = OmegaConf.load(tmp_path / ".hydra" / "hydra.yaml").hydra
    assert node.runtime.output_dir == str(tmp_path)
    assert node.job.num == 0
    overrides = yaml.safe_load((tmp_path / ".hydra" / "overrides.yaml").read_text())
    assert overrides == ["lora.r=4", 'name="1e3"', f"outputs_dir={tmp_path}"]


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


def test_the_folder_of_a_sweep_is_resolved_once(monkeypatch: pytest.MonkeyPatch):
    jobs = jobs_of(["seed=range(30)", "hydra.sweep.dir=/tmp/x/${now:%f}"])
    assert len({job.sweep_dir for job in jobs}) == 1


@pytest.mark.parametrize(
    ("override", "told"),
    [("hydra/launcher=basic", "launcher=local"), ("hydra.job.chdir=true", "has no effect here"),
     ("hydra.callbacks.x.y=1", "hydra.callbacks")],
)  # fmt: skip
def test_keys_of_hydra_without_effect_are_refused(override: str, told: str):
    with pytest.raises(ConfigError, match=told):
        jobs_of(["seed=1,2", override])
