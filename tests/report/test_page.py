"""The page is complete in itself, and a browser draws what the terminal shows."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import html
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
    shown_there = [[re.sub(r"<[^>]+>", "", cell) for cell in row] for row in cells]
    assert [" ".join(row).split() for row in shown_there] == rows
