"""The verb ``compare``: over real runs in folders, in MLflow's database and behind its server, and over folders that
tell of other ends."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import csv
import html
import io
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import pytest
from conftest import TINY
from test_mirror import Server, fresh_database, server
from test_ui import shown

from runner.cli import main
from runner.report import curves, publish
from runner.tracking import metrics_log
from runner.tracking.mlflow import parent_run, store, upload
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir

SWEEP = (
    "-m", *(word for word in TINY if word != "tracking=offline"), "tracking.system_metrics=false", "train.max_steps=2",
    "train.eval_steps=1", "quant=none,8bit", "seed=1,2", "sweep=small",
)  # fmt: skip
CONFIG = """task:
  _target_: runner.tasks.{task}
lora:
  _target_: runner.models.lora.lora
  r: {r}
seed: {seed}
tracking:
  _target_: runner.tracking.trackers.offline
"""


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A folder with a sweep of four real runs, mirrored into the embedded database."""
    folder = tmp_path_factory.mktemp("real")
    done = runner(*SWEEP, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def copied(real: Path, tmp_path: Path) -> Path:
    """The same once more, for a test that changes it: nothing in it names the first."""
    folder = tmp_path / "copied"
    shutil.copytree(real, folder)
    for path in (*folder.rglob("*.json"), *folder.rglob("config.yaml")):
        path.write_text(path.read_text().replace(str(real), str(folder)))
    places = {"experiments": "artifact_location", "runs": "artifact_uri", "tags": "value"}
    with closing(sqlite3.connect(folder / "outputs" / "mlflow.db")) as database:
        for table, column in places.items():
            database.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (str(real), str(folder)))
        database.commit()
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def runner(*words: str, cwd: Path, code: str = "") -> subprocess.CompletedProcess[str]:
    """The program as a process of its own; ``code`` is run before it in the same process."""
    script = f"{code}\nimport sys\nfrom runner.cli import main\nsys.exit(main.run({list(words)!r}))"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=600)


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main.run(["compare", *words])
    out, err = capsys.readouterr()
    return code, out, err


def as_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    code, out, err = said(capsys, *words, "--json")
    assert code == 0, err
    return json.loads(out)


def a_sweep(folder: str = "outputs/sweeps/played") -> SweepDir:
    sweep = SweepDir(Path(folder).absolute())
    sweep.update(id="s", name=sweep.path.name, created=1.0, jobs={})
    return sweep


def played(sweep: SweepDir, r: int, loss: float | None, *, seed: int = 0, **how: object) -> RunDir:
    """A run of a sweep that was never trained; ``how``: status, reason, label, task."""
    jobs = sweep.read()["jobs"]
    rundir = RunDir(sweep.path / f"{len(jobs):03d}-job")
    label = str(how.pop("label", f"lora.r={r},seed={seed}"))
    rundir.path.mkdir(parents=True)
    rundir.config.write_text(CONFIG.format(r=r, seed=seed, task=how.pop("task", "sft")))
    rundir.write_state(**{"status": "completed", "step": 20, "total_steps": 20, "seconds": 3.0, **how})
    rundir.update_manifest(name=label, label=label, overrides=[])
    losses = [] if loss is None else [(0, 5.0), (10, loss - 0.25), (20, loss)]
    lines = [json.dumps({"step": step, "time": 100.0 + step, "eval/loss": value}) for step, value in losses]
    rundir.metrics.write_text("".join(f"{line}\n" for line in lines))
    sweep.update(jobs={**jobs, str(len(jobs)): {"folder": rundir.path.name, "label": label}})
    return rundir


# Where the runs come from


