"""Prevents: weeks of GPU time asked for on a wrong figure, a job that does not fit its card, a card mistaken for
another, and a plan that says nothing because the corpus is not there yet."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from gloria import plan
from gloria.dist.gpus import CARDS, card_of_cuda_name, gpus_here, read_gpus
from gloria.dist.state import shard_rows
from gloria.errors import run_command
from gloria.model.config import PRESETS, count_parameters, flops_per_token, parameter_shapes
from gloria.model.memory import executed_flops_per_token, newton_schulz_flops, traffic_per_step
from gloria.train.config import read_pretrain_config

RECIPE = ["--config", "launch/gloria-1.3b.toml", "--gpus", "4xA100-40GB"]


@pytest.fixture(autouse=True)
def in_repository(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)


def reported(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    """What `plan` prints, by the first word of a line (the last line of a word wins)."""
    assert plan.main(list(arguments)) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line.split()[0]: line for line in lines if line.strip()}


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert run_command(plan.main, list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == "", "a plan was begun"
    return captured.err.splitlines()


def test_the_original_recipe_in_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    lines = reported(capsys, *RECIPE, "--data.corpus", "nowhere")
    assert lines["length"] == "length       187,500 steps x 512 windows x 512 = 49.2B tokens (49,152,000,000)"
    shape = PRESETS["gloria-1.3b"]
    hours = flops_per_token(shape, 512) * 49_152_000_000 / (0.4 * 312e12) / 3600
    assert lines["time"] == (
        f"time         {hours / 4 / 24:.1f} days, {hours:,.0f} GPU-hours on 4 x A100-40GB at 40 % of 312 TFLOP/s "
        "(16-bit dense; A100 data sheet)"
    )
    assert lines["A100-40GB"] == "  A100-40GB has 36.57 GiB for tensors: fits"
    each = 12 * sum(rows * (size[0] if size else 1) for rows, *size in parameter_shapes(shape).values())
    # 150 saves; kept for good 6, of which the last is also among the newest 3; one being written.
    assert lines["checkpoints"] == (
        f"checkpoints  {each / 1e9:.3g} GB each, 150 in all; at most 9 at once (one of them being written): "
        f"{9 * each / 1e9:.3g} GB"
    )
    assert lines["unknown"].startswith("unknown      shares of the recipe: ptwiki 0.0990, ")


def test_muon_keeps_one_average_of_a_hidden_matrix_and_multiplies_more(capsys: pytest.CaptureFixture[str]) -> None:
    lines = reported(capsys, *RECIPE, "--data.corpus", "nowhere", "--optim.name", "muon")
    shape = PRESETS["gloria-1.3b"]
    hidden, layer = 24 * 12 * 2048**2, 4 * 6 * 2048**3 + 2 * 18 * 2048**3  # four squares, two four times as long
    every = sum(rows * (size[0] if size else 1) for rows, *size in parameter_shapes(shape).values())
    assert lines["checkpoints"].startswith(f"checkpoints  {(12 * every - 4 * hidden) / 1e9:.3g} GB each, ")
    assert newton_schulz_flops(shape) == 24 * 5 * layer
    share = 100 * 24 * 5 * layer / (flops_per_token(shape, 512) * 512 * 512)
    assert lines["muon"] == f"muon         its products add {share:.2g} % to a step's operations"


@pytest.mark.parametrize("name", ["gloria-1.3b", "gloria-2.7b"])
def test_the_plans_beside_the_recipes_are_what_plan_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if Path("data/gloria").exists():
        pytest.skip("data/gloria is there: a plan with a corpus prints more than the one beside the recipe")
    blocks = re.findall(r"# \$ (.*)\n((?:#.*\n)+)", Path(f"launch/{name}.toml").read_text())
    assert len(blocks) == 2
    for command, lines in blocks:
        words = command.split()
        assert words[:3] == ["python", "-m", "gloria.plan"]
        assert plan.main(words[3:]) == 0
        without_table = capsys.readouterr().out.split("\n\n")[0]
        assert lines == "".join(f"# {line}\n" for line in without_table.splitlines())
        assert ": fits\n" in lines


def test_half_the_mfu_is_twice_the_time_and_a_slow_network_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    def gpu_hours(*flags: str, gpus: str = "4xA100-40GB") -> float:
        words = reported(capsys, *RECIPE[:2], "--gpus", gpus, *flags)["time"].split()
        return float(words[words.index("GPU-hours") - 1].replace(",", ""))

    assert gpu_hours("--mfu", "0.2") == pytest.approx(2 * gpu_hours(), rel=0.01)
    fast, slow = (gpu_hours("--network", speed, gpus="32xA100-40GB") for speed in ("5", "0.5"))
    assert gpu_hours() < fast < slow / 5
    assert gpu_hours("--network", "2.5") == gpu_hours(), "a node of 8 does not use the network"


def test_a_table_from_1_to_1024_gpus_that_says_where_a_job_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    rows = reported(capsys, "--config", "launch/gloria-2.7b.toml", "--gpus", "4xA100-40GB", "--data.corpus", "nowhere")
    assert rows["1"].split()[1:4] == ["does", "not", "fit:"]
    assert rows["4"].split()[:3] == ["4", "8", "16"]
    assert rows["512"].split()[:3] == ["512", "1", "1"]
    assert rows["1024"] == " 1024  not possible: global batch 512"
    assert [word for word in rows if word.isdigit()] == [str(2**power) for power in range(11)]


def test_the_recipe_of_a_llama_has_tucanos_size(capsys: pytest.CaptureFixture[str]) -> None:
    rows = reported(capsys, "--config", "launch/llama-160m.toml", "--gpus", "4xA100-40GB", "--data.corpus", "nowhere")
    assert rows["parameters"].startswith("parameters   162,417,408 ")


def test_what_fits_grows_with_checkpointing_and_is_the_largest_that_does() -> None:
    machine = plan.Machine(4, read_gpus("A100-40GB")[1], 0.4, 25)
    largest = []
    for mode in plan.MODES:
        recipe = [*RECIPE[:2], "--train.activation_checkpointing", mode, "--data.corpus", "no"]
        job = plan.read_job(read_pretrain_config(recipe, world=lambda config: 4), machine)
        found = plan.largest_that_fits(job, machine, 4, 128)
        assert found is not None
        assert found.fits
        if found.micro_batch < 128:
            assert not plan.estimate(job, machine, 4, 2 * found.micro_batch).fits
        largest.append(found.micro_batch)
    assert largest == sorted(largest)
    assert largest[0] < largest[-1]


def test_with_a_corpus_the_plan_knows_its_epochs(sample_corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--gpus", "2xT4", "--data.corpus", str(sample_corpus)]) == 0
    captured = capsys.readouterr()
    assert "source       cartas: share 0.2000, " in captured.out
    assert "unknown" not in captured.out
    assert "\nprecision    fp16: T4 has no bf16\n" in captured.out
    assert "2 x T4 at 40 % of 65 TFLOP/s (16-bit dense; T4 data sheet)" in captured.out
    assert captured.err.startswith("warning: up to ")


def test_the_precision_is_the_best_the_card_has_or_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    def plan_of(card: str, precision: str) -> dict[str, str]:
        flags = ("--gpus", card, "--data.corpus", "nowhere", "--train.precision", precision)
        return reported(capsys, "--config", "launch/gpt2-124m.toml", *flags)

    auto = {card: plan_of(card, "auto") for card in ("V100-32GB", "T4", "A100-40GB")}
    assert [lines["precision"] for lines in auto.values()] == [
        "precision    fp16: V100-32GB has no bf16",
        "precision    fp16: T4 has no bf16",
        "precision    bf16: A100-40GB has it",
    ]
    assert "at 40 % of 125 TFLOP/s (16-bit dense; V100 data sheet, SXM2)" in auto["V100-32GB"]["time"]
    fp16, fp32 = (plan_of("V100-32GB", precision) for precision in ("fp16", "fp32"))
    assert "precision" not in fp16, "the recipe says it"
    for line in ("memory", "time", "network"):
        assert fp16[line] == auto["V100-32GB"][line] != fp32[line]
    assert fp16["memory"] == auto["A100-40GB"]["memory"], "16 bits are 16 bits"
    assert "at 40 % of 15.7 TFLOP/s (fp32 dense" in fp32["time"]


def test_this_machine_is_planned_for_without_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    lines = reported(capsys, "--data.corpus", "nowhere")
    assert lines["time"] == "time         unknown: no peak is known of processor (no GPU here; name one with --gpus)"


@pytest.mark.parametrize(
    ("name", "count", "card"),
    [("NVIDIA A100-SXM4-40GB", 2, "A100-40GB"), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 1, None)],
)
def test_gpus_of_this_machine(name, count, card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\n" + f"echo '{name}, 40960'\n" * count)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    found, here = gpus_here()
    assert (found, here.name, here.memory) == (count, card or name, 40960)
    assert (here.peak("bf16") is None) == (card is None)
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert gpus_here() is None


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--gpus", "4xA100-4GB"], '--gpus: unknown card "A100-4GB"; did you mean "A100-40GB"?'),
        (["--gpus", "4xA100"], '--gpus: unknown card "A100"; did you mean "A100-80GB" or "A100-40GB"?'),
        (["--gpus", "h10"], '--gpus: unknown card "h10"; did you mean "H100"?'),
        (["--gpus", "0xH100"], "--gpus: 0xH100 is no number of GPUs; give at least 1, as in 1xH100"),
        (["--gpus", "H100", "--mfu", "40"], "--mfu: 40.0 is too large; give at most 1"),
        (["--gpus", "H100", "--network", "0"], "--network: 0.0 is too small; give more than 0"),
        (
            ["--gpus", "5xH100"],
            "launch/demo.toml: train.micro_batch: 5 ranks do not divide train.global_batch 24; set that to 25",
        ),
        (
            ["--gpus", "T4", "--train.precision", "bf16", "--data.corpus", "nowhere"],
            "--train.precision: T4 has no bf16; set it to auto, fp16 or fp32",
        ),
        (
            ["--gpus", "T4", "--train.epochs", "2", "--data.corpus", "nowhere"],
            "--train.epochs: 2 epochs of what? There is no corpus at nowhere yet; prepare it or give --train.steps",
        ),
        (
            ["--gpus", "T4", "--model.preset", "demi", "--data.corpus", "nowhere"],
            '--model.preset: unknown preset "demi"; did you mean "demo"?',
        ),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert complaint(capsys, *arguments) == [f"error: {line}"]


def test_cards_have_names_of_their_own() -> None:
    assert len({card.name.upper() for card in CARDS}) == len(CARDS)
    for card in CARDS:
        assert read_gpus(f"3x{card.name.lower()}") == (3, card)
        assert card.fp32 < card.fp16
        assert card.bf16 in (None, card.fp16)
    assert card_of_cuda_name("Tesla V100-SXM2-16GB").name == "V100-16GB"


def test_traffic_is_that_of_ring_collectives() -> None:
    """Counted again from the shapes, for a model whose rows divide."""
    shape = PRESETS["gpt2-124m"]
    sizes = {name: rows * (rest[0] if rest else 1) for name, (rows, *rest) in parameter_shapes(shape).items()}
    blocks = sum(size for name, size in sizes.items() if ".h." in name)
    root = sum(sizes.values()) - blocks
    once = 2 * (2 * blocks + root)
    found = traffic_per_step(shape, passes=3, ranks=4, replicas=1, element_bytes=2)
    assert found == ((3 * once + 4 * (blocks + root)) * 3 // 4, 0)
    kept = traffic_per_step(shape, passes=3, ranks=4, replicas=1, element_bytes=2, keep_gathered=True)
    assert kept == ((2 + 4) * (blocks + root) * 3 // 4, 0), "one gather a step, whatever the number of passes"
    assert traffic_per_step(shape, passes=3, ranks=1, replicas=1, element_bytes=2) == (0, 0)
    hsdp = traffic_per_step(shape, passes=3, ranks=8, replicas=2, element_bytes=2)
    assert hsdp == (found.shards, 4 * (blocks + root) // 4), "each replica then sends its shard of the sum once"


def test_executed_flops_are_more_than_mfu_counts() -> None:
    for name in ("gpt2-124m", "gloria-1.3b"):
        shape = PRESETS[name]
        none, full = (executed_flops_per_token(shape, 1024, mode) for mode in ("none", "full"))
        assert flops_per_token(shape, 1024) < none < full < 4 / 3 * none
        assert none == executed_flops_per_token(shape, 1024, "selective")


def test_the_largest_shard_is_the_first_ranks() -> None:
    shape = PRESETS["gloria-2.7b"]
    whole = count_parameters(shape)["total"]
    for ranks in (3, 64, 1024):
        rows = [size[0] for size in parameter_shapes(shape).values()]
        assert all(shard_rows(count, ranks, 0)[1] == -(-count // ranks) for count in rows)
    assert whole == 2_651_307_520


def test_a_plan_needs_no_torch() -> None:
    code = (
        "import sys, gloria.plan; gloria.plan.main(['--gpus', '8xH100', '--data.corpus', 'nowhere']); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
