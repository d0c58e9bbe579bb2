"""Documents out of files that hold more than text: tables, JSON, web archives, treebanks, subtitles, dumps of wikis.

Each reader takes an open binary file and gives rows (number, text, problem, metadata) in the file's order, as
`read_documents` does: what is wrong with one document is its problem, what is wrong with the file is a `UserError`.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from xml.etree import ElementTree

from gloria.data.prepare.wikitext import plain_text
from gloria.errors import UserError

Row = tuple[int, str, str, Mapping[str, Any]]
NOT_UTF8 = "not UTF-8"


class Kind(NamedTuple):
    """How files of one kind are read; `reader` takes the file, its path and the name of the field with the text."""

    reader: Callable[[io.BufferedIOBase, str, str], Iterator[Row]]
    endings: tuple[str, ...] = ()  # of names; none where the format has to be given
    packed: tuple[str, ...] = ("",)  # how the files may be compressed


def table_rows(file: io.BufferedIOBase, path: str, field: str, *, tabs: bool = False) -> Iterator[Row]:
    """A row a document, under a header line. Tab-separated files have no quoting: a `"` is an ordinary character."""
    csv.field_size_limit(sys.maxsize)
    # Bytes that are no UTF-8 are kept apart, so that they spoil their own row only.
    binary: Any = file
    lines = io.TextIOWrapper(binary, "utf-8-sig", "surrogateescape", newline="")
    rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(lines)
    header = next(rows, [])
    if field not in header:
        raise UserError(f'{path}: no column "{field}"; set text_field to one of its columns: {", ".join(header)}')
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield rows.line_num, "", f"no row of a table ({error})", {}
            continue
        if row is None:
            return
        if not row:
            continue
        values = dict(zip(header, row))
        text = values.pop(field, None)
        if text is None or len(row) != len(header):
            yield rows.line_num, "", f"{len(row)} columns, not {len(header)}", {}
        elif any("\udc80" <= character <= "\udcff" for character in text):
            yield rows.line_num, "", NOT_UTF8, {}
        else:
            yield rows.line_num, text, "", values


def tab_rows(file: io.BufferedIOBase, path: str, field: str) -> Iterator[Row]:
    return table_rows(file, path, field, tabs=True)


def _load_json(file: io.BufferedIOBase, path: str) -> Any:
    try:
        return json.loads(file.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 (byte {error.start}); convert it") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({error}); get it again") from None


def array_items(file: io.BufferedIOBase, path: str, field: str) -> Iterator[Row]:
    """The objects of one JSON array, read as a whole. Numbers are of items, from 1."""
    items = _load_json(file, path)
    if not isinstance(items, list):
        raise UserError(f'{path}: is no JSON array; for an object a line, set format = "jsonl"')
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict):
            yield number, "", "not a JSON object", {}
        elif not isinstance(item.get(field), str):
            problem = f'field "{field}" is not a string' if field in item else f'no field "{field}"'
            yield number, "", problem, {}
        else:
            yield number, item[field], "", {key: value for key, value in item.items() if key != field}


def squad_articles(file: io.BufferedIOBase, path: str, field: str) -> Iterator[Row]:
    """The articles of a SQuAD-like file: the title and the contexts, without the questions."""
    whole = _load_json(file, path)
    articles = whole.get("data") if isinstance(whole, dict) else None
    if not isinstance(articles, list):
        raise UserError(f'{path}: is not SQuAD-like (no list "data"); set another format')
    for number, article in enumerate(articles, 1):
        try:
            contexts = [paragraph["context"] for paragraph in article["paragraphs"]]
            title = str(article.get("title", "")).replace("_", " ")
            yield number, "\n\n".join(filter(None, [title, *contexts])), "", {}
        except (AttributeError, KeyError, TypeError):
            yield number, "", "no article with paragraphs and contexts", {}


def treebank_documents(file: io.BufferedIOBase, path: str, field: str) -> Iterator[Row]:
    """The documents of a CoNLL-U file (`# newdoc`, else all of it): its sentences, `# newpar` begins a line."""
    parts: list[str] = []
    words: list[str] = []
    problem, first, sentence, number, is_new = "", 1, "", 0, False

    def end_sentence() -> None:
        nonlocal sentence, words, is_new
        if text := sentence or "".join(words).strip():
            parts.append(("\n" if is_new else " ") * bool(parts) + text)
        sentence, words, is_new = "", [], False

    def document() -> Iterator[Row]:
        end_sentence()
        if parts or problem:
            yield first, "" if problem else "".join(parts), problem, {}

    for number, raw in enumerate(file, 1):
        try:
            line = raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            problem = NOT_UTF8
            continue
        if line.startswith("# newdoc"):
            yield from document()
            parts, problem, first = [], "", number
        elif line.startswith("# newpar"):
            is_new = True
        elif line.startswith("# text ="):
            sentence = line.partition("=")[2].strip()
        elif not line:
            end_sentence()
        elif not line.startswith("#"):
            columns = line.split("\t")
            if len(columns) != 10:
                problem = problem or f"line {number} has {len(columns)} columns, not 10"
            elif columns[0].isdigit():  # a range or an empty node repeats words or adds none
                words.append(columns[1] + ("" if "SpaceAfter=No" in columns[9] else " "))
    yield from document()


_CAPTION = re.compile(r"\d+|[\d:,. ]+-->.*")
_TAG = re.compile(r"</?[a-zA-Z][^<>]{0,60}>|\{\\[^{}]{0,60}\}")


def subtitle_text(file: io.BufferedIOBase, path: str, field: str) -> Iterator[Row]:
    """The captions of a SubRip file as one document, a line each, without numbers, times and tags."""
    try:
        lines = file.read().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        yield 1, "", NOT_UTF8, {}
        return
    if not any("-->" in line for line in lines):
        yield 1, "", "no captions", {}
        return
    bare = (_TAG.sub("", line).strip() for line in lines if not _CAPTION.fullmatch(line.strip()))
    yield 1, "\n".join(filter(None, bare)), "", {}


def archive_pages(file: io.BufferedIOBase, path: str, field: str) -> Iterator[Row]:
    """The pages of a WARC file by trafilatura, or the texts of a WET file. A page without text is an empty document."""
    try:
        from trafilatura import extract
        from warcio.archiveiterator import ArchiveIterator
        from warcio.exceptions import ArchiveLoadFailed
        from warcio.statusandheaders import StatusAndHeadersParserException
    except ImportError as error:
        raise UserError(f"{path}: reading WARC needs {error.name}; pip install 'gloria[data]'") from None
    number = 0
    records = ArchiveIterator(file)
    while True:
        try:
            record = next(records, None)
        # What warcio raises for headers that are missing or are none.
        except (ArchiveLoadFailed, StatusAndHeadersParserException, AttributeError, ValueError) as error:
            reason = " ".join(str(error).split())[:100]
            raise UserError(f"{path}: is no whole WARC file after {number} pages ({reason}); get it again") from None
        if record is None:
            break
        if record.rec_type not in ("response", "conversion"):
            continue
        number += 1
        headers = record.rec_headers
        data = record.content_stream().read()
        about = {"url": headers.get_header("WARC-Target-URI"), "date": headers.get_header("WARC-Date")}
        if record.rec_type == "response":
            kind = (record.http_headers and record.http_headers.get_header("Content-Type")) or ""
            is_page = "html" in kind or (not kind and data.lstrip()[:1] == b"<")
            text = extract(data, favor_precision=True, include_comments=False, deduplicate=True) if is_page else ""
            yield number, text or "", "", about
        elif len(data) != int(headers.get_header("Content-Length") or 0):
            yield number, "", "cut short", {}
        else:
            try:
                yield number, data.decode("utf-8"), "", about
            except UnicodeDecodeError:
                yield number, "", NOT_UTF8, {}
    file.read(1)  # warcio takes the end of a file that is cut short for the end of its records


def wiki_articles(file: io.BufferedIOBase, path: str, field: str) -> Iterator[Row]:
    """The articles of a MediaWiki dump (pages-articles.xml) as plain text; redirects and other pages are none."""
    number = 0
    try:
        for _, page in ElementTree.iterparse(file, events=("end",)):
            if page.tag.rpartition("}")[2] != "page":
                continue
            found = {item.tag.rpartition("}")[2]: item for item in page.iter()}
            number += 1
            if found["ns"].text == "0" and "redirect" not in found:
                title = found["title"].text or ""
                yield number, f"{title}\n\n{plain_text(found['text'].text or '')}", "", {"title": title}
            page.clear()
    except (ElementTree.ParseError, KeyError) as error:
        raise UserError(f"{path}: is no whole MediaWiki dump after {number} pages ({error}); get it again") from None


KINDS = {
    "csv": Kind(table_rows, (".csv",), ("", ".gz", ".zst")),
    "tsv": Kind(tab_rows, (".tsv",), ("", ".gz", ".zst")),
    "json": Kind(array_items, (), ("", ".gz", ".zst")),  # a .json is taken for an object a line
    "squad": Kind(squad_articles),
    "conllu": Kind(treebank_documents, (".conllu",), ("", ".gz")),
    "srt": Kind(subtitle_text, (".srt",)),
    "warc": Kind(archive_pages, (".warc", ".wet"), ("", ".gz")),
    "mediawiki": Kind(wiki_articles, (".xml",), ("", ".gz", ".bz2")),
}
FORMATS = tuple(f"{kind}{packed}" for kind, about in KINDS.items() for packed in about.packed)
SUFFIXES = {f"{end}{p}": f"{kind}{p}" for kind, about in KINDS.items() for end in about.endings for p in about.packed}
