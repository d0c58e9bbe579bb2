"""The report as one HTML page that needs nothing else: no network, no other file.

Whatever a run has written is text: `html.escape` for what stands in the page, JSON whose `<` is escaped for what its
script draws, `textContent` in the script. A content security policy forbids the page to fetch anything.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import gloria
from gloria.config.schema import flatten
from gloria.data.corpus import source_fingerprint
from gloria.page.plots import Plot, sources_of
from gloria.page.read import Record

MOST_LISTED = 500  # events in the table under the time line
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(records: Sequence[Record], plots: Sequence[Plot]) -> str:
    """The whole page."""
    sections: dict[str, str] = {"Summary": _summary(records)}
    for name in dict.fromkeys(plot.section for plot in plots):
        figures = "".join(_figure(plot) for plot in plots if plot.section == name)
        sections[name] = f'<div class="plots">{figures}</div>'
        if name == "Loss" or (name == next(plot.section for plot in plots) and "Loss" not in sections):
            sections["Events"] = _events(records)
    parts = {"Scores of evaluations": _results, "Generated text": _samples, "Recipe": _recipes, "Corpus": _corpora}
    sections |= {name: text for name, make in parts.items() if (text := make(records))}
    links = "".join(f'<a href="#{_slug(name)}">{escape(name)}</a>' for name in sections)
    body = "".join(f'<section id="{_slug(n)}"><h2>{escape(n)}</h2>{text}</section>' for n, text in sections.items())
    title = ", ".join(record.name for record in records)
    made = f"{time.strftime('%Y-%m-%d %H:%M')}, gloria {gloria.__version__}"
    return _PAGE.format(
        policy=POLICY,
        title=escape(title),
        made=escape(made),
        links=links,
        body=body,
        style=_asset("uPlot.min.css") + _asset("page.css"),
        data=_json(_data(records, plots)),
        plotter=_asset("uPlot.iife.min.js"),
        script=_asset("page.js"),
        licence=escape(_asset("uPlot.LICENSE")),
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}"><link rel="icon" href="data:,">
<title>{title}</title><style>{style}</style></head>
<body><header><h1>{title}</h1><p class="lead">Report of {made}. Drag over a plot to enlarge a part of it in all plots;
a double click shows the whole. A click on a name hides its curve. Numbers: logged (smoothed), of the last line or where
the pointer is.</p></header>
<div class="bar"><div><nav>{links}</nav>
<label>x axis <select id="axis"><option>step</option><option>tokens</option></select></label>
<label>smoothing <input id="smooth" type="range" min="0" max="100" value="30"></label>
<label><input id="clip" type="checkbox" checked>cut outliers</label>
<label><input id="events" type="checkbox" checked>events</label>
<button id="theme" type="button">light / dark</button></div></div>
<main>{body}</main>
<footer><details><summary>Licence of uPlot, which draws the plots</summary><pre>{licence}</pre></details></footer>
<script id="data" type="application/json">{data}</script><script>{plotter}</script><script>{script}</script>
</body></html>
"""


def _asset(name: str) -> str:
    return files("gloria.page").joinpath("assets", name).read_text()


def _slug(name: str) -> str:
    return "s-" + "".join(c if c.isalnum() else "-" for c in name.lower())


def _json(value: Any) -> str:
    """JSON that no text in it can end: `</script>` and `<!--` need a `<`."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _rounded(values: Sequence[float | None]) -> list[float | int | None]:
    """Five figures: more than a screen shows. Whole numbers lose their point."""
    found: list[float | int | None] = []
    for value in values:
        short = None if value is None else float(f"{value:.5g}")
        found.append(int(short) if short is not None and short == int(short) and abs(short) < 1e15 else short)
    return found


def _data(records: Sequence[Record], plots: Sequence[Plot]) -> dict[str, Any]:
    """What the script draws. Columns of steps are many curves' own, and written once."""
    xs: list[list[int]] = []
    places: dict[tuple[int, ...], int] = {}
    drawn = {}
    for plot in plots:
        curves = []
        for curve in plot.curves:
            place = places.setdefault(tuple(curve.x), len(xs))
            if place == len(xs):
                xs.append(curve.x)
            values = {"y": curve.y, "mean": curve.mean if curve.smooth else [], "low": curve.low, "high": curve.high}
            about = {"label": curve.label, "run": curve.run, "color": curve.color, "dash": curve.dash}
            kind = {"smooth": curve.smooth, "points": curve.points, "x": place}
            curves.append(about | kind | {name: _rounded(column) for name, column in values.items()})
        drawn[plot.id] = {"range": plot.range, "note": plot.note, "anchors": plot.anchors, "curves": curves}
    events: dict[tuple[int, str], dict[str, Any]] = {}
    for run, record in enumerate(records):
        for event in record.events:
            group = events.setdefault((run, event.kind), {"run": run, "kind": event.kind, "steps": [], "texts": []})
            group["steps"].append(event.step)
            group["texts"].append(event.text)
    runs = [
        {"name": record.name, "steps": record.train.steps, "tokens": _tokens(record.train.columns)}
        for record in records
    ]
    for group in events.values():
        order = sorted(range(len(group["steps"])), key=lambda number: group["steps"][number])
        group["steps"], group["texts"] = ([group[key][n] for n in order] for key in ("steps", "texts"))
    return {"runs": runs, "xs": xs, "plots": drawn, "events": list(events.values())}


