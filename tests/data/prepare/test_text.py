"""Prevents: a text that depends on how its file was packed (BOM, CRLF, compression, accents spelled two ways), a
bad line that stops the reading or passes unseen, and a damaged file that is taken for a short one.
"""

from __future__ import annotations

import gzip
import json
import unicodedata
from itertools import pairwise
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from gloria.data.prepare.text import clean, format_of, lines_before, read_documents
from gloria.errors import UserError

TEXTS = ["Olá, mundo.", "Segunda linha\ncom \t tabulação — e «aspas».", 'Um "terceiro" \\ texto 😀']


def lines_of(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def pack(path: Path, data: bytes) -> str:
    """Write `data` compressed as the name says; Zstandard in two frames, gzip in two members."""
    half = len(data) // 2
    if path.suffix.lower() == ".gz":
        data = gzip.compress(data[:half]) + gzip.compress(data[half:])
    elif path.suffix == ".zst":
        compressor = zstandard.ZstdCompressor()
        data = compressor.compress(data[:half]) + compressor.compress(data[half:])
    path.write_bytes(data)
    return str(path)


def read(path: str, **options) -> list[tuple[int, str, str]]:
    return [tuple(document)[:3] for document in read_documents(path, format_of(path), **options)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "A.JSONL.GZ", "a.json.gz", "a.jsonl.zst", "a.json.zst"])
def test_json_lines_are_the_same_in_every_packing(tmp_path: Path, name: str) -> None:
    data = b"\xef\xbb\xbf" + lines_of(TEXTS[:2]) + b"\r\n   \n" + lines_of(TEXTS[2:])
    path = pack(tmp_path / name, data)
    assert read(path) == [(1, TEXTS[0], ""), (2, TEXTS[1], ""), (5, TEXTS[2], "")]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_a_txt_is_one_document_or_a_document_a_block(tmp_path: Path, name: str) -> None:
    path = pack(tmp_path / name, "um\ndois\r\n \t\r\n\r\n\ntrês\n\nquatro".encode())
    assert [document.text for document in read_documents(path, format_of(path))] == [
        "um\ndois\r\n \t\r\n\r\n\ntrês\n\nquatro"
    ]
    assert read(path, documents="block") == [(1, "um\ndois\r\n", ""), (6, "três\n", ""), (8, "quatro", "")]


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.binary(),
        pyarrow.large_binary(),
        pyarrow.binary_view(),
    ],
)
def test_parquet_rows_are_documents(tmp_path: Path, kind: pyarrow.DataType) -> None:
    column = pyarrow.array([*TEXTS, None], kind)
    dictionary = column if "view" in str(kind) else column.dictionary_encode()
    for name, values in (("plain", column), ("dictionary", dictionary)):
        table = pyarrow.table({"id": [1, 2, 3, 4], "text": values})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
        assert read(str(tmp_path / f"{name}.parquet")) == [
            *((row, text, "") for row, text in enumerate(TEXTS, 1)),
            (4, "", 'field "text" is not a string'),
        ]


