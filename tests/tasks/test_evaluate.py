"""Bugs prevented: scores that depend on batch size or on the number of ranks, log-likelihoods of the wrong tokens, text
scored twice or not at all between windows, a rule that is not named, an option that is ignored."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gloria.evaluate as evaluate
import gloria.finetune as finetune
from gloria.dist.process import Process
from gloria.errors import UserError
from gloria.tasks import evaluation
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


def predictions(out: Path) -> dict[str, list[dict[str, Any]]]:
    paths = sorted((out / "predictions").glob("*/predictions.jsonl"))
    return {path.parent.name: [json.loads(line) for line in path.read_text().splitlines()] for path in paths}


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A prediction with each log-likelihood under a key of its own."""
    return row | {f"log-likelihood {n}": value for n, value in enumerate(row.pop("log_likelihoods", []))}


def run(neo: Path, data: Path, out: Path, task: str, *more: str) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert (
        evaluate.main([f"--task={task}", f"--model={neo}", f"--data={data}", f"--out={out}", "--device=cpu", *more])
        == 0
    )
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # each length would be planned anew


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
    assert predictions(tmp_path / "b3") == predictions(tmp_path / "two")
    one, many = predictions(tmp_path / "b1"), predictions(tmp_path / "b64")
    assert set(one) == set(many) == {
        "assin2-test", "exams-test", "calame-test-first-word", "calame-test-paper", "calame-test-gloria-script",
        "calame-test-tucano",
        "calame-test-log-likelihood",
    }  # fmt: skip
    for name in one:
        for first, second in zip(one[name], many[name], strict=True):
            assert flat(first) == pytest.approx(flat(second), abs=1e-4)


def test_generation_is_that_of_transformers(neo, data, tmp_path):
    run(neo, data, tmp_path / "out", "calame", "--rule=paper,gloria-script")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(neo).eval(), AutoTokenizer.from_pretrained(neo)
    found = predictions(tmp_path / "out")
    for rule, strip in (("paper", True), ("gloria-script", False)):  # the script left the space at a context's end
        written = {row["id"]: row["text"] for row in found[f"calame-test-{rule}"]}
        for line in (data / "calamept_all.jsonl").read_text().splitlines():
            row = json.loads(line)
            context = row["sentence"].rstrip() if strip else row["sentence"]
            ids = tokenizer(context, return_tensors="pt")["input_ids"]
            options = {"max_new_tokens": 5, "do_sample": False, "repetition_penalty": 2.0, "pad_token_id": 0}
            output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            assert written[str(row["id"])] == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert found["calame-test-paper"] != found["calame-test-gloria-script"]


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


def compared(capsys: pytest.CaptureFixture, *flags: str) -> list[str]:
    capsys.readouterr()
    assert evaluate.main(["--task=assin2", "--compare", *flags]) == 0
    return capsys.readouterr().out.splitlines()


def test_two_models_are_compared_by_run_folder_evaluation_or_file(neo, data, tmp_path, capsys):
    flags = ["--train.steps=2", f"--run.dir={tmp_path / 'a'}", "--run.device=cpu", "--log.tensorboard=false"]
    assert finetune.main(["--task=assin2", f"--model={neo}", f"--data={data}", *flags]) == 0
    run(neo, data, tmp_path / "b", "assin2", "--shots=2")
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    lines = compared(capsys, a, b)
    file = "predictions/assin2-test/predictions.jsonl"
    assert lines[:3] == [f"assin2 test of {data}", f"A  {a}/predictions/test/predictions.jsonl", f"B  {b}/{file}"]
    assert lines[3].split() == ["metric", "A", "-", "B", "95", "%", "interval", "p", "test"]
    assert lines[4].startswith("accuracy")
    assert compared(capsys, f"{a}/predictions/test", f"{b}/{file}") == lines
    assert len(compared(capsys, a, a)) == 2 * len(lines)  # dev and test


