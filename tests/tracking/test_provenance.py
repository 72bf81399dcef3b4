"""Digests of what computes."""

# ruff: noqa: F401 - fixtures are imported, then asked for by name

from __future__ import annotations

from pathlib import Path

from fixtures.clones import _in_a_new_folder

from runner.tracking import provenance


def test_weights_have_a_digest_of_their_values_alone(tmp_path: Path):
    import torch
    from safetensors.torch import save_file

    weights = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(4, dtype=torch.bfloat16)}
    for name in ("whole", "shards", "other", "reshaped", "none"):
        (tmp_path / name).mkdir()
    save_file(weights, tmp_path / "whole" / "model.safetensors", metadata={"format": "pt"})
    save_file({"b": weights["b"]}, tmp_path / "shards" / "1.safetensors")
    save_file({"a": weights["a"]}, tmp_path / "shards" / "2.safetensors")
    save_file({**weights, "b": weights["b"] + 1e-6}, tmp_path / "other" / "model.safetensors")
    save_file({**weights, "b": weights["b"].reshape(3, 2)}, tmp_path / "reshaped" / "model.safetensors")
    found = {folder.name: provenance.weights_digest(folder) for folder in tmp_path.iterdir() if folder.is_dir()}
    assert found["whole"] == found["shards"]
    assert len({found["whole"], found["other"], found["reshaped"]}) == 3
    assert found["none"] is None
