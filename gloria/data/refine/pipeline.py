"""The steps of a task as datatrove has them: documents in, documents judged and changed, a shard of text out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter, get_filter_result
from datatrove.pipeline.writers import JsonlWriter

from gloria.data.prepare.scatter import lines_before, read_piece
from gloria.data.prepare.text import clean, read_documents
from gloria.data.refine.plan import Shard
from gloria.data.refine.records import Record, length_class
from gloria.errors import UserError

SHOWN = 3  # malformed documents of a piece that are named
MOST_CHARACTERS = 20_000_000  # of a document: a longer one is no text, and no rule ends on it in good time
SUFFIX = ".jsonl.zst"


@dataclass(frozen=True)
class Step:
    """One step on documents: `apply` gives the reason to drop one, or an empty string; it may change its text."""

    name: str
    apply: Callable[[Document], str]


def library_step(name: str, *filters: BaseFilter) -> Step:
    """Filters of datatrove as one step; the first that drops a document gives the reason."""

    def apply(document: Document) -> str:
        for filter in filters:
            kept, reason = get_filter_result(filter.filter(document))
            if not kept:
                return reason or filter.name
        return ""

    return Step(name, apply)


class ReadRaw(PipelineStep):
    """The documents of a shard's pieces by prepare's readers: each one is a document or counted as malformed."""

    type, name = "READER", "raw files"

    def __init__(self, shards: Sequence[Shard], folder: str) -> None:
        super().__init__()
        self.shards, self.folder = shards, folder

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        shard = self.shards[rank]
        record = Record()
        for number, piece in enumerate(shard.pieces):
            before = lines_before(piece.file.path, piece.start)
            name = Path(piece.file.path).absolute().as_posix().removeprefix(f"{Path(shard.base).absolute()}/")
            bad: list[Any] = []
            for line, text, problem, fields, _ in read_piece(piece, shard.config, ""):
                record.counts["read"] += 1
                if not problem:
                    text = clean(text)
                    try:
                        text.encode()
                    except UnicodeEncodeError:
                        problem = "half a surrogate pair"
                if problem:
                    record.counts["malformed"] += 1
                    bad.append([line, problem])
                    continue
                metadata = {"shard": shard.name, "fields": fields, "notes": {}}
                yield Document(text, f"{name}:{before + line}", metadata=metadata)
            if bad:
                record.malformed.append([rank, number, len(bad), *bad[:SHOWN]])
        record.write(Path(self.folder, f"{rank:05d}.json"))


class ReadCleaned(PipelineStep):
    """The documents of a shard that another task wrote with `writer`; none where it wrote no file."""

    type, name = "READER", "cleaned text"

    def __init__(self, shards: Sequence[Shard], folder: str) -> None:
        super().__init__()
        self.shards, self.folder = shards, folder

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        shard = self.shards[rank]
        path = Path(self.folder, shard.name + SUFFIX)
        if path.exists():
            for _, text, problem, fields, _ in read_documents(str(path), "jsonl.zst"):
                assert not problem, f"{path}: {problem}"
                metadata = {"shard": shard.name, "fields": {}, "notes": fields.get("notes", {})}
                yield Document(text, fields["id"], metadata=metadata)


class Clean(PipelineStep):
    """Takes each document through the steps of its source, and writes the task's record at the end.

    `build(shard)` makes the steps in the task itself: what they hold (models, indices) is never pickled.
    """

    type, name = "FILTER", "cleaning"

    def __init__(self, shards: Sequence[Shard], build: Callable[[Shard, Record], list[Step]], folder: str) -> None:
        super().__init__()
        self.shards, self.build, self.folder = shards, build, folder

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        shard, record = self.shards[rank], Record()
        steps = self.build(shard, record)
        for step in steps:
            record.step(step.name)  # also where no document comes
        for document in data:
            if self.keep(document, steps, record, shard.config.report_only):
                record.counts["kept"] += 1
                record.counts["kept_characters"] += len(document.text)
                record.histograms["length"][length_class(len(document.text))] += 1
                yield document
        record.write(Path(self.folder, f"{rank:05d}.json"))

    def keep(self, document: Document, steps: Sequence[Step], record: Record, report_only: bool) -> bool:
        for step in steps:
            before, count = document.text, record.step(step.name)
            count["documents"] += 1
            count["characters"] += len(before)
            with record.timed(step.name):
                try:
                    reason = step.apply(document)
                except UserError:
                    raise
                except Exception as error:
                    raise RuntimeError(f"step {step.name!r} failed at {document.id}") from error
            if not reason and not document.text:
                reason = "nothing left"
            count["changed"] += document.text != before
            if reason:
                record.drop(step.name, reason, document.id, before)
                if not report_only or not document.text:
                    return False
        return True


class WriteCleaned(JsonlWriter):
    """Writes FOLDER/SOURCE/00000.jsonl.zst; the bytes depend on the documents alone (gzip would hold the time)."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder, f"${{shard}}{SUFFIX}", compression="zstd")

    def _default_adapter(self, document: Document) -> dict[str, Any]:
        """A line of cleaned text: where it comes from, the text, and what the steps found out about it."""
        return {"id": document.id, "text": document.text, "notes": document.metadata["notes"]}
