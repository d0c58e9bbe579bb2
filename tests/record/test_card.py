"""Prevents: a model card that the hub refuses, that says what nobody has recorded, or that takes a user's own away."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from gloria.data.corpus import read_manifest, write_manifest
from gloria.errors import run_command
from gloria.export import main as export
from gloria.prepare import main as prepare
from gloria.pretrain import main as pretrain
from gloria.record.card import UNKNOWN, finetuned_card
from gloria.record.facts import CardFacts
from tests.launch import SMALL, flags, metrics

FACTS = """
name = "Pequena"
authors = ["Grupo de Línguas", "Uma | Faculdade"]
licence = "CC-BY-4.0"
language = ["pt"]
contact = "grupo@exemplo.pt"
datasets = ["grupo/textos"]
citation = "@misc{pequena}"
"""
TOLD = {"enciclopedia": {"origin": "escrita para isto", "licence": "CC0-1.0", "description": "Artigos curtos."}}
SCORE = {"value": 0.25, "low": 0.125, "high": 0.5, "n": 8}


@pytest.fixture(scope="module")
def run(sample_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two launches, on a corpus that says where its text comes from, with scores of its last checkpoint."""
    folder = tmp_path_factory.mktemp("card")
    corpus = shutil.copytree(sample_corpus, folder / "corpus")
    manifest = read_manifest(corpus)
    contamination = {"calame": {"documents": 3, "texts": 2076}}
    write_manifest(corpus, replace(manifest, recipe={**manifest.recipe, "about": TOLD, "contamination": contamination}))
    recipe = {"config": Path(__file__).parents[2] / "launch/demo.toml", "data.corpus": corpus, **SMALL}
    for steps in (4, 8):
        assert pretrain(flags(recipe | {"run.dir": folder / "run", "train.steps": steps})) == 0
    saved = json.loads((folder / "run/checkpoints/step-00000008/manifest.json").read_text())
    record = {"task": "calame", "split": "test", "method": "generation", "rule": "paper", "scores": {"exact": SCORE}}
    about = {"step": 8, "launch": saved["launch"], "saved_at": saved["saved_at"], "part": "1/1"}
    lines = [{**about, **record}, {**about, **record, "launch": "another", "scores": {"other": SCORE}}]
    (folder / "run/scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "run"


def row(text: str, key: str) -> str:
    (found,) = [line for line in text.splitlines() if line.startswith(f"| {key} |")]
    return found


def test_the_card_of_a_run_is_valid_and_says_what_was_recorded(run, tmp_path):
    (tmp_path / "facts.toml").write_text(FACTS)
    assert export(["--run", str(run), "--out", str(tmp_path / "m"), "--card", str(tmp_path / "facts.toml")]) == 0
    card = ModelCard.load(tmp_path / "m/README.md")
    known = {"license": "cc-by-4.0", "library_name": "transformers", "pipeline_tag": "text-generation"}
    known |= {"language": ["pt"], "datasets": ["grupo/textos"], "tags": ["gloria", "gpt-neo"]}
    metadata = card.data.to_dict()
    assert {key: metadata[key] for key in known} == known
    assert metadata["model-index"][0]["name"] == "Pequena"
    (result,) = card.data.eval_results
    assert (result.task_type, result.dataset_name, result.dataset_split) == ("text-generation", "calame", "test")
    assert (result.metric_type, result.metric_value) == ("exact", 0.25)
    assert result.metric_name == "exact (95 %: 0.1250 to 0.5000; generation, paper)"
    assert ModelCard(str(card)).data.to_dict() == metadata  # what the hub reads back

    text = card.text
    order = ["## 1. General", "### 1.1 Prov", "### 1.2 Mod", "### 1.3 Tr", "## 2. Data s", "## 3. Data p"]
    order += ["## Training", "## Scores", "## Limits", "## Proof", "## Citation"]
    assert sorted(order, key=text.index) == order
    assert row(text, "Provider") == "| Provider | Grupo de Línguas, Uma \\| Faculdade |"
    last = metrics(run, "train")[-1]
    assert row(text, "Tokens") == f"| Tokens | {last['tokens']:,} |"
    source = last["sources"]["enciclopedia"]
    assert f"| {source['asked']:.4f} | {source['share']:.4f} |" in row(text, "enciclopedia")
    assert row(text, "enciclopedia").endswith(f" {source['epoch']:.3f} |")
    assert "**enciclopedia**. Description: Artigos curtos. Origin: escrita para isto. Licence: CC0-1.0. " in text
    assert f"**cartas**. Description: {UNKNOWN}. Origin: {UNKNOWN}. Licence: {UNKNOWN}." in text
    assert "- calame: 3 documents with one of its 2,076 texts were left out" in text
    assert row(text, "Launches") == "| Launches | 2 |"
    assert row(text, "Hardware").startswith("| Hardware | 1 x ")
    assert "| calame | test | exact | 0.2500 | 95 %: 0.1250 to 0.5000 | 8 | generation, paper |" in text
    assert "2402.12969" in text
    assert "@misc{pequena}" in text
    assert str(run.parent) not in text  # where folders lie on this machine


def test_what_nobody_said_is_not_recorded(run, tmp_path, capsys):
    alone = shutil.copytree(run, tmp_path / "run")
    (alone / "mixture.json").unlink()
    trainer = alone / "checkpoints/step-00000008/trainer.json"
    assert export(["--run", str(alone), "--out", str(tmp_path / "m"), "--step", "4"]) == 0
    assert f"warning: RUN: {alone} has no mixture.json" in capsys.readouterr().err
    card = ModelCard.load(tmp_path / "m/README.md")
    assert trainer.exists()
    assert not {"license", "language", "datasets", "model-index"} & card.data.to_dict().keys()
    for key in ("Provider", "Contact", "Licence", "Languages", "Newest text", "Illegal content", "Time", "Hardware"):
        assert row(card.text, key) == f"| {key} | {UNKNOWN} |"
    assert "Not recorded: this checkpoint was not scored." in card.text


def test_a_fine_tuning_has_a_card_with_its_scores():
    record = {"task": "rte", "split": "dev", "method": "fine-tuned head", "scores": {"accuracy": SCORE}}
    results = {
        "from": "models/base",
        "seed": 3,
        "chosen": {"step": 40},
        "results": [record],
        "recipe": {"data": None, "run": {"dir": "/home/a/runs/b"}},
    }
    card = ModelCard(finetuned_card(CardFacts(), results, "rte", "AutoModelForSequenceClassification", "m"))
    assert card.data.pipeline_tag == "text-classification"
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("rte", "accuracy", 0.25)
    assert "| rte | dev | accuracy | 0.2500 | 95 %: 0.1250 to 0.5000 | 8 | fine-tuned head |" in card.text
    assert 'dir = "b"' in card.text
    assert "`models/base`, whose own card says" in row(card.text, "Based on")


def test_a_licence_that_the_hub_does_not_know_has_a_name():
    data = ModelCard(finetuned_card(CardFacts(licence="Our Own 2"), {}, "rte", "AutoModel", "m")).data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "our-own-2")


