"""Prevents: an audit that passes a run whose record was changed, and one that fails a run which only had a long life:
resumed, on other ranks, re-weighted, with another batch, around bad samples, gone back, with skipped updates."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import gloria.train.windows
from gloria.audit import main as audit
from gloria.data.corpus import read_manifest, write_manifest
from gloria.dist.manifest import manifest_bytes
from gloria.dist.manifest import read_manifest as read_checkpoint
from gloria.errors import run_command
from gloria.export import main as export
from gloria.pretrain import main as pretrain
from tests.launch import SMALL, flags, run

STEPS = 28


@pytest.fixture(scope="module")
def corpus(sample_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(sample_corpus, tmp_path_factory.mktemp("audit") / "corpus")


@pytest.fixture(scope="module")
def lived(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run with a long life, and what an audit printed after each part of it."""
    folder = tmp_path_factory.mktemp("audit") / "run"
    recipe = {"config": Path(__file__).parents[2] / "launch/demo.toml", "data.corpus": corpus, **SMALL}
    recipe |= {"run.dir": folder, "checkpoint.keep": 99, "log.every": 2, "valid.every": 6, "valid.windows": 3}
    recipe |= {"data.period": 1000}
    printed = []

    def part(**changes: Any) -> None:
        assert pretrain(flags(recipe, **changes)) == 0
        printed.append(audited(folder))

    part()
    with pytest.MonkeyPatch.context() as patch:
        spoil_step(patch, 13)
        part(train__steps=18, data__weights__cartas=0.9, train__global_batch=24, optim__lr=2e-4, log__every=3)
    part(train__steps=22, run__resume=16, data__skip_samples="250:400", log__every=3, checkpoint__every=5)
    run(flags(recipe, train__steps=STEPS, data__weights__parlamento=0, train__micro_batch=2), 2, folder.parent)
    printed.append(audited(folder))
    return folder, printed