def test_parquet_bytes_that_are_not_utf8_spoil_their_row_only(tmp_path: Path) -> None:
    raw = pyarrow.array([b"ol\xc3\xa1", b"\xff\xfe"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": raw}), tmp_path / "a.parquet")
    assert read(str(tmp_path / "a.parquet")) == [(1, "olá", ""), (2, "", "not UTF-8")]


def test_each_way_for_a_line_to_be_malformed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    bad = {
        b'{"text": "a"': "not JSON",
        b"texto corrido": "not JSON",
        b"[" * 100_000: "not JSON",
        b'{"text": "\xe9"}': "not UTF-8",
        b'{"texto": "a"}': 'no field "text"',
        b'{"text": 3}': 'field "text" is not a string',
        b'{"text": null}': 'field "text" is not a string',
        b'["text"]': "not a JSON object",
        b'"text"': "not a JSON object",
        b"7": "not a JSON object",
        b'{"text": "a", "n": ' + b"9" * 5000 + b"}": "not JSON",
        b'{"text": "a", "n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": "not JSON",
    }
    path.write_bytes(b"\n".join([*bad, b'{"text": "bom"}']))
    found = read(str(path))
    assert found[-1] == (len(bad) + 1, "bom", "")
    assert [problem for _, _, problem in found[:-1]] == list(bad.values())
    assert [line for line, _, _ in found] == list(range(1, len(bad) + 2))


def test_ranges_of_a_file_share_its_lines_whatever_the_cuts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(["á" * length for length in range(1, 12)]) + b"\n" + lines_of(["sem fim"])[:-1])
    size = path.stat().st_size
    whole = read(str(path))
    for step in (1, 7, 20, 33, size):
        edges = [*range(0, size, step), size]
        pieces = []
        for start, end in pairwise(edges):
            found = read_documents(str(path), "jsonl", start=start, end=end)
            before = lines_before(str(path), start)
            pieces += [(before + line, text, problem) for line, text, problem, *_ in found]
        assert pieces == whole


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "a.jsonl.gz",
            "is no whole .gz file (Compressed file ended before the end-of-stream marker was reached)",
        ),
        ("a.jsonl.zst", "is no whole .zst file (the last frame ends too early)"),
    ],
)
def test_a_file_cut_short_is_an_error(tmp_path: Path, name: str, reason: str) -> None:
    path = tmp_path / name
    pack(path, lines_of([f"documento {number}" for number in range(2000)]))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError) as error:
        read(str(path))
    assert str(error.value) == f"{path}: {reason}; get it again"


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.parquet"])
def test_a_file_that_is_not_what_its_name_says_is_an_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("nem por isso, mas bastante comprido para ter um rodapé")
    with pytest.raises(UserError) as error:
        read(str(path))
    assert str(error.value).startswith(f"{path}: is no whole ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("data", ['[{"text": "a"}]', '[\n  {"text": "a"}\n]', ' [{"text": "a"},\n{"text": "b"}]'])
def test_one_json_array_is_an_error_with_its_remedy(tmp_path: Path, data: str) -> None:
    (tmp_path / "a.json").write_text(data)
    with pytest.raises(UserError) as error:
        read(str(tmp_path / "a.json"))
    assert str(error.value) == (f'{tmp_path}/a.json: is one JSON array, not an object a line; set format = "json"')


def test_metadata_are_the_other_fields_and_columns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "url": "x", "n": [1]}\n{"text": 1, "url": "y"}\n')
    found = read_documents(str(tmp_path / "a.jsonl"), "jsonl")
    assert [document.metadata for document in found] == [{"url": "x", "n": [1]}, {}]
    table = pyarrow.table({"url": ["x", "y"], "text": ["a", "b"], "n": [1, None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = read_documents(str(tmp_path / "a.parquet"), "parquet", columns=True)
    assert [(document.text, document.metadata) for document in found] == [
        ("a", {"url": "x", "n": 1}),
        ("b", {"url": "y", "n": None}),
    ]


def test_parquet_without_the_column_names_those_there_are(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError) as error:
        read(str(tmp_path / "a.parquet"))
    assert str(error.value) == (
        f'{tmp_path}/a.parquet: no column "text"; set text_field to one of its columns: id, body'
    )


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read(str(tmp_path / "a.txt"))
    assert str(error.value) == f"{tmp_path}/a.txt: can't be read (No such file or directory); check the file"


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("\ufeffum\r\ndois\rtrês\n", "um\ndois\ntrês"),
        ("a\x01b\x07c\x7fd\x9fe", "abcde"),
        ("um\x00dois\x0btrês\x0cquatro\x85cinco\x00", "um dois três quatro cinco"),  # they stand between words
        ("tab\tfica\n\n  também isto", "tab\tfica\n\n  também isto"),
        ("cafe\u0301 e\x01\u0301", "café é"),
        (" \u00a0\n\t \u2028", ""),
        ("ﬁ ½ ﬀ Ⅳ", "ﬁ ½ ﬀ Ⅳ"),  # NFC, not NFKC
        ("<|endoftext|>", "<|endoftext|>"),
    ],
)
def test_cleaning(raw: str, cleaned: str) -> None:
    assert clean(raw) == cleaned


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters() | st.sampled_from("\r\n\t\x00\x85\ufeff\u0301\u0327 eac")))
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    once = clean(text)
    assert clean(once) == once
    assert unicodedata.is_normalized("NFC", once)
    assert not any(unicodedata.category(char) == "Cc" and char not in "\n\t" for char in once)
    assert once == once.strip()
