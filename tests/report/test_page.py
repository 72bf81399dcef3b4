"""The page is complete in itself, and a browser draws what the terminal shows."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from fixtures.compared_runs import a_sweep, data_of, here, played, said

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
    done = subprocess.run(command, capture_output=True, text=True, check=False)
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
    done = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True, check=True)
    scatter = done.stdout.partition('id="scatter">')[2].partition("</svg>")[0]
    ringed = re.findall(r'<circle[^>]*stroke="var\(--ink\)"[^>]*data-run="(\d+)"', scatter)
    assert sorted(map(int, ringed)) == on_front
    table = done.stdout.partition('id="table">')[2].partition("</table>")[0]
    found = re.findall(r"<tr[^>]*data-run.*?</tr>", table, re.DOTALL)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in found]
    shown_there = [[re.sub(r"<[^>]+>", "", cell) for cell in row[:-1]] for row in cells]  # the last: links
    assert [" ".join(row).split() for row in shown_there] == rows


def seeds(here: Path) -> None:
    """Three settings with three seeds each; two runs have samples."""
    sweep = a_sweep()
    for r in (4, 8, 16):
        for seed in range(3):
            rundir = played(sweep, r, 3 - r / 10 + seed / 1000, seed=seed, seconds=float(r + seed))
            if seed == 0 and r > 4:
                sample = {"prompt": "Who?", "reference": "Ana", "before": "none", "after": f"answer of {r}"}
                rundir.samples.write_text(json.dumps([sample]))
                rundir.update_manifest(mlflow={"run_id": "ab" * 16, "experiment_id": "1", "url": None})


def test_the_page_has_samples_places_and_what_to_try_next(here: Path, capsys: pytest.CaptureFixture[str]):
    seeds(here)
    code, out, _ = said(capsys, "--html", "page.html")
    assert code == 0
    data = data_of(Path("page.html"))
    assert data["over"] == "seed"
    assert {runs["after"] for each in data["samples"].values() for runs in each} == {"answer of 8", "answer of 16"}
    best = data["runs"][0]
    assert best["links"][0][:2] == ["folder", Path(best["folder"]).as_uri()]
    address = f"http://127.0.0.1:5000/#/experiments/1/runs/{'ab' * 16}?workflowType=machine_learning"
    assert best["links"][1] == ["MLflow", address, "while python -m runner ui is running"]
    assert [kind for kind, _ in data["next"]] == ["improving"]
    assert f"next  {data['next'][0][1]}" in out
    assert data["next"][0][1].endswith("; try lora.r=32")
    times = {metric["key"]: metric["unit"] for metric in data["all_metrics"]}
    assert times == {"eval/loss": "", "eval/best_loss": "", "train/seconds": "s"}


DRIVE = """<script>
const tell = (id, what) => $(id).dispatchEvent(new Event(what));
const set = (id, value) => { $(id).value = value; tell(id, "change"); tell(id, "input"); };
const curves_there = () => document.querySelectorAll("#curves path.curve").length;
const stars = () => [...document.querySelectorAll("#table tbody tr.best td:first-child")].map(cell => cell.textContent);
const seen = { curves: curves_there(), star: stars() };
$("fold").checked = true; tell("fold", "change");
seen.folded = curves_there(); seen.bands = document.querySelectorAll("#curves path.band").length;
set("rank", "train/seconds"); seen.ranked = stars(); seen.first = document.querySelector("#table tbody td").textContent;
set("sx", "train/seconds");
seen.axis = [...document.querySelectorAll("#scatter text.strong")].map(each => each.textContent);
set("filter", "lora.r>=8 loss<2.202");
seen.count = $("count").textContent; seen.best = stars(); seen.left = curves_there();
set("filter", "lora.rank>=8"); seen.unknown = $("count").textContent;
seen.answers = [...document.querySelectorAll("#samples .said")].map(each => each.textContent);
$("before").checked = true; tell("before", "change");
seen.before = [...document.querySelectorAll("#samples .said")].map(each => each.textContent);
document.body.replaceChildren(JSON.stringify(seen));
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no browser here")
def test_one_can_work_in_the_page(here: Path, capsys: pytest.CaptureFixture[str]):
    """Filter, rank, fold the seeds and read the answers, in a real browser."""
    seeds(here)
    assert said(capsys, "--html", "page.html")[0] == 0
    page = Path("page.html").read_text(encoding="utf-8")
    Path("driven.html").write_text(page.replace("</body>", f"{DRIVE}</body>"), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={here}/profile", "--dump-dom"]
    command = [str(CHROMIUM), *flags, (here / "driven.html").as_uri()]
    drawn = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seen = json.loads(html.unescape(drawn.partition("<body>")[2].partition("</body>")[0]))
    assert (seen["curves"], seen["star"]) == (9, ["★ 006-job"])
    assert (seen["folded"], seen["bands"]) == (3, 3), "a line and a band for each setting"
    assert (seen["ranked"], seen["first"]) == (["★ 000-job"], "★ 000-job")
    assert (seen["count"], seen["best"], seen["left"]) == ("5 of 9", ["★ 003-job"], 2)
    assert seen["unknown"] == "no run has this key"
    assert seen["answers"] == ["Who?", "answer of 16", "answer of 8", "Ana"]
    assert seen["before"] == ["Who?", "none", "none", "Ana"]
    assert "time (s)" in seen["axis"], "metrics have units"
