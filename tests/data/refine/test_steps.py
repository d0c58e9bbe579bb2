"""Prevents: presets that aren't the published values, a library filter that is passed wrong values, and each mistake of
the original scripts: `.pt` anywhere in an address, "Publicado" cut to "licado", filters before encodings are repaired,
everyday words taken for bad ones, a split that depends on PYTHONHASHSEED.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.data.refine.conftest import Cleaned, sample_texts, write_lines, write_recipe

datatrove = pytest.importorskip("datatrove", reason='needs the extra "data"')

from datatrove.data import Document  # noqa: E402
from datatrove.pipeline.decont import NGramsDecontFilter  # noqa: E402
from datatrove.pipeline.dedup import MinhashDedupSignature  # noqa: E402
from datatrove.pipeline.filters import FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter  # noqa: E402

from gloria.data.refine import steps as ours  # noqa: E402
from gloria.data.refine.bloom import BloomRules, character_repetition, cut_long_words, word_repetition  # noqa: E402
from gloria.data.refine.config import DecontaminateConfig, DedupConfig, Limits, PiiConfig  # noqa: E402
from gloria.data.refine.decontaminate import contamination_filter, make_index  # noqa: E402
from gloria.data.refine.dedup import minhash_config, signature_step  # noqa: E402
from gloria.data.refine.kinds import KINDS  # noqa: E402
from gloria.data.refine.presets import PRESETS  # noqa: E402
from gloria.data.refine.private import is_iban, is_nif, replace_private  # noqa: E402
from gloria.data.refine.records import Record  # noqa: E402
from gloria.data.refine.words import load_words  # noqa: E402


def document(text: str, **fields: str) -> Document:
    return Document(text, "id", metadata={"fields": fields, "notes": {}})


def noisy_texts(count: int) -> list[str]:
    """Texts of every quality: of lines that repeat, of symbols, without punctuation, short and long."""
    choose = random.Random(7)
    lines = [
        line for text in sample_texts("enciclopedia") + sample_texts("dialogos") for line in text.splitlines() if line
    ]
    lines += ["#" * 9, "• ponto", "e mais...", "1 2 3 4 5", "Clique aqui", "Clique aqui", "de a e o em do da"]
    return ["\n".join(choose.choices(lines, k=choose.randint(1, 12))) * choose.choice((1, 1, 3)) for _ in range(count)]


def test_quality_filters_are_datatroves_with_the_published_values() -> None:
    """FineWeb-2's por_Latn.yml, written out once more as datatrove's own arguments."""
    load_words()
    stop_words = ["de", "a", "e", "o", "em", "do", "da", "que", "um", "no", "uma", "com", "para", "na", "é", "foi"]
    theirs = [
        GopherRepetitionFilter(
            dup_line_frac=0.287,
            dup_para_frac=0,
            dup_line_char_frac=0,
            dup_para_char_frac=0,
            top_n_grams=((2, 0.371), (3, 0.191), (4, 0.163)),
            dup_n_grams=((5, 0.163), (6, 0.153), (7, 0.141), (8, 0.130), (9, 0.119), (10, 0.108)),
            language="por",
        ),
        FineWebQualityFilter(
            line_punct_thr=0.077, short_line_thr=999, char_duplicates_ratio=0.1, new_line_ratio=0.186, language="por"
        ),
        GopherQualityFilter(
            min_avg_word_length=3,
            max_avg_word_length=13,
            max_non_alpha_words_ratio=0.814,
            min_stop_words=2,
            stop_words=stop_words,
            language="por",
        ),
    ]
    steps = ours.quality_steps(PRESETS["fineweb2-por"])
    seen = set()
    for text in noisy_texts(150):
        for step, filter in zip(steps, theirs, strict=True):
            expected = filter.filter(Document(text, "id"))
            reason = "" if expected is True else expected[1]
            assert step.apply(document(text)) == reason
            seen.add(reason)
    assert len(seen) > 8
    assert ours.quality_steps(Limits()) == []
    assert [step.name for step in ours.quality_steps(Limits(min_words=3))] == ["gopher"]


def test_limits_go_over_the_preset_and_0_is_off() -> None:
    limits = Limits(min_words=0, max_new_lines=0.5).over(PRESETS["amalia-arquivo"])
    assert (limits.min_words, limits.max_new_lines, limits.min_line_punct) == (0, 0.5, 0.077)
    short = document("Passou para uma casa da montanha.")
    assert PRESETS["amalia-arquivo"].min_words == 15
    assert [step.apply(short) for step in ours.quality_steps(limits) if step.name == "gopher"] == [""]


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("https://www.publico.pt/2020/x", True),
        ("http://PUBLICO.PT.:80/", True),
        ("publico.pt/x", True),
        ("http://www.ptt.cc/a", False),
        ("http://example.com/x.ptx", False),
        ("http://example.com/a.pt", False),
        ("http://notpt/", False),
        (3, False),
    ],
)
def test_a_domain_is_the_end_of_the_host(url: object, kept: bool) -> None:
    assert ours.is_on_host(url, ".pt") == kept


def test_encodings_are_repaired_before_anything_is_judged_and_quotes_stay() -> None:
    repair = ours.repair_encoding()
    right = "A ação “começou” à tarde, na estação de São João; não há pão."
    for wrong in (right.encode().decode("cp1252", "ignore"), right):
        found = document(wrong if wrong == right else "A aÃ§Ã£o comeÃ§ou Ã\xa0 tarde")
        repair(found)
        assert found.text == (right if wrong == right else "A ação começou à tarde")
    record = Record()
    names = [step.name for step in ours.build_steps(_config(rules="news"), PRESETS["fineweb2-por"], True, None, record)]
    assert names == ["size", "encoding", "language", "kind: news", "repetition", "fineweb", "gopher"]


def _config(**keys: str):
    from gloria.data.prepare.recipe import SourceConfig

    return SourceConfig(name="um", paths=["um.jsonl"], **keys)


def test_language_is_identified_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", None)
    record = Record()
    keep = ours.language_filter("pt", 0.65, record)
    texts = {
        "O comboio para Coimbra parte às oito da manhã, e a viagem demora menos de duas horas.": "",
        "El tren para Sevilla sale a las ocho de la mañana y el viaje dura menos de dos horas.": "is es",
        "The train to London leaves at eight in the morning and takes less than two hours.": "is en",
    }
    assert {text: keep(document(text)) for text in texts} == texts
    assert record.histograms["language"] == {"pt": 1, "es": 1, "en": 1}


def test_what_is_cut_out_of_texts_of_a_kind() -> None:
    assert (
        KINDS["subtitles"].cut("12\n00:01 --> 00:02\n- Olá, <i>bom</i> dia.\n[PORTA]\nLegendas por: Zé\n♪")
        == "- Olá, bom dia."
    )
    assert KINDS["wiki"].cut("Lisboa[1] é a capital.\n\n== Referências ==\nAutor, 1990.") == "Lisboa é a capital."
    assert (
        KINDS["parliament"].cut("O Orador: - Sim.\nAplausos do PS.\nVozes do PSD: - Muito bem!") == "O Orador: - Sim."
    )
    # "^Pub" of the original made "licado" of this, and its list of bad words dropped the queue and the bread.
    news = "Publicada em livro, a obra vendeu bem.\nPartilhar\nPublicado a 3 de maio\nA bicha para a pita crescia."
    assert KINDS["news"].cut(news) == "Publicada em livro, a obra vendeu bem.\nA bicha para a pita crescia."


def test_bloom_rules() -> None:
    rules = BloomRules(PRESETS["bloom-pt"])
    good = sample_texts("enciclopedia")[0]
    assert rules.reason(good) == ""
    assert rules.reason("casa mesa livro árvore " * 3) == "stop_word_ratio"
    assert rules.reason("a de o 12 345 678 910 1112 ! ! ! 1314 1516") == "special_characters"
    assert rules.reason("é o que ele me disse a mim. " * 60) in ("word_repetition", "char_repetition")
    # Two runs of ten characters once each; four of five words, two of them the same.
    assert character_repetition("abcdefghijk") == 0.0
    assert word_repetition(["a", "b", "c", "d", "e", "a", "b", "c", "d", "e"]) == pytest.approx(2 / 6)
    assert cut_long_words("ver www.x.pt ou\nanticonstitucionalissimamente sim", 19) == "ver ou\nsim"
    flagged = BloomRules(Limits(max_flagged_ratio=0.1, flagged_words=["Feio"]))
    assert flagged.reason("um dia feio, muito feio") == "flagged_ratio"


def test_evaluation_data_is_found_as_datatrove_finds_it_and_when_it_is_short(tmp_path: Path) -> None:
    long = "Naquela tarde de inverno o velho pescador voltou ao cais com as redes vazias e o coração cheio."
    short = "A raposa saltou por cima do muro alto."
    texts = {"calame": [long, short, "É curto."], "files": [long]}
    counts = make_index(texts, DecontaminateConfig(), tmp_path / "index.npz")
    assert counts["calame"] == {"texts": 3, "short": 1}
    record = Record()
    find = contamination_filter(tmp_path / "index.npz", DecontaminateConfig(), record)
    hidden = f"Era uma vez. {long.upper().replace(',', '')} E foi assim."
    assert find(document(hidden)) == "holds calame"
    assert find(document(f"Diz-se que {short} Foi ontem.")) == "holds calame"
    assert find(document("Naquela tarde de inverno o velho pescador voltou ao cais com outra coisa.")) == ""
    assert find(document("É curto. A raposa saltou por cima.")) == ""
    assert record.histograms["contaminated"] == {"calame": 2}
    # The same runs of 12 words as in datatrove's filter, whose index wants lighteval.
    library = NGramsDecontFilter(str(tmp_path), language="por")
    words = library.tokenizer.word_tokenize("naquela tarde de inverno o velho pescador voltou ao cais com as")
    library._index_hashes = {library.hash_func(" ".join(words)): "calame"}
    assert library.filter(Document(hidden, "id")) == (False, "contaminated")


def test_personal_data_are_replaced_by_their_check_digits() -> None:
    replace = replace_private(PiiConfig(nif=True, iban=True, phone=True))
    found = document(
        "Rui (rui.sa@exemplo.pt, 8.8.8.8 e 192.168.1.1), NIF 123456789 e não 123456788, "
        "IBAN PT50 0002 0123 1234 5678 9015 4, tel. +351 912 345 678 ou 21 234 56 78; 2,912345678 e 1.234.567.890 "
        "euros."
    )
    replace(found)
    assert found.text == (
        "Rui (<EMAIL>, <IP> e 192.168.1.1), NIF <NIF> e não 123456788, "
        "IBAN <IBAN>, tel. <PHONE> ou <PHONE>; 2,912345678 e 1.234.567.890 euros."
    )
    assert is_nif("123456789")
    assert is_iban("GB82 WEST 1234 5698 7654 32")
    assert not is_iban("GB83 WEST 1234 5698 7654 32")


def test_rehydration_keeps_the_first_of_a_cluster(tmp_path: Path) -> None:
    load_words()
    text = sample_texts("cartas")[0]
    write_lines(tmp_path / "um.jsonl", [f"{text} Número {number}." for number in range(6)] + ["Outro texto, só um."])
    sections = '[refine]\npreset = "none"\n[dedup]\nrehydrate = {1 = 1, 2 = 2, 6 = 3, 7 = 1}\n'
    cleaned = Cleaned(write_recipe(tmp_path, {"um": ""}, sections), tmp_path / "out")
    assert [text[-9:] for text in cleaned.texts("um")] == ["Número 0.", "Número 1.", "Número 2.", "o, só um."]
    assert [row["notes"].get("near_duplicates") for row in cleaned.rows("um")] == [6, 6, 6, None]
    library = MinhashDedupSignature(str(tmp_path / "sig"), minhash_config(DedupConfig()), "por")
    assert (library.num_hashes, library.config.n_grams) == (112, 5)
    own = signature_step(str(tmp_path / "sig"), DedupConfig())
    for text in sample_texts("enciclopedia"):
        shingles = own.get_shingles(text)
        assert own.get_signature(shingles) == library.get_signature(library.get_shingles(text))


def test_varieties_are_told_apart_by_spelling_and_grammar_not_by_names(tmp_path: Path) -> None:
    choose = random.Random(3)
    towns = ["Lisboa", "Recife", "Porto", "Santos"]
    forms = {
        "pt": [
            "O autocarro está a chegar à paragem",
            "De facto, ele disse-me que está a ler",
            "Ligaste-lhe do telemóvel?",
        ],
        "br": [
            "O ônibus está chegando ao ponto",
            "De fato, ele me disse que está lendo",
            "Você ligou para ele do celular?",
        ],
    }
    for name, sentences in forms.items():
        texts = [
            " ".join(f"{choose.choice(sentences)} em {choose.choice(towns)}." for _ in range(9)) for _ in range(40)
        ]
        write_lines(tmp_path / f"{name}.jsonl", texts[10:])
        write_lines(tmp_path / f"{name}-new.jsonl", texts[:10])
    sections = '[refine]\npreset = "none"\n[variety]\neuropean = ["pt.jsonl"]\nbrazilian = ["br.jsonl"]\n'
    recipe = write_recipe(tmp_path, {"pt-new": 'variety = "pt-PT"', "br-new": 'variety = "pt-PT"'}, sections)
    cleaned = Cleaned(recipe, tmp_path / "out")
    assert cleaned.status == 2  # nothing is left of one source, and the report says why
    assert cleaned.dropped("br-new") == {"variety: is pt-BR": 10}
    assert len(cleaned.texts("pt-new")) == 10
    assert cleaned.report["sources"]["pt-new"]["histograms"]["variety"] == {"pt-PT": 10}


def test_report_only_counts_and_keeps(tmp_path: Path) -> None:
    write_lines(tmp_path / "um.jsonl", [{"text": "One two three.", "url": "http://a.com/x.pt"}, {"text": "!!"}])
    keys = 'url_field = "url"\ndomain = ".pt"\nreport_only = true\n'
    cleaned = Cleaned(write_recipe(tmp_path, {"um": keys}, '[refine]\npreset = "none"\n'), tmp_path / "out")
    assert cleaned.texts("um") == ["One two three.", "!!"]
    assert cleaned.dropped("um") == {"size: empty": 1, "host: no url": 1, "host: not on .pt": 1}
    page = (tmp_path / "out/report.html").read_text()
    assert "not on .pt" in page
    assert "One two three." in page
