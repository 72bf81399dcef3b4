"""The verb sync: what it prints, and what it refuses."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures.mirrored_runs import finish, make_run, outputs

from runner.cli import main, sync
from runner.errors import ConfigError, TrackingError


def test_the_verb_sync(outputs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rundir = finish(make_run(outputs))
    assert sync.main([str(outputs)]) == 0
    assert capsys.readouterr().out == f"{rundir.path}  completed  uploaded\n"
    before = rundir.mirror_report.read_bytes(), rundir.manifest.read_bytes()
    with pytest.raises(TrackingError, match="refused") as refused:
        sync.main([str(outputs), "uri=http://127.0.0.1:9"])
    assert len(refused.value.faults) == 1, "said once, not for each run"
    with pytest.raises(ConfigError, match=r"is already in sqlite:.*, and a run can be in one store only"):
        sync.main([str(rundir.path), f"uri=sqlite:///{outputs}/other.db"])
    assert (rundir.mirror_report.read_bytes(), rundir.manifest.read_bytes()) == before
    assert capsys.readouterr().out == "", "what is in MLflow, and nothing else"
    assert sync.main(["run", f"outputs_dir={outputs}"]) == 0
    assert capsys.readouterr().out == f"{rundir.path}  completed  uploaded\n"
    assert main.run(["sync", "--help"]) == 0
    assert "uri=URI" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--force: no such option"):
        sync.main(["--force"])
    monkeypatch.chdir(outputs / "mlartifacts")
    with pytest.raises(ConfigError, match="outputs contains no run"):
        sync.main([])
