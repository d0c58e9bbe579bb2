"""MediaWiki's markup as plain text: what a reader of the article reads, without tables, boxes, notes and pictures."""

from __future__ import annotations

import html
import re

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_BLOCK = re.compile(
    r"<(ref|gallery|math|timeline|syntaxhighlight|source|imagemap|score|table)\b[^<>]*?(/>|>.*?</\1\s*>)",
    re.DOTALL | re.IGNORECASE,
)
_TAG = re.compile(r"</?[a-zA-Z][^<>]{0,200}>")
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)  # an innermost template or table
_PICTURE = re.compile(
    r"\[\[(?:ficheiro|imagem|arquivo|file|image|categoria|category)\s*:[^\[\]]*(?:\[\[[^\[\]]*\]\][^\[\]]*)*\]\]",
    re.IGNORECASE,
)
_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
_ADDRESS = re.compile(r"\[(?:https?|ftp)?:?//[^\s\]]+ ?([^\]]*)\]")
_EMPHASIS = re.compile(r"'{2,5}")
_HEADING = re.compile(r"^=+\s*(.*?)\s*=+\s*$", re.MULTILINE)
_ITEM = re.compile(r"^[*#:;]+\s*", re.MULTILINE)
_SWITCH = re.compile(r"__[A-Z]{3,}__")
_EMPTY = re.compile(r"\(\s*[,;]?\s*\)")
_LINES = re.compile(r"\n{3,}")


def plain_text(markup: str) -> str:
    """The text of an article. Templates are cut out from the inside to the outside; headings stay as lines."""
    text = _BLOCK.sub("", _COMMENT.sub("", markup))
    count = 1
    while count:
        text, count = _TEMPLATE.subn("", text)
    text = _LINK.sub(r"\1", _PICTURE.sub("", text))
    text = _ADDRESS.sub(r"\1", text)
    text = _SWITCH.sub("", _EMPHASIS.sub("", _TAG.sub("", text)))
    text = _EMPTY.sub("", _ITEM.sub("", _HEADING.sub(r"\1", text)))
    return _LINES.sub("\n\n", html.unescape(text)).strip()
