"""Prevents: a report that holds for a finished run alone, one that a run's text can break out of, one that thins away
the loss spike somebody looks for, and a page that is valid and shows nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gloria import report
from gloria.errors import UserError
from gloria.page.html import page
from gloria.page.plots import make_plots, matching
from gloria.page.read import read_folders
from gloria.page.thin import Table
from tests.browser import MISSING, browser
from tests.conftest import REPOSITORY

EVIL = "</script><script>document.title='broken'</script><img src=x onerror=alert(1)>"


def write_run(folder: Path, lines: int = 60, *, tail: str = "", rate: float = 1e-3) -> Path:
    """A run's log as pre-training writes it, with a resume on other ranks, a skip, a re-weighting and a branch."""
    folder.mkdir(parents=True)
    recipe = {"optim": {"lr": rate}, "data": {"corpus": "gone"}}
    about = {"versions": {"torch": "2.13"}, "recipe": recipe, "planned_steps": 10 * lines}
    found: list[dict[str, Any]] = [{"kind": "event", "step": 0, "event": "start", "ranks": 1, "time": 0.5, **about}]
    for number in range(1, lines + 1):
        loss = 90.0 if number == lines // 3 else 2 + 6 / number
        sources = {name: {"asked": 0.5, "share": 0.5, "loss": loss, "epoch": number / 9} for name in ("wiki", EVIL)}
        values = {"loss": loss, "lr": rate, "grad_norm": 1.0, "tokens": 960 * number, "perplexity": 9.0, "mfu": 0.4}
        values |= {"tokens_per_s": 1e4, "step_s": 0.1, "data_s": 0.01, "memory": 1 << 30, "sources": sources}
        found.append({"kind": "train", "step": 10 * number, **values, "time": float(number)})
        if number % 20 == 0:
            valid = {"loss": loss, "perplexity": 9.0, "sources": {"wiki": loss, EVIL: loss}, "weights": {"wiki": 1.0}}
            valid |= {"bits_per_byte": 1.0, "source_bits_per_byte": {"wiki": 1.0, EVIL: 1.1}}
            valid["texts"] = {"novel": {"loss": 3.0, "perplexity": 20.1, "bits_per_byte": 1.2}}
            found.append({"kind": "valid", "step": 10 * number, **valid, "time": float(number)})
            found.append({"kind": "event", "step": 10 * number, "event": "checkpoint", "time": float(number)})
    found.append({"kind": "event", "step": 200, "event": "resume", "ranks": 4, "time": 70.0, **about})
    found.append({"kind": "event", "step": 200, "event": "changed", "what": f"data.weights: {EVIL}", "time": 70.0})
    found.append({"kind": "event", "step": 210, "event": "skipped", "why": "not finite", "time": 71.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found) + tail)
    scores = {"exact_match:strict": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 2076}}
    score = {"step": 200, "task": "calame", "split": "test", "n": 2076, "settings": {}, "scores": scores}
    (folder / "scores.jsonl").write_text(json.dumps(score) + "\n")
    sample = {"step": 200, "prompt": EVIL, "text": " era uma vez"}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    return folder


def test_a_report_of_two_runs_has_all_that_they_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", rate=2e-3)]
    assert report.main([*map(str, runs), "--out", str(tmp_path / "x.html")]) == 0
    assert "x.html: 17 plots of 140 lines" in capsys.readouterr().out
    text = (tmp_path / "x.html").read_text()
    assert text.count("<script") == 3, "the run's text has opened none"
    assert "<img" not in text
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\'' in text
    (differ,) = text.split("In which they differ")[1:]
    assert "optim.lr</td><td>0.001</td><td>0.002" in differ.split("All keys")[0]
    assert "data.corpus" not in differ.split("All keys")[0]
    drawn = json.loads(text.split('type="application/json">')[1].split("</script>")[0])
    kinds = {group["kind"] for group in drawn["events"] if group["run"] == 1}
    assert kinds == {"start", "resume, other ranks", "re-weighted", "skipped", "checkpoint"}
    (loss,) = [curve for curve in drawn["plots"]["loss"]["curves"] if curve["label"] == "b train"]
    assert max(loss["y"]) == 90
    (text,) = [curve for curve in drawn["plots"]["text-bits"]["curves"] if curve["run"] == 0]
    assert (text["label"], text["y"]) == ("a novel", [1.2, 1.2, 1.2])


def test_a_run_under_way_is_read_up_to_its_last_whole_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tail='not json\n[1]\n{"kind":"train","step":610,"lo')
    (record,) = read_folders([run])
    assert record.train.steps[-1] == 600
    assert record.notes == [
        "metrics.jsonl: the last line is half-written, and is left out",
        "metrics.jsonl: 2 lines are no JSON objects, and are left out",
        "gone: the corpus can't be read from here, so its table is missing",
    ]
    assert all(note in page([record], make_plots([record])) for note in record.notes[:2])