def test_a_readme_that_somebody_wrote_stays(run, tmp_path):
    own = shutil.copytree(run, tmp_path / "run")
    (own / "tokenizer/README.md").write_text("o meu\n")
    assert export(["--run", str(own), "--out", str(tmp_path / "m")]) == 0
    assert (tmp_path / "m/README.md").read_text() == "o meu\n"


def test_a_wrong_fact_is_one_line_and_nothing_is_written(run, tmp_path, capsys):
    (tmp_path / "facts.toml").write_text('license = "mit"\n')
    arguments = ["--run", str(run), "--out", str(tmp_path / "m"), "--card", str(tmp_path / "facts.toml")]
    assert run_command(export, arguments) == 2
    assert capsys.readouterr().err == f'error: {tmp_path}/facts.toml: license: unknown key; did you mean "licence"?\n'
    assert not (tmp_path / "m").exists()


def test_transformers_writes_from_the_folder(run, tmp_path):
    from transformers import pipeline

    assert export(["--run", str(run), "--out", str(tmp_path / "m")]) == 0
    (made,) = pipeline("text-generation", str(tmp_path / "m"))("Era uma vez", max_new_tokens=4)
    assert made["generated_text"].startswith("Era uma vez")


def test_origins_are_told_without_making_the_corpus_again(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("Um texto pequeno. " * 200)
    recipe, source = tmp_path / "c.toml", '[[source]]\nname = "a"\npaths = ["a.txt"]\n'
    start = f'out = "{tmp_path}/c"\n[tokenizer]\nvocab_size = 512\n'
    recipe.write_text(start + source)
    assert prepare([str(recipe), "--workers", "1"]) == 0
    assert "about" not in read_manifest(tmp_path / "c").recipe
    shards = [path.stat().st_mtime_ns for path in sorted((tmp_path / "c/a").iterdir())]
    for told in ('origin = "um arquivo"\nlicence = "CC0-1.0"\n', 'origin = "outro"\n', ""):
        recipe.write_text(start + source + told)
        capsys.readouterr()
        assert prepare([str(recipe), "--workers", "1"]) == 0
        assert "origin, licence and description of its sources are written anew" in capsys.readouterr().out
        about = dict(line.split(" = ") for line in told.splitlines())
        expected = {"a": {key: json.loads(value) for key, value in about.items()}} if about else None
        assert read_manifest(tmp_path / "c").recipe.get("about") == expected
    assert prepare([str(recipe), "--workers", "1"]) == 0
    assert "written anew" not in capsys.readouterr().out
    assert shards == [path.stat().st_mtime_ns for path in sorted((tmp_path / "c/a").iterdir())]
