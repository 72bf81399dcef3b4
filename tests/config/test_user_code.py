"""Options of one's own: a loss, a metric, a data format and an optimizer from outside the package.

The four are those of the README's how-to, word by word.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import TINY

from runner.cli import main
from runner.config import bind, code_files, user_code
from runner.errors import ConfigError
from runner.tracking import manifest, metrics_log
from runner.tracking.rundir import RunDir

README = (Path(__file__).parents[2] / "README.md").read_text()
QUICK = (*TINY, "train.max_steps=2")


def how_to(name: str) -> str:
    """The Python text of the README's how-to that defines this function."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (text,) = [block for block in blocks if f"def {name}(" in block]
    assert text.count("\n") <= 15, f"{name} is longer than 15 lines"
    return text


@pytest.fixture(autouse=True)
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    """A folder outside the checkout with a file of each how-to."""
    monkeypatch.chdir(tmp_path)
    for name in ("focal", "with_bits", "quiz", "my_sgd"):
        Path(f"{name}_lab.py").write_text(how_to(name))
    Path("rows.jsonl").write_text(
        "".join(json.dumps({"q": f"what is {n}", "a": f"it is {n}"}) + "\n" for n in range(40))
    )
    return tmp_path


def last(folder: str) -> dict[str, float]:
    return metrics_log.last_values(metrics_log.read(RunDir(Path(folder).absolute())))


def test_a_loss(capfd: pytest.CaptureFixture[str]) -> None:
    assert main.run([*QUICK, "hydra.run.dir=plain"]) == 0
    assert main.run(["code=focal_lab.py", "task=focal", "task.gamma=0", *QUICK, "hydra.run.dir=same"]) == 0
    assert main.run(["code=focal_lab.py", "task=focal", *QUICK, "hydra.run.dir=focal"]) == 0
    assert last("same")["eval/loss"] == pytest.approx(last("plain")["eval/loss"], abs=1e-5)
    assert last("focal")["eval/loss"] < last("plain")["eval/loss"]
    config = manifest.read_config(RunDir(Path("focal").absolute()))
    assert config["task"]["gamma"] == 2.0, "the default of the signature is a value like any other"