def test_an_evaluation_and_seeds_are_reported(tmp_path: Path) -> None:
    results = {
        "model": "m",
        "results": [{"task": "rte", "split": "test", "scores": {"accuracy": {"value": 0.5, "n": 9}}}],
    }
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/results.json").write_text(json.dumps(results))
    for seed in (1, 2):
        folder = write_run(tmp_path / f"tuned/seed-{seed}")
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(
                json.dumps({"kind": "event", "step": 600, "event": "dev", "f1": 0.25 * seed, "best": True}) + "\n"
            )
    records = read_folders([tmp_path / "eval", tmp_path / "tuned"])
    assert [record.name for record in records] == ["eval", "tuned/seed-1", "tuned/seed-2"]
    plots = {plot.id: plot for plot in make_plots(records)}
    assert [curve.y for curve in plots["dev-f1"].curves] == [[0.25], [0.5]]
    assert "0.5000, n = 9" in page(records, list(plots.values()))


def test_what_is_no_run_is_one_line_each(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        report.main([str(tmp_path / "empty"), str(tmp_path / "none")])
    assert caught.value.problems == (
        f"{tmp_path}/empty: holds neither metrics.jsonl nor results.json; name a run, a fine-tuning or an evaluation",
        f"{tmp_path}/none: is not a folder; name a run (runs/NAME), a fine-tuning or an evaluation",
    )


def test_thinning_keeps_extremes_and_their_order() -> None:
    table = Table(width=100)
    values = [5.0] * 10_000
    values[4_321], values[4_399], values[9_999] = -7.0, 8.0, 99.0
    for step, value in enumerate(values):
        table.add(step, {("loss", ""): value} | ({("rare", ""): 1.0} if step == 7_777 else {}))
    table.close()
    column = table.columns["loss", ""]
    assert len(column) == len(table.steps) == len(table.columns["rare", ""]) == 200
    assert column[86:88] == [-7.0, 8.0]
    assert (max(table.columns["loss", ""]), table.steps[-1]) == (99.0, 9_999)  # type: ignore[type-var]
    assert [value for value in table.columns["rare", ""] if value] == [1.0, 1.0]
    assert table.means["loss", ""][0] == 5.0
    assert table.steps == sorted(set(table.steps))


def test_published_scores_stand_beside_scores_of_the_same_protocol_alone(tmp_path: Path) -> None:
    (record,) = read_folders([write_run(tmp_path / "run")])
    plots = {plot.id: plot for plot in make_plots([record])}
    assert {anchor["model"] for anchor in plots["score-calame-exact-match-strict"].anchors} == {
        "Tucano-1b1",
        "Tucano-160m",
    }
    anchors = plots["score-calame-exact-match-strict"].anchors
    record.rules["calame"] = {**record.rules["calame"], "n": 406}
    assert matching(anchors, record, "calame", "exact_match:strict") == []
    assert matching(anchors, record, "calame", "exact_match:first-word") == []


def test_pictures_are_drawn_or_their_package_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    command = [
        sys.executable,
        "-c",
        "import sys; sys.modules['matplotlib'] = None\nfrom gloria import report, errors\n",
    ]
    command[-1] += "raise SystemExit(errors.run_command(report.main))"
    words = [str(run), "--png", str(tmp_path / "png")]
    done = subprocess.run([*command, *words], cwd=REPOSITORY, capture_output=True, text=True)
    line = "error: --png: needs matplotlib; pip install 'gloria[report]', or leave the flag out\n"
    assert (done.returncode, done.stderr) == (2, line)
    assert not (run / "report.html").exists()
    pytest.importorskip("matplotlib")
    assert report.main(words) == 0
    pictures = sorted(path.stem for path in (tmp_path / "png").iterdir())
    assert pictures == sorted(plot.id for plot in make_plots(read_folders([run])))


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_every_plot_is_drawn_wide_and_narrow_light_and_dark(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    report.main([str(run)])
    plots = len(make_plots(read_folders([run]))) + 1  # and the time line
    # Of each canvas, how many pixels have a colour.
    count = """return [...document.querySelectorAll('canvas')].map(c => {
        const data = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let n = 0;
        for (let i = 3; i < data.length; i += 4) n += data[i] > 0; return n; })"""
    with browser() as window:
        for theme, width in (("light", 1400), ("dark", 400)):
            media = {"name": "prefers-color-scheme", "value": theme}
            window.devtools("Emulation.setEmulatedMedia", features=[media])
            window.open(run / "report.html", width)
            assert window.run("return document.documentElement.dataset.theme") == theme
            drawn = window.run(count)
            assert len(drawn) == plots
            assert min(drawn) > 500
            assert window.run("return document.documentElement.scrollWidth") <= width
            assert window.run("return document.title") == "run"
            assert window.errors() == []
        window.run("document.getElementById('theme').click(); document.getElementById('axis').value = 'tokens'")
        window.run("document.getElementById('axis').dispatchEvent(new Event('change'))")
        assert window.run("return document.documentElement.dataset.theme") == "light"
        assert window.run("return charts[0][0].data[0].at(-1)") == 57_600
        assert window.errors() == []
