"""What is printed fits its width."""

# ruff: noqa: F401 - fixtures are imported, then asked for by name

from __future__ import annotations

from fixtures.run_folders import _in_a_new_folder

from runner import terminal


def test_long_names_stay_apart_when_they_are_cut():
    fixed = "model=tiny,train.max_steps=20,data.max_length=128"
    names = [f"{fixed},lora.r={r},lora.lora_alpha={alpha}" for r in (8, 16) for alpha in (16, 32)]
    for width in (30, 48):
        shown = terminal.told_apart([*names, "short"], width)
        assert len(set(shown)) == 5
        assert max(map(len, shown)) <= width
    assert terminal.told_apart([*names, "short"], 48)[0] == "…lora.r=8,lora.lora_alpha=16"
    assert terminal.told_apart([names[0], names[0]], 20) == [f"{names[0][:19]}…"] * 2
