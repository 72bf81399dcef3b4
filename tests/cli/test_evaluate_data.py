"""Which rows ``evaluate`` reads, from the overrides alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, composed

from runner.cli import evaluate_data
from runner.errors import ConfigError


@pytest.fixture(scope="module")
def frozen() -> dict[str, Any]:
    data: dict[str, Any] = composed(*TINY, "data.max_length=96")["data"]
    return data


def test_the_rows_of_the_run_stay_its_own(frozen: dict[str, Any]) -> None:
    changes = ["data.eval_rows=2", "data.packing=false"]
    assert evaluate_data.node(frozen, changes) == {**frozen, "eval_rows": 2, "packing": False}
    assert not evaluate_data.is_other(changes)


def test_other_rows_are_read_whole_as_the_run_reads_its_own(frozen: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    other = ["data=local", f"data.path={tmp_path}/rows.jsonl", "data/format=alpaca"]
    assert evaluate_data.is_other(other)
    node = evaluate_data.node(frozen, other)
    assert (node["path"], node["eval_rows"]) == (f"{tmp_path}/rows.jsonl", None)
    assert node["format"]["_target_"].endswith(".alpaca")
    assert (node["max_length"], node["packing"]) == (96, frozen["packing"])
    own = evaluate_data.node(frozen, [*other, "data.eval_rows=2", "data.max_length=64"])
    assert (own["eval_rows"], own["max_length"]) == (2, 64)


def test_all_faults_are_named_at_once(frozen: dict[str, Any]) -> None:
    words = ["optim=adamw", "data.order_by=length", "rows.jsonl", "data.eval_rows=2"]
    with pytest.raises(ConfigError) as error:
        evaluate_data.node(frozen, words)
    assert [fault.key for fault in error.value.faults] == ["optim", "data.order_by", "rows.jsonl"]
    with pytest.raises(ConfigError, match=r"data\.max_length: takes one value per key"):
        evaluate_data.node(frozen, ["data.max_length=64,128"])
    with pytest.raises(ConfigError, match="did you mean"):
        evaluate_data.node(frozen, ["data.max_lenght=64"])