def spoil_step(patch: pytest.MonkeyPatch, step: int) -> None:
    """The loss of one step is not finite, so its update is left out."""
    honest = gloria.train.windows.window_losses

    def window_losses(run: Any, *rest: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss, rows = honest(run, *rest, **more)
        return loss * (float("nan") if run.step == step and torch.is_grad_enabled() else 1.0), rows

    patch.setattr(gloria.train.windows, "window_losses", window_losses)


def audited(folder: Path, *more: object) -> str:
    """What an audit prints, with its exit status in front."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = run_command(audit, [str(folder), *map(str, more)])
    return f"{status}\n{out.getvalue()}"


def test_a_run_with_a_long_life_holds_at_every_part_of_it(lived):
    folder, printed = lived
    assert [text.splitlines()[0] for text in printed] == ["0"] * 4, "\n".join(printed)
    assert all("FAILED" not in text for text in printed)
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    happened = {event["event"] for event in events if event["kind"] == "event"}
    assert {"start", "resume", "changed", "skipped", "done"} <= happened
    assert list((folder / "checkpoints").glob("*.aside-*"))


def test_a_branch_is_followed_to_its_trunk(lived, corpus, tmp_path):
    trunk, branch = shutil.copytree(lived[0], tmp_path / "trunk"), tmp_path / "branch"
    recipe = {"config": Path(__file__).parents[2] / "launch/demo.toml", "data.corpus": corpus, **SMALL}
    recipe |= {"data.period": 1000, "run.dir": branch, "run.branch": f"{trunk}@20", "train.steps": 26}
    assert pretrain(flags(recipe, data__weights__cartas=0.5)) == 0
    printed = audited(branch)
    assert printed.startswith("0\n"), printed
    assert f"ok      ancestor     {trunk} has drawn the same samples before step 20" in printed
    edit_json(trunk / "mixture.json", lambda start: start["mixture"].update(seed=5))
    assert f"FAILED  ancestor     {trunk}" in audited(branch)
    shutil.rmtree(trunk)
    assert f"ok      ancestor     {trunk} at step 20: is not here any more, and is not proved" in audited(branch)


Edit = Callable[[dict[str, Any]], object]


def edit_line(folder: Path, step: int, edit: Edit, kind: str = "train") -> None:
    """Change the values of the last line of a kind at a step."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = [values for values in lines if (values["kind"], values["step"]) == (kind, step)]
    edit([values for values in found if kind != "event" or values["event"] in ("start", "resume")][-1])
    path.write_text("".join(json.dumps(values) + "\n" for values in lines))


def edit_lines(folder: Path, edit: Callable[[list[str], int], object], step: int = 24, kind: str = "train") -> None:
    """Change the lines of the log, given the place of one."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    (place,) = [n for n, line in enumerate(lines) if line.startswith(f'{{"kind":"{kind}","step":{step},')]
    edit(lines, place)
    path.write_text("".join(lines))


def edit_json(path: Path, edit: Edit) -> None:
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def edit_trainer(folder: Path, edit: Edit, step: int = 20) -> None:
    """Change a checkpoint's state, with hashes and seal to match."""
    checkpoint = folder / f"checkpoints/step-{step:08}"
    edit_json(checkpoint / "trainer.json", edit)
    data = (checkpoint / "trainer.json").read_bytes()
    manifest = read_checkpoint(checkpoint)
    entry = replace(manifest.files[-1], size=len(data), hash=xxhash.xxh3_128_hexdigest(data))
    (checkpoint / "manifest.json").write_bytes(manifest_bytes(replace(manifest, files=(*manifest.files[:-1], entry))))


def edit_corpus(corpus: Path, **changes: Any) -> None:
    """Change the first source's entry in a corpus's manifest, and seal it again."""
    manifest = read_manifest(corpus)
    first, *others = manifest.sources
    write_manifest(corpus, replace(manifest, sources=[replace(first, **changes), *others]))


def flip(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def rename(folder: Path, step: int, other: int) -> None:
    shutil.rmtree(folder / f"checkpoints/step-{other:08}")
    (folder / f"checkpoints/step-{step:08}").rename(folder / f"checkpoints/step-{other:08}")


def count_one_more(corpus: Path) -> None:
    train = read_manifest(corpus).sources[0].train
    shard = replace(train.shards[0], documents=train.shards[0].documents + 1)
    edit_corpus(corpus, train=replace(train, documents=train.documents + 1, shards=[shard]))


def raise_loss(values: dict[str, Any]) -> None:
    values["loss"] += 0.01
    values["perplexity"] = float(torch.tensor(values["loss"], dtype=torch.float64).exp())


def of_source(key: str, add: float) -> Edit:
    return lambda values: values["sources"]["dialogos"].update({key: values["sources"]["dialogos"][key] + add})


def last_stage(state: dict[str, Any]) -> dict[str, Any]:
    return state["mixture"]["stages"][-1]


def begin_with_batches_of_24(start: dict[str, Any]) -> None:
    start["mixture"].update(batches=[{"step": 0, "sample": 0, "batch": 24}])


# Name -> (the lie, told in a copy of the run and of its corpus; what the audit says of it)
LIES: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "a byte of a shard": (
        lambda run, corpus: flip(corpus / "cartas/train-00000.bin"),
        "corpus       {corpus}/cartas/train-00000.bin: its hash is",
    ),
    "a byte of an index": (
        lambda run, corpus: flip(corpus / "cartas/valid-00000.idx"),
        "corpus       {corpus}/cartas/valid-00000.idx: its hash is",
    ),
    "a source renamed": (
        lambda run, corpus: edit_corpus(corpus, name="outra"),
        'sources      {corpus}: has no source "enciclopedia", which the run has read',
    ),
    "documents of a source": (
        lambda run, corpus: count_one_more(corpus),
        "corpus       enciclopedia/train-00000: holds 13 documents and",
    ),
    "the tokenizer": (
        lambda run, corpus: flip(run / "tokenizer/tokenizer.json", 40),
        "sources      {run}/tokenizer: the tokenizer is",
    ),
    "tokens of a line": (
        lambda run, corpus: edit_line(run, 24, lambda values: values.update(tokens=values["tokens"] - 384)),
        "step 24: tokens is",
    ),
    "tokens of a checkpoint": (
        lambda run, corpus: edit_trainer(run, lambda values: values["state"].update(tokens=1)),
        "step-00000020: counts 1 tokens; 20 steps of its mixture are 9216",
    ),
    "the rate of a line": (
        lambda run, corpus: edit_line(run, 24, lambda values: values.update(lr=values["lr"] * 1.01)),
        "step 24: lr is",
    ),
    "the rate of a checkpoint": (
        lambda run, corpus: edit_trainer(run, lambda values: values["state"]["schedule"].update(lr=0.5)),
        "step-00000020: its rate is 0.5 at step 20; the schedule has",
    ),
    "the rate of a recipe": (
        lambda run, corpus: edit_line(run, 22, lambda line: line["recipe"]["optim"].update(lr=1.0), "event"),
        "its recipe is not that of launch",
    ),
    "a share": (
        lambda run, corpus: edit_line(run, 24, of_source("share", 0.001)),
        'step 24: source "dialogos": share is',
    ),
    "a weight": (
        lambda run, corpus: edit_line(run, 24, of_source("asked", 0.001)),
        'step 24: source "dialogos": asked is',
    ),
    "epochs": (
        lambda run, corpus: edit_line(run, 24, of_source("epoch", -0.01)),
        'step 24: source "dialogos": epoch is',
    ),
    "a loss": (lambda run, corpus: edit_line(run, 24, raise_loss), "the sources' losses and windows make"),
    "an update left out": (
        lambda run, corpus: edit_line(run, 24, lambda values: values.update(skipped=1, loss=1.0, perplexity=None)),
        "step 24: 1 updates were left out, by the events 0",
    ),
    "a loss that is a word": (
        lambda run, corpus: edit_line(run, 24, lambda values: values["sources"]["dialogos"].update(loss="7")),
        "has losses of other sources than those drawn since the line before",
    ),
    "the log": (lambda run, corpus: (run / "metrics.jsonl").write_text(""), "metrics.jsonl: has no launch of this run"),
    "the start's mixture": (
        lambda run, corpus: edit_json(run / "mixture.json", lambda values: values["mixture"].update(stages=[])),
        "mixture.json: has no stages or no batches",
    ),
    "a perplexity": (
        lambda run, corpus: edit_line(run, 24, lambda values: values.update(perplexity=2.0)),
        "step 24: perplexity is 2.0, that of loss",
    ),
    "a line dropped": (
        lambda run, corpus: edit_lines(run, lambda lines, n: lines.pop(n)),
        "step 26: the line of step 24 is missing before it",
    ),
    "the last line dropped": (
        lambda run, corpus: edit_lines(run, lambda lines, n: lines.pop(n), STEPS),
        f"the line of step {STEPS} is missing at its end",
    ),
    "a line doubled": (
        lambda run, corpus: edit_lines(run, lambda lines, n: lines.insert(n, lines[n])),
        "step 24: is doubled, out of order, or not of launch",
    ),
    "a line moved": (
        lambda run, corpus: edit_lines(run, lambda lines, n: lines.append(lines.pop(n))),
        "step 24: is doubled, out of order, or not of launch",
    ),
    "a line of no meaning": (
        lambda run, corpus: edit_lines(run, lambda lines, n: lines.insert(n, "null\n")),
        "is no line of a log",
    ),
    "a validation dropped": (
        lambda run, corpus: edit_lines(run, lambda lines, n: lines.pop(n), 12, "valid"),
        "the validation of step 12 is missing",
    ),
    "a validation loss": (
        lambda run, corpus: edit_line(run, 12, raise_loss, "valid"),
        "step 12: loss is",
    ),
    "a byte of a checkpoint": (
        lambda run, corpus: flip(run / "checkpoints/step-00000008/rank-00000.safetensors"),
        "checkpoints  {run}/checkpoints/step-00000008/rank-00000.safetensors: its content is not what was written",
    ),
    "a checkpoint of another step": (
        lambda run, corpus: rename(run, 8, 20),
        "checkpoints  {run}/checkpoints/step-00000020/manifest.json: belongs to step 8",
    ),
    "a checkpoint of another run": (
        lambda run, corpus: edit_line(run, 0, lambda values: values.update(launch="0123456789"), "event"),
        "saved it, of which the log knows nothing",
    ),
    "the weights of a mixture": (
        lambda run, corpus: edit_trainer(run, lambda values: last_stage(values["state"])["quotas"].reverse()),
        "trainer.json: stages[3]: its quotas are not those of its weights",
    ),
    "the seed of a mixture": (
        lambda run, corpus: edit_trainer(run, lambda values: values["state"]["mixture"].update(seed=5)),
        "trainer.json: stages[3]: does not continue where the one before it stopped",
    ),
    "the start of a launch": (
        lambda run, corpus: edit_json(
            run / "mixture.json",
            lambda values: values["mixture"].update(batches=[{"step": 0, "sample": 0, "batch": 24}]),
        ),
        "mixture.json",
    ),
    "the status": (
        lambda run, corpus: edit_json(run / "status.json", lambda values: values.update(step=STEPS + 1)),
        f"status       status.json says done at step {STEPS + 1} of launch",
    ),
    "a status of another launch": (
        lambda run, corpus: edit_json(run / "status.json", lambda values: values.update(launch="0123456789")),
        "of launch 0123456789; the log's last launch is",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_found(lived, corpus, tmp_path, name):
    lie, found = LIES[name]
    folder, data = shutil.copytree(lived[0], tmp_path / "run"), shutil.copytree(corpus, tmp_path / "corpus")
    lie(folder, data)
    printed = audited(folder, "--corpus", data)
    failed = [line for line in printed.splitlines() if line.startswith("FAILED")]
    assert printed.startswith("1\n"), printed
    assert any(found.format(run=folder, corpus=data) in line for line in failed), printed


def say_step(folder: Path, step: int) -> None:
    """The file's metadata names another step than its weights are of."""
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | {"gloria.step": str(step)}
    save_file(load_file(path), path, metadata=metadata)


def change_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["transformer.h.1.mlp.c_fc.bias"][3] += 1
    save_file(tensors, path, metadata={"format": "pt", "gloria.step": str(STEPS)})


def test_an_exported_folder_is_the_checkpoint_that_it_says(lived, tmp_path):
    folder, made = lived[0], tmp_path / "model"
    for step, precision in (("24", "fp32"), (str(STEPS), "bf16")):
        shutil.rmtree(made, ignore_errors=True)
        assert export(["--run", str(folder), "--out", str(made), "--step", step, "--precision", precision]) == 0
        dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
        assert f"ok      export       {made}: every weight is that of step {step} in {dtype}" in audited(
            folder, "--export", made
        )
    lies = {
        "another step": (lambda: say_step(made, 24), ".weight is not that of step 24"),
        "a step that is gone": (lambda: say_step(made, 23), "is of step 23, whose checkpoint is not here any more"),
        "one weight": (lambda: change_weight(made), "transformer.h.1.mlp.c_fc.bias is not that of step 28"),
        "its tokenizer": (lambda: flip(made / "tokenizer.json", 40), "its tokenizer is"),
    }
    kept = shutil.copytree(made, tmp_path / "kept")
    for lie, found in lies.values():
        shutil.rmtree(made)
        shutil.copytree(kept, made)
        lie()
        printed = audited(folder, "--export", made)
        assert printed.startswith("1\n")
        assert any(found in line for line in printed.splitlines() if line.startswith("FAILED  export")), printed


def test_misuse_is_one_line(lived, tmp_path, capsys):
    for arguments, error in (
        ([tmp_path / "none"], f"RUN: {tmp_path}/none is not a folder; name a run's folder (runs/NAME)"),
        ([tmp_path], f"RUN: {tmp_path} has no mixture.json, so it is no pre-training run; name one"),
        ([lived[0], "--export", tmp_path / "none"], f"--export: {tmp_path}/none is not a folder; name one that "
         "gloria.export made"),
        ([lived[0], "--document", "a", "--export", "b"], "--export: has no meaning with --document; leave one of them "
         "out"),
    ):  # fmt: skip
        assert run_command(audit, [*map(str, arguments)]) == 2
        assert capsys.readouterr().err == f"error: {error}\n"