def test_a_metric_that_a_sweep_is_compared_by(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["-m", "code=with_bits_lab.py", "task=with_bits", "seed=0,1", *QUICK, "sweep=bits"]
    command = [sys.executable, "-m", "runner", *words]
    assert subprocess.run(command).returncode == 0  # not in this process: jobs are forks of it, and it may have trained
    found = last("outputs/sweeps/bits/" + sorted(path.name for path in Path("outputs/sweeps/bits").glob("0*"))[0])
    assert found["eval/bits_per_token"] == pytest.approx(found["eval/loss"] / 0.6931471805599453)
    capfd.readouterr()
    assert main.run(["compare", "bits", "--metrics", "eval/bits_per_token", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["metrics"][-1] == "eval/bits_per_token"


def test_a_format_by_name_and_by_function() -> None:
    rows = ("data=local", "data.path=rows.jsonl", *QUICK, "data.train_rows=null")
    assert main.run(["code=quiz_lab.py", "data/format=quiz", *rows, "hydra.run.dir=named"]) == 0
    config = manifest.read_config(RunDir(Path("named").absolute()))
    assert config["data"]["format"]["_target_"] == "quiz_lab.quiz"
    assert user_code.detached(config)["data"]["format"] == {"_target_": "quiz_lab.quiz", "question": "q", "answer": "a"}


def test_an_optimizer_in_a_config_folder(capfd: pytest.CaptureFixture[str]) -> None:
    Path("my_conf/optim").mkdir(parents=True)
    Path("my_conf/optim/my_sgd.yaml").write_text("_target_: my_sgd_lab.my_sgd\nlearning_rate: 0.01\nmomentum: 0.9\n")
    start = ["--config-dir", "my_conf", "optim=my_sgd", *QUICK]
    assert main.run([*start, "hydra.run.dir=run"]) == 0
    assert main.run([*start, "optim.momentun=0.5"]) == 2
    assert "did you mean 'momentum'" in capfd.readouterr().err
    assert main.run([*start, "optim.momentum=high"]) == 2
    assert "must be a finite number" in capfd.readouterr().err


def test_the_run_keeps_the_code_that_it_was_started_with(capfd: pytest.CaptureFixture[str]) -> None:
    start = ["code=my_sgd_lab.py", "optim=my_sgd", *QUICK]
    assert main.run([*start, "hydra.run.dir=run"]) == 0
    rundir, file = RunDir(Path("run").absolute()), Path("my_sgd_lab.py")
    assert (rundir.code / file.name).read_text() == file.read_text()
    frozen = yaml.safe_load(rundir.config.read_text())
    assert frozen["code"] == {"my_sgd_lab": code_files.digest([file])}
    assert frozen == user_code.detached(frozen)
    file.write_text(file.read_text() + "# edited\n")
    assert main.run([*start, "hydra.run.dir=run"]) == 2
    assert "another configuration" in capfd.readouterr().err
    assert main.run(["rerun", "run", "hydra.run.dir=again", "tracking=offline"]) == 0
    assert "bit for bit; the weights are identical" in capfd.readouterr().err
    assert main.run([*start, "hydra.run.dir=other"]) == 0
    capfd.readouterr()
    assert main.run(["diff", "run", "other", "--patch"]) == 0
    said = capfd.readouterr().out
    assert "code.my_sgd_lab" in said
    assert "+# edited" in said


def test_a_resumed_run_goes_on_with_its_copy(capfd: pytest.CaptureFixture[str]) -> None:
    start = ["code=my_sgd_lab.py", "optim=my_sgd", *QUICK]
    assert main.run([*start, "hydra.run.dir=run"]) == 0
    rundir, file = RunDir(Path("run").absolute()), Path("my_sgd_lab.py")
    file.write_text("raise SystemExit('the edited file was imported')\n")
    shutil.rmtree(rundir.checkpoints)
    rundir.write_state(status="killed")
    assert main.run(["resume=run"]) == 0
    assert "was edited since this run began; the run continues with its own copy" in capfd.readouterr().err
    rundir.write_state(status="killed")
    (rundir.code / file.name).write_text("edited here as well\n")
    assert main.run(["resume=run"]) == 2
    assert "was edited after the run began" in capfd.readouterr().err


def test_a_package() -> None:
    Path("lab/parts").mkdir(parents=True)
    Path("lab/__init__.py").write_text("")
    Path("lab/parts/__init__.py").write_text("from lab.parts.rate import RATE\n")
    Path("lab/parts/rate.py").write_text("RATE = 0.5\n")
    Path("lab/optim.py").write_text("from lab.parts import RATE\n" + how_to("my_sgd"))
    assert main.run(["code=lab", "optim._target_=lab.optim.my_sgd", *_only("learning_rate=0.1", "momentum=0.5"), *QUICK,
                     "hydra.run.dir=run"]) == 0  # fmt: skip
    assert sorted(name for name, _ in code_files.files([Path("run/code/lab")])) == [
        "lab/__init__.py", "lab/optim.py", "lab/parts/__init__.py", "lab/parts/rate.py",
    ]  # fmt: skip


def _only(*values: str) -> list[str]:
    """Overrides that leave of ``optim`` the target and these keys."""
    others = ("weight_decay", "betas", "eps", "fused", "loraplus_lr_ratio")
    return [*(f"~optim.{key}" for key in others), *(f"++optim.{value}" for value in values)]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["code=nothing.py"], "no such file or folder"),
        (["code="], "no such file or folder"),
        (["code=rows.jsonl"], "is not a Python file"),
        (["code=no_such_package"], "no such file, folder or installed package"),
        (["code=3"], "code=3: must be a text or"),
        (["code=json.py"], "cannot be the name of a module of yours"),
        (["code=broken.py", "optim._target_=broken.f"], "cannot be imported: SyntaxError"),
        (["code=raises.py", "optim._target_=raises.f"], "cannot be imported: ValueError: bad constant"),
        (["code=my_sgd_lab.py", "optim._target_=my_sgd_lab.my_sdg"], "did you mean 'my_sgd'"),
        (["code=my_sgd_lab.py", "optim._target_=my_sgd_lab.nothing.my_sgd"], "no module 'my_sgd_lab.nothing'"),
        (["code=my_sgd_lab.py", "optim._target_=my_sgd_lab.torch"], "no such function"),
        (["code=borrows.py", "optim._target_=borrows.SGD"], "is imported into borrows from torch.optim"),
        (["optim._target_=os.system"], "'os' is not part of your code"),
        (["optim._target_=torch.optim.SGD"], "'torch' is not part of your code"),
        (["quant._target_=runner.launch.local.child.kill_session"], "is no option of quant"),
        (["quant._target_=runner.models.quantization.bitsandbytes.FourBit"], "is no option of quant"),
        (["optim._target_=my_sgd_lab.my_sgd", "code=[my_sgd_lab.py,other/my_sgd_lab.py]"], "has two modules called"),
    ],
)  # fmt: skip
def test_what_is_refused(words: list[str], problem: str, capfd: pytest.CaptureFixture[str]) -> None:
    Path("json.py").write_text("")
    Path("broken.py").write_text("no Python (\n")
    Path("raises.py").write_text("raise ValueError('bad constant')\n")
    Path("borrows.py").write_text("from torch.optim import SGD\n")
    Path("other").mkdir()
    shutil.copy("my_sgd_lab.py", "other")
    assert main.run([*words, *QUICK]) == 2
    said = capfd.readouterr().err
    assert problem in said
    assert "Traceback" not in said
    assert not Path("outputs").exists()


def test_two_versions_of_a_module_in_one_process() -> None:
    """As the jobs of a sweep over ``code`` have them."""
    for number in (1, 2):
        Path(f"v{number}").mkdir()
        Path(f"v{number}/mine.py").write_text(f"from beside import NUMBER\ndef value(): return NUMBER * {number}\n")
        Path(f"v{number}/beside.py").write_text(f"NUMBER = {number}0\n")
    for number in (1, 2, 1):
        module = user_code.load("mine", [Path(f"v{number}/mine.py").absolute()])
        assert module.value() == 10 * number * number


def test_a_target_that_a_stored_configuration_names_is_not_imported() -> None:
    with pytest.raises(ConfigError, match="not part of your code"):
        bind.bind({"_target_": "shutil.rmtree"}, "optim")
