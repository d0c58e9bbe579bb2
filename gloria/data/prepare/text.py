"""Documents out of raw files of every format we read, and the cleaning each text gets before it is hashed.

A file is JSON lines (one object a line), plain text, Parquet or of a kind in formats.py, most also compressed. A
malformed line is reported with its number, and reading continues; a file that is malformed as a whole (cut short, of
another format than its name) is a `UserError` that names it.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import os
import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import zstandard

from gloria.data.prepare import formats
from gloria.errors import UserError
from gloria.files import size_text

# The end of a file's name -> its format; the longest that fits counts.
SUFFIXES = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".jsonl.gz": "jsonl.gz",
    ".json.gz": "jsonl.gz",
    ".jsonl.zst": "jsonl.zst",
    ".json.zst": "jsonl.zst",
    ".txt": "txt",
    ".txt.gz": "txt.gz",
    ".txt.zst": "txt.zst",
    ".parquet": "parquet",
    **formats.SUFFIXES,
}
FORMATS = tuple(dict.fromkeys((*SUFFIXES.values(), *formats.FORMATS)))

# How much text a byte of a compressed file holds, about; of token shards text and tokens.
TEXT_PER_BYTE = {"gz": 4, "zst": 4, "bz2": 5, "parquet": 3, "megatron": 3}

# A longer line or text is malformed: it is no document, and reading it would take several times its size in memory.
MOST_BYTES = 1 << 27
TOO_LONG = f"longer than {size_text(MOST_BYTES)}"

# Controls that stand between words (NUL, vertical tab, form feed, separators, next line) become a space; the other
# C0 and C1 controls but for tab and newline go, as does the byte order mark, which has no meaning inside a text.
_SEPARATING = re.compile("[\x00\x0b\x0c\x1c-\x1f\x85]")
_CONTROL = re.compile("[\x01-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff]")


class Document(NamedTuple):
    """One document as it was read: its text, or what is wrong with the line (row, block) it should come from."""

    line: int  # first line of the document in its file (or in the byte range read), row for Parquet; from 1
    text: str
    problem: str = ""  # empty where the text is good
    metadata: Mapping[str, Any] = MappingProxyType({})  # the line's other fields, the row's other columns
    tokens: bytes = b""  # of token shards made elsewhere: the document's ids and EOS, in the corpus's dtype


def format_of(path: str) -> str | None:
    """The format that a file's name stands for, None where it stands for none."""
    name = os.path.basename(path).lower()
    found = [suffix for suffix in SUFFIXES if name.endswith(suffix)]
    return SUFFIXES[max(found, key=len)] if found else None