def _tokens(columns: Mapping[Any, list[float | None]]) -> list[float | None]:
    column = columns.get(("tokens", ""), [])
    return [] if None in column else column


def _figure(plot: Plot) -> str:
    unit = f'<span class="unit">{escape(plot.unit)}</span>' if plot.unit else ""
    return (
        f'<figure data-plot="{escape(plot.id)}"><h3>{escape(plot.title)} {unit}</h3>'
        '<div class="chart"></div><figcaption></figcaption></figure>'
    )


def table(headings: Sequence[str], rows: Sequence[Sequence[object]], kind: str = "") -> str:
    """An HTML table of texts."""
    head = "".join(f"<th>{escape(text)}</th>" for text in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="data {kind}"><tr>{head}</tr>{body}</table></div>'


def number(value: object, form: str = ",.4g") -> str:
    """A number, or a dash where there is none."""
    return f"{value:{form}}" if isinstance(value, int | float) else "–"


def _summary(records: Sequence[Record]) -> str:
    facts = [_facts(record) for record in records]
    names = dict.fromkeys(name for fact in facts for name in fact)
    rows = [[name, *(fact.get(name, "–") for fact in facts)] for name in names]
    notes = [f"{record.name}: {note}" for record in records for note in record.notes]
    chips = "".join(
        f'<span class="chip" data-color="{n}"></span>{escape(record.name)} &nbsp; ' for n, record in enumerate(records)
    )
    warnings = "".join(f'<div class="warn">{escape(note)}</div>' for note in notes)
    return (chips if len(records) > 1 else "") + table(["", *(r.name for r in records)], rows, "text") + warnings


def _facts(record: Record) -> dict[str, str]:
    """What the summary says of a run, as far as it is known."""
    last, launch, facts = record.last, record.launch, {"state": record.status}
    if record.lines:
        planned = launch.get("planned_steps")
        steps = number(last.get("step"), ",")
        facts["steps"] = f"{steps} of {number(planned, ',')}" if planned else steps
        facts["tokens"] = number(last.get("tokens"), ",")
        facts["time of all launches"] = f"{record.seconds / 3600:.2f} h in {record.launches}"
        facts["ranks"] = str(launch.get("ranks", "–"))
        hardware = launch.get("hardware")
        facts["hardware"] = (
            ", ".join(map(str, hardware.values())) if isinstance(hardware, Mapping) else str(hardware or "–")
        )
        facts["training loss, last line"] = number(last.get("loss"))
        for key, name in (("loss", "validation loss"), ("bits_per_byte", "validation bits per byte")):
            points = [p for p in zip(record.valid.columns.get((key, ""), []), record.valid.steps) if p[0] is not None]
            if points:
                best = min(points)
                facts[name] = f"{number(points[-1][0])} (least {number(best[0])} at step {best[1]:,})"
        facts["speed, last line"] = f"{number(last.get('tokens_per_s'))} tokens/s"
        if "mfu" in last:
            facts["MFU, last line"] = f"{number(last['mfu'], '.1%')}"
        facts["steps skipped"] = number(record.skips, ",")
        versions = launch.get("versions")
        if isinstance(versions, Mapping):
            facts["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
        facts["lines of the log"] = f"{record.lines:,}"
        if record.train.width > 2:
            facts["lines of the log"] += f"; drawn: the least and the greatest of each {record.train.width:,}"
    elif record.results:
        facts["model"] = str(record.results.get("model", "–"))
    return facts


def _events(records: Sequence[Record]) -> str:
    if not any(record.events for record in records):
        return ""
    plot = (
        '<div class="plots"><figure class="timeline" data-plot="timeline"><div class="chart"></div>'
        '<div class="happened">Point at an event to read what happened.</div></figure></div>'
    )
    rows: list[list[str]] = []
    total = sum(len(record.events) for record in records)
    for record in records:
        rows += [
            [record.name, f"{event.step:,}", event.kind, _clock(event.time), event.text]
            for event in record.events
            if event.kind != "checkpoint"
        ]
    shown = f"All but checkpoints, {len(rows):,} of {total:,}"
    if len(rows) > MOST_LISTED:
        shown += f"; the first and the last {MOST_LISTED // 2} are listed"
        rows = rows[: MOST_LISTED // 2] + rows[-MOST_LISTED // 2 :]
    listed = table(["run", "step", "event", "time (UTC)", "what"], rows, "text")
    return f"{plot}<details><summary>{shown}</summary>{listed}</details>"


def _clock(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds)) if isinstance(seconds, int | float) else ""


def _results(records: Sequence[Record]) -> str:
    """The scores in results.json, one row a score, one column a run."""
    found: dict[tuple[str, str, str], dict[int, str]] = {}
    for run, record in enumerate(records):
        for result in record.results.get("results", []):
            for metric, value in result.get("scores", {}).items():
                cell = number(value.get("value"), ".4f")
                if isinstance(value.get("low"), int | float):
                    cell += f" ({value['low']:.4f} to {value['high']:.4f})"
                elif "deviation" in value:
                    cell += f" ± {value['deviation']:.4f}"
                place = (str(result.get("task")), str(result.get("split")), metric)
                found.setdefault(place, {})[run] = f"{cell}, n = {value.get('n')}"
    rows = [[*place, *(cells.get(run, "–") for run in range(len(records)))] for place, cells in found.items()]
    note = '<p class="soft">In brackets: 95 % intervals; ±: standard deviation over seeds.</p>'
    names = [record.name for record in records]
    return table(["task", "split", "metric", *names], rows, "text") + note if rows else ""


def _samples(records: Sequence[Record]) -> str:
    """What the runs wrote while they trained: for each prompt the first, some in between and the last."""
    parts: list[str] = []
    for record in records:
        prompts = dict.fromkeys(str(sample.get("prompt")) for sample in record.samples)
        for prompt in prompts:
            own = [sample for sample in record.samples if str(sample.get("prompt")) == prompt]
            kept = sorted({round(n * (len(own) - 1) / 7) for n in range(8)}) if len(own) > 8 else range(len(own))
            head = f"{record.name}: " if len(records) > 1 else ""
            parts.append(f"<h3>{escape(head)}“{escape(prompt)}”</h3>")
            parts += [
                f'<div class="sample"><span class="soft">step {own[n]["step"]:,}</span>\n'
                f"<b>{escape(prompt)}</b>{escape(str(own[n].get('text', '')))}</div>"
                for n in kept
            ]
            if len(own) > len(kept):
                parts.append(f'<p class="soft">{len(kept)} of {len(own)} are shown; all are in samples.jsonl.</p>')
    return "".join(parts)


def _recipes(records: Sequence[Record]) -> str:
    """The recipe of one run; of several, the keys in which they differ, and then all."""
    flat = [flatten(record.recipe) for record in records]
    if not any(flat):
        return ""
    keys = sorted({key for recipe in flat for key in recipe})
    rows = [[key, *(_value(recipe.get(key)) for recipe in flat)] for key in keys]
    names = ["key", *(record.name for record in records)]
    if len(records) == 1:
        return f"<details open><summary>{len(rows)} keys</summary>{table(names, rows, 'text')}</details>"
    differ = [row for row in rows if len(set(row[1:])) > 1]
    listed = table(names, differ, "text") if differ else '<p class="soft">The recipes are the same.</p>'
    whole = f"<details><summary>All keys</summary>{table(names, rows, 'text')}</details>"
    return f"<h3>In which they differ</h3>{listed}{whole}"


def _value(value: object) -> str:
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _corpora(records: Sequence[Record]) -> str:
    return "".join(_corpus(record, len(records) > 1) for record in records if record.manifest or sources_of(record))


def _corpus(record: Record, named: bool) -> str:
    entries = {entry.name: entry for entry in record.manifest.sources} if record.manifest else {}
    last = record.last.get("sources") or {}
    rows = []
    for name in dict.fromkeys([*sources_of(record), *entries]):
        now, entry = last.get(name, {}), entries.get(name)
        known = (
            [
                f"{entry.train.documents:,}",
                f"{entry.train.tokens:,}",
                f"{entry.train.bytes:,}",
                f"{entry.valid.tokens:,}",
            ]
            if entry
            else ["–"] * 4
        )
        share = [number(now.get(key), ".2%") for key in ("asked", "share")]
        fingerprint = source_fingerprint(entry)[:12] if entry else "–"
        rows.append([name, *known, *share, number(now.get("epoch"), ".3f"), fingerprint])
    heads = ["documents", "tokens", "bytes of text", "validation tokens", "asked", "achieved", "epochs", "fingerprint"]
    head = f"<h3>{escape(record.name)}</h3>" if named else ""
    return head + table(["source", *heads], rows)
