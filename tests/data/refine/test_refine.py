"""Prevents: cleaned text that depends on workers or on a kill, a re-run that does everything again or misses a change,
lost documents, a corpus of text that is not the recipe's, and mistakes that end in a traceback."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from gloria import prepare, refine
from gloria.data.corpus import open_corpus
from gloria.errors import run_command
from tests.data.refine.conftest import SAMPLE, Cleaned, sample_texts, write_lines, write_recipe
from tests.launch import wait_until

# Rules that cost no word tokeniser (5 s to import): what is tested here is the machine.
RULES = '[refine]\npreset = "none"\n[dedup]\nscope = "all"\n[pii]\n'


def two_sources(folder: Path) -> Path:
    """Two sources: the second repeats a third of the first with a word changed."""
    texts = sample_texts("enciclopedia") + sample_texts("dialogos")
    write_lines(folder / "um.jsonl", texts)
    changed = [f"{text} Fim." for text in texts[::3]]
    write_lines(folder / "dois.jsonl", [*changed, *sample_texts("cartas"), "Escreva a rui.sa@exemplo.pt ou 8.8.8.8."])
    return write_recipe(folder, {"um": "", "dois": ""}, RULES)


def test_any_number_of_workers_and_a_second_launch_make_the_same_text(tmp_path: Path, capsys) -> None:
    recipe = two_sources(tmp_path)
    one = Cleaned(recipe, tmp_path / "one")
    two = Cleaned(recipe, tmp_path / "two", "--workers", "2")
    assert (one.status, two.status) == (0, 0)
    assert one.bytes() == two.bytes()
    assert one.texts("um") == [json.loads(line)["text"].strip() for line in (tmp_path / "um.jsonl").open()]
    # The first in the recipe's order stays, and what it stands for is dropped from the second source.
    assert one.dropped("dois") == {"near-duplicates: near-duplicate": 9}
    assert one.report["near_duplicates"] == {"dois": {"um": 9}}
    assert one.texts("dois")[-1] == "Escreva a <EMAIL> ou <IP>."
    capsys.readouterr()
    assert Cleaned(recipe, tmp_path / "one").status == 0
    assert f"{tmp_path}/one: was complete" in capsys.readouterr().out
    # One more document in one source: the other is not read again.
    with (tmp_path / "dois.jsonl").open("a") as file:
        file.write('{"text": "Um texto novo, que ainda não havia."}\n')
    kept = (tmp_path / "one/work/filtered/um/00000.jsonl.zst").stat().st_mtime_ns
    again = Cleaned(recipe, tmp_path / "one")
    assert again.texts("dois")[-1] == "Um texto novo, que ainda não havia."
    assert (tmp_path / "one/work/filtered/um/00000.jsonl.zst").stat().st_mtime_ns == kept


def test_a_killed_launch_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    recipe = two_sources(tmp_path)
    (tmp_path / "slow.py").write_text("import time\ndef f(text, metadata):\n    time.sleep(0.05)\n")
    recipe.write_text(recipe.read_text().replace('paths = ["dois', 'filter = "slow.py:f"\npaths = ["dois'))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "gloria.refine", str(recipe), "--out", str(out), "--workers", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: (out / "work/records/clean/00000.json").exists())  # the second source has begun
        os.kill(process.pid, signal.SIGKILL)
    assert not (out / "manifest.json").exists()
    whole = f"import sys; from gloria import refine; refine.main({[*command[3:4], '--out', str(tmp_path / 'whole')]})"
    subprocess.run([sys.executable, "-c", f"{whole}; assert 'torch' not in sys.modules"], check=True)
    assert Cleaned(recipe, out).bytes() == Cleaned(recipe, tmp_path / "whole").bytes()


def test_prepare_reads_what_was_cleaned_for_its_recipe(tmp_path: Path, monkeypatch, capsys) -> None:
    recipe = two_sources(tmp_path)
    recipe.write_text(recipe.read_text() + '[decontaminate]\ntasks = {calame = "{gloria}/tasks/sample/calame"}\n')
    example = json.loads((SAMPLE.parents[1] / "tasks/sample/calame/calamept_all.jsonl").read_text().splitlines()[3])
    with (tmp_path / "um.jsonl").open("a") as file:
        file.write(json.dumps({"text": f"Leu-se: {example['sentence']} {example['last_word']}! E nada mais."}) + "\n")
    monkeypatch.chdir(tmp_path)
    flags = [str(recipe), "--workers", "1"]
    assert run_command(prepare.main, flags) == 2
    missing = "data/refined: holds no cleaned text, and the recipe has [refine]"
    assert capsys.readouterr().err == f"error: {missing}; run python -m gloria.refine {recipe}\n"
    cleaned = Cleaned(recipe, Path("data/refined"))
    assert run_command(prepare.main, flags) == 0
    corpus = open_corpus(Path("data/corpus"))
    assert [source.counts["read"] for source in corpus.manifest.sources] == [
        len(cleaned.texts(n)) for n in ("um", "dois")
    ]
    # What evaluation data the text held is known to all who read the corpus.
    assert corpus.manifest.recipe["contamination"] == {"calame": {"texts": 44, "short": 0, "documents": 1}}
    assert cleaned.dropped("um")["evaluation data: holds calame"] == 1
    assert run_command(prepare.main, flags) == 0
    with (tmp_path / "um.jsonl").open("a") as file:
        file.write('{"text": "mais um"}\n')
    capsys.readouterr()
    assert run_command(prepare.main, flags) == 2
    assert "data/refined: is of another recipe, or its sources have changed" in capsys.readouterr().err


def test_the_commands_of_the_page_run(tmp_path: Path, monkeypatch, capsys) -> None:
    """docs/refine.md: its recipe and its commands, on files as the recipe names them."""
    page = (SAMPLE.parents[2] / "docs/refine.md").read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.toml").write_text(page.partition("```toml\n")[2].partition("```")[0].replace("50_257", "512"))
    (tmp_path / "raw/web").mkdir(parents=True)
    (tmp_path / "raw/debates").mkdir()
    rows = [{"text": text, "url": f"https://a{n % 3}.pt/"} for n, text in enumerate(sample_texts("enciclopedia"))]
    lines = "".join(json.dumps(row) + "\n" for row in [*rows, {"text": rows[0]["text"], "url": "http://a.com/x.pt"}])
    (tmp_path / "raw/web/1.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    write_lines(tmp_path / "raw/debates/1.jsonl", sample_texts("parlamento"))
    commands = re.findall(r"^python -m gloria\.(\w+) (corpus\.toml.*)$", page, re.M)
    assert [name for name, _ in commands] == ["refine", "prepare"]
    for name, arguments in commands:
        module = {"refine": refine, "prepare": prepare}[name]
        assert run_command(module.main, [*arguments.split(), "--workers", "1"]) == 0
    steps = json.loads((tmp_path / "data/refined/report.json").read_text())["sources"]["web"]["steps"]
    assert steps["host"]["dropped"]["not on .pt"]["documents"] == 1
    assert {"[dedup]", "[[source]]", "[executor]", "[variety]"} <= set(help_sections(capsys))


def help_sections(capsys) -> list[str]:
    """The sections that `python -m gloria.refine --help` lists."""
    capsys.readouterr()
    with pytest.raises(SystemExit):
        refine.main(["--help"])
    return [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("[")]


def test_no_document_is_lost_at_a_bad_byte(tmp_path: Path, capsys) -> None:
    """datatrove's own reader leaves the rest of a file out behind one, without a count."""
    write_lines(tmp_path / "um.jsonl", [f"O documento número {number}." for number in range(3000)])
    data = (tmp_path / "um.jsonl").read_bytes().replace("número 7.".encode(), b"n\xfamero 7.")
    (tmp_path / "um.jsonl").write_bytes(data)
    cleaned = Cleaned(write_recipe(tmp_path, {"um": ""}, '[refine]\npreset = "none"\n'), tmp_path / "out")
    assert len(cleaned.texts("um")) == 2999
    assert cleaned.report["sources"]["um"]["malformed"] == 1
    assert "1 malformed documents are left out: " in (err := capsys.readouterr().err)
    assert f"{tmp_path}/um.jsonl:8 (not UTF-8)" in err


