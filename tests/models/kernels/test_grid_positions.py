"""Positions in time, height and width, of packed documents. Losses: ``tests/models/test_models_vision.py``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fixtures import pictures
from fixtures.language_models import FAMILIES, build

from runner.models import pretrained
from runner.models.kernels import grid_positions
from runner.models.quantization import none

pytestmark = pictures.needs_transformers_5


def test_models_whose_positions_have_one_dimension_do_not_use_them() -> None:
    assert not grid_positions.uses(build(FAMILIES["llama"]))


@pytest.mark.extras
@pictures.needs_video
def test_each_document_begins_at_0_and_an_image_has_rows_and_columns(tmp_path) -> None:
    source, _ = pictures.loaded(pictures.write(tmp_path / "model", "qwen2_5_vl"))
    model = pretrained.empty(source, none.none())
    assert grid_positions.uses(model)
    kinds = torch.tensor([[0, 1, 1, 1, 1, 0, 0, 0, 0, 0]])  # an image of 2 × 2 tokens, and a document without one
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 0]])
    batch = {"input_ids": kinds + 5, "mm_token_type_ids": kinds, "position_ids": positions,
             "spans": np.array([[0, 0, 7], [1, 7, 9]]), "image_grid_thw": torch.tensor([[1, 4, 4]])}  # fmt: skip
    found = grid_positions.packed(batch, model)
    assert found.shape == (4, 1, 10)
    assert torch.equal(found[0], positions)
    assert found[2, 0].tolist() == [0, 1, 1, 2, 2, 3, 4, 0, 1, 0]  # height
    assert found[3, 0].tolist() == [0, 1, 2, 1, 2, 3, 4, 0, 1, 0]  # width
    text = {name: value for name, value in batch.items() if name != "image_grid_thw"}
    assert torch.equal(grid_positions.packed(text, model), positions.expand(4, -1, -1))
