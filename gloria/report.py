"""The report of runs as one page: what they learnt, from what, how fast, and all that happened to them.

    python -m gloria.report RUN [RUN ...] [--out FILE.html] [--png DIR]

RUN is the folder of a pre-training, a fine-tuning or an evaluation; several are laid over one another. It reads a run
that is going on or has died as well, takes no lock, and writes nothing into it but report.html, unless --out names
another file. The page needs no network and no other file. --png also writes each plot as DIR/PLOT.png.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gloria.config.cli import option, parse
from gloria.errors import UserError, run_command, warn
from gloria.files import os_errors, size_text, write_whole
from gloria.page.html import page
from gloria.page.plots import make_plots
from gloria.page.read import read_folders


@dataclass(frozen=True)
class ReportOptions:
    """Which runs, and where the report goes."""

    runs: list[Path] = option(help="folders of runs, fine-tunings or evaluations", positional="RUN [RUN ...]")
    out: Path | None = option(None, "the page; default report.html in the (first) run's folder")
    png: Path | None = option(None, "a folder for a picture of each plot; needs pip install 'gloria[report]'")


def main(argv: list[str] | None = None) -> int:
    """Write the page, and the pictures where they are requested."""
    options = parse(
        ReportOptions,
        argv,
        prog="python -m gloria.report",
        description="Make one page of plots, tables and text from the folders of runs.",
        recipe=False,
    ).config
    if options.png:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise UserError("--png: needs matplotlib; pip install 'gloria[report]', or leave the flag out") from None
    records = read_folders(options.runs)
    plots = make_plots(records)
    out = options.out or options.runs[0] / "report.html"
    data = page(records, plots).encode()
    with os_errors("choose another place with --out or --png"):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, data)
        if options.png:
            from gloria.page.png import draw

            options.png.mkdir(parents=True, exist_ok=True)
            print(f"{options.png}: {draw(records, plots, options.png)} pictures")
    for record in records:
        for note in record.notes:
            warn(f"{record.folder}: {note}")
    lines = sum(record.lines for record in records)
    print(f"{out}: {len(plots)} plots of {lines:,} lines, {size_text(len(data))}; open it in a browser")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
