"""Prevents: an adapter that peft cannot load or that computes something else there, a merge that is not peft's, and
frozen weights that move or are saved with every checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import gloria.finetune as finetune
import gloria.train.run
from gloria.dist.checkpoint_read import read_full_tensors
from gloria.dist.manifest import checkpoint_path, saved_steps
from gloria.errors import run_command
from gloria.tasks.models.backbones import load_model
from tests.tasks.test_finetune import command, results
from tests.tasks.test_two_ranks import on_a_rank
from tests.tasks.tiny import make_folder, write_assin
from tests.world import run_world

FLAGS = {"train__lora_rank": 2, "train__steps": 6, "eval__every": 3, "checkpoint__every": 3, "optim__lr": 1e-2}


@pytest.fixture(scope="module")
def assin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_assin(tmp_path_factory.mktemp("assin"), {"train": 24, "dev": 8, "test": 6})


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "gpt_neox"])
def test_merged_and_alone_it_is_what_peft_makes_of_it(family: str, assin: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, run = make_folder(family, tmp_path / family), tmp_path / "run"
    assert finetune.main(command("assin2-entailment", base, assin, run, **FLAGS)) == 0
    ids = torch.arange(6, 30).view(2, 12)
    plain, merged = (load_model(str(folder)).backbone.eval() for folder in (base, run / "model"))
    with_adapter = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(base), run / "model" / "adapter").eval()
    with torch.no_grad():
        before, after = (model(ids, torch.ones_like(ids), torch.zeros_like(ids))[0] for model in (plain, merged))
        theirs = with_adapter(ids).last_hidden_state
        peft_merged = with_adapter.merge_and_unload()(ids).last_hidden_state
    assert (after - before).norm() > 1e-3 * before.norm(), "nothing was learnt"
    for other in (theirs, peft_merged):
        assert (after - other).norm() <= 1e-5 * after.norm()
    # Every adapter is in the file, and the heads beside it.
    adapter = load_file(run / "model" / "adapter" / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)
    assert load_file(run / "model" / "adapter" / "head.safetensors").keys() == {"label.weight"}
    assert (run / "huggingface" / "config.json").is_file()


def test_checkpoints_hold_what_is_trained_and_the_rest_stands_still(assin: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    base, run = make_folder("gpt_neo", tmp_path / "neo"), tmp_path / "run"
    assert finetune.main(command("assin2-entailment", base, assin, run, **FLAGS)) == 0
    names = {name for name, _ in read_full_tensors(checkpoint_path(run, max(saved_steps(run))))}
    trained = {name.removeprefix("model.") for name in names if name.startswith("model.")}
    assert trained == {name.removeprefix("optim.exp_avg.") for name in names if name.startswith("optim.exp_avg.")}
    assert all(".lora_" in name or name == "heads.label.weight" for name in trained)
    assert len(trained) == 2 * 6 * 2 + 1
    before, after = load_file(base / "model.safetensors"), load_file(run / "model" / "model.safetensors")
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {name for name in after if ".h." in name and name.endswith(("_proj.weight", "c_fc.weight"))}


def test_on_two_ranks_and_stopped_in_between_it_learns_the_same(
    assin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    base = make_folder("bert", tmp_path / "bert")
    recipes = {name: command("assin2", base, assin, tmp_path / name, **FLAGS) for name in ("whole", "two", "broken")}
    assert finetune.main(recipes["whole"]) == 0
    run_world(on_a_rank, 2, recipes["two"], [], assin)
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(gloria.train.run, "stop_reason", lambda: calls.append(1) or "SIGTERM" * (len(calls) > 3))
        assert finetune.main(recipes["broken"]) == 0
    assert not (tmp_path / "broken" / "results.json").exists()

    weights = base / "model.safetensors"
    kept = weights.read_bytes()
    save_file({name: tensor + 1e-3 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    capsys.readouterr()
    assert run_command(finetune.main, recipes["broken"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {tmp_path / 'broken'}: its checkpoints hold only what was trained, and the other weights of {base} "
        "have changed since; bring them back, or choose another run.dir"
    )
    weights.write_bytes(kept)
    assert finetune.main(recipes["broken"]) == 0
    for file in ("model.safetensors", "head.safetensors", "adapter/adapter_model.safetensors"):
        whole, broken, two = (load_file(tmp_path / run / "model" / file) for run in ("whole", "broken", "two"))
        for name, tensor in whole.items():
            assert torch.equal(broken[name], tensor), name
            torch.testing.assert_close(two[name], tensor, atol=2e-5, rtol=1e-4)
    assert results(tmp_path / "whole") == results(tmp_path / "broken")


def test_without_peft_or_with_muon_one_line_says_so(
    assin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command("assin2", make_folder("gpt2", tmp_path / "gpt2"), assin, tmp_path / "run", **FLAGS)
    assert run_command(finetune.main, [*arguments, "--optim.name=muon"]) == 2
    assert "muon updates whole matrices, and LoRA trains factors; choose adamw" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "peft", None)
    assert run_command(finetune.main, arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "error: train.lora_rank: needs peft (import of peft halted; None in sys.modules); "
        'pip install "gloria[lora]", or leave it out'
    )
