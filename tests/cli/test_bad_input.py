"""Bad input: one clear message with the remedy, exit code 2, no traceback, nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.cli import main

LOCAL = ("model=tiny", "data=local", "tracking=offline")
GOOD_ROW = {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]}


def rows(*lines: object, name: str = "rows.jsonl") -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        (folder / name).write_text(text + "\n")

    return write


def nothing(folder: Path) -> None: ...


def pickled_weights(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (folder / "model" / "pytorch_model.bin").write_bytes(b"pickle")


def a_file_for_outputs(folder: Path) -> None:
    (folder / "outputs").write_text("in the way")


def a_foreign_folder(folder: Path) -> None:
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("two years of work")


def binary(folder: Path) -> None:
    (folder / "rows.jsonl").write_bytes(bytes(range(256)) * 8)


def empty_folder(folder: Path) -> None:
    (folder / "rows").mkdir()


COMPOSE: list[tuple[str, list[str], str]] = [
    ("misspelt group", ["modle=llama"], "did you mean 'model'"),
    ("several values without -m", ["lora.r=4,8"], "has several values, but this is a single run"),
    ("several options without -m", ["quant=none,4bit"], "add -m to sweep over them (python -m runner -m"),
    ("misspelt option", ["quant=4bits"], "did you mean '4bit'"),
    ("misspelt key", ["lora.rank_alpha=4"], "keys here: "),
    ("misspelt key with a neighbour", ["optim.learnin_rate=1e-4"], "did you mean 'learning_rate'"),
    ("key without its group", ["learning_rate=1e-4"], "did you mean optim.learning_rate"),
    ("key added with a plus", ["+quant.typo=1"], "no such key"),
    ("top-level key added with a plus", ["+sead=1"], "did you mean 'seed'"),
    ("misspelt experiment", ["experiment=qlra"], "did you mean 'qlora'"),
    ("misspelt nested option", ["data/format=alpacca"], "did you mean 'alpaca'"),
    ("a group set like a key", ["quant=4bit", "lora=8"], "no such option"),
    ("wrong type: a word for a number", ["lora.r=abc"], "must be a whole number"),
    ("wrong type: a fraction of a step", ["train.max_steps=1.5"], "must be a whole number"),
    ("wrong type: a number for a switch", ["data.packing=3"], "must be true or false"),
    ("out of range: negative rank", ["lora.r=-1"], ">= 1"),
    ("out of range: negative seed", ["seed=-1"], ">= 0"),
    ("out of range: batch of nothing", ["train.per_device_batch_size=0"], ">= 1"),
    ("out of range: dropout of one", ["lora.lora_dropout=1.5"], "<"),
    ("out of range: learning rate", ["optim.learning_rate=-1"], ">"),
    ("bad literal", ["model.dtype=bf16"], "allowed: one of"),
    ("bad literal in the task", ["task.train_on=asistant"], "did you mean 'assistant'"),
    ("missing value", ["data=local"], "data.path: needs a value"),
    ("two ends of the training", ["train.num_train_epochs=2"], "both limit the training"),
    ("a usual name for the learning rate", ["lr=1e-4"], "did you mean optim.learning_rate"),
    ("a key of another option", ["model.path=/models/llama"], "model=local"),
    ("nothing ends the training", ["train.max_steps=null"], "no stopping criterion"),
    ("quantized full fine-tuning", ["quant=4bit", "lora=none"], "full fine-tuning does not support quantized weights"),
    ("device_map", ["+model.device_map=auto"], "inference only"),
    (
        "a library class as an option",
        ["quant._target_=transformers.BitsAndBytesConfig"],
        "'transformers' is not part of your code, and only options and your own code may be named",
    ),
    ("unknown PEFT method", ["lora=peft", "lora.method=loraa"], "did you mean"),
    ("unknown PEFT option", ["lora=peft", "lora.method=ia3", "+lora.rank=3"], "rank"),
    ("unknown optimizer", ["optim=torch", "optim.name=AdamWW"], "did you mean"),
    ("unknown optimizer option", ["optim=torch", "optim.name=Adagrad", "+optim.momentun=1"], "momentun"),
    ("two warm-ups", ["schedule.warmup_steps=5", "schedule.warmup_ratio=0.1"], "warmup"),
    ("no such data file", [*LOCAL, "data.path=nowhere.jsonl"], "nowhere.jsonl"),
    ("no such model folder", ["model=llama", "model.path=./nowhere"], "no such folder"),
    ("float16 training", ["model.dtype=float16"], "bfloat16"),
    ("a tracking folder", ["tracking=server", "tracking.uri=./mlruns"], "sqlite"),
    ("a tracking URI without scheme", ["tracking=server", "tracking.uri=localhost:5000"], "http://localhost:5000"),
    ("unknown verb", ["trian"], "verbs: "),
    ("misspelt verb", ["pln"], "did you mean 'plan'"),
    ("broken override", ["quant=[4"], ""),
    ("one bad value of a sweep", ["-m", "lora.r=4,x"], "must be a whole number"),
    ("resume of nothing", ["resume=outputs/nowhere"], "there is no run or sweep"),
    ("resume with other overrides", ["resume=outputs/nowhere", "seed=3"], "cannot change seed=3"),
]

BUILD: list[tuple[str, Callable[[Path], None], list[str], str]] = [
    ("empty file", rows(name="rows.jsonl"), [*LOCAL, "data.path=rows.jsonl"], "rows.jsonl"),
    ("malformed line", rows(GOOD_ROW, '{"messages": [}'), [*LOCAL, "data.path=rows.jsonl"], "rows.jsonl:2"),
    ("rows that are no objects", rows([1, 2]), [*LOCAL, "data.path=rows.jsonl"], "rows.jsonl:1"),
    ("binary file", binary, [*LOCAL, "data.path=rows.jsonl"], "rows.jsonl"),
    ("a text file of one document", rows("One.", "", "Two.", name="t.txt"),
     ["model=tiny", "data=local", "data.path=t.txt", "data/format=text", "task=pretrain"], "data.documents=paragraph"),
    ("empty folder", empty_folder, [*LOCAL, "data.path=rows"], "rows"),
    ("unknown extension", rows("x", name="rows.docx"), [*LOCAL, "data.path=rows.docx"], "jsonl"),
    ("rows of another format", rows({"instruction": "Say hi", "input": "", "output": "Hi"}),
     [*LOCAL, "data.path=rows.jsonl"], "data/format=alpaca"),
    ("sharegpt rows", rows({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}),
     [*LOCAL, "data.path=rows.jsonl"], "data/format=sharegpt"),
    ("text for a conversation task", rows({"text": "Once upon a time."}),
     [*LOCAL, "data.path=rows.jsonl", "data/format=text"], "task=pretrain"),
    ("nothing to train on", rows({"messages": [{"role": "user", "content": "Anyone?"}]}),
     [*LOCAL, "data.path=rows.jsonl"], "assistant"),
    ("max_length beyond the model's", nothing, ["model=tiny", "data.max_length=1000000"], "positions at most"),
    ("weights that are not safetensors", pickled_weights, ["model=llama", "model.path=model"], "safetensors"),
    ("target modules that match nothing", nothing, ["model=tiny", "lora.target_modules=[c_attn]"], "q_proj"),
    ("outputs that cannot be written", a_file_for_outputs, ["model=tiny"], "outputs_dir"),
    ("a folder with other files", a_foreign_folder, ["model=tiny", "hydra.run.dir=mine"], "contains files but no run"),
    ("a custom format that is not there", rows(GOOD_ROW),
     [*LOCAL, "data.path=rows.jsonl", "data/format=custom", "data.format.function=rows.py:convert"], "rows.py"),
]  # fmt: skip


def refused(capfd: pytest.CaptureFixture[str], *overrides: str) -> str:
    """Run it, demand a clean refusal, and return what was said."""
    before = everything(Path())
    code = main.run(list(overrides))
    said = capfd.readouterr()
    assert code == 2, said.err
    assert "Traceback" not in said.err + said.out
    assert "error" in said.err
    assert "→" in said.err, "no remedy"
    assert everything(Path()) == before, "something was left behind"
    return said.err


def everything(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


@pytest.fixture(autouse=True)
def _in_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RUNNER_TRACEBACK", raising=False)


@pytest.mark.parametrize(("overrides", "said"), [case[1:] for case in COMPOSE], ids=[case[0] for case in COMPOSE])
def test_refused_while_composing(overrides: list[str], said: str, capfd: pytest.CaptureFixture[str]):
    assert said in refused(capfd, *overrides)


@pytest.mark.parametrize(("write", "overrides", "said"), [case[1:] for case in BUILD], ids=[case[0] for case in BUILD])
def test_refused_before_training(
    write: Callable[[Path], None], overrides: list[str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    write(tmp_path)
    tracking = [] if "tracking=offline" in overrides else ["tracking=offline"]
    assert said in refused(capfd, *overrides, *tracking)


def test_all_faults_of_a_line_come_at_once(capfd: pytest.CaptureFixture[str]):
    said = refused(capfd, "lora.r=x", "train.max_stepss=3", "quant=5bit", "optim.learning_rate=-1")
    assert "train.max_stepss=3: no such key" in said
    assert "quant=5bit: no such option" in said
    said = refused(capfd, "lora.r=x", "optim.learning_rate=-1", "seed=a")
    assert said.startswith("3 errors:")


def test_a_foreign_folder_is_untouched(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    a_foreign_folder(tmp_path)
    refused(capfd, "model=tiny", "hydra.run.dir=mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "two years of work"


def test_the_traceback_is_there_for_those_who_ask(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setenv("RUNNER_TRACEBACK", "1")
    assert main.run(["quant=5bit"]) == 2
    assert "Traceback" in capfd.readouterr().err


def test_an_unwritable_cache_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))
    assert "RUNNER_CACHE" in refused(capfd, "model=tiny", "tracking=offline")


def test_a_typo_is_refused_without_loading_torch(tmp_path: Path):
    code = "import sys; from runner.cli import main; code = main.run(['quant=4bits'])"
    code += "; print('torch' in sys.modules); sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (2, "False")


@pytest.mark.cold
def test_the_console_script_and_the_module_are_the_same_program(tmp_path: Path):
    script = Path(sys.executable).with_name("runner")
    for command in ([str(script)], [sys.executable, "-m", "runner"]):
        done = subprocess.run([*command, "quant=4bits"], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 2
        assert "did you mean '4bit'" in done.stderr
    assert os.listdir(tmp_path) == []