def test_folders_database_and_server_say_the_same(
    real: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(real)
    server.kill()
    shutil.copy(real / "outputs" / "mlflow.db", server.folder / "server.db")
    server.start()
    try:
        found = {
            way: as_json(capsys, *words, "--by", "seed")
            for way, words in {
                "folders": (), "embedded": ("runner",), "database": ("uri=outputs/mlflow.db", "small"),
                "server": (f"uri={server.uri}", "runner"),
            }.items()
        }  # fmt: skip
    finally:
        server.kill()
    for way, board in found.items():
        assert board["parameters"] == ["quant", "seed"], way
        assert board["metrics"] == ["eval/loss", "eval/best_loss", "train/tokens_per_second", "memory/peak_rss_gib",
                                    "train/seconds"], way  # fmt: skip
        assert {run["quant"] for run in board["runs"]} == {"none", "8bit"}, way
        numbers = [{key: run[key] for key in ("label", "status", *board["metrics"])} for run in board["runs"]]
        expected = found["folders"]["runs"]
        assert numbers == [{key: run[key] for key in number} for run, number in zip(expected, numbers, strict=True)]
        assert [group["setting"] for group in board["groups"]] == [
            group["setting"] for group in found["folders"]["groups"]
        ], way
    best = found["database"]["runs"][0]
    for word in (best["mlflow_run_id"][:12], best["label"]):
        assert as_json(capsys, "uri=outputs/mlflow.db", word)["runs"][0]["mlflow_run_id"] == best["mlflow_run_id"]
    runs = found["folders"]["runs"]
    losses = [run["eval/loss"] for run in runs]
    assert losses == sorted(losses)
    assert [run["is_best"] for run in runs] == [True, False, False, False]
    state = RunDir(Path(runs[0]["folder"])).read_state()
    assert (runs[0]["eval/loss"], runs[0]["train/seconds"]) == (state.summary["eval/loss"], state.seconds)


COUNTED = """
import sys
import sqlite3
counts, connect = {}, sqlite3.connect
def traced(*arguments, **options):
    made = connect(*arguments, **options)
    made.set_trace_callback(lambda text: counts.update(queries=counts.get("queries", 0) + text.startswith("SELECT")))
    return made
sqlite3.connect = traced
def hook(event, arguments):
    name = {"urllib.Request": "requests"}.get(event)
    if event == "open" and str(arguments[0]).endswith(("config.yaml", "metrics.jsonl", "state.json", "manifest.json")):
        name = "files"
    if name:
        counts[name] = counts.get(name, 0) + 1
sys.addaudithook(hook)
import atexit
atexit.register(lambda: print("COUNTED", counts, "mlflow" in sys.modules, "torch" in sys.modules, file=sys.stderr))
"""


def counted(cwd: Path, *words: str) -> str:
    done = runner("compare", *words, cwd=cwd, code=COUNTED)
    assert done.returncode == 0, done.stderr
    return done.stderr.split("COUNTED")[1].strip()


def test_many_runs_cost_no_more_questions_than_few(real: Path, tmp_path: Path):
    few = counted(real, "uri=outputs/mlflow.db", "--where", "seed=1")
    assert few == "{'queries': 5} False False"
    many = tmp_path / "many.db"
    shutil.copy(real / "outputs" / "mlflow.db", many)
    store.connect.cache_clear()
    client = store.connect(f"sqlite:///{many}")
    experiment = client.get_experiment_by_name("runner").experiment_id
    for _ in range(10):
        client.set_terminated(client.create_run(experiment).info.run_id)
    assert counted(real, f"uri={many}") == few


def test_a_server_is_asked_once_for_all_runs(real: Path, server: Server):
    server.kill()
    shutil.copy(real / "outputs" / "mlflow.db", server.folder / "server.db")
    server.start()
    try:
        assert counted(real, f"uri={server.uri}", "runner") == "{'requests': 2} False False"
    finally:
        server.kill()


def test_each_folder_is_read_once(here: Path):
    sweep = a_sweep()
    for n in range(12):
        played(sweep, r=2**n, loss=float(n))
    assert counted(here, "outputs/sweeps/played") == "{'files': 48} False False"


def test_a_word_may_be_several_things(here: Path, capsys: pytest.CaptureFixture[str]):
    one, other = a_sweep("outputs/sweeps/one"), a_sweep("outputs/sweeps/other")
    played(one, 4, 2.0), played(one, 8, 1.0), played(other, 16, 3.0)
    labels = {
        words: [run["run"] for run in as_json(capsys, *words)["runs"]]
        for words in (("one",), ("one/lora.r=4", "other"), ("outputs/sweeps",), ())
    }
    assert labels[("one",)] == ["001-job", "000-job"]
    assert labels[("one/lora.r=4", "other")] == ["one/000-job", "other/000-job"]
    assert labels[("outputs/sweeps",)] == ["one/001-job", "one/000-job", "other/000-job"]
    assert labels[()] == ["000-job"], "no word is the latest sweep"


# What is shown


def test_what_did_not_complete_is_shown_as_what_it_is(here: Path, capsys: pytest.CaptureFixture[str]):
    sweep = a_sweep()
    played(sweep, 4, 2.0)
    played(sweep, 8, 0.5, status="failed", reason="the loss is nan at step 7", step=7)
    played(sweep, 16, None, status="killed", reason="cancelled by me", step=0)
    played(sweep, 32, 1.0)
    (sweep.path / "003-job" / "state.json").write_text("{")
    code, out, _ = said(capsys)
    assert code == 0
    lines = [line for line in out.splitlines() if re.match(r" (★ )?00\d-job", line)]
    assert [line.replace("★", "").split()[1] for line in lines] == ["completed", "failed", "damaged", "killed"]
    assert "★ 000-job" in lines[0]
    assert "failed  001-job: the loss is nan at step 7" in out
    assert "killed  002-job: cancelled by me" in out
    assert "python -m runner logs outputs/sweeps/played/001-job" in out


def test_best_is_the_smallest_after_training_began(here: Path, capsys: pytest.CaptureFixture[str]):
    played(a_sweep(), 4, 9.0)
    (run,) = as_json(capsys)["runs"]
    assert (run["eval/loss"], run["eval/best_loss"]) == (9.0, 8.75), "5.0 was before the first step"


def test_what_was_evaluated_later_can_be_asked_for(here: Path, capsys: pytest.CaptureFixture[str]):
    sweep = a_sweep()
    for r, loss in ((4, 1.0), (8, 2.0)):
        record = {"time": 200.0, "step": 20, "name": "held_out", "metrics": {"eval_held_out/loss": -loss}}
        metrics_log.append_to(played(sweep, r, loss).evaluations, record)
    found = as_json(capsys, "--sort", "eval_held_out/loss", "--where", "eval_held_out/loss<0")
    assert [run["eval_held_out/loss"] for run in found["runs"]] == [-2.0, -1.0]
    assert found["best"] == "001-job"


def test_the_forms_hold_the_same(here: Path, capsys: pytest.CaptureFixture[str]):
    sweep = a_sweep()
    for r, seed, loss in ((4, 0, 1.0), (4, 1, 1.1), (8, 0, 2.0), (8, 1, 2.1)):
        played(sweep, r, loss, seed=seed, label=f"a|b,lora.r={r},seed={seed}")
    words = ("--by", "seed", "--pareto", "loss,time")
    code, out, _ = said(capsys, *words, "--markdown")
    assert code == 0
    heading, *tables = out.strip().split("\n\n")
    assert heading == "**mean ± 95 % confidence interval over seed**"
    groups, runs = ([re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()] for table in tables)
    assert [cell.strip() for cell in groups[0]][:3] == ["lora.r", "n", "loss"]
    assert [cell.strip() for cell in groups[2]][:3] == ["4", "2", "1.0500 ± 0.6353"]
    assert len({len(row) for row in runs}) == 1
    assert "★◆ 000-job" in runs[2][0]
    code, out, _ = said(capsys, *words, "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(row["run"], row["lora.r"], float(row["eval/loss"])) for row in rows] == [
        ("000-job", "4", 1.0), ("001-job", "4", 1.1), ("002-job", "8", 2.0), ("003-job", "8", 2.1)
    ]  # fmt: skip
    found = as_json(capsys, *words)
    assert found["pareto"] == {"axes": ["eval/loss", "train/seconds"], "front": ["000-job"]}
    assert found["groups"][0]["means"]["eval/loss"]["n"] == 2


def test_runs_that_differ_in_the_seed_alone_are_one_line_under_its_explanation(
    here: Path, capsys: pytest.CaptureFixture[str]
):
    sweep = a_sweep()
    for seed, loss in enumerate((1.0, 1.5, 2.0)):
        played(sweep, 8, loss, seed=seed)
    code, out, _ = said(capsys, "--by", "seed")
    lines = [line.strip() for line in out.splitlines() if line.strip()]
    assert code == 0
    assert lines[0] == (
        "mean ± 95 % confidence interval over seed; nothing else differs, so there is no other setting to compare with"
    )
    assert lines[1].split()[:2] == ["n", "loss"]
    assert lines[3].split()[:4] == ["3", "1.5000", "±", "1.2421"]
    assert lines[4] == "3 runs (3 completed): --all shows them"
    assert "compared with best" not in out
    assert "001-job" in said(capsys, "--by", "seed", "--all")[1]
    for form in ("--markdown", "--html=page.html"):
        assert said(capsys, "--by", "seed", form)[0] == 0
    assert "nothing else differs" in Path("page.html").read_text(encoding="utf-8")


def test_the_page_is_of_what_was_compared(here: Path, capsys: pytest.CaptureFixture[str]):
    sweep = a_sweep("other/sweeps/played")
    played(sweep, 4, 2.0, seed=1), played(sweep, 8, 1.0, seed=1), played(sweep, 8, 1.0, seed=2)
    _, out, _ = said(capsys, "outputs_dir=other", "--where", "seed=1", "--by", "seed")
    assert "runner compare outputs_dir=other --where=seed=1 --by=seed --html compare.html" in out


def test_runs_of_several_stores_do_not_stand_side_by_side(here: Path, capsys: pytest.CaptureFixture[str]):
    client = store.connect(f"sqlite:///{here}/theirs.db")
    store.create_run(client, store.experiment_id(client, "runner", here), "some id", "theirs", 1.7e9)
    played(a_sweep("outputs/sweeps/mine"), 4, 1.0)
    for words, told in {
        ("uri=theirs.db", "uri=other.db"): "uri: is given more than once.*a command reads one MLflow store",
        ("uri=theirs.db", "theirs", "outputs/sweeps/mine"): "no experiment, sweep or run 'outputs/sweeps/mine' in "
        "sqlite:.*theirs.db.*to compare folders, leave out uri=",
        ("uri=theirs.db", "runner", "mine"): "'runner' is an experiment, but mine is not",
    }.items():
        code, out, err = said(capsys, *words)
        assert (code, out) == (2, "")
        assert re.search(told, err, re.DOTALL), err


def test_what_keeps_the_embedded_database_from_answering_is_told(here: Path, capsys: pytest.CaptureFixture[str]):
    played(a_sweep(), 4, 1.0)
    code, _, err = said(capsys, "nosuch")
    assert (code, "database" in err) == (2, False)
    Path("outputs/mlflow.db").write_text("this is no database, and never was one")
    code, _, err = said(capsys, "nosuch")
    assert code == 2
    assert "there is no run or sweep 'nosuch'" in err
    assert "file is not a database" in err


def test_runs_of_different_tasks_are_refused(here: Path, capsys: pytest.CaptureFixture[str]):
    sweep = a_sweep()
    played(sweep, 4, 1.0), played(sweep, 8, 2.0, task="pretrain")
    code, out, err = said(capsys)
    assert (code, out) == (2, "")
    assert "different tasks (1 of sft, 1 of pretrain): their losses cannot be compared" in err
    assert said(capsys, "--where", "task=pretrain")[0] == 0


def test_no_password_is_shown(here: Path, server: Server, capsys: pytest.CaptureFixture[str]):
    server.running()
    uri = server.uri.replace("://", "://me:hunter2hunter2@")
    code, out, err = said(capsys, f"uri={uri}", "no such experiment")
    assert code == 2
    assert "no such experiment" in err
    assert "hunter2" not in out + err


def test_the_hints_name_what_can_be_typed(here: Path, capsys: pytest.CaptureFixture[str]):
    sweep = a_sweep("outputs/sweeps/with space")
    (played(sweep, 4, 1.0).path / "model").mkdir()
    played(sweep, 8, 2.0)
    _, out, _ = said(capsys, "with space")
    assert "runner diff 'outputs/sweeps/with space/000-job' 'outputs/sweeps/with space/001-job'" in out
    assert "runner generate 'outputs/sweeps/with space/000-job'" in out
    assert "runner compare 'with space' --html compare.html" in out


# The page and the pictures


HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>&\u2028"


def test_the_page_is_complete_in_itself_and_takes_any_name(here: Path, capsys: pytest.CaptureFixture[str]):
    sweep = a_sweep()
    for n in range(8):
        played(sweep, 2**n, 1.0 + n, seed=n % 2, label=f"{HOSTILE}{n}")
    code, out, err = said(capsys, "--html", "deep/report.html", "--by", "seed")
    assert (code, err) == (0, "")
    assert "wrote deep/report.html" in out
    page = Path("deep/report.html").read_text(encoding="utf-8")
    assert not re.findall(r"<(?:img|link|iframe|object)|src\s*=\s*[\"']|@import|url\((?!#)", page)
    assert set(re.findall(r"https?://[\w./]+", page)) == {"http://www.w3.org/2000/svg"}
    assert page.count("</script>") == 2, "one ends the data, one the program"
    data = data_of(Path("deep/report.html"))
    assert [run["label"] for run in data["runs"]] == [f"{HOSTILE}{n}" for n in range(8)]
    assert data["curves"]["0"]["eval"] == [[0, 10, 20], [0.0, 0.0, 0.0], [0.0, 10.0, 20.0], [5.0, 0.75, 1.0]]


def data_of(page: Path) -> dict:
    """What the page draws."""
    match = re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    assert match
    return json.loads(match[1])


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no browser here")
@pytest.mark.parametrize("count", [1, 200])
def test_a_browser_draws_it(count: int, here: Path, capsys: pytest.CaptureFixture[str]):
    sweep = a_sweep()
    for n in range(count):
        played(sweep, n + 1, 1.0 + n / 100, label=f"{HOSTILE}{n}", status="failed" if n % 9 == 5 else "completed")
    assert said(capsys, "--html", "report.html")[0] == 0
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={here}/profile", "--dump-dom"]
    command = [str(CHROMIUM), *flags, (here / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    drawn = done.stdout
    assert drawn.count('<tr class="" data-run=') + drawn.count('<tr class="best" data-run=') == count
    curves_there = re.search(r'id="curves">(.*?)id="left"', drawn, re.DOTALL)
    assert curves_there
    assert curves_there[1].count('class="curve"') == count
    assert "<title>taken" not in drawn
    assert html.escape("</script><script>document") in drawn


@pytest.mark.skipif(CHROMIUM is None, reason="no browser here")
def test_the_front_and_the_cells_of_the_page_are_those_of_the_terminal(here: Path, capsys: pytest.CaptureFixture[str]):
    """Two runs are equal in both: both are on the front."""
    sweep = a_sweep()
    trained = [(1.0, 9.0), (1.0, 9.0), (2.0, 3.0), (2.0, 4.0), (3.0, 1234.5), (0.5, None)]
    for n, (loss, seconds) in enumerate(trained):
        played(sweep, 2**n, loss, seconds=seconds) if seconds else played(sweep, 2**n, loss, status="failed")
    code, out, _ = said(capsys, "--pareto", "time,loss", "--html", "page.html")
    assert code == 0
    rows = [line.split() for line in out.splitlines() if re.search(r"00\d-job +(completed|failed)", line)]
    on_front = [number for number, row in enumerate(rows) if "◆" in row[0]]
    assert [rows[number][1] for number in on_front] == ["000-job", "001-job", "002-job"]

    data = data_of(Path("page.html"))
    assert sorted(data["fronts"]["eval/loss"]["train/seconds"]) == on_front
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={here}/profile"]
    address = (here / "page.html").as_uri()
    done = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True, check=True, timeout=120)
    scatter = done.stdout.partition('id="scatter">')[2].partition("</svg>")[0]
    ringed = re.findall(r'<circle[^>]*stroke="var\(--ink\)"[^>]*data-run="(\d+)"', scatter)
    assert sorted(map(int, ringed)) == on_front
    table = done.stdout.partition('id="table">')[2].partition("</table>")[0]
    found = re.findall(r"<tr[^>]*data-run.*?</tr>", table, re.DOTALL)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in found]
    shown_there = [[re.sub(r"<[^>]+>", "", cell) for cell in row] for row in cells]
    assert [" ".join(row).split() for row in shown_there] == rows


def test_curves_are_thinned_without_losing_a_peak():
    values = [1.0] * 5000
    values[1234], values[4321] = 9.0, -3.0
    curve = curves.Curve(list(range(5000)), [float(n) for n in range(5000)], [float(n) for n in range(5000)], values)
    thin = curve.thinned()
    assert len(thin.values) <= curves.MOST_POINTS + 2
    assert (max(thin.values), min(thin.values)) == (9.0, -3.0)
    assert (thin.steps[0], thin.steps[-1]) == (0, 4999)
    assert thin.steps[thin.values.index(9.0)] == 1234


def test_curves_of_runs_without_a_folder_come_from_mlflow(copied: Path, tmp_path: Path):
    found = json.loads(runner("compare", "--json", cwd=copied).stdout)
    shutil.rmtree(copied / "outputs" / "sweeps")
    uri = f"uri={copied}/outputs/mlflow.db"
    done = runner("compare", uri, "--html", str(tmp_path / "page.html"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shown = data_of(tmp_path / "page.html")
    assert [curve["eval"][0] for curve in shown["curves"].values()] == [[0, 1, 2]] * 4
    assert shown["curves"]["0"]["eval"][3][-1] == pytest.approx(found["runs"][0]["eval/loss"], rel=1e-5)
    tokens = shown["curves"]["0"]["eval"][1]
    assert tokens[0] == 0 < tokens[1] < tokens[2]


def test_pictures_are_written(here: Path, capsys: pytest.CaptureFixture[str]):
    sweep = a_sweep()
    for n in range(6):
        played(sweep, 4 * (1 + n % 2), 1.0 + n, seed=n, label="$x_n")
    code, _, err = said(capsys, "--png", "pictures")
    assert (code, err) == (0, "")
    written = sorted(path.name for path in Path("pictures").iterdir())
    assert written == ["importance.png", "loss.png", "parallel.png", "tradeoff.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in Path("pictures").iterdir())


# What is refused


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["plaied"], r"no run or sweep 'plaied'.*did you mean 'played'"),
        (["--html"], "--html: needs a value"),
        (["--html", "--csv"], "--html: needs a value"),
        (["--wher", "x=1"], "no such option.*did you mean '--where'"),
        (["--csv", "--json"], "are several output formats"),
        (["--sort", "loss", "--sort", "r"], "--sort: is given more than once"),
        (["uri=a.db", "uri=b.db"], "uri: is given more than once"),
        (["--metrics", "nothing"], "no run has the metric 'nothing'.*available metrics: eval/best_loss, eval/loss"),
        (["--html", "file/page.html"], "--html=file/page.html: cannot be written"),
        (["--html", "outputs"], "--html=outputs: cannot be written"),
        (["--png", "file"], "--png=file: cannot be written"),
        (["uri=nothing.db"], "there is no such database"),
        (["uri=http://127.0.0.1:9", "x"], "the server, http://127.0.0.1:9.*refused"),
        (["outputs_dir=empty"], "no runs below empty yet"),
        (["waiting"], "none of the 2 runs is completed: 2 pending.*(lora.r=4|000-job)"),
    ],
)
def test_a_line_that_means_nothing_is_refused_in_one_message(
    words: list[str], expected: str, here: Path, capsys: pytest.CaptureFixture[str]
):
    waiting = a_sweep("outputs/sweeps/waiting")
    played(waiting, 4, None, status="pending"), played(waiting, 8, None, status="pending")
    sweep = a_sweep()
    played(sweep, 4, 1.0), played(sweep, 8, 2.0)
    Path("file").write_text("")
    Path("empty").mkdir()
    code, out, err = said(capsys, *words)
    assert (code, out) == (2, "")
    assert re.search(expected, err, re.DOTALL), err
    assert err.startswith("error: ")


def test_an_experiment_that_is_not_there_names_those_that_are(real: Path, capsys: pytest.CaptureFixture[str]):
    code, _, err = said(capsys, f"uri={real}/outputs/mlflow.db", "runer")
    assert code == 2
    assert "there is no experiment, sweep or run 'runer'" in err
    assert "did you mean 'runner'? experiments: " in err


# The parent of a sweep in MLflow


@pytest.fixture(scope="module")
def pages(real: Path) -> Iterator[str]:
    """The address of MLflow's pages of the real sweep's experiment."""
    with shown(f"outputs_dir={real / 'outputs'}") as (_, address):
        yield address.removesuffix("/runs")


def text_of(address: str) -> str:
    """What stands on a page, without its tags: a browser has run its scripts."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium here (Debian: apt install chromium)")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=2400,1400", "--dump-dom",
        "--virtual-time-budget=30000", address,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    kept = re.sub(r"<(script|style).*?</\1>", " ", done.stdout, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", kept)).split())


@pytest.mark.slow
def test_what_a_person_sees_in_mlflow(real: Path, pages: str):
    sweep = SweepDir(real / "outputs" / "sweeps" / "small")
    parent, runs = sweep.read()["mlflow"]["parent_run_id"], sweep.rundirs()
    best = min(runs, key=lambda rundir: rundir.read_state().summary["eval/loss"])

    table = text_of(f"{pages}/runs")
    assert "5 matching runs" in table
    assert "small" in table
    assert best.read_manifest()["label"] not in table, "children are folded below their parent"

    story = text_of(f"{pages}/runs/{parent}")
    assert f"Best of this sweep : {best.read_manifest()['label']}" in story
    assert f"{best.read_state().summary['eval/loss']:.4f}" in story
    assert "Status Finished" in story
    children = story.partition("Child runs")[2].partition("Source")[0]
    assert all(rundir.read_manifest()["label"] in children for rundir in runs)

    child = text_of(f"{pages}/runs/{best.read_manifest()['mlflow']['run_id']}")
    assert "chitchat" in child.partition("Datasets")[2], "the column Dataset is filled"
    assert "Parent run small" in child
    name = upload.plain(best.read_manifest()["model"]["name"])
    assert name in child.partition("Logged models")[2].partition("Registered prompts")[0], "so is the column Models"

    ids = json.dumps([rundir.read_manifest()["mlflow"]["run_id"] for rundir in runs])
    experiment = pages.rpartition("/")[2]
    address = (
        f"{pages.partition('/#')[0]}/#/compare-runs?runs={quote(ids)}&experiments={quote(json.dumps([experiment]))}"
    )
    compared = text_of(address)
    assert "Comparing 4 Runs from 1 Experiment" in compared
    assert "Parallel Coordinates Plot" in compared
    assert "eval/loss" in compared


def test_the_parent_shows_the_leaderboard_and_follows_when_runs_are_added(copied: Path):
    sweep = SweepDir(copied / "outputs" / "sweeps" / "small")
    noted = sweep.read()["mlflow"]
    client = store.connect(noted["uri"])

    def parent() -> object:
        return client.get_run(noted["parent_run_id"])

    best = min(sweep.rundirs(), key=lambda rundir: rundir.read_state().summary["eval/loss"])
    data = parent().data
    assert data.metrics["best/eval/loss"] == best.read_state().summary["eval/loss"]
    assert data.tags["runner.best_run_id"] == best.read_manifest()["mlflow"]["run_id"]
    assert data.tags["runner.best_run"] == best.read_manifest()["label"]
    assert f"/runs/{data.tags['runner.best_run_id']})" in data.tags["mlflow.note.content"]
    there = {found.path for found in client.list_artifacts(noted["parent_run_id"])}
    assert there >= {"leaderboard.json", "compare.html"}
    file = Path(client.download_artifacts(noted["parent_run_id"], "leaderboard.json"))
    table = json.loads(file.read_text())
    assert [row[table["columns"].index("is_best")] for row in table["data"]] == [1.0, 0.0, 0.0, 0.0]
    before = data.tags["runner.leaderboard"]
    assert parent_run.update_parent(sweep, publish=publish.send) == ""
    assert parent().data.tags["runner.leaderboard"] == before, "nothing new, nothing sent"
    client.set_tag(noted["parent_run_id"], "mlflow.note.content", "mine")
    best.write_state(reason="looked at again")
    assert parent_run.update_parent(sweep, publish=publish.send) == ""
    assert parent().data.tags["runner.leaderboard"] != before
    assert parent().data.tags["mlflow.note.content"] == "mine", "what somebody wrote stays"
