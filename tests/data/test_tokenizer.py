"""Bug prevented: ids that change between training and publication (AutoTokenizer reads the folder otherwise, or a
retrained tokenizer differs), text that doesn't come back from its ids, and a literal `<|endoftext|>` read as EOS."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from gloria.data.tokenizer import (
    EOS,
    PAD,
    SPACE,
    TextTokenizer,
    TokenizerConfig,
    cut_at_spaces,
    import_tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from gloria.errors import UserError

KINDS = ("bpe", "sentencepiece")
VOCAB = 440
SENTENCES = [
    "O comboio para Évora parte às nove e meia da manhã, se não houver atrasos na linha.",
    "A avó pôs a mesa, acendeu o lume e chamou os netos que andavam na eira.",
    "— Não me digas que já leste o jornal todo! — exclamou o João, espantado.",
    "Em 1974, a 25 de abril, cantou-se na rua; ninguém queria voltar para casa.",
    "As marés da ria mudam de seis em seis horas, e com elas mudam os caminhos.",
    "Dir-lhe-ei amanhã o que penso: «o trabalho está feito», respondeu a ministra.",
    "Há quem prefira o vinho verde ao maduro, e há quem não beba senão água.",
    "Três pescadores remendavam as redes enquanto o sol se punha atrás do farol.",
]
# Chosen so that the sample is big enough for 440 tokens of either kind and no bigger.
TEXTS = [
    "\n".join([SENTENCES[(i * k + k) % 8][j:] for j in range(0, 24, 5)] + [f"\t{i * k} vezes  {k}"])
    for i in range(12)
    for k in (1, 3, 5)
]
VARIED = [
    "",
    " ",
    "Olá, mundo!",
    " Olá  mundo\n\n  fim ",
    "a\tb\r\nc\n",
    " " * 33 + "x",
    "e\u0301 cafe\u0301 ñ — « » “ ” … º ª",
    "😀👩‍👩‍👧 \u200b\u00a0x\u00a0",
    "ﬁ ½ Ⅳ ｆｕｌｌ",
    "日本語 Ελλάδα Москва",
    "I'm n't 'll d'água",
    "\x00\x7f\u0085\u2028\ufffd",
    "<unk> <0x41><0x0A> <s></s>",
    f"{EOS} no texto{EOS}{PAD}",
    *TEXTS[:6],
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("tokenizers")
    for kind in KINDS:
        train_tokenizer(TokenizerConfig(kind=kind, vocab_size=VOCAB), TEXTS, base / kind)
    return {kind: base / kind for kind in KINDS}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, folders) -> Path:
    return folders[request.param]


@pytest.fixture(scope="module")
def tokenizer(folder) -> TextTokenizer:
    return load_tokenizer(folder)


def error_of(function, *args) -> str:
    with pytest.raises(UserError) as caught:
        function(*args)
    return str(caught.value)


@pytest.mark.parametrize("text", VARIED, ids=range(len(VARIED)))
def test_text_comes_back_from_its_ids(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.eos_id, tokenizer.pad_id} & set(ids)
    assert max(ids, default=0) < tokenizer.vocab_size


def test_sentencepieces_own_space_is_the_one_exception(folders) -> None:
    assert load_tokenizer(folders["bpe"]).decode(load_tokenizer(folders["bpe"]).encode("a\u2581b")) == "a\u2581b"
    pieces = load_tokenizer(folders["sentencepiece"])
    assert pieces.decode(pieces.encode("a\u2581b")) == "a b"


def test_special_tokens_have_ids_of_their_own(tokenizer: TextTokenizer, folder: Path) -> None:
    assert tokenizer.vocab_size == VOCAB == tokenizer.backend.get_vocab_size()
    assert tokenizer.eos_id != tokenizer.pad_id
    assert tokenizer.decode([tokenizer.eos_id, tokenizer.pad_id]) == EOS + PAD
    assert tokenizer.decode([tokenizer.eos_id, tokenizer.pad_id], skip_special_tokens=True) == ""
    content = (folder / "tokenizer.json").read_bytes()
    assert tokenizer.fingerprint == xxhash.xxh3_128_hexdigest(content)
    assert sorted(os.listdir(folder)) == ["tokenizer.json", "tokenizer_config.json"]


def test_a_batch_is_encoded_as_its_texts_are(tokenizer: TextTokenizer) -> None:
    batch = tokenizer.encode_batch(VARIED)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in VARIED]
    assert {ids.dtype for ids in batch} == {np.dtype("uint16")}


def wordpiece() -> Tokenizer:
    """BERT's way: words between spaces, in pieces; characters are lowered and spaces lost."""
    letters = [chr(code) for code in range(33, 255)]
    words = ["[UNK]", *letters, *(f"##{letter}" for letter in letters), "que", "##ou", "casa", "##am"]
    backend = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend


