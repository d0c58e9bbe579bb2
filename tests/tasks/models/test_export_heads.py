"""Bugs prevented: an exported model whose logits are others, that reads padding as a text's end, or whose tokenizer
leaves out the separators it was trained with; a folder that is left where nothing could be exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification, AutoTokenizer

import gloria.export
import gloria.tasks.models.export as export
from gloria.errors import run_command
from gloria.tasks.catalog import find_task
from gloria.tasks.examples import Pair, Span
from gloria.tasks.models.backbones import load_model
from gloria.tasks.models.encode import collate, encode_pairs, encode_spans
from gloria.tasks.models.finetuned import FinetunedModel, Inputs, save_finetuned, task_heads
from gloria.tasks.models.heads import LABEL, SCORE, TaskModel, initialise_heads
from tests.tasks.tiny import ENCODERS, FAMILIES, make_folder

PAIRS = [("o gato dorme", "um cão corre na rua"), ("a mesa", "não"), ("sim sim sim sim sim", "a casa grande e branca")]


SHAPES = [(family, 3, None) for family in (*FAMILIES, "roberta", "electra", "distilbert")]
# No pad token, or EOS as one, and no row of the embedding for another.
SHAPES += [(family, 0, pad) for family in ("llama", "opt", "gpt_neo") for pad in (None, "</s>")]


def tuned_folder(family: str, task: str, folder: Path, **shape: Any) -> tuple[FinetunedModel, Path]:
    """A fine-tuned model whose head is random, in memory and as a folder."""
    loaded, about = load_model(str(make_folder(family, folder / "base", **shape))), find_task(task)
    heads = task_heads(about)
    model = TaskModel(loaded.backbone, heads, 0.0).eval()
    initialise_heads(model, 1, 3.0)
    finetuned = FinetunedModel(
        loaded.source, model, loaded.tokenizer, Inputs(task, about.labels, heads, 64, 8, 30, False)
    )
    save_finetuned(finetuned, dict(model.state_dict()), folder / "model", {})
    return finetuned, folder / "model"


@pytest.mark.parametrize("task", ["assin2-entailment", "assin2-similarity", "faquad"])
@pytest.mark.parametrize(("family", "spare", "pad"), SHAPES)
@torch.no_grad()
def test_the_class_of_transformers_gives_our_logits(family, spare, pad, task, tmp_path):
    finetuned, folder = tuned_folder(family, task, tmp_path, spare=spare, pad=pad)
    out = tmp_path / "out"
    reported = export.export_head(folder, out)
    if (family, task) == ("llama", "assin2-similarity"):
        assert reported == (
            "none: its class has a head without a bias, and no bias in its last norm that could stand in"
        )
        assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []
        return
    assert reported.startswith(f"{out}: ")
    tokenizer = AutoTokenizer.from_pretrained(out)
    batch = tokenizer(*map(list, zip(*PAIRS)), padding=True, return_tensors="pt")
    if not finetuned.model.backbone.token_types:  # DeBERTa's tokenizer makes some, its model has none
        batch.pop("token_type_ids", None)
    if task == "faquad":
        questions = [Span(str(number), *pair, impossible=True) for number, pair in enumerate(PAIRS)]
        causal = family not in ENCODERS
        rows = encode_spans(questions, finetuned.tokenizer, 64, 8, causal=causal, training=False).rows
    else:
        rows = encode_pairs(
            find_task(task), [Pair("0", *pair, "None", 1.0) for pair in PAIRS], finetuned.tokenizer, 64
        ).rows
    ours = collate(rows, tokenizer.pad_token_id, torch.device("cpu"))
    assert torch.equal(batch["input_ids"], ours["ids"])
    assert {row.ids[-1] for row in rows}.isdisjoint({tokenizer.pad_token_id})
    ours["ids"] = ours["ids"].clamp(max=len(finetuned.tokenizer) - 1)  # a pad token that our model does not know
    (expected,) = finetuned.model({**ours, "allowed": torch.ones_like(ours["mask"])}).values()
    if task == "faquad":
        model = AutoModelForQuestionAnswering.from_pretrained(out).eval()
        found = model(**batch)
        for logits, end in ((found.start_logits, 0), (found.end_logits, 1)):
            kept = batch["attention_mask"].bool()
            torch.testing.assert_close(logits[kept], expected[..., end][kept], atol=1e-4, rtol=0)
        return
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    torch.testing.assert_close(model(**batch).logits, expected, atol=1e-4, rtol=0)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    if task == "assin2-entailment":
        assert model.config.id2label == {0: "None", 1: "Entailment"}
        assert model.config.label2id == {"None": 0, "Entailment": 1}
    else:
        assert (model.config.num_labels, model.config.problem_type) == (1, "regression")


def test_two_heads_are_no_class_of_transformers(tmp_path):
    _, folder = tuned_folder("gpt_neo", "assin2", tmp_path)
    reported = export.export_head(folder, tmp_path / "out")
    assert reported == f"none: no class of transformers has two heads, {LABEL} and {SCORE}"
    assert not (tmp_path / "out").exists()


def test_other_logits_leave_no_folder_and_the_older_one_as_it_was(tmp_path, monkeypatch):
    _, folder = tuned_folder("gpt2", "assin2-similarity", tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "older").touch()
    with monkeypatch.context() as patch:
        patch.setattr(export, "_fold", lambda *_: None)
        reported = export.export_head(folder, tmp_path / "out")
    assert reported.startswith("none: the logits of GPT2ForSequenceClassification differ from ours by 3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "model", "out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["older"]
    assert export.export_head(folder, tmp_path / "out").startswith(f"{tmp_path / 'out'}: GPT2ForSequence")
    assert not (tmp_path / "out" / "older").exists()


def test_a_fine_tuned_folder_is_exported_by_command(tmp_path, capsys):
    _, folder = tuned_folder("gpt_neo", "assin2-entailment", tmp_path)
    out = tmp_path / "out"
    assert run_command(gloria.export.main, [f"--finetuned={folder}", f"--out={out}"]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: GPTNeoForSequenceClassification, its logits differ")
    for flags, line in (
        ([f"--finetuned={folder}", f"--out={out}"], f"--out: {out} is already there; give another folder or remove it"),
        (
            [f"--out={tmp_path / 'b'}"],
            "--run: is missing; give a run's folder, or --finetuned with a fine-tuned model's",
        ),
        (
            [f"--finetuned={folder}", "--run=x", f"--out={tmp_path / 'b'}"],
            "--finetuned: names a model, and so does --run; give one of them",
        ),
        ([f"--finetuned={folder}", "--step=3", f"--out={tmp_path / 'b'}"], "--step: is for --run; leave it out"),
        (
            [f"--finetuned={tmp_path / 'base'}", f"--out={tmp_path / 'b'}"],
            f"--finetuned: {tmp_path / 'base'} holds no task.json; give the folder of a fine-tuning",
        ),
    ):
        assert run_command(gloria.export.main, flags) == 2
        assert capsys.readouterr().err == f"error: {line}\n"
    assert not (tmp_path / "b").exists()
