"""Prevents an exported model that is not the checkpoint's: another step, another dtype, optimizer state for
weights, rows that pad the vocabulary left in."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gloria.data.corpus import describe_contamination, read_manifest, write_manifest
from gloria.dist.checkpoint import begin_save, publish
from gloria.dist.checkpoint_read import find_checkpoint, read_trainer
from gloria.dist.state import model_state_dict, optimizer_state_dict
from gloria.errors import run_command
from gloria.export import main
from gloria.model.huggingface import read_tensors
from gloria.model.transformer import Transformer
from gloria.optim.optimizers import OptimConfig, build_optimizer
from tests.tiny_models import GPT_NEO, make_tokenizer, random_ids, uneven_model

SHAPE = replace(GPT_NEO, vocab_size=600)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Transformer]]:
    """A run's folder with checkpoints of steps 10 and 20, and the models of those steps."""
    folder = tmp_path_factory.mktemp("run")
    make_tokenizer(folder / "tokenizer")
    models = {step: uneven_model(SHAPE, seed=step) for step in (10, 20)}
    for step, model in models.items():
        optimizer = build_optimizer(OptimConfig(), model.named_parameters())
        ids = random_ids(SHAPE, 2, 20)
        model(ids, ids)[0].backward()
        optimizer.step()
        shards = model_state_dict(model) | optimizer_state_dict(model, optimizer)
        trainer = {"model": SHAPE.to_dict(), "recipe": {"data": {"corpus": str(folder / "corpus")}}}
        save = begin_save(folder, step, shards, {}, trainer, rank=0, world=1, launch="test", asynchronous=False)
        assert publish(save), save.error
    return folder, models


@pytest.mark.parametrize(("flags", "step"), [([], 20), (["--step", "10"], 10)])
def test_the_weights_of_the_step_asked_for(
    run: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], step: int
) -> None:
    folder, models = run
    assert main(["--run", str(folder), "--out", str(tmp_path / "out"), *flags]) == 0
    parameters = dict(models[step].named_parameters())
    read = read_tensors(tmp_path / "out")
    assert read.keys() == parameters.keys()
    for name, tensor in read.items():
        assert torch.equal(tensor, parameters[name]), name
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["transformer.wte.weight"].shape == (600, 32)
    assert capsys.readouterr().out == (
        f"{tmp_path}/out: 38,208 parameters (float32) from {folder}/checkpoints/step-000000{step}\n"
    )


def test_evaluation_data_that_the_training_text_held_is_told(
    run: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str], sample_corpus: Path
) -> None:
    """It stands in the corpus's manifest, which may be gone (above)."""
    folder, _ = run
    manifest = read_manifest(sample_corpus)
    found = {"calame": {"texts": 2076, "short": 3, "documents": 12}}
    shutil.copytree(sample_corpus, folder / "corpus")
    write_manifest(folder / "corpus", replace(manifest, recipe={**manifest.recipe, "contamination": found}))
    assert main(["--run", str(folder), "--out", str(tmp_path / "out")]) == 0
    line = "training   calame: 12 documents with one of its 2,076 texts were left out\n"
    assert capsys.readouterr().out.endswith(f"step-00000020\n{line}")
    trainer = read_trainer(find_checkpoint(folder, None))
    assert describe_contamination(trainer, ["calame", "enem"]) == [
        line.rstrip(),
        "training   enem: its texts were not looked for in the training text",
    ]
    shutil.rmtree(folder / "corpus")


@pytest.mark.parametrize("flags", [["--precision", "bf16"], ["--dtype", "bfloat16"]])
def test_bf16_is_the_rounded_weights(run: tuple, tmp_path: Path, flags: list[str]) -> None:
    folder, models = run
    assert main(["--run", str(folder), "--out", str(tmp_path / "out"), *flags]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    wanted = models[20].transformer.h[1].mlp.c_fc.weight.detach().bfloat16()
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored["transformer.h.1.mlp.c_fc.weight"], wanted)


def test_mistakes_end_in_one_line(run: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = run
    out = ["--out", str(tmp_path / "out")]
    assert run_command(main, ["--run", str(tmp_path), *out]) == 2
    assert run_command(main, ["--run", str(folder), "--step", "15", *out]) == 2
    assert run_command(main, ["--run", str(folder), "--out", str(tmp_path)]) == 2
    assert run_command(main, ["--run", str(folder), *out, "--dtype", "int8"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"error: {tmp_path}/checkpoints: holds no checkpoint",
        f"error: {folder}/checkpoints: holds no checkpoint of step 15; there are steps 10, 20",
        f"error: --out: {tmp_path} is already there; give another folder or remove it",
        'error: --dtype: unknown value "int8"; one of "fp32", "bf16", "float32", "bfloat16"',
    ]
    assert list(tmp_path.iterdir()) == []
