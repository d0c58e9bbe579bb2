"""Bugs prevented: scores that depend on batch size or on the number of ranks, log-likelihoods of the wrong tokens, text
scored twice or not at all between windows, a rule that is not named, an option that is ignored."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gloria.evaluate as evaluate
import gloria.finetune as finetune
from gloria.dist.process import Process
from gloria.errors import UserError
from gloria.tasks.catalog import find_task
from gloria.tasks.models.loglikelihood import windows
from gloria.tasks.samples import sample_folder
from tests.tasks.tiny import WORDS, make_folder, sentence, write_assin, write_lines
from tests.world import run_world


@pytest.fixture(scope="module")
def neo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder("gpt_neo", tmp_path_factory.mktemp("neo") / "neo")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ASSIN-2, CALAME and EXAMS in one folder, contexts of all lengths."""
    folder = write_assin(tmp_path_factory.mktemp("tasks") / "data", {"train": 12, "dev": 8, "test": 8})
    generator = random.Random(3)
    rows = [
        {"id": number, "sentence": sentence(generator, 1 + number % 9) + " ", "last_word": generator.choice(WORDS)}
        for number in range(14)
    ]
    write_lines(folder / "calamept_all.jsonl", rows)
    choices = [
        {"id": f"e{n}", "question": {"stem": sentence(generator), "choices": [
            {"text": sentence(generator, 1 + c), "label": "ABCD"[c]} for c in range(4)]}, "answerKey": "B"}
        for n in range(6)
    ]  # fmt: skip
    write_lines(folder / "test_pt.jsonl", choices)
    return folder


def records(out: Path) -> list[dict[str, Any]]:
    found = json.loads((out / "results.json").read_text())["results"]
    for record in found:
        record["counts"].pop("seconds", None)
    return found


def guesses(out: Path) -> dict[str, list[dict[str, Any]]]:
    paths = sorted((out / "predictions").glob("*/guesses.jsonl"))
    return {path.parent.name: [json.loads(line) for line in path.read_text().splitlines()] for path in paths}


def run(neo: Path, data: Path, out: Path, task: str, *more: str) -> None:
    assert (
        evaluate.main([f"--task={task}", f"--model={neo}", f"--data={data}", f"--out={out}", "--device=cpu", *more])
        == 0
    )


