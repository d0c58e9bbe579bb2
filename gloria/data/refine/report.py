"""What cleaning did: report.json, a page with plots that needs nothing else, and a table."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gloria.data.prepare.report import align
from gloria.data.refine.records import Record
from gloria.files import write_whole

Report = dict[str, Any]

STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.6rem 0}td,th{padding:.15rem .7rem;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}blockquote{margin:.3rem 0 .3rem 1rem;color:#555;white-space:pre-wrap}
figure{display:inline-block;margin:.5rem 1.5rem .5rem 0;vertical-align:top}figcaption{font-weight:600}
svg text{font-size:11px;fill:#333}svg rect{fill:#2a6f97}code{color:#777}"""


def make_report(
    names: Sequence[str], records: Sequence[Record], contamination: Mapping[str, Any], pairs: Any
) -> Report:
    """All that the report says, as plain values: the same for any number of workers."""
    return {
        "sources": {name: _source(record) for name, record in zip(names, records)},
        "near_duplicates": pairs,
        "contamination": dict(contamination),
    }


def _source(record: Record) -> dict[str, Any]:
    steps = {}
    for name, step in record.steps.items():
        rules = sorted(step["dropped"].items(), key=lambda item: (-item[1]["documents"], item[0]))
        dropped = {
            rule: found
            | {
                "share": round(found["documents"] / step["documents"], 5),
                "examples": [{"id": id, "text": text} for _, id, text in found["examples"]],
            }
            for rule, found in rules
        }
        steps[name] = {key: step[key] for key in ("documents", "characters", "changed")} | {"dropped": dropped}
    counts = {key: record.counts[key] for key in ("read", "malformed", "kept", "kept_characters")}
    histograms = {name: dict(sorted(found.items(), key=_order)) for name, found in sorted(record.histograms.items())}
    return counts | {"steps": steps, "histograms": histograms}


def _order(item: tuple[str, int]) -> Any:
    name, count = item
    return (0, int(name), "") if name.isdigit() else (1, -count, name)


def write_report(folder: Path, report: Report) -> None:
    """report.json and report.html in the folder."""
    write_whole(folder / "report.json", (json.dumps(report, ensure_ascii=False, indent=1) + "\n").encode())
    write_whole(folder / "report.html", page(report).encode())


def table(report: Report) -> list[str]:
    """A line for each source: documents read, malformed, dropped by each step and kept, and the text that stays."""
    sources = report["sources"]
    steps = list(dict.fromkeys(name for source in sources.values() for name in source["steps"]))
    lost = {
        name: {step: sum(r["documents"] for r in found["dropped"].values()) for step, found in source["steps"].items()}
        for name, source in sources.items()
    }
    shown = [step for step in steps if any(counts.get(step) for counts in lost.values())]
    malformed = any(source["malformed"] for source in sources.values())
    rows = [["source", "read", *(["malformed"] if malformed else []), *shown, "kept", "share", "million characters"]]
    for name, source in sources.items():
        rows.append(
            [
                name,
                f"{source['read']:,}",
                *([f"{source['malformed']:,}"] if malformed else []),
                *(f"{lost[name].get(step, 0):,}" for step in shown),
                f"{source['kept']:,}",
                f"{source['kept'] / max(source['read'], 1):.1%}",
                f"{source['kept_characters'] / 1e6:,.2f}",
            ]
        )
    lines = align(rows)
    for name, source in sources.items():
        rules = Counter(
            {
                f"{step}: {rule}": r["documents"]
                for step, f in source["steps"].items()
                for rule, r in f["dropped"].items()
            }
        )
        if rules:
            lines.append(f"{name}: " + ", ".join(f"{rule} {count:,}" for rule, count in rules.most_common(8)))
    for task, found in report["contamination"].items():
        short = f", {found['short']:,} of them too short to look for" if found["short"] else ""
        lines.append(f"{task}: {found['documents']:,} documents held one of its {found['texts']:,} texts{short}")
    return lines


def page(report: Report) -> str:
    """The report as one HTML page."""
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>Cleaning</title><style>{STYLE}</style>"]
    parts.append("<h1>Cleaning</h1><pre>" + html.escape("\n".join(table(report))) + "</pre>")
    if report["near_duplicates"]:
        rows = [
            [source, first, f"{count:,}"]
            for source, firsts in report["near_duplicates"].items()
            for first, count in firsts.items()
        ]
        parts += ["<h2>Near-duplicates</h2>", _table(["dropped from", "for one of", "documents"], rows)]
    for name, source in report["sources"].items():
        parts.append(f"<h2>{html.escape(name)}</h2>")
        rows, examples = [], []
        for step, found in source["steps"].items():
            changed = f"{found['changed']:,}" if found["changed"] else ""
            rows.append([step, f"{found['documents']:,}", "", "", changed])
            for rule, dropped in found["dropped"].items():
                rows.append([f"  {rule}", "", f"{dropped['documents']:,}", f"{dropped['share']:.2%}", ""])
                shown = [
                    f"<blockquote><code>{html.escape(e['id'])}</code>\n{html.escape(e['text'])}</blockquote>"
                    for e in dropped["examples"]
                ]
                examples.append(
                    f"<details><summary>{html.escape(f'{step}: {rule}')}</summary>{''.join(shown)}</details>"
                )
        parts.append(_table(["step and rule", "documents", "dropped", "share", "changed"], rows))
        parts += [_plot(histogram, counts) for histogram, counts in source["histograms"].items() if counts]
        parts += examples
    return "\n".join(parts) + "\n"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(text)}" for text in headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(text)}" for text in row) for row in rows)
    return f"<table><tr>{head}{body}</table>"


def _plot(name: str, counts: Mapping[str, int]) -> str:
    """A histogram as horizontal bars, the 20 largest where there are more."""
    largest = dict(sorted(counts.items(), key=lambda item: -item[1])[:20])
    shown = {key: count for key, count in counts.items() if key in largest}
    most = max(shown.values())
    bars = []
    for row, (key, count) in enumerate(shown.items()):
        y = 18 * row
        bars.append(f'<text x="90" y="{y + 12}" text-anchor="end">{html.escape(key)}</text>')
        bars.append(f'<rect x="95" y="{y + 2}" width="{max(1, 260 * count // most)}" height="13"/>')
        bars.append(f'<text x="{100 + max(1, 260 * count // most)}" y="{y + 12}">{count:,}</text>')
    titles = {"length": "characters, up to", "cluster": "size of a cluster"}
    title = html.escape(titles.get(name, name))
    svg = f'<svg width="430" height="{18 * len(shown)}">{"".join(bars)}</svg>'
    return f"<figure><figcaption>{title}</figcaption>{svg}</figure>"
