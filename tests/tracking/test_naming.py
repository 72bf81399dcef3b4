"""Names of runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.tracking import lookup
from runner.tracking.naming import default_name, short_name
from runner.tracking.rundir import RunDir


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["model=tiny", "train.max_steps=40", "outputs_dir=o", "train.sample_prompts=0"], "tiny,max_steps=40"),
        (["data=local", "data.path=/far/away/rows.jsonl", "seed=1"], "local,path=rows.jsonl,seed=1"),
        (["lora.target_modules=[q,v]", "+x.y=2"], "target_modules=[q,v],y=2"),
        ([], "defaults"),
    ],
)
def test_a_name_for_narrow_columns(overrides: list[str], name: str):
    choices = {"model": "tiny", "data": "local"}
    manifest = {"overrides": overrides, "name": default_name(overrides), "choices": choices}
    assert short_name(manifest) == name
    assert short_name({**manifest, "name": "mine"}) == "mine"


def test_the_name_of_a_sweeps_job_keeps_the_swept_groups():
    manifest = {"overrides": ["quant=none", "lora.r=8"], "name": "quant=none,lora.r=8", "choices": {"quant": "none"}}
    assert short_name(manifest) == "none,r=8"
    assert short_name({**manifest, "label": "quant=none,lora.r=8"}) == "quant=none,r=8"


def test_a_run_is_also_found_by_its_name_in_mlflow(tmp_path: Path):
    rundir, overrides = RunDir(tmp_path / "day" / "run"), ["model=tiny", "seed=1"]
    name = default_name(overrides)
    rundir.update_manifest(id="x", name=name, overrides=overrides, choices={"model": "tiny"})
    assert lookup.resolve("tiny,seed=1", tmp_path) == lookup.resolve(name, tmp_path) == rundir


def test_a_long_name_is_cut_without_a_comma_at_its_end():
    assert default_name(["a=" + "x" * 117, "b=2"]) == "a=" + "x" * 117
    assert default_name(["a=" + "x" * 116, "b=2"]) == "a=" + "x" * 116 + ",b"