NEEDLESS = "has no effect without a [refine] section; add it or remove this"
KINDS = 'unknown value "slrm"; did you mean "slurm"? One of "local", "slurm", "ray"'


def test_damaged_inputs_end_in_a_line_and_what_was_made_is_kept(tmp_path: Path, capsys) -> None:
    """Cut gzip and Zstandard, HTML in place of JSON; then the file is whole, and the other source is not read again."""
    write_lines(tmp_path / "um.jsonl", sample_texts("cartas"))
    whole = (tmp_path / "um.jsonl").read_bytes()
    recipe = write_recipe(tmp_path, {"um": "", "dois": ""}, '[refine]\npreset = "none"\n')
    text = recipe.read_text()
    damaged = {
        "d.jsonl.gz": (gzip.compress(whole)[:-30], f"{tmp_path}/d.jsonl.gz: is no whole .gz file ("),
        "d.jsonl.zst": (zstandard.compress(whole)[:-30], f"{tmp_path}/d.jsonl.zst: is no whole .zst file ("),
        "d.json": (b"<html>" + b"\n<p>x" * 40, 'source "dois": 41 of 41 documents are malformed, over max_malformed'),
    }
    for name, (data, what) in damaged.items():
        (tmp_path / name).write_bytes(data)
        recipe.write_text(text.replace("dois.jsonl", name))
        capsys.readouterr()
        assert Cleaned(recipe, tmp_path / "out").status == 2
        kept, error = capsys.readouterr().err.splitlines()
        assert kept == f"{tmp_path}/out: holds what is finished; the same command goes on"
        assert error.startswith(f"error: {what}")
    kept = (tmp_path / "out/um/00000.jsonl.zst").stat().st_mtime_ns
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(whole))
    recipe.write_text(text.replace("dois.jsonl", "d.jsonl.gz"))
    cleaned = Cleaned(recipe, tmp_path / "out")
    assert cleaned.texts("dois") == cleaned.texts("um") != []
    assert (tmp_path / "out/um/00000.jsonl.zst").stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    ("keys", "sections", "what"),
    [
        ("", "", "has no [refine] section, so its text is not cleaned; add one, or run gloria.prepare"),
        ('preset = "bloom"', "[refine]", 'source[0].preset: bloom: unknown preset; did you mean "bloom-pt"?'),
        (
            'domain = ".pt"',
            "[refine]",
            "source[0].domain: needs url_field, the key or column that holds a page's address; add it",
        ),
        ("report_only = true", "", f"source[0].report_only: {NEEDLESS}"),
        ("", "[pii]", f"pii: {NEEDLESS}"),
        ("limits.min_word = 3", "[refine]", 'source[0].limits.min_word: unknown key; did you mean "min_words"?'),
        (
            "limits.dup_n_grams = {a = 1}",
            "[refine]",
            'source[0].limits.dup_n_grams: "a" is no number of words; write for example {5 = 0.15}',
        ),
        ("", '[refine]\n[executor]\nkind = "slrm"', f"executor.kind: {KINDS}"),
        ("", "[refine]\n[decontaminate]", "decontaminate: names no tasks and no files; name some, or remove it"),
    ],
)
def test_mistakes(tmp_path: Path, capsys, keys: str, sections: str, what: str) -> None:
    write_lines(tmp_path / "um.jsonl", ["Um texto."])
    recipe = write_recipe(tmp_path, {"um": keys}, sections)
    assert Cleaned(recipe, tmp_path / "out").status == 2
    assert capsys.readouterr().err == f"error: {recipe}: {what}\n"


def test_a_missing_extra_is_named(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("gloria.refine.EXTRA", ("datatrove", "no_such_package"))
    write_lines(tmp_path / "um.jsonl", ["Um texto."])
    assert Cleaned(write_recipe(tmp_path, {"um": ""}, "[refine]"), tmp_path / "out").status == 2
    what = "gloria.refine: needs the extra \"data\" (no_such_package missing); pip install 'gloria[data]'"
    assert capsys.readouterr().err == f"error: {what}\n"
