"""What Hydra writes of a job."""

from __future__ import annotations

from pathlib import Path

import yaml
from fixtures.composed_jobs import jobs_of
from omegaconf import OmegaConf

from runner.config.job import write_hydra


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
