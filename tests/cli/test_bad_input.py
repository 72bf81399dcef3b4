"""Bad input: one clear message with the remedy, exit code 2, no traceback, nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY, prepared

from runner.cli import jobs, main
from runner.tracking import resume

LOCAL = ("model=tiny", "data=local", "tracking=offline")
GOOD_ROW = {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]}


def rows(*lines: object, name: str = "rows.jsonl") -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        (folder / name).write_text(text + "\n")

    return write


def call_row(number: int) -> dict[str, Any]:
    call = {"name": "add", "arguments": {"a": number}}
    return {"messages": [GOOD_ROW["messages"][0], {"role": "assistant", "content": None, "tool_calls": [call]}]}


def reasoned_row(number: int, is_reasoned: bool = True) -> dict[str, Any]:
    more = {"reasoning_content": "Easy."} if is_reasoned else {}
    question = {"role": "user", "content": f"{number}?"}
    return {"messages": [question, {"role": "assistant", "content": "Yes.", **more}]}


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
    ("a dot for a nested option", ["data.format=alpaca"], "choose the format with data/format=alpaca"),
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
    ("two ends of the training", ["train.num_train_epochs=2"], "has 2 stopping criteria, and can have one"),
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
    ("verb of another program", ["train", "model=tiny"], "overrides train, without a word: model=… data=…; verbs: "),
    ("file of another program", ["sft.yaml"], "experiment=NAME, if it is FOLDER/experiment/NAME.yaml"),
    ("broken override", ["quant=[4"], "quant=[4: cannot be read ("),
    ("one bad value of a sweep", ["-m", "lora.r=4,x"], "must be a whole number"),
    ("resume of nothing", ["resume=outputs/nowhere"], "there is no run or sweep"),
    ("an empty variable for outputs", ["outputs_dir="], "outputs_dir=: is empty"),
    ("an empty variable for data", ["data=local", "data.path="], "data.path=: is empty"),
    ("an empty variable for a run", ["resume="], "resume=: is empty"),
    ("an empty variable for a run, beside other keys", ["train.max_steps=8", "resume="], "resume=: is empty"),
    ("an empty variable for a preset", ["experiment="], "the name of one option"),
    ("an empty variable of a verb", ["plan", "outputs_dir="], "outputs_dir=: is empty"),
    ("an empty folder of a verb", ["status", "outputs_dir="], "outputs_dir: needs a value"),
    ("a sweep that leaves its folder", ["-m", "seed=1,2", "sweep=../../x"], "the name of one folder"),
    ("a sweep named by a dot", ["-m", "seed=1,2", "sweep=."], "the name of one folder"),
    ("a sweep without a name", ["-m", "seed=1,2", "sweep="], "sweep=: is empty"),
    ("a long sweep", ["-m", "seed=1,2", f"sweep={'x' * 121}"], "of length 1 to 120"),
    ("a first beta of nothing for Lion", ["optim=lion", "optim.betas=[0.9]"], "of length 2"),
    ("epochs of nothing", ["train.num_train_epochs=1e-9", "train.max_steps=null"], ">= 1e-06"),
    ("epochs without end", ["train.num_train_epochs=1e300", "train.max_steps=null"], "<= 1e+06"),
    ("two options at once", ["optim=[adamw,lion]"], "must be the name of one option, not a list"),
    ("numbers for a group", ["data=[1,2]"], "must be the name of one option, not a list"),
    ("a number for a store", ["tracking.uri=5"], "must be a text or null"),
    ("a group removed", ["~tracking"], "cannot be removed"),
    ("a million threads", ["launcher.threads=1000000"], "<= 1024"),
    ("a warm-up beyond the run", ["schedule.warmup_steps=50", "schedule.warmup_ratio=0"], "longer than the run (30"),
    ("a scale beyond float32", ["lora.lora_alpha=1e300"], "with which float32 cannot compute"),
    ("an option of another group", ["quant._target_=runner.models.lora.none"], "is no option of quant"),
    ("a function that is no option", ["quant._target_=runner.files.write_atomic"], "is no option of quant"),
    ("code without code", ["code={my_lab:0123}"], "is not where your code is"),
    ("a task of another program", ["task=ppo"], "a loss of your own is a function"),
    ("a rank of another program", ["lora.rank=4"], "did you mean lora.r?"),
    ("a dtype of another program", ["train.bf16=true"], "model.dtype=bfloat16"),
    ("a path of another program", ["model.name_or_path=x"], "model.path=FOLDER"),
    ("a resume of another program", ["resume_from_checkpoint=x"], "resume=auto"),
    ("a comment for Slurm", ["launcher=slurm", "launcher.comment=x"], "+launcher.additional_parameters.comment"),
    (
        "label smoothing that has no effect",
        ["task.loss_type=dft", "task.label_smoothing=0.1"],
        "has no effect with loss_type=dft",
    ),
    (
        "z-loss that has no effect",
        ["task.loss_type=eaft", "task.z_loss=1e-4"],
        "set task.z_loss=0, or task.loss_type=nll",
    ),
    ("an exponent that has no effect", ["task.eaft_alpha=2"], "set task.eaft_alpha=1, or task.loss_type=eaft"),
    ("runs of another sweeper", ["plan", "-m", "seed=1,2", "hydra/sweeper=basic"], "chooses the runs itself"),
    (
        "a home folder without quotes",
        ["data=local", "data.path=~/rows.jsonl"],
        "data.path=~/rows.jsonl: cannot",
    ),
    ("outputs of an unknown user", ["outputs_dir='~nobody-here/x'"], "outputs_dir=~nobody-here/x: "),
    (
        "outputs of an unknown user, offline",
        ["tracking=offline", "outputs_dir='~nobody-here/x'"],
        "outputs_dir=~nobody-here/x: ",
    ),
    ("a sweep of an unknown user", ["-m", "hydra.sweep.dir='~nobody-here/x'"], "hydra.sweep.dir=~nobody-here/x: "),
    ("a model of an unknown user", ["model=llama", "model.path='~nobody-here/x'"], "this machine does not have"),
    ("code of an unknown user", ["code='~nobody-here/x.py'"], "code=~nobody-here/x.py: "),
    ("a run of an unknown user", ["status", "~nobody-here/x"], "this machine does not have"),
    ("a run to resume of an unknown user", ["resume='~nobody-here/x'"], "this machine does not have"),
    ("a word too long for a folder", ["status", "x" * 300], "there is no run or sweep"),
    ("a model too long for a folder", ["model=llama", f"model.path=./{'x' * 300}"], "no such folder or file"),
    ("code too long for a file", [f"code=./{'x' * 300}.py"], "no such file or folder"),
    ("a target too long for a file", [f"data.format._target_={'x' * 300}.f"], "your own code may be named"),
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
    ("pairs for a conversation task", rows(*({"prompt": f"{i}?", "chosen": "A", "rejected": "B"} for i in (1, 2))),
     [*LOCAL, "data.path=rows.jsonl"], "data/format=preference task=dpo"),
    ("pairs in their format for a conversation task",
     rows(*({"prompt": f"{i}?", "chosen": "A", "rejected": "B"} for i in (1, 2))),
     [*LOCAL, "data.path=rows.jsonl", "data/format=preference"], "use task=dpo"),
    ("conversations for a task of pairs", rows(reasoned_row(1, False), reasoned_row(2, False)),
     [*LOCAL, "data.path=rows.jsonl", "task=dpo"], "use task=sft"),
    ("rows of ms-swift for a conversation task", rows(*({**GOOD_ROW, "rejected_response": f"{i}"} for i in (1, 2))),
     [*LOCAL, "data.path=rows.jsonl"], "data/format=preference_swift task=dpo"),
    ("judged rows for a conversation task", rows({"conversations": [], "kto_tag": False}),
     [*LOCAL, "data.path=rows.jsonl"], "data/format=kto_sharegpt task=kto"),
    ("tools that the template leaves out", rows(*[{**GOOD_ROW, "tools": [{"name": "add"}]}] * 2),
     [*LOCAL, "data.path=rows.jsonl"], "leaves out the tools of the row"),
    ("calls that the template leaves out", rows(call_row(1), call_row(2)), [*LOCAL, "data.path=rows.jsonl"],
     "leaves out a tool call of message 2"),
    ("reasoning that the template leaves out", rows(reasoned_row(1), reasoned_row(2)), [*LOCAL, "data.path=rows.jsonl"],
     "+data.format.ignore=[reasoning_content,reasoning,thinking]"),
    ("a variable that the template does not have",
     rows(*({**reasoned_row(i, False), "chat_template_kwargs": {"enable_thinking": False}} for i in (1, 2))),
     [*LOCAL, "data.path=rows.jsonl"], "'enable_thinking', which the model's chat template does not use"),
    ("a negative weight", rows({**GOOD_ROW, "weight": -1}), [*LOCAL, "data.path=rows.jsonl"], "a number from 0"),
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


@pytest.mark.parametrize("variable", ["RUNNER_TRACEBACK", "HYDRA_FULL_ERROR"])
def test_the_traceback_is_there_for_those_who_ask(
    variable: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv(variable, "1")
    assert main.run(["quant=5bit"]) == 2
    assert "Traceback" in capfd.readouterr().err
    monkeypatch.delenv(variable)
    assert main.run(["quant=5bit", "--cfg", "job"]) == 2
    assert "Traceback" not in capfd.readouterr().err, "Hydra's own errors are ours again"


def test_an_unwritable_cache_is_refused(
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


def test_equal_remedies_are_shown_once(capfd: pytest.CaptureFixture[str]):
    said = refused(capfd, "lora.aaaaaaaa=1", "lora.bbbbbbbb=1", "lora.zzzzzzzz=1", "train.qqqqqqqq=1")
    assert said.startswith("4 errors:")
    assert said.count("keys here: ") == 2
    assert said.count("→") == 2


def test_a_resumed_run_takes_the_values_that_it_has(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    rundir = prepared(tmp_path / "outputs" / "day" / "run", *TINY, "quant=none", "lora.r=4")
    resumed, same = f"resume={rundir.path}", (*TINY, "quant=none", "lora.r=4", "seed=0", "data/format=messages")
    for word in ("seed=3", "lora.r=8", "quant=8bit", "name=other", "experiment=qlora"):
        assert f"cannot change {word}" in refused(capfd, resumed, *TINY, word)
    with jobs.composed([resumed, *same]) as (_, (job,)):
        assert resume.configuration(job.cfg, job.overrides)["lora"]["r"] == 4


def test_no_verb_loads_code_that_a_stored_configuration_names(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """A config.yaml of a store is no reason to call anything but options and the run's own code."""
    (tmp_path / "evil.py").write_text("import pathlib\npathlib.Path('called').touch()\ndef none(): ...\n")
    changes: list[dict[str, Any]] = [
        {"quant": {"_target_": "evil.none", "_code_": [str(tmp_path / "evil.py")]}},
        {"quant": {"_target_": "evil.none"}, "_code_": [str(tmp_path / "evil.py")]},
        {"quant": {"_target_": "evil.none"}, "code": {"../../../../evil": "0"}},
        {"quant": {"_target_": "evil.none"}, "code": {str(tmp_path / "evil"): "0"}},
        {"quant": {"_target_": "os.getcwd"}, "code": {"os": "0"}},
        {"quant": {"_target_": "runner.files.cache_dir", "room": "x"}},
        {"quant": {"_target_": "runner.models.lora.none"}},
    ]
    for number, change in enumerate(changes):
        rundir = prepared(tmp_path / "outputs" / "day" / f"run{number}", *TINY)
        config = yaml.safe_load(rundir.config.read_text())
        rundir.config.write_text(yaml.safe_dump({**config, **change}))
        rundir.write_state(status="completed")
        rundir.model.mkdir()
        before = everything(Path())
        words = (["rerun", str(rundir.path)], ["generate", str(rundir.path), "Hi"], ["evaluate", str(rundir.path)],
                 ["export", str(rundir.path), "x", "--merged"], [f"resume={rundir.path}"])  # fmt: skip
        rundir.write_state(status="preempted")
        for line in words:
            assert main.run(list(line)) in (1, 2), (line, change)
            assert "Traceback" not in capfd.readouterr().err
            assert not (tmp_path / "called").exists(), (line, change)
        assert {path for path in everything(Path()) - before if "evil" in path} == set()
