"""``lora.start=RUN``: the next stage on a run's adapter. Real runs of the smallest model, in one process."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from safetensors.torch import load_file, save_file

from runner.cli import main
from runner.errors import Preempted
from runner.report import diff, model_card, record, results
from runner.signals import Stop
from runner.tracking import manifest, metrics_log, origin
from runner.tracking.mlflow import tags
from runner.tracking.rundir import RunDir

SHORT = (*TINY, "data.max_length=512", "train.max_steps=2", "model.dtype=float32", "train.save_steps=1")
PAIRS = ("task=dpo", "data=chitchat_pairs", "data.train_rows=16", "data.packing=false")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A folder with the run ``sft``, an SFT run, and ``next``, which trains its adapter further."""
    place = tmp_path_factory.mktemp("stages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        run("sft", "optim.learning_rate=3e-3")
        run("next", "lora.start=sft", "optim.learning_rate=3e-3", "seed=1")
    return place


@pytest.fixture(autouse=True)
def _in_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def run(name: str, *overrides: str, code: int = 0) -> RunDir:
    assert main.run([*SHORT, f"name={name}", f"hydra.run.dir=outputs/runs/{name}", *overrides]) == code
    return RunDir(Path(f"outputs/runs/{name}").absolute())


def of(name: str) -> RunDir:
    return RunDir(Path(f"outputs/runs/{name}").absolute())


def evaluations(rundir: RunDir) -> list[float]:
    return [record["eval/loss"] for record in metrics_log.read(rundir) if "eval/loss" in record]


def test_the_next_stage_begins_where_the_run_ended() -> None:
    sft, following = of("sft"), of("next")
    assert evaluations(following)[0] == evaluations(sft)[-1]
    assert evaluations(following)[-1] < evaluations(sft)[-1] < evaluations(sft)[0]
    first = following.read_manifest()[origin.FIELD][0]
    assert first["weights_sha256"] == sft.read_manifest()["weights_sha256"]
    assert (first["how"], first["name"], first["where"]) == ("lora.start", "sft", str(sft.path))


def test_the_reference_of_dpo_is_the_model_that_it_starts_from() -> None:
    dpo = run("dpo", *PAIRS, "lora.start=next")
    records = [record for record in metrics_log.read(dpo) if "eval/loss" in record]
    assert records[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert records[0]["eval/rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    other = run("from-base", *PAIRS)
    assert records[0]["eval/nll"] != pytest.approx(evaluations_of(other, "nll")[0], rel=1e-3)
    assert [each["name"] for each in dpo.read_manifest()[origin.FIELD]] == ["next", "sft"]


def evaluations_of(rundir: RunDir, name: str) -> list[float]:
    return [record[f"eval/{name}"] for record in metrics_log.read(rundir) if f"eval/{name}" in record]


def test_the_chain_is_shown_wherever_a_run_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    sft, following = of("sft"), of("next")
    known = following.read_manifest()
    chain = f"sft ({sft.read_manifest()['id'][:8]})"
    assert tags.of_run(following, known, following.read_state())["runner.chain"] == chain
    assert tags.of_run(following, known, following.read_state())["runner.came_from"] == sft.read_manifest()["id"]
    assert f"- trained further from: {chain}" in model_card.text(following, ("adapter",), "/base", {}, is_chat=True)
    (data,) = (each for each in diff.of(*map(record.of_folder, (sft, following))) if each.title == "data")
    assert [row.theirs for row in data.rows if row.key == "came from"] == [chain]
    assert [each.came_from for each in results.of_folders([sft, following], Path("outputs"))] == ["", chain]
    assert main.run(["compare", str(sft.path), str(following.path)]) == 0
    table = capsys.readouterr().out
    assert "outputs/runs/sft" in table
    assert "@" not in table


def test_only_the_weights_are_part_of_the_signature(tmp_path: Path) -> None:
    copy = shutil.copytree(of("sft").path, tmp_path / "elsewhere")
    known = of("next").read_manifest()["signature"]
    assert run("twin", f"lora.start={copy}", "optim.learning_rate=3e-3", "seed=1").read_manifest()["signature"] == known
    adapter = run("of-a-plain-adapter", f"lora.start={copy / 'model'}", "optim.learning_rate=3e-3", "seed=1")
    assert adapter.read_manifest()["signature"] == known
    assert adapter.read_manifest()["weights_sha256"] == of("next").read_manifest()["weights_sha256"]


@pytest.mark.parametrize(
    ("overrides", "problem", "remedy"),
    [
        ("lora.r=4", "lora.r=4: the adapter of lora.start has 8", "set lora.r=8"),
        ("lora.lora_alpha=8", "has 16", "set lora.lora_alpha=16"),
        ("lora.target_modules=[q_proj]", "lora.target_modules", "up_proj"),
        ("lora.use_rslora=true", "lora.use_rslora=True", "set lora.use_rslora=false"),
        ("lora.modules_to_save=[lm_head]", "lora.modules_to_save", "set lora.modules_to_save=null"),
        ("lora.init_lora_weights=gaussian", "has no effect with lora.start", "set lora.init_lora_weights=true"),
        ("model.layers=3", "was trained on", "choose that base model"),
        ("lora=peft lora.method=ia3 +lora.target_modules=[q_proj] +lora.feedforward_modules=[]", "method", "same kind"),
    ],
)
@pytest.mark.parametrize("verb", [(), ("plan",)])
def test_an_adapter_that_does_not_fit_is_refused(
    overrides: str, problem: str, remedy: str, verb: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*verb, *SHORT, "lora.start=sft", *overrides.split()]
    assert main.run([*words, *([] if verb else ["hydra.run.dir=outputs/refused"])]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert problem in error
    assert remedy in error
    assert not Path("outputs/refused").exists()


def test_a_run_without_an_adapter_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    full = run("full", "lora=none", "train.max_steps=1")
    for word, problem in {"full": "it has no adapter to continue", "stf": "no run or sweep 'stf'"}.items():
        assert main.run([*SHORT, f"lora.start={word}"]) == 2
        assert problem in capsys.readouterr().err
    following = run("of-full", "model=local", f"model.path={full.model}", "model.dtype=float32")
    assert [each["how"] for each in following.read_manifest()[origin.FIELD]] == ["model.path"]
    assert main.run([*SHORT, "model=local", f"model.path={full.path}"]) == 2
    assert f"set it to {full.model}" in capsys.readouterr().err


def test_the_run_keeps_what_it_started_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The other run may be deleted: a resumed and a repeated run give the same weights."""
    shutil.copytree(of("sft").path, "outputs/runs/gone")
    words = ("lora.start=outputs/runs/gone", "optim.learning_rate=3e-3", "seed=1", "train.max_steps=2")
    with pytest.MonkeyPatch.context() as patch:
        stops = iter([False, False, True])
        patch.setattr(Stop, "check", lambda _: (_ for _ in ()).throw(Preempted("stop")) if next(stops, False) else None)
        cut = run("cut", *words, code=75)
    assert cut.read_state().step < 2
    shutil.rmtree("outputs/runs/gone")
    assert main.run([f"resume={cut.path}"]) == 0
    expected = of("next").read_manifest()["weights_sha256"]
    assert cut.read_manifest()["weights_sha256"] == expected
    capsys.readouterr()
    assert main.run(["rerun", str(cut.path), f"hydra.run.dir={tmp_path / 'again'}"]) == 0
    again = RunDir(tmp_path / "again").read_manifest()
    assert again["weights_sha256"] == expected
    assert again[origin.FIELD] == cut.read_manifest()[origin.FIELD]
    assert again["signature"] == cut.read_manifest()["signature"]
    elsewhere = f"lora.start={of('next').path}"
    assert main.run(["rerun", str(cut.path), elsewhere]) == 2
    assert "has other weights now" in capsys.readouterr().err


def test_a_changed_copy_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    rundir = run("changed", "lora.start=sft", "train.max_steps=1")
    changed = {name: tensor + 1 for name, tensor in load_file(rundir.start / "adapter_model.safetensors").items()}
    (rundir.start / "adapter_model.safetensors").unlink()  # a link to the file of the other run
    save_file(changed, rundir.start / "adapter_model.safetensors")
    rundir.write_state(status="killed")
    assert main.run([f"resume={rundir.path}"]) == 2
    assert "other weights than when it was prepared" in capsys.readouterr().err
    assert origin.digest_of(of("sft").path) == of("sft").read_manifest()["weights_sha256"]


def test_an_adapter_that_cut_its_base_is_continued_as_it_was_saved() -> None:
    """PiSSA is saved as a LoRA of twice the rank on the original weights."""
    pissa = run("pissa", "lora=pissa", "lora.r=4", "lora.lora_alpha=4", "optim.learning_rate=3e-3")
    following = run("after-pissa", "lora.start=pissa", "lora.r=8", "lora.lora_alpha=8", "train.max_steps=1")
    assert evaluations(following)[0] == pytest.approx(evaluations(pissa)[-1], abs=1e-5)


def test_configurations_without_a_start_keep_their_signature() -> None:
    cfg = manifest.read_config(of("sft"))
    before: dict[str, Any] = json.loads(json.dumps(cfg))
    del before["lora"]["start"]
    assert manifest.signature(before) == manifest.signature(cfg)
