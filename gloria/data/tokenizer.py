"""Tokenizers: trained or imported once, kept as a Hugging Face folder, used through `tokenizers` alone.

Two kinds are trained, byte-level BPE as GPT-2's (Radford et al. 2019) and a SentencePiece unigram model (Kudo
2018). Both become `tokenizer.json` and `tokenizer_config.json`, which `transformers.AutoTokenizer` loads with
the same ids; for SentencePiece the ids are those of this folder, not those of the `.model` file, which isn't
kept: other classes that read it would add prefixes or shift ids. Any text comes back from its ids as it was,
except that SentencePiece's own U+2581 comes back as a space.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from gloria.config.cli import option
from gloria.data.shards import dtype_for_vocab
from gloria.errors import UserError, warn
from gloria.files import read_json_object

EOS = "<|endoftext|>"
PAD = "<|pad|>"
ROLES = ("eos_token", "pad_token", "bos_token", "unk_token")  # of special tokens, as Hugging Face names them
SPACE = "\u2581"  # SentencePiece's visible space
NO_LIMIT = int(1e30)  # what transformers writes for a tokenizer without a length limit
SENTENCEPIECE_THREADS = 4  # a constant, not the number of cores: the trained pieces depend on it
# A literal "<unk>" or "<0x41>" in a text must never become that piece: any other reading scores better.
NEVER = -1e6
PIECE_CHARS = 2**20  # of a long text encoded at a time: its encoding takes some 100 bytes a character
# A single space between two letters or digits. Every kind of tokenizer below ends what it works on before it.
_CUT = re.compile(r"(?<=\w) (?=\w)")
# Normalizers that change a character by itself, or with those it is joined to without a space.
_LOCAL = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer", "Nmt", "Precompiled"}
_SPACE_PATTERNS = ({"String": " "}, {"Regex": " {2,}"})
_SPLITS_AT_SPACES = {"Whitespace", "WhitespaceSplit", "BertPreTokenizer"}
_SPLITS_ELSEWHERE = {"Digits", "Punctuation", "ByteLevel", "Metaspace"}


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes tokens; trained on a sample of the sources, or an existing tokenizer taken over."""

    kind: str = option(
        "bpe",
        "byte-level BPE as GPT-2's, or a SentencePiece unigram model with byte fallback",
        choices=("bpe", "sentencepiece"),
    )
    vocab_size: int = option(
        50257, "tokens, with EOS and pad; under 65,500 a token takes 2 bytes on disk, else 4", minimum=512
    )
    path: str | None = option(
        None, "folder or name of an existing Hugging Face tokenizer; the other keys are then unused"
    )
    sample_bytes: int = option(
        2**28, "bytes of text to train on, drawn from the sources by weight; memory grows with it", minimum=1
    )


@dataclass(frozen=True)
class TextTokenizer:
    """A loaded tokenizer. Special tokens in a text are plain text: `<|endoftext|>` never becomes EOS."""

    backend: Tokenizer
    eos_id: int
    pad_id: int | None
    vocab_size: int  # highest id + 1
    fingerprint: str  # xxh3-128 of tokenizer.json

    @functools.cached_property
    def why_whole(self) -> str:
        """Why long texts are encoded whole, or an empty string where they are cut, see `why_whole`."""
        return why_whole(json.loads(self.backend.to_str()))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, (tokens,) in the shards' dtype, without EOS.

        A text of more than PIECE_CHARS is encoded piece by piece, for its encoding takes about a hundred times its
        size in memory. The ids are those of the whole text; only of a Unigram model's segmentations that score the
        same up to rounding the other one may be chosen.
        """
        if all(len(text) <= PIECE_CHARS for text in texts):
            return self._encode(texts)
        pieces = ([text] if self.why_whole else cut_at_spaces(text) for text in texts)
        return [np.concatenate([self._encode([piece])[0] for piece in parts]) for parts in pieces]

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        dtype = dtype_for_vocab(self.vocab_size)
        try:
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except BaseException as error:  # the library's panics are no `Exception`, and no process can hand them on
            if type(error).__name__ != "PanicException":
                raise
            raise MemoryError(f"the tokenizer gave up: {error}") from None
        return [np.array(encoding.ids, dtype) for encoding in encodings]

    def encode(self, text: str) -> list[int]:
        """The ids of one text, without EOS."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode_batch(self, documents: Sequence[np.ndarray]) -> list[str]:
        """The texts of several documents' ids, each (tokens,)."""
        return self.backend.decode_batch([ids.tolist() for ids in documents], skip_special_tokens=False)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ids; bytes that are no whole character come out as U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str], folder: str | os.PathLike[str]) -> TextTokenizer:
    """Train on `texts` and save as a Hugging Face folder; the same bytes for any order of the texts.

    Neither the number of cores nor that of threads matters. A vocabulary the texts can't fill is a
    `UserError` for SentencePiece and a warning for BPE, which is then smaller.
    """
    train = {"bpe": _train_bpe, "sentencepiece": _train_sentencepiece}[config.kind]
    backend = train(texts, config.vocab_size)
    _save(folder, backend.to_str(pretty=True), {"eos_token": EOS, "pad_token": PAD})
    return load_tokenizer(folder)


