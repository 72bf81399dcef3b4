"""Jobs are composed once and fast, and come out as Hydra itself would compose them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from runner.cli import jobs as cli_jobs
from runner.config import command_line, compose
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
    args = command_line.parse(["-m", *flags, *arguments])
    with command_line.opened(args) as hydra:
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


def test_a_folder_may_contain_the_number_of_its_job():
    with cli_jobs.composed(["-m", "model=tiny", "seed=1,2", "sweep=s", "hydra.sweep.subdir=x/${hydra.job.num}"]) as (
        _,
        both,
    ):
        assert [job.folder.partition("/s/")[2] for job in both] == ["x/0", "x/1"]


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


def test_long_names_of_sweeps_differ_with_their_keys():
    keys = [f"group.some_long_key_{number}" for number in range(20)]
    names = {compose.named_by(keys), compose.named_by(keys[:-1]), compose.named_by(reversed(keys))}
    assert len(names) == 2
    assert {len(name) for name in names} == {120}


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


def test_a_key_that_only_the_swept_options_have():
    jobs = jobs_of(["quant=4bit,fp4", "quant.double=false", "seed=1,2"])
    assert [job.cfg["quant"]["double"] for job in jobs] == [False] * 4
    for order in ("none,4bit", "4bit,none"):
        with pytest.raises(ConfigError, match=r"quant\.double=false: no such key with quant=none"):
            jobs_of([f"quant={order}", "quant.double=false"])


@pytest.mark.parametrize(
    ("words", "problem"),
    [(["lora.r=range(9,4)"], r"lora\.r=range\(9,4\): has no values"), (["quant=glob(x*)"], "quant=.*: has no values"),
     (["lora.r=glob(*)"], r"lora\.r=.*: has no values"), (["seed=range(1,1000000000)"], "more than 10,000"),
     (["seed=range(1,102)", "lora.r=range(1,101)"], "more than 10,000 combinations"),
     (["lora.r=4,8", "lora.r=16"], r"lora\.r=4,8: is set twice"),
     (["quant=none,4bit", "+quant=8bit"], "quant=none,4bit: is set twice")],
)  # fmt: skip
def test_a_grid_has_values_each_once_and_not_too_many(words: list[str], problem: str):
    with pytest.raises(ConfigError, match=problem):
        jobs_of(words)


@pytest.mark.parametrize("form", ["${hydra:job.num}", "${hydra.job.num}"])
def test_folders_of_jobs_may_be_their_numbers(form: str):
    jobs = jobs_of(["seed=1,2", "sweep=one", f"hydra.sweep.subdir={form}"])
    assert [Path(job.folder).name for job in jobs] == ["0", "1"]


def test_parameters_of_our_own_sweeper_are_refused():
    for word in ('+hydra.sweeper.params={seed:"1,2"}', "hydra.sweeper.params.seed=1"):
        with pytest.raises(ConfigError, match="write the keys and their values themselves"):
            jobs_of(["lora.r=4,8", word])


@pytest.mark.parametrize(
    "word",
    ["hydra.output_subdir=../..", "hydra.output_subdir=.", "hydra.output_subdir=", "hydra.sweep.subdir=../..",
     "hydra.sweep.subdir=/x", "hydra.sweep.dir=", "hydra.run.dir="],
)  # fmt: skip
def test_paths_of_hydra_stay_in_their_folder(word: str):
    key = word.partition("=")[0].replace(".", r"\.")
    with pytest.raises(ConfigError, match=key):
        jobs_of(["seed=1,2", word, "data=local", "data.path=../x"])


@pytest.mark.parametrize(
    ("word", "problem"),
    [("seed=" + "9" * 5000, "more than 400 digits"), ("seed=" + "[" * 3000, "levels deep"),
     ("name=\udcff", "not UTF-8"),
     ("name=\x1b[31m", "control characters"), ("quant=[4bit,fp4]", "not a list"), ("~tracking", "cannot be removed"),
     ("quant=", "name of one option"), ("experiment=", "name of one option"), ("hydra={}", "as a whole"),
     ("experiment=null", "name of one option"), ("=4", "no key before ="), ("+=4", "no key before ="),
     ("--package=lora", "no effect without --cfg"), ("--resolve", "no effect without --cfg"),
     ("+quant._code_=[x.py]", "cannot be set"), ("+_code_=[x.py]", "cannot be set")],
)  # fmt: skip
def test_words_that_are_no_overrides_are_refused(word: str, problem: str):
    with pytest.raises(ConfigError, match=problem) as caught:
        jobs_of(["seed=1,2", word])
    str(caught.value).encode()


def test_flags_may_stand_after_overrides_and_unknown_ones_are_refused_in_our_words():
    args = command_line.parse(["model=tiny", "-m", "lora.r=4,8"])
    assert args.multirun
    assert args.overrides == ["model=tiny", "lora.r=4,8"]
    with pytest.raises(ConfigError, match="cannot be read: unrecognized arguments: --multi-run"):
        command_line.parse(["--multi-run", "model=tiny"])