def llama() -> Tokenizer:
    """Llama 2's way: BPE over the whole text, in which spaces are visible; here without its prefix."""
    bpe = {"<unk>": 0, SPACE: 1, "\n": 2} | {chr(code): code for code in range(33, 255)}
    merges = [("q", "u"), ("qu", "e"), (SPACE, "a"), (SPACE, "que"), ("o", "s"), (SPACE, SPACE), ("o", "\n")]
    bpe |= {"".join(pair): 300 + number for number, pair in enumerate(merges)}
    backend = Tokenizer(models.BPE(bpe, merges, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", SPACE)
    return backend


TRICKY = [
    "a  b   c d",
    "x . y , z",
    "1 2 34 a1 b",
    f"a{SPACE} b {SPACE}c",
    "o\n p\n\n q r",
    "😀 b c 😀 d",
    "ª º á b\t c d ½ e",
]


@pytest.mark.parametrize("kind", [*KINDS, "wordpiece", "llama"])
def test_a_long_text_in_pieces_has_the_ids_of_the_whole(folders, monkeypatch, kind: str) -> None:
    backend = {"wordpiece": wordpiece, "llama": llama}.get(kind, lambda: load_tokenizer(folders[kind]).backend)()
    tokenizer = TextTokenizer(backend, 0, None, 1000, "")
    assert tokenizer.why_whole == ""
    texts = [" ".join(random.Random(seed).choices([*VARIED, *TRICKY, *SENTENCES], k=60)) for seed in range(20)]
    whole = tokenizer.encode_batch(texts)
    monkeypatch.setattr("gloria.data.tokenizer.PIECE_CHARS", 20)
    pieces = [list(cut_at_spaces(text)) for text in texts]
    assert ["".join(parts) for parts in pieces] == texts
    assert sum(map(len, pieces)) > 1500
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [ids.tolist() for ids in whole]


def reaching(backend: Tokenizer, change: Callable[[Tokenizer], object]) -> str:
    change(backend)
    return TextTokenizer(backend, 0, None, 1000, "").why_whole


def test_a_tokenizer_that_may_reach_across_a_cut_gets_the_whole_text(folders, monkeypatch) -> None:
    """Each would have other ids in pieces."""
    regex = pre_tokenizers.Split(Regex(r"\w+ \w+"), "isolated")
    token = AddedToken("e a", normalized=False)
    across = Tokenizer(models.BPE({"a": 0, SPACE: 1, f"a{SPACE}": 2}, [("a", SPACE)]))
    reasons = {
        "its normalizer Prepend": reaching(llama(), lambda b: setattr(b, "normalizer", normalizers.Prepend(SPACE))),
        "its normalizer Strip": reaching(wordpiece(), lambda b: setattr(b, "normalizer", normalizers.Strip())),
        "its pre-tokenizer Split": reaching(wordpiece(), lambda b: setattr(b, "pre_tokenizer", regex)),
        'its added token "e a"': reaching(wordpiece(), lambda b: b.add_tokens([token])),
        f'its token "a{SPACE}"': reaching(across, lambda b: None),
        "its WordPiece model": reaching(wordpiece(), lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.Digits())),
    }
    assert [reason for start, reason in reasons.items() if not reason.startswith(start)] == []
    tokenizer = TextTokenizer(across, 0, None, 3, "")
    across.normalizer = normalizers.Replace(" ", SPACE)
    monkeypatch.setattr("gloria.data.tokenizer.PIECE_CHARS", 3)
    assert tokenizer.encode_batch(["a a a a"])[0].tolist() == [2, 2, 2, 0]


def test_a_panic_of_the_library_is_a_memory_error() -> None:
    """No process can hand on the panic itself, so a worker's would be a traceback about pickling."""

    class PanicException(BaseException):
        pass

    class Backend:
        def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> None:
            raise PanicException("capacity overflow")

    with pytest.raises(MemoryError, match="the tokenizer gave up: capacity overflow"):
        TextTokenizer(Backend(), 0, None, 10, "").encode_batch(["a"])


def test_the_kinds_are_what_they_are_called(folders) -> None:
    """Byte-level without a prefix space, and unigram pieces that keep every space and newline."""
    bpe, pieces = (load_tokenizer(folders[kind]).backend for kind in KINDS)
    assert bpe.encode("a a").tokens == ["a", "Ġa"]
    assert bpe.encode("日").tokens == ["æ", "Ĺ", "¥"]
    assert pieces.encode("a a").tokens == ["a", "▁a"]
    assert pieces.encode("日\n\n").tokens == ["<0xE6>", "<0x97>", "<0xA5>", "\n", "\n"]


@pytest.mark.parametrize("model_type", [None, "gpt_neo", "gpt2"])
def test_auto_tokenizer_gives_the_same_ids(
    tokenizer: TextTokenizer, folder: Path, tmp_path: Path, model_type: str | None
) -> None:
    """Also beside the config.json of the published model, which must not choose another tokenizer class."""
    shutil.copytree(folder, tmp_path / "model")
    if model_type:
        config = {"model_type": model_type, "vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0}
        (tmp_path / "model/config.json").write_text(json.dumps(config))
    auto = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (auto.eos_token_id, auto.pad_token_id, len(auto)) == (tokenizer.eos_id, tokenizer.pad_id, VOCAB)
    assert list(auto("a")) == ["input_ids", "attention_mask"]
    assert auto.clean_up_tokenization_spaces is False
    for text in VARIED:
        ids = tokenizer.encode(text)
        assert auto(text, split_special_tokens=True)["input_ids"] == ids
        assert auto.decode(ids) == text
        if EOS not in text:
            assert auto(text)["input_ids"] == ids
    auto.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert [again(text)["input_ids"] for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_the_saved_settings(folder: Path, tokenizer: TextTokenizer) -> None:
    assert json.loads((folder / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": int(1e30),
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }


@pytest.mark.parametrize("kind", KINDS)
def test_training_does_not_depend_on_the_order_of_texts(repository: Path, tmp_path: Path, kind: str) -> None:
    """On more text: with a few lines SentencePiece's sums come out alike in any order."""
    texts = [path.read_text("utf-8") for path in sorted(repository.glob("gloria/data/sample/*/*.txt"))]
    fingerprints = set()
    for seed in range(3):
        random.Random(seed).shuffle(texts)
        config = TokenizerConfig(kind=kind, vocab_size=600)
        fingerprints.add(train_tokenizer(config, texts, tmp_path).fingerprint)
    assert len(fingerprints) == 1


def test_training_does_not_depend_on_threads(folders, tmp_path: Path) -> None:
    """In processes of their own, since a process starts its threads once."""
    script = (
        "import json, sys; from gloria.data.tokenizer import *\n"
        "kind, vocab, folder, texts = json.load(sys.stdin)\n"
        "train_tokenizer(TokenizerConfig(kind=kind, vocab_size=vocab), texts, folder)\n"
    )
    for kind in KINDS:
        for threads in (1, 3):
            out = tmp_path / f"{kind}-{threads}"
            environment = {
                **os.environ,
                "RAYON_NUM_THREADS": str(threads),
                "OMP_NUM_THREADS": str(threads),
                "TOKENIZERS_PARALLELISM": str(threads > 1).lower(),
                "PYTHONHASHSEED": str(threads),
            }
            arguments = json.dumps([kind, VOCAB, str(out), TEXTS])
            command = [sys.executable, "-c", script]
            subprocess.run(command, input=arguments, text=True, env=environment, check=True)
            assert (out / "tokenizer.json").read_bytes() == (folders[kind] / "tokenizer.json").read_bytes()


def test_a_small_sample_makes_a_smaller_bpe_and_is_reported(tmp_path: Path, capsys) -> None:
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=2000), SENTENCES, tmp_path)
    assert tokenizer.vocab_size < 2000
    assert capsys.readouterr().err == (
        f"warning: tokenizer.vocab_size: {tokenizer.vocab_size} tokens instead of 2000; "
        "the texts have no more to merge\n"
    )


def test_a_vocabulary_that_sentencepiece_cannot_fill(tmp_path: Path) -> None:
    config = TokenizerConfig(kind="sentencepiece", vocab_size=5000)
    assert error_of(train_tokenizer, config, SENTENCES, tmp_path / "out").startswith(
        "tokenizer.vocab_size: 5000 does not suit the texts (Vocabulary size too high (4998). "
        "Please set it to a value <= "
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_no_text(tmp_path: Path, kind: str) -> None:
    expected = "tokenizer: there is no text to train on; check sources and tokenizer.sample_bytes"
    assert error_of(train_tokenizer, TokenizerConfig(kind=kind), [], tmp_path) == expected


def test_truncation_and_padding_of_a_foreign_file_are_off(folders, tmp_path: Path) -> None:
    """Else every document would end after the first `max_length` tokens."""
    shutil.copytree(folders["bpe"], tmp_path, dirs_exist_ok=True)
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    backend.save(str(tmp_path / "tokenizer.json"))
    whole = load_tokenizer(folders["bpe"])
    assert load_tokenizer(tmp_path).encode(TEXTS[0]) == whole.encode(TEXTS[0])
    assert load_tokenizer(tmp_path).encode("a") == whole.encode("a")


def test_import_copies_a_folder_with_its_fingerprint(folder: Path, tokenizer, tmp_path: Path, capsys) -> None:
    (tmp_path / "source").mkdir()
    shutil.copy(folder / "tokenizer.json", tmp_path / "source")
    config = {
        "eos_token": {"__type": "AddedToken", "content": EOS},
        "pad_token": PAD,
        "tokenizer_class": "LlamaTokenizer",
        "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]},
    }
    (tmp_path / "source/tokenizer_config.json").write_text(json.dumps(config))
    imported = import_tokenizer(str(tmp_path / "source"), tmp_path / "out")
    assert imported.fingerprint == tokenizer.fingerprint
    assert (imported.eos_id, imported.pad_id) == (tokenizer.eos_id, tokenizer.pad_id)
    assert "auto_map" not in (tmp_path / "out/tokenizer_config.json").read_text()
    auto = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [auto(text)["input_ids"] for text in TEXTS] == [imported.encode(text) for text in TEXTS]
    assert capsys.readouterr().err == ""


def test_import_without_a_pad_token_is_reported(folders, tmp_path: Path, capsys) -> None:
    source = tmp_path / "source"
    shutil.copytree(folders["bpe"], source)
    (source / "tokenizer_config.json").unlink()
    (source / "special_tokens_map.json").write_text(json.dumps({"eos_token": EOS}))
    assert import_tokenizer(str(source), tmp_path / "out").pad_id is None
    assert capsys.readouterr().err == (
        f"warning: {source}: this tokenizer has no pad token and gets none; pre-training pads nothing\n"
    )


def test_import_converts_gpt2s_own_files(folders, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    values = json.loads((folders["bpe"] / "tokenizer.json").read_text())
    (source / "vocab.json").write_text(json.dumps(values["model"]["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in values["model"]["merges"])
    (source / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    imported, trained = import_tokenizer(str(source), tmp_path / "out"), load_tokenizer(folders["bpe"])
    assert imported.eos_id == trained.eos_id
    assert [imported.encode(text) for text in VARIED] == [trained.encode(text) for text in VARIED]


def word_tokenizer(folder: Path, config: dict) -> None:
    """A foreign tokenizer: whole words, a special token of its own, and an added one that is none."""
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2, "</s>": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["</s>"])
    backend.add_tokens(["  "])
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_foreign_tokenizer_keeps_its_ids(tmp_path: Path) -> None:
    word_tokenizer(tmp_path / "source", {"eos_token": "</s>", "pad_token": "[UNK]"})
    imported = import_tokenizer(str(tmp_path / "source"), tmp_path / "out")
    assert (imported.eos_id, imported.pad_id, imported.vocab_size) == (3, 2, 5)
    assert imported.encode("a  b") == [0, 4, 1]


def test_an_eos_that_texts_can_spell_is_reported(tmp_path: Path, capsys) -> None:
    """Unigram tokenizers of others have it among their pieces, where no setting keeps texts from it."""
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0)], unk_id=0))
    backend.add_special_tokens(["</s>"])
    source = tmp_path / "source"
    source.mkdir()
    backend.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "<unk>"}))
    assert import_tokenizer(str(source), tmp_path / "out").encode("a</s>") == [2, 1]
    assert capsys.readouterr().err == (
        f'warning: {source}: to this tokenizer a "</s>" in a text is EOS; there a document counts as two\n'
    )