def clean(text: str) -> str:
    """The text as it is hashed and tokenised: NFC, newlines as LF, no control characters or byte order marks,
    no white space around it. Cleaning twice changes nothing.
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    # Controls go first: one between a letter and its accent would keep NFC from joining them.
    return unicodedata.normalize("NFC", _CONTROL.sub("", _SEPARATING.sub(" ", text))).strip()


def read_documents(
    path: str,
    format: str,
    *,
    text_field: str = "text",
    documents: str = "file",
    columns: bool = False,
    start: int = 0,
    end: int | None = None,
) -> Iterator[Document]:
    """The documents of one file in its own order, uncleaned.

    `text_field` is the key or column that holds the text; `documents` says what a document of a plain text
    is: the whole "file" or a "block" between blank lines; with `columns` the other columns of Parquet are read as
    metadata, too. `start` and `end` (bytes; uncompressed JSON lines
    only) keep the lines that begin in that range, so that several workers can share a file. Blank lines are
    no documents.
    """
    kind, _, compression = format.partition(".")
    try:
        if kind == "parquet":
            yield from _parquet_rows(path, text_field, columns)
            return
        with _open(path, compression) as file:
            if kind == "jsonl":
                lines = _lines_between(file, start, end)
                yield from _json_lines(lines, text_field, path if start == 0 else "")
            elif kind in formats.KINDS:
                yield from (Document(*row) for row in formats.KINDS[kind].reader(file, path, text_field))
            elif documents == "block":
                yield from _blocks(_lines_between(file, 0, None))
            else:
                yield _decoded(1, file.read(MOST_BYTES + 1))
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise UserError(f"{path}: is no whole .{compression} file ({error}); get it again") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error}); check the file") from None
    except MemoryError:
        raise UserError(f"{path}: holds a document too long for this machine's memory; cut it up") from None


def lines_before(path: str, start: int) -> int:
    """How many lines of a file begin before byte `start`: what to add to the line numbers of a range."""
    if start == 0:
        return 0
    lines = 0
    with open(path, "rb") as file:
        while start > 0:
            block = file.read(min(start, 1 << 20))
            lines += block.count(b"\n")
            start -= len(block)
        # `start` in the middle of a line: that line belongs to the range before.
        file.seek(-1, os.SEEK_CUR)
        return lines if file.read(1) == b"\n" else lines + 1


def _json_lines(lines: Iterable[bytes], field: str, path: str) -> Iterator[Document]:
    missing, wrong_type = f'no field "{field}"', f'field "{field}" is not a string'
    for number, line in enumerate(lines, 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) > MOST_BYTES:
            yield Document(number, "", TOO_LONG)
            continue
        if line.isspace() or not line:
            continue
        values: Any = None
        text, problem = "", ""
        try:
            values = json.loads(line.decode("utf-8"))
            text = values.pop(field)
            if type(text) is not str:
                text, problem = "", wrong_type
        except UnicodeDecodeError:
            problem = "not UTF-8"
        except (ValueError, RecursionError):
            problem = "not JSON"
        except KeyError:
            problem = missing
        except (AttributeError, TypeError, IndexError):
            problem = "not a JSON object"
        if number == 1 and path and (line.strip() == b"[" or line.lstrip().startswith(b"[{")):
            raise UserError(f'{path}: is one JSON array, not an object a line; set format = "json"')
        yield Document(number, text, problem, values if not problem else {})


def _lines_between(file: io.BufferedIOBase, start: int, end: int | None) -> Iterator[bytes]:
    position = start
    if start > 0:
        file.seek(start - 1)
        position = start - 1 + _skip_line(file)
    while (end is None or position < end) and (line := file.readline(MOST_BYTES + 1)):
        position += len(line)
        if len(line) > MOST_BYTES and not line.endswith(b"\n"):
            position += _skip_line(file)
        yield line


def _skip_line(file: io.BufferedIOBase) -> int:
    """Read to the end of a line, which may be too long to be held; its bytes."""
    skipped = 0
    while part := file.readline(1 << 20):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def _blocks(lines: Iterable[bytes]) -> Iterator[Document]:
    block: list[bytes] = []
    for number, line in enumerate(lines, 1):
        if not line.isspace():
            block.append(line)
        elif block:
            yield _decoded(number - len(block), b"".join(block))
            block = []
    if block:
        yield _decoded(number - len(block) + 1, b"".join(block))


def _decoded(line: int, data: bytes) -> Document:
    if len(data) > MOST_BYTES:
        return Document(line, "", TOO_LONG)
    try:
        return Document(line, data.decode("utf-8"))
    except UnicodeDecodeError:
        return Document(line, "", "not UTF-8")


def _parquet_rows(path: str, field: str, others: bool) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs pyarrow; pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if field not in columns:
                raise UserError(
                    f'{path}: no column "{field}"; set text_field to one of its columns: {", ".join(columns)}'
                )
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=None if others else [field]):
                texts = _column_bytes(batch.column(field), pyarrow)
                rows = batch.drop_columns([field]).to_pylist() if others else [{}] * len(texts)
                for value, metadata in zip(texts, rows):
                    row += 1
                    if value is None:
                        yield Document(row, "", f'field "{field}" is not a string')
                    else:
                        yield _decoded(row, value)._replace(metadata=metadata)
    except pyarrow.ArrowInvalid as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{path}: is no whole Parquet file ({reason}); get it again") from None


def _column_bytes(column: Any, pyarrow: Any) -> list[bytes | None]:
    """The raw bytes of a text column, so that a value that is not UTF-8 spoils its own row only; None elsewhere."""
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if str(column.type) in ("string", "large_string", "string_view", "binary", "large_binary", "binary_view"):
        return column.cast(pyarrow.large_binary()).to_pylist()
    return [None] * len(column)


def _open(path: str, compression: str) -> io.BufferedIOBase:
    if compression == "gz":
        return gzip.open(path, "rb")
    if compression == "bz2":
        return bz2.open(path, "rb")
    if compression == "zst":
        return io.BufferedReader(_ZstandardFile(path), 1 << 20)
    return io.BufferedReader(io.FileIO(path), 1 << 20)


def _decompressor() -> zstandard.ZstdDecompressionObj:
    # The window that `zstd --long=31` writes: archives of text are often made so.
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


class _ZstandardFile(io.RawIOBase):
    """A Zstandard file of any number of frames; zstandard's own reader takes a file cut short for a whole one."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 (closed with this object)
        self._frame = _decompressor()
        self._begun = False
        self._pending = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            data = self._frame.unused_data if self._frame.eof else self._file.read(1 << 17)
            if self._frame.eof:
                self._frame, self._begun = _decompressor(), False
                data = data or self._file.read(1 << 17)
            if not data:
                if self._begun:
                    raise EOFError("the last frame ends too early")
                return 0
            self._begun = True
            self._pending = memoryview(self._frame.decompress(data))
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
