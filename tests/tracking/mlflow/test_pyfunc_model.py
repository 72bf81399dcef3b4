"""The files beside a model are those that MLflow itself would write and read."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from runner.tracking.mlflow import pyfunc_model

TEXT = Schema([ColSpec(DataType.string)])
SYSTEM = ParamSpec("system", DataType.string, "")
SAMPLING = [ParamSpec("max_new_tokens", DataType.long, 256), ParamSpec("temperature", DataType.double, 0.0)]


@pytest.mark.parametrize(
    ("outputs", "pairs", "inputs", "scores", "params"),
    [
        ((), False, TEXT, TEXT, [*SAMPLING, SYSTEM]),
        (("good", "bad"), False, TEXT, ("good", "bad"), [SYSTEM]),
        (("score",), True, Schema([ColSpec(DataType.string, each) for each in ("prompt", "answer")]), ("score",),
         [SYSTEM]),
    ],
)  # fmt: skip
def test_the_signature_is_that_of_mlflow(outputs, pairs, inputs, scores, params) -> None:  # type: ignore[no-untyped-def]
    wanted = scores if scores is TEXT else Schema([ColSpec(DataType.double, name) for name in scores])
    expected = ModelSignature(inputs, wanted, ParamSchema(params))
    assert ModelSignature.from_dict(pyfunc_model.signature(outputs, takes_pairs=pairs)) == expected


def test_mlflow_reads_what_is_written(tmp_path: Path) -> None:
    signed = pyfunc_model.signature((), takes_pairs=False)
    pyfunc_model.write(tmp_path, signed, {"is_chat": True, "problem": None}, ["peft"], "abc")
    model = Model.load(str(tmp_path))
    assert model.signature == ModelSignature.from_dict(signed)
    assert model.metadata == {"runner.signature": "abc"}
    assert {path.name for path in tmp_path.iterdir()} == set(pyfunc_model.FILES)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 20_000
    assert "peft==" in (tmp_path / "requirements.txt").read_text()
