"""Prevents: documents lost or merged in tables, archives, treebanks, subtitles and dumps; one bad row that spoils a
file; damaged files that end in a traceback or pass for whole."""

from __future__ import annotations

import bz2
import gzip
import io
import json
from pathlib import Path

import pytest

from gloria.data.prepare.text import format_of, read_documents
from gloria.data.prepare.wikitext import plain_text
from gloria.errors import UserError

CONLLU = """# newdoc id = a
# text = O rio corre.
1\tO\t_\t_\t_\t_\t_\t_\t_\t_
2\trio\t_\t_\t_\t_\t_\t_\t_\t_

1-2\tdo\t_\t_\t_\t_\t_\t_\t_\t_
1\tSem\t_\t_\t_\t_\t_\t_\t_\t_
2\ttexto\t_\t_\t_\t_\t_\t_\t_\tSpaceAfter=No
3\t.\t_\t_\t_\t_\t_\t_\t_\t_

# newdoc id = b
# newpar
# text = Outro.
1\tOutro\t_\t_\t_\t_\t_\t_\t_\tSpaceAfter=No

# newpar
# text = Fim.
1\tFim\t_\t_\t_\t_\t_\t_\t_\t_
"""
SRT = "\ufeff1\r\n00:01,000 --> 00:02,000\r\n<i>Olá.</i>\r\n\r\n2\r\n00:03,000 --> 00:04,000\r\n{\\an8}Adeus.\r\n"
WIKI = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/">
<page><title>Lisboa</title><ns>0</ns><revision><text>'''Lisboa''' é a [[capital|capital]] de
[[Portugal]].{{Info|a={{b}}}}&lt;ref&gt;nota&lt;/ref&gt;</text></revision></page>
<page><title>LX</title><ns>0</ns><redirect title="Lisboa"/><revision><text>x</text></revision></page>
<page><title>Discussão:Lisboa</title><ns>1</ns><revision><text>x</text></revision></page>
<page><title>Faro</title><ns>0</ns><revision><text>Faro fica no sul.</text></revision></page>
</mediawiki>
"""
PARAGRAPHS = [{"context": "Nasce."}, {"context": "Desagua."}]
SQUAD = {"data": [{"title": "Rio_Tejo", "paragraphs": PARAGRAPHS}, {"title": "x"}]}
TABLE = 'id,text,url\n1,"um, ""dois""\ntrês",u\n2,quatro\n3,cinco,v\n'

FILES = {
    "a.csv": (TABLE, ['um, "dois"\ntrês', None, "cinco"]),
    "a.tsv": ('id\ttext\n1\t"um\n2\tdois"\n', ['"um', 'dois"']),
    "a.conllu": (CONLLU, ["O rio corre. Sem texto.", "Outro.\nFim."]),
    "a.srt": (SRT, ["Olá.\nAdeus."]),
    "a.xml": (WIKI, ["Lisboa\n\nLisboa é a capital de\nPortugal.", "Faro\n\nFaro fica no sul."]),
    "a.array": (json.dumps([{"text": "um"}, 3, {"text": 4}, {"text": "dois", "k": 1}]), ["um", None, None, "dois"]),
    "a.squad": (json.dumps(SQUAD), ["Rio Tejo\n\nNasce.\n\nDesagua.", None]),
}


def texts(path: Path, format: str = "") -> list[str | None]:
    format = format or format_of(str(path)) or {"array": "json", "squad": "squad"}[path.name.split(".")[1]]
    return [None if document.problem else document.text for document in read_documents(str(path), format)]


@pytest.mark.parametrize("name", FILES)
def test_documents_of_each_kind(tmp_path: Path, name: str) -> None:
    content, expected = FILES[name]
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert texts(path) == expected
    for ending, compress in ((".gz", gzip.compress), (".bz2", bz2.compress)):
        if format_of(name + ending):
            (tmp_path / (name + ending)).write_bytes(compress(content.encode()))
            assert texts(tmp_path / (name + ending)) == expected


def test_a_bad_byte_spoils_its_own_document(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text\num\nd\xf3is\ntr\xc3\xaas\n")
    assert texts(tmp_path / "a.csv") == ["um", None, "três"]
    (tmp_path / "a.conllu").write_bytes(CONLLU.encode().replace(b"O rio", b"\xd3 rio"))
    assert texts(tmp_path / "a.conllu") == [None, "Outro.\nFim."]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.csv", "id,url\n1,2\n", 'no column "text"; set text_field to one of its columns: id, url'),
        ("a.array", "<html>não</html>", "is not valid JSON (Expecting value: line 1 column 1 (char 0)); get it again"),
        ("a.array", '{"text": "a"}', 'is no JSON array; for an object a line, set format = "jsonl"'),
        ("a.squad", "[]", 'is not SQuAD-like (no list "data"); set another format'),
        (
            "a.xml",
            WIKI[: WIKI.index("<page><title>Faro")],
            "is no whole MediaWiki dump after 3 pages (no element found: line 6, column 0); get it again",
        ),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: str, what: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        texts(tmp_path / name)
    assert str(error.value) == f"{tmp_path}/{name}: {what}"


def test_markup_of_wikis() -> None:
    markup = """{{Info
| a = {{b|c}}
}}
[[Ficheiro:x.jpg|thumb|Uma [[ponte]].]]
== História ==
A ''ponte'' ({{lang|en|x}}) é de [[1998]],<ref name="a" /> ver [https://x.pt o sítio].
{| class="wikitable"
| célula
|}
* um [[rio (água)|rio]] &amp; mais
[[Categoria:Pontes]]"""
    assert plain_text(markup) == "História\nA ponte  é de 1998, ver o sítio.\n\num rio & mais"


def test_pages_of_web_archives(tmp_path: Path) -> None:
    pytest.importorskip("warcio", reason='needs the extra "data"')
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    paragraph = "O farol da barra foi aceso pela primeira vez numa noite de outubro, e ainda hoje guia os barcos. " * 4
    page = f"<html><body><nav>Menu</nav><article><h1>O farol</h1><p>{paragraph}</p></article></body></html>".encode()
    with (tmp_path / "a.warc.gz").open("wb") as file:
        writer = WARCWriter(file, gzip=True)
        for url, kind, data in (("http://a.pt/", "text/html", page), ("http://a.pt/b", "image/png", b"\x89PNG")):
            headers = StatusAndHeaders("200 OK", [("Content-Type", kind)], protocol="HTTP/1.0")
            writer.write_record(writer.create_warc_record(url, "response", io.BytesIO(data), http_headers=headers))
        writer.write_record(writer.create_warc_record("http://b.pt/", "conversion", io.BytesIO("Só texto.".encode())))
    found = list(read_documents(str(tmp_path / "a.warc.gz"), "warc.gz"))
    assert [(document.metadata["url"], paragraph.strip() in document.text) for document in found] == [
        ("http://a.pt/", True),
        ("http://a.pt/b", False),
        ("http://b.pt/", False),
    ]
    assert [document.text for document in found][1:] == ["", "Só texto."]
    whole = (tmp_path / "a.warc.gz").read_bytes()
    (tmp_path / "cut.warc.gz").write_bytes(whole[:-40])
    with pytest.raises(UserError) as error:
        list(read_documents(str(tmp_path / "cut.warc.gz"), "warc.gz"))
    assert str(error.value).startswith(f"{tmp_path}/cut.warc.gz: is no whole .gz file")
    (tmp_path / "broken.warc").write_bytes(b"WARC/1.0\r\nWARC-Type: response\r\n\r\nnot a record")
    with pytest.raises(UserError) as error:
        texts(tmp_path / "broken.warc")
    assert str(error.value).startswith(f"{tmp_path}/broken.warc: is no whole WARC file after 0 pages")