def _on_a_rank(rank: int, world: int, arguments: list[str]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    evaluate.start_process_group = lambda *_, **__: Process(rank, world, torch.device("cpu"))
    evaluate.stop_process_group = lambda: None
    assert evaluate.main(arguments) == 0


def test_batch_size_and_ranks_change_nothing(neo, data, tmp_path):
    tasks = "calame,exams,assin2"
    run(neo, data, tmp_path / "b1", tasks, "--batch=1")
    run(neo, data, tmp_path / "b64", tasks, "--batch=64")
    run(neo, data, tmp_path / "b3", tasks, "--batch=3")
    flags = [f"--task={tasks}", f"--model={neo}", f"--data={data}", f"--out={tmp_path / 'two'}", "--batch=3"]
    run_world(_on_a_rank, 2, flags)
    # The same batches on any number of ranks: the same bits.
    assert records(tmp_path / "b3") == records(tmp_path / "two")
    assert guesses(tmp_path / "b3") == guesses(tmp_path / "two")
    one, many = guesses(tmp_path / "b1"), guesses(tmp_path / "b64")
    assert set(one) == set(many) == {
        "assin2-test", "exams-test", "calame-test-first-word", "calame-test-paper", "calame-test-strict",
        "calame-test-log-likelihood",
    }  # fmt: skip
    for name in one:
        for first, second in zip(one[name], many[name]):
            assert first == pytest.approx(second, abs=1e-4)


def test_generation_is_that_of_transformers(neo, data, tmp_path):
    run(neo, data, tmp_path / "out", "calame", "--rule=paper")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(neo).eval(), AutoTokenizer.from_pretrained(neo)
    written = {row["id"]: row["text"] for row in guesses(tmp_path / "out")["calame-test-paper"]}
    for line in (data / "calamept_all.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids = tokenizer(row["sentence"].rstrip(), return_tensors="pt")["input_ids"]
        options = {"max_new_tokens": 5, "do_sample": False, "repetition_penalty": 2.0, "pad_token_id": 0}
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert written[str(row["id"])] == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_perplexity_is_the_loss_of_transformers(neo, tmp_path):
    text = " ".join(WORDS)
    (tmp_path / "text.txt").write_text(text)
    run(neo, tmp_path / "text.txt", tmp_path / "out", "perplexity")
    (record,) = records(tmp_path / "out")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(neo).eval(), AutoTokenizer.from_pretrained(neo)
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
    assert ids.shape[1] - 1 <= 96
    loss = model(ids, labels=ids).loss.item()
    tokens = ids.shape[1] - 1
    assert record["n"] == tokens
    assert record["scores"]["token_perplexity"]["value"] == pytest.approx(math.exp(loss), rel=1e-5)
    bits = loss * tokens / math.log(2) / len(text.encode())
    assert record["scores"]["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-5)


@pytest.mark.parametrize(("tokens", "length", "stride"), [(2, 8, 4), (9, 8, 8), (100, 8, 3), (17, 16, 16), (18, 16, 1)])
def test_windows_score_each_token_once(tokens, length, stride):
    ids, scored = list(range(tokens)), []
    for number, request in enumerate(windows(ids, length, stride)):
        assert len(request.ids) <= length + 1
        scored += request.ids[-request.scored :]
        if number:
            assert len(request.ids) - request.scored >= length - stride
    assert scored == ids[1:]


def test_two_predictions_are_compared(neo, data, tmp_path, capsys):
    run(neo, data, tmp_path / "a", "assin2")
    run(neo, data, tmp_path / "b", "assin2", "--shots=2")
    folders = [str(tmp_path / name / "predictions" / "assin2-test") for name in "ab"]
    capsys.readouterr()
    assert evaluate.main(["--task=assin2", f"--data={data}", "--compare", *folders]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["metric", "A", "-", "B", "95", "%", "interval", "p", "test"]
    assert lines[1].startswith("accuracy")


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--task=calme"], 'calme: unknown task; did you mean "calame"?'),
        (["--task=assin2", "--rule=strict"], "--rule: no task of assin2 has a use for it; leave it out"),
        (["--task=calame", "--length=8"], "--length: no task of calame has a use for it; leave it out"),
        (["--task=calame", "--rule=papr"], '--rule: unknown rule papr; did you mean "paper"?'),
        (["--task=calame", "--batch=0"], "--batch: must be at least 1, not 0"),
        (
            ["--task=calame", "--shots=2"],
            "--shots: calame is a text to go on with, without examples before it; leave it out",
        ),
        (
            ["--task=exams", "--method=generation"],
            "--method: generation is a way to ask for pairs, not exams; leave it out",
        ),
        (
            ["--task=squad1"],
            "--task: squad1 asks for a span, which takes a head; fine-tune the model on it first",
        ),
    ],
)
def test_wrong_flags_are_told_in_a_line(flags, line, neo, data, tmp_path):
    with pytest.raises(UserError) as caught:
        evaluate.main([*flags, f"--model={neo}", f"--data={data}", f"--out={tmp_path / 'out'}", "--device=cpu"])
    (found,) = caught.value.problems
    assert found == line
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_fine_tuned_folder_scores_as_it_did_when_it_was_saved(neo, data, tmp_path):
    flags = ["--train.steps=4", f"--run.dir={tmp_path / 'run'}", "--run.device=cpu", "--log.tensorboard=false"]
    assert finetune.main(["--task=assin2", f"--model={neo}", f"--data={data}", *flags]) == 0
    run(tmp_path / "run", data, tmp_path / "out", "assin2", "--batch=1")
    (record,) = records(tmp_path / "out")
    before = json.loads((tmp_path / "run" / "results.json").read_text())["results"][1]
    assert (record["split"], before["split"]) == ("test", "test")
    for name, score in before["scores"].items():
        assert record["scores"][name]["value"] == pytest.approx(score["value"], abs=1e-4)
    with pytest.raises(UserError, match="has heads for assin2, not calame; give the model before it was tuned"):
        run(tmp_path / "run", data, tmp_path / "other", "calame")


@pytest.mark.parametrize(("task", "count"), [("assin2", "training examples"), ("calame", "examples")])
def test_without_data_the_sample_is_scored_and_called_one(task, count, neo, tmp_path, capsys):
    out = tmp_path / "out"
    given = [f"--task={task}", f"--model={neo}", f"--out={out}", "--device=cpu"]
    assert evaluate.main([*given, "--rule=log-likelihood"] if task == "calame" else given) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("data ")]
    sizes = {
        split: len(find_task(task).read(sample_folder(find_task(task)), split)) for split in find_task(task).splits
    }
    number = sizes.get("train", sizes["test"])
    assert line == (
        f"data       sample of {task} that comes with gloria ({number} {count}, written for it): for trying out, its "
        "scores say nothing"
    )
    assert records(out)[0]["n"] == sizes["test"]