def load_tokenizer(folder: str | os.PathLike[str]) -> TextTokenizer:
    """The tokenizer in a Hugging Face folder with a `tokenizer.json`; `UserError` where it is no such folder.

    Truncation and padding that `tokenizer.json` may ask for are switched off: documents are never cut.
    """
    fingerprint, backend = tokenizer_fingerprint(folder), _backend(folder)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    names = _special_tokens(Path(folder))
    eos_id, pad_id = (_token_id(backend, names.get(key), folder, key) for key in ("eos_token", "pad_token"))
    if eos_id is None:
        config = Path(folder) / "tokenizer_config.json"
        raise UserError(f'{config}: names no "eos_token"; documents end with it, so name one there')
    vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    return TextTokenizer(backend, eos_id, pad_id, vocab_size, fingerprint)


def import_tokenizer(path: str, folder: str | os.PathLike[str]) -> TextTokenizer:
    """Take over an existing Hugging Face tokenizer, a folder or else a name, and save it in `folder`.

    A `tokenizer.json` is copied byte for byte, so its fingerprint stays. Other tokenizers are converted by
    `AutoTokenizer` (never running code that comes with them). The folder is always saved for
    `PreTrainedTokenizerFast`, which takes `tokenizer.json` as it is. A tokenizer without a pad token gets
    none, with a warning; pre-training pads nothing.
    """
    source = Path(path).expanduser()
    if (source / "tokenizer.json").is_file():
        load_tokenizer(source)
        content, names = (source / "tokenizer.json").read_bytes().decode(), _special_tokens(source)
    elif source.is_dir() or not _looks_like_a_path(path):
        content, names = _convert(str(source) if source.is_dir() else path)
    else:
        raise UserError(f"{path}: no such folder; tokenizer.path is a Hugging Face folder or a name")
    if "eos_token" not in names:
        raise UserError(f'{path}: this tokenizer names no "eos_token"; documents end with it, so name one')
    _save(folder, content, names)
    tokenizer = load_tokenizer(folder)
    if tokenizer.pad_id is None:
        warn(f"{path}: this tokenizer has no pad token and gets none; pre-training pads nothing")
    if tokenizer.eos_id in tokenizer.encode(eos := names["eos_token"]):  # it is a piece of the model's own
        warn(f'{path}: to this tokenizer a "{eos}" in a text is EOS; there a document counts as two')
    return tokenizer


def cut_at_spaces(text: str) -> Iterator[str]:
    """A text in pieces of about PIECE_CHARS, each but the first beginning with a single space between two words."""
    start = 0
    while len(text) - start > PIECE_CHARS and (found := _CUT.search(text, start + PIECE_CHARS)):
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]


def why_whole(tokenizer: dict[str, Any]) -> str:
    """Why the pieces of `cut_at_spaces` may have other ids than the whole text; "" where their ids are the same.

    `tokenizer` are the values of a `tokenizer.json`. The ids are the same where nothing reaches across the cut: each
    normalizer changes single characters, no added token holds or takes in a space, and either a pre-tokenizer splits at
    the cut or the vocabulary has no piece in which a space follows something else. Then no merge spans the cut.
    """
    for part in _parts(tokenizer["normalizer"], "normalizers"):
        is_local = part["type"] in _LOCAL or (part["type"] == "Strip" and not part["strip_left"])
        if not is_local and not (part["type"] == "Replace" and part["pattern"] in _SPACE_PATTERNS):
            return f"its normalizer {part['type']} may reach across spaces"
    for token in tokenizer["added_tokens"]:  # special ones are plain text here
        if not token["special"] and (token["lstrip"] or token["rstrip"] or re.search(r"\s", token["content"])):
            return f'its added token "{token["content"]}" may take in spaces'
    if tokenizer["model"].get("dropout"):
        return "its merges are drawn by chance"
    is_split = False
    for part in _parts(tokenizer["pre_tokenizer"], "pretokenizers"):
        if part["type"] not in _SPLITS_AT_SPACES | _SPLITS_ELSEWHERE:
            return f"its pre-tokenizer {part['type']} may look across spaces"
        is_split |= part["type"] in _SPLITS_AT_SPACES or bool(part.get("use_regex") or part.get("split"))
    if is_split:
        return ""
    model = tokenizer["model"]
    if model["type"] not in ("BPE", "Unigram") or model.get("ignore_merges") or model.get("end_of_word_suffix"):
        return f"its {model['type']} model takes the whole text for one word"
    vocabulary = model["vocab"]
    pieces = vocabulary if isinstance(vocabulary, dict) else [piece for piece, _ in vocabulary]
    if SPACE not in pieces and "\u0120" not in pieces:
        return "its vocabulary has no space"
    across = next((piece for piece in pieces if re.search(f"[^{SPACE}\u0120 ][{SPACE}\u0120 ]", piece)), "")
    return f'its token "{across}" reaches across a space' if across else ""


