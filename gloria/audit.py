"""Prove what a run was trained on, from its folder and its corpus alone.

    python -m gloria.audit runs/demo [--corpus data/corpus] [--export models/demo]
    python -m gloria.audit runs/demo --document "Era uma vez" | @FILE | SOURCE:NUMBER

A line for each thing that holds ("ok") or does not ("FAILED"); exit status 1 if one does not. Every sample of the run
is drawn again, which takes minutes for a thousand million. What only training can tell stays the run's word: losses
by source, gradient norms, speeds. `--document` answers instead whether, and in which steps, a text was read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gloria.config.cli import option, parse
from gloria.data.corpus import open_corpus
from gloria.errors import UserError, run_command
from gloria.record.checks import check_ancestors, check_checkpoints, check_corpus, check_status
from gloria.record.document import describe_document
from gloria.record.findings import Finding
from gloria.record.history import History, read_history
from gloria.record.log import check_log
from gloria.record.weights import check_export


@dataclass(frozen=True)
class AuditOptions:
    """What is proved."""

    run: Path = option(help="the run's folder", positional="RUN")
    corpus: Path | None = option(None, "its corpus, if it is not where the run read it")
    export: Path | None = option(None, "a folder that gloria.export made of the run")
    document: str | None = option(
        None, "instead: when the run has read a text, the text in @FILE, or document NUMBER of a source, SOURCE:NUMBER"
    )


def main(argv: list[str] | None = None) -> int:
    """Audit a run, or look for a document in it."""
    arguments = parse(
        AuditOptions,
        argv,
        prog="python -m gloria.audit",
        description="Prove what a run was trained on, from its folder and its corpus alone.",
        recipe=False,
        check=lambda options: (
            [(("export",), "has no meaning with --document; leave one of them out")]
            if options.export and options.document is not None
            else []
        ),
    ).config
    history = read_history(arguments.run)
    corpus = arguments.corpus or Path(history.state["recipe"]["data"]["corpus"])
    if arguments.document is not None:
        print(*describe_document(arguments.document, open_corpus(corpus), history), sep="\n")
        return 0
    if arguments.export and not arguments.export.is_dir():
        raise UserError(f"--export: {arguments.export} is not a folder; name one that gloria.export made")
    failed = 0
    for finding in audit(history, corpus, arguments.export):
        print(finding, flush=True)
        failed += not finding.ok
    print(f"{arguments.run}: " + (f"{failed} lines FAILED" if failed else "all of it holds"))
    return int(failed > 0)


def audit(history: History, corpus: Path, export: Path | None) -> Iterator[Finding]:
    """Every check, the quick ones first."""
    yield from check_status(history)
    yield from check_checkpoints(history)
    yield from check_ancestors(history)
    if export:
        yield from check_export(export, history)
    yield from check_corpus(corpus, history)
    yield from check_log(history)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