def test_errors_of_a_folder(folders, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere/tokenizer.json"
    assert error_of(load_tokenizer, missing.parent) == (
        f"{missing}: no such file; a tokenizer's folder has a tokenizer.json"
    )
    assert error_of(import_tokenizer, str(missing.parent), tmp_path / "out") == (
        f"{missing.parent}: no such folder; tokenizer.path is a Hugging Face folder or a name"
    )
    word_tokenizer(tmp_path / "no-eos", {"pad_token": "[UNK]"})
    assert error_of(import_tokenizer, str(tmp_path / "no-eos"), tmp_path / "out") == (
        f'{tmp_path}/no-eos/tokenizer_config.json: names no "eos_token"; documents end with it, so name one there'
    )
    word_tokenizer(tmp_path / "other-eos", {"eos_token": "<eos>"})
    assert error_of(import_tokenizer, str(tmp_path / "other-eos"), tmp_path / "out") == (
        f'{tmp_path}/other-eos: its eos_token "<eos>" is not in tokenizer.json; save the tokenizer again'
    )
    broken = tmp_path / "broken"
    shutil.copytree(folders["bpe"], broken)
    (broken / "tokenizer_config.json").write_text("{")
    assert error_of(load_tokenizer, broken) == (
        f"{broken}/tokenizer_config.json: is not valid JSON (Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1)); save the tokenizer again"
    )
    (broken / "tokenizer_config.json").write_text("[]")
    assert error_of(load_tokenizer, broken) == (
        f"{broken}/tokenizer_config.json: is not a JSON object; save the tokenizer again"
    )
    (broken / "tokenizer.json").write_text("{}")
    assert error_of(load_tokenizer, broken).startswith(f"{broken}/tokenizer.json: is no tokenizer (")
    assert not (tmp_path / "out").exists()


def test_a_folder_or_name_that_is_no_tokenizer(tmp_path: Path) -> None:
    for name in (str(tmp_path), "ninguem/tokenizer-que-nao-existe"):
        line = error_of(import_tokenizer, name, tmp_path / "out")
        assert line.startswith(f"{name}: no tokenizer that can be loaded (")
        assert "\n" not in line
    assert not (tmp_path / "out").exists()