def test_what_cannot_be_compared_ends_in_a_line(neo, data, tmp_path):
    run(neo, data, tmp_path / "a", "assin2")
    other = write_assin(tmp_path / "other", {"train": 12, "dev": 8, "test": 4})
    run(neo, other, tmp_path / "b", "assin2")
    file = tmp_path / "a/predictions/assin2-test/predictions.jsonl"
    (tmp_path / "old").mkdir()
    (tmp_path / "old/guesses.jsonl").write_text(file.read_text())
    moved = tmp_path / "moved.jsonl"
    moved.write_text(file.read_text())
    a, b = tmp_path / "a", tmp_path / "b"
    for given, line in [
        ([a, b], f"--data: {file} is of {data} and {str(file).replace('/a/', '/b/')} is of {other}; give the folder of "
                 "the files that both were made from"),
        ([a, moved], f"--data: {moved} is in no results.json; give the folder of the files it was made from"),
        ([a, a, f"--data={other}"], f'{file}:5: "4" is not among the 4 examples; give --data and --split of this file'),
        ([a, a, "--split=dev"], f"--compare: {a} has no predictions of --split and --rule; leave them out"),
        ([a, tmp_path / "old"], f"{tmp_path / 'old'}: has guesses.jsonl of an older version; rename it to "
                                "predictions.jsonl, and give --data"),
        ([a, tmp_path], f"{tmp_path}/predictions.jsonl: no such file; give a folder of gloria.finetune or "
                        "gloria.evaluate, or its predictions.jsonl"),
        ([a, a, "--task=rte"], f"{a}/results.json: lists no predictions of rte; name a folder that has them"),
    ]:  # fmt: skip
        task = [] if "--task=rte" in given else ["--task=assin2"]
        with pytest.raises(UserError) as error:
            evaluate.main([*task, "--compare", *map(str, given)])
        assert error.value.problems[0] == line
    assert evaluate.main(["--task=assin2", f"--data={data}", "--compare", str(a), str(moved)]) == 0


def test_results_of_another_model_or_request_are_never_replaced(neo, data, tmp_path, monkeypatch):
    """Two models called `model` wrote to one folder, and the first predictions were lost."""
    monkeypatch.chdir(tmp_path)
    for name in ("A", "B"):
        shutil.copytree(neo, f"runs/{name}/model")

    def score(*flags: str) -> None:
        assert evaluate.main(["--task=assin2", f"--data={data}", "--device=cpu", *flags]) == 0

    score("--model=runs/A/model")
    score("--model=runs/B/model")
    score("--model=runs/A/model", "--shots=1")
    score("--model=runs/A/model")  # again: the same folder
    found = {str(path.parent): json.loads(path.read_text()) for path in Path().rglob("results.json")}
    folders = ["runs/evaluate/A-model/assin2", "runs/evaluate/A-model/assin2-2", "runs/evaluate/B-model/assin2"]
    assert sorted(found) == folders
    assert [found[folder]["model"] for folder in folders] == ["runs/A/model", "runs/A/model", "runs/B/model"]
    assert [found[folder]["results"][0]["settings"] for folder in folders] == [{}, {"shots": 1}, {}]
    with pytest.raises(UserError) as error:
        score("--model=runs/B/model", f"--out={folders[0]}")
    assert error.value.problems == (
        f"--out: {folders[0]} has results of {tmp_path}/runs/A/model, with other tasks, files or settings; choose "
        "another folder",
    )


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--task=calme"], '--task: calme: unknown task; did you mean "calame"?'),
        (["--task=assin2", "--rule=tucano"], "--rule: no task of assin2 uses it; leave it out"),
        (["--task=calame", "--length=8"], "--length: no task of calame uses it; leave it out"),
        (["--task=calame", "--rule=papr"], '--rule: unknown rule papr; did you mean "paper"?'),
        (["--task=calame", "--batch=0"], "--batch: 0 is too small; give at least 1"),
        (["--task=calame", "--shots=2"], "--shots: no task of calame uses it; leave it out"),
        (["--task=exams", "--method=generation"], "--method: no task of exams uses it; leave it out"),
        (
            ["--task=squad1"],
            "--task: squad1 is answered by a span, which needs a head; fine-tune the model on it first",
        ),
    ],
)
def test_wrong_flags_are_reported_in_a_line(flags, line, neo, data, tmp_path):
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
    with pytest.raises(UserError, match="has heads for assin2, not calame; give the model before fine-tuning"):
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
        "scores mean nothing"
    )
    assert records(out)[0]["n"] == sizes["test"]


@pytest.mark.parametrize(
    ("asked", "device", "has_bf16", "found"),
    [
        ("auto", "cpu", True, "fp32"),
        ("auto", "cuda", True, "bf16"),
        ("auto", "cuda", False, "fp32"),
        ("fp32", "cuda", True, "fp32"),
        ("bf16", "cpu", False, "bf16"),
    ],
)
def test_weights_are_bf16_on_a_gpu_that_has_it(monkeypatch, asked: str, device: str, has_bf16: bool, found: str):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    monkeypatch.setattr(evaluation, "on_any_rank", bool)  # one rank
    options = evaluation.EvaluateOptions(task="calame", precision=asked)
    assert evaluation.with_precision(options, torch.device(device)).precision == found
