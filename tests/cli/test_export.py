"""export against plain PEFT and transformers."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import TINY
from fixtures import versions
from fixtures.fake_hub import TOKEN, Hub, hub
from fixtures.trained_runs import _there, logits, said, trained
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from runner.cli import main
from runner.tracking.rundir import RunDir

# export


def test_an_exported_adapter_is_the_one_that_was_trained(capsys: pytest.CaptureFixture[str]):
    run = trained("first")
    code, out, _ = said(capsys, "export", "first")
    folder = Path("outputs/exports/first")
    assert (code, str(folder) in out) == (0, True)
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json"):
        assert (folder / name).read_bytes() == (run.model / name).read_bytes()
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, PeftModel)
    text = (folder / "README.md").read_text()
    summary = run.read_state().summary
    for fact in ("chitchat", "lora", f"{summary['eval/loss']:.4f}", f"{summary['eval/loss before']:.4f}",
                 run.read_manifest()["signature"], "model=tiny", "PeftModel.from_pretrained"):  # fmt: skip
        assert fact in text, fact
    assert str(Path.cwd()) not in text, "where it lay here means nothing to others"
    assert not re.search(r"(?<![\w:/.<…])/\w+/", text), "nor does any other folder of this machine"


@pytest.mark.parametrize("name", ["first", "four", "dora", "pissa", "ends"])
def test_a_merged_model_has_the_logits_of_base_and_adapter(
    capsys: pytest.CaptureFixture[str], name: str, tmp_path: Path
):
    run = trained(name)
    code, out, err = said(capsys, "export", name, str(tmp_path / "merged"), "--merged")
    assert code == 0, err
    assert "logits differ by" in out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", **versions.FLOAT32)
    origin = json.loads((run.model / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = AutoModelForCausalLM.from_pretrained(origin, **versions.FLOAT32)
    if name == "ends":
        base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")("The quick brown fox jumps.")["input_ids"]
    before = logits(base, ids)
    unmerged = logits(PeftModel.from_pretrained(base, run.model), ids)
    assert (unmerged - before).abs().max() > 0.1  # the adapter does something
    torch.testing.assert_close(logits(merged, ids), unmerged, rtol=0, atol=1e-4)


def test_a_model_trained_whole_is_exported_as_it_is(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    run = trained("whole")
    assert said(capsys, "export", "whole", str(tmp_path / "out"), "--dtype", "bfloat16")[0] == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", **versions.AUTO).dtype == torch.bfloat16
    assert said(capsys, "export", "whole", str(tmp_path / "same"))[0] == 0
    ids = list(range(20))
    one, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (run.model, tmp_path / "same"))
    assert torch.equal(logits(one, ids), logits(other, ids))
    code, _, err = said(capsys, "export", "whole", str(tmp_path / "more"), "--merged")
    assert (code, "no effect" in err) == (2, True)


CONVERTER = """#!/usr/bin/env python
import json, sys
from pathlib import Path
assert (Path(sys.argv[1]) / "model.safetensors").is_file() and (Path(sys.argv[1]) / "tokenizer.json").is_file()
if "--fail" in {fail!r}:
    sys.exit("Model architecture is not supported")