def _parts(component: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The components of a normalizer or pre-tokenizer, which may be none, one, or a sequence."""
    if component is None:
        return []
    return component[key] if component["type"] == "Sequence" else [component]


def tokenizer_fingerprint(folder: str | os.PathLike[str]) -> str:
    """xxh3-128 of a folder's `tokenizer.json`, in hexadecimal."""
    path = Path(folder) / "tokenizer.json"
    try:
        return xxhash.xxh3_128_hexdigest(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a tokenizer's folder has a tokenizer.json") from None


def other_meanings(folder: str | os.PathLike[str], other: str | os.PathLike[str]) -> tuple[int, int]:
    """How many of the tokens of `folder` have another id in `other` or none, and how many there are."""
    ours, theirs = (_backend(path).get_vocab(with_added_tokens=True) for path in (folder, other))
    return sum(theirs.get(token) != number for token, number in ours.items()), len(ours)


def _backend(folder: str | os.PathLike[str]) -> Tokenizer:
    path = Path(folder) / "tokenizer.json"
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises plain `Exception`
        raise UserError(f"{path}: is no tokenizer ({error}); save the tokenizer again") from None


def _train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_not_empty(texts), trainer)
    if (size := backend.get_vocab_size()) < vocab_size:
        warn(f"tokenizer.vocab_size: {size} tokens instead of {vocab_size}; the texts have no more to merge")
    return backend


def _train_sentencepiece(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    import sentencepiece  # here: only those who train such a tokenizer need it

    # Sorted, because training depends on the order; by line, as SentencePiece takes a line for a sentence.
    lines = sorted(line for text in _not_empty(texts) for line in text.splitlines() if line)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size - 2,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            required_chars="".join(map(chr, range(33, 127))) + "\n\t",
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            max_sentence_length=2**30,  # longer lines would be left out
            num_threads=SENTENCEPIECE_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].rpartition("] ")[2]
        raise UserError(f"tokenizer.vocab_size: {vocab_size} does not suit the texts ({reason})") from None
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    scores = [
        (pieces.id_to_piece(i), NEVER if i == 0 or pieces.is_byte(i) else pieces.get_score(i))
        for i in range(len(pieces))
    ]
    backend = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    # Added after the model's own pieces: a piece of the model would be found in a text that spells it.
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in (EOS, PAD)])
    return backend


def _not_empty(texts: Iterable[str]) -> Iterator[str]:
    count = 0
    for count, text in enumerate(texts, 1):  # noqa: B007 (counts)
        yield text
    if count == 0:
        raise UserError("tokenizer: there is no text to train on; check sources and tokenizer.sample_bytes")


def _save(folder: str | os.PathLike[str], content: str, names: dict[str, str]) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "model_max_length": NO_LIMIT,
        "clean_up_tokenization_spaces": False,
        # transformers 4 would add token_type_ids, which GPT-2 looks up among its words
        "model_input_names": ["input_ids", "attention_mask"],
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "tokenizer.json").write_bytes(content.encode())
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _convert(path_or_name: str) -> tuple[str, dict[str, str]]:
    """(tokenizer.json, special tokens) of a tokenizer that only `transformers` can read."""
    from transformers import AutoTokenizer  # here: it takes seconds, and a tokenizer.json needs none of it

    try:
        loaded = AutoTokenizer.from_pretrained(path_or_name, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, ImportError, ...: whatever the foreign files provoke
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path_or_name}: no tokenizer that can be loaded ({reason})") from None
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        kind = type(loaded).__name__
        raise UserError(f"{path_or_name}: {kind} has no tokenizer.json form; save it as a fast tokenizer")
    names = {key: str(getattr(loaded, key)) for key in ROLES if getattr(loaded, key) is not None}
    return backend.to_str(pretty=True), names


def _special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens a folder's `tokenizer_config.json` (or `special_tokens_map.json`) names, by role."""
    names: dict[str, str] = {}
    for path in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        if path.is_file():
            values = read_json_object(path, "save the tokenizer again")
            for key in ROLES:
                value = values.get(key)
                value = value.get("content") if isinstance(value, dict) else value  # an AddedToken as JSON
                names |= {key: value} if isinstance(value, str) else {}
    return names


def _token_id(backend: Tokenizer, name: str | None, folder: str | os.PathLike[str], key: str) -> int | None:
    number = None if name is None else backend.token_to_id(name)
    if name is not None and number is None:
        raise UserError(f'{folder}: its {key} "{name}" is not in tokenizer.json; save the tokenizer again')
    return number


def _looks_like_a_path(path: str) -> bool:
    return path.startswith((".", "~", "/")) or path.count("/") > 1