Path(sys.argv[sys.argv.index("--outfile") + 1]).write_text(json.dumps(sys.argv[2:]))
"""


def test_gguf_is_made_of_the_merged_model_by_the_converter_on_the_path(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    trained("first")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("runner.models.gguf_export.PACKAGE", "no_such_package")
    code, _, err = said(capsys, "export", "first", str(tmp_path / "g"), "--gguf")
    assert (code, "convert_hf_to_gguf.py" in err) == (2, True)
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(CONVERTER.format(fail=""))
    script.chmod(0o755)
    assert said(capsys, "export", "first", str(tmp_path / "g"), "--gguf", "--dtype", "float16")[0] == 0
    assert sorted(path.name for path in (tmp_path / "g").iterdir()) == ["README.md", "g.gguf"]
    assert json.loads((tmp_path / "g/g.gguf").read_text())[-2:] == ["--outtype", "f16"]
    script.write_text(CONVERTER.format(fail="--fail"))
    code, _, err = said(capsys, "export", "first", str(tmp_path / "h"), "--gguf")
    assert (code, "not supported" in err, (tmp_path / "h").exists()) == (2, True, False)


def test_what_cannot_be_exported_is_refused_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from runner.models import pretrained

    trained("first")
    monkeypatch.setattr(pretrained, "load", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for words, part in {
        ("first", str(tmp_path / "full")): "is not empty",
        ("first", str(tmp_path / "full/file")): "is a file",
        ("first", str(tmp_path / "x"), "--dtype", "float16"): "no effect on an adapter",
        ("first", str(tmp_path / "x"), "--merged", "--dtype", "float17"): "did you mean 'float16'",
        ("first", "a", "b"): "takes one folder",
        ("frist",): "did you mean 'first'?",
        ("first", "--mergd"): "did you mean '--merged'?",
        (): "needs a run",
    }.items():
        code, _, err = said(capsys, "export", *words)
        assert (code, part in err) == (2, True), (words, err)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@versions.hub_1
def test_an_export_is_pushed_to_the_hub(capsys: pytest.CaptureFixture[str], tmp_path: Path, hub: Hub):
    trained("first")
    folder = tmp_path / "out"
    code, out, err = said(capsys, "export", "first", str(folder), "--merged", "--push", "me/first", "--private")
    assert code == 0, err
    assert f"upload   {hub.url}/me/first" in out
    (created,) = hub.created
    assert (created["name"], created["organization"], created["visibility"]) == ("first", "me", "private")
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    del written["came_from.json"]  # it names folders of this machine
    assert hub.files == written
    assert b"# first" in hub.files["README.md"]


def test_a_push_that_cannot_work_is_refused_before_the_work_and_a_failed_one_keeps_the_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
):
    trained("first")
    for name, part in {"first": "has no owner", "me/a b": "no name of a repository"}.items():
        code, _, err = said(capsys, "export", "first", str(tmp_path / "x"), "--push", name)
        assert (code, part in err) == (2, True), err
    assert "no effect without --push" in said(capsys, "export", "first", str(tmp_path / "x"), "--private")[2]
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, _, err = said(capsys, "export", "first", str(tmp_path / "x"), "--push", "me/first")
    assert (code, "HF_TOKEN" in err, "hf_wrong" in err, list(tmp_path.iterdir())) == (2, True, False, [])
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.refuses_commits = True
    code, _, err = said(capsys, "export", "first", str(tmp_path / "x"), "--push", "me/first")
    assert (code, f"hf upload me/first {tmp_path / 'x'}" in err) == (1, True), err
    assert (tmp_path / "x/adapter_model.safetensors").is_file()


def test_a_missing_base_is_an_error_and_its_new_place_can_be_named(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    import shutil

    run = trained("first")
    origin = Path(json.loads((run.model / "adapter_config.json").read_text())["base_model_name_or_path"])
    shutil.copytree(origin, tmp_path / "base")
    folder = tmp_path / "run"
    assert main.run([*TINY, "train.max_steps=1", "model=local", f"model.path={tmp_path / 'base'}",
                    f"hydra.run.dir={folder}"]) == 0  # fmt: skip
    (tmp_path / "base").rename(tmp_path / "moved")
    code, _, err = said(capsys, "generate", str(folder), "Hello!")
    assert (code, "model.path=FOLDER" in err) == (2, True)
    words = ("generate", str(folder), "Hello!", "--max-new-tokens", "2", f"model.path={tmp_path / 'moved'}")
    assert said(capsys, *words)[0] == 0


@pytest.mark.parametrize("verb", ["generate", "export", "evaluate", "register"])
def test_a_run_without_a_model_is_refused_with_its_status(
    capsys: pytest.CaptureFixture[str], verb: str, tmp_path: Path
):
    for status, remedy in {"failed": "retry=true", "killed": "resume=", "preempted": "resume="}.items():
        rundir = RunDir(tmp_path / status)
        rundir.write_state(status=status, step=3, total_steps=9)
        rundir.update_manifest(name=status)
        code, _, err = said(capsys, verb, str(rundir.path), "x")
        assert (code, f"it is {status} (step 3/9)" in err, remedy in err) == (2, True, True), err


@pytest.mark.slow
def test_the_average_of_runs_is_exported_merged_and_refused_where_there_is_none(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    trained("first")
    trained("other")
    code, out, err = said(capsys, "export", "first", "--average", "other", "--merged")
    assert code == 0, err
    assert "mean of the changes of 2 adapters, as one of rank 16: first, other" in " ".join(out.split())
    assert "logits differ by" in out, "of base and averaged adapter"
    folder = Path("outputs/exports/first-merged-average")
    assert "mean of the changes of 2 adapters" in (folder / "README.md").read_text()
    assert logits(AutoModelForCausalLM.from_pretrained(folder), [1, 2, 3]).isfinite().all()
    for other, problem in (("first", "names a run twice"), ("dora", "the adapters differ in use_dora")):
        trained(other)
        code, _, err = said(capsys, "export", "first", str(tmp_path / "none"), "--average", other)
        assert (code, problem in err) == (2, True), err
    assert not (tmp_path / "none").exists()
