"""A recipe with two mistakes of which one is reported, or one that starts a week's run on the wrong number of steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gloria.config.cli import from_mapping, to_mapping
from gloria.data.corpus import Manifest, SourceEntry, SplitEntry, TokenizerEntry, write_manifest
from gloria.data.shards import write_split
from gloria.data.tokenizer import tokenizer_fingerprint
from gloria.errors import UserError, run_command
from gloria.train.config import DEMO, PretrainConfig, plan_run, read_pretrain_config
from gloria.train.summary import describe, gathered_here

RECIPE = """
[run]
dir = "run"
[model]
preset = "demo"
[data]
corpus = "corpus"
[train]
steps = 40
global_batch = 24
sequence_length = 32
[schedule]
warmup_steps = 4
"""
SIZES = {"ptwiki": 3201, "europarl": 1000, "oscar": 6500}  # tokens of the training split


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: recipe.toml, and a corpus of three sources (the last without validation windows)."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    Path("recipe.toml").write_text(RECIPE)
    Path("corpus/tokenizer").mkdir(parents=True)
    Path("corpus/tokenizer/tokenizer.json").write_text("{}")
    sources = []
    for number, (name, tokens) in enumerate(SIZES.items()):
        splits = {
            split: _split(f"{name}/{split}", count)
            for split, count in (("train", tokens), ("valid", 100 if number < 2 else 10))
        }
        sources.append(SourceEntry(name, [0.25, 0.25, 0.5][number], **splits, counts={}))
    tokenizer = TokenizerEntry(tokenizer_fingerprint("corpus/tokenizer"), 500, 0, 1)
    write_manifest("corpus", Manifest(1, tokenizer, sources, {}))
    return tmp_path


def _split(path: str, tokens: int) -> SplitEntry:
    Path("corpus", path).parent.mkdir(exist_ok=True)
    document = (np.arange(tokens) % 500).astype(np.uint16)
    shards = write_split("corpus", path, document.dtype, [(document, np.array([tokens]))])
    return SplitEntry(1, tokens, tokens, tokens, shards)


def ranks(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(world))


def read(*argv: str) -> PretrainConfig:
    return read_pretrain_config(["--config", "recipe.toml", *argv])


def problems(*argv: str, plan: bool = False) -> list[str]:
    with pytest.raises(UserError) as caught:
        plan_run(read(*argv)) if plan else read(*argv)
    return list(caught.value.problems)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--train.steps 0", "--train.steps: 0 is too small; give at least 1"),
        (
            "--train.steps 9 --train.epochs 2",
            "--train.steps: steps and epochs: both are given; give one of them",
        ),
        (
            "--train.micro_batch 10",
            "--train.micro_batch: 10 x 1 ranks = 10 does not divide train.global_batch 24; set it to 8",
        ),
        (
            "--train.precision fp8",
            '--train.precision: unknown value "fp8"; one of "auto", "fp32", "bf16", "fp16"',
        ),
        (
            "--train.activation_checkpointing some",
            '--train.activation_checkpointing: unknown value "some"; one of "none", "full", "selective"',
        ),
        ("--train.clip_norm 0", "--train.clip_norm: 0.0 is too small; give more than 0"),
        ("--train.compile yes", '--train.compile: unknown value "yes"; one of "auto", true, false'),
        ("--train.global-btach 3", "--train.global-btach: unknown flag; did you mean --train.global_batch?"),
        ("--run.seed -1", "--run.seed: -1 is too small; give at least 0"),
        ("--run.device gpu", '--run.device: unknown value "gpu"; did you mean "cpu"? One of "auto", "cpu", "cuda"'),
        (
            "--optim.name adam",
            '--optim.name: unknown value "adam"; did you mean "radam"? One of "adamw", "radam", "muon"',
        ),
        ("--optim.lr 0", "--optim.lr: 0.0 is too small; give more than 0.0"),
        (
            "--optim.betas [0.9,1]",
            "--optim.betas: optim.betas[1]: 1.0 is too large; give at most 0.999999",
        ),
        (
            "--schedule.kind wsdd",
            '--schedule.kind: unknown value "wsdd"; did you mean "wsd"? '
            'One of "linear", "cosine", "cosine_hard", "constant", "wsd"',
        ),
        (
            "--schedule.warmup_steps 41",
            "--schedule.warmup_steps: 41 exceeds the run's 40 steps; shorten the warm-up",
        ),
        (
            "--schedule.kind cosine_hard",
            "recipe.toml: schedule.restarts: restarts and restart_steps: neither is given; "
            "give cosine_hard one of them",
        ),
        (
            "--schedule.restart_steps 5",
            '--schedule.restart_steps: is for kind "cosine_hard", but kind is "cosine"; '
            "leave it out or change the kind",
        ),
        ("--valid.every -1", "--valid.every: -1 is too small; give at least 0"),
        ("--valid.windows 0", "--valid.windows: 0 is too small; give at least 1"),
        ("--checkpoint.keep 1", "--checkpoint.keep: 1 is too small; give at least 2"),
        (
            "--checkpoint.every 100 --checkpoint.keep_every 150",
            "--checkpoint.keep_every: 150 is no multiple of every, 100; give a multiple",
        ),
        ("--dist.replicas 2", "--dist.replicas: 2 does not divide the number of ranks, 1; give one of 1"),
        ("--log.every 0", "--log.every: 0 is too small; give at least 1"),
        ("--data.weights.ptwiki lots", '--data.weights.ptwiki: must be a number, not "lots"; for example 0.1'),
    ],
)
def test_a_wrong_recipe_has_its_line(argv: str, expected: str) -> None:
    assert problems(*argv.split()) == [expected]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--data.corpus nowhere", "nowhere: "),
        (
            "--data.weights.ptwikki 1",
            '--data.weights.ptwikki: the corpus has no source "ptwikki"; did you mean "ptwiki"?',
        ),
        ("--model.preset dmeo", '--model.preset: unknown preset "dmeo"; did you mean "demo"?'),
        ("--train.sequence_length 300", "--train.sequence_length: 300 exceeds the model's 256 positions"),
        ("--model.num_heads 5", "--model.num_heads: 5 does not divide hidden_size 128"),
        (
            "--train.epochs 0.5 --schedule.warmup_steps 60",
            "--schedule.warmup_steps: 60 exceeds the run's 7 steps; shorten the warm-up",
        ),
        (
            "--data.max_epochs 3",
            '--data.max_epochs: source "europarl" runs out at sample',
        ),
    ],
)
def test_what_only_the_corpus_can_tell_has_its_line_with_its_place(argv: str, expected: str) -> None:
    assert problems(*argv.split(), plan=True)[0].startswith(expected)


@pytest.mark.usefixtures("folder")
def test_problems_of_every_kind_come_at_once() -> None:
    found = problems("--train.micro_batch", "7", "--optim.lr", "fast", "--modle.preset", "x", "--schedule.kind", "wsd")
    assert found == [
        "--modle.preset: unknown flag; did you mean --model.preset?",
        '--optim.lr: must be a number, not "fast"; for example 0.1',
        "--train.micro_batch: 7 x 1 ranks = 7 does not divide train.global_batch 24; set it to 6",
        'recipe.toml: schedule.decay_steps: missing; kind "wsd" needs it, for example a tenth of the steps',
    ]
    assert problems("--model.preset", "dmeo", "--data.weights.oskar", "1", plan=True) == [
        '--model.preset: unknown preset "dmeo"; did you mean "demo"?',
        '--data.weights.oskar: the corpus has no source "oskar"; did you mean "oscar"?',
    ]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("world", "argv", "expected"),
    [
        (
            2,
            "--train.micro_batch 8",
            "--train.micro_batch: 8 x 2 ranks = 16 does not divide train.global_batch 24; set it to 6",
        ),
        (
            3,
            "--train.micro_batch 3",
            "--train.micro_batch: 3 x 3 ranks = 9 does not divide train.global_batch 24; set it to 2",
        ),
        (5, "", "recipe.toml: train.micro_batch: 5 ranks do not divide train.global_batch 24; set that to 25"),
        (4, "--dist.replicas 3", "--dist.replicas: 3 does not divide the number of ranks, 4; give one of 1, 2, 4"),
    ],
)
def test_the_batch_must_divide_among_the_ranks(
    world: int, argv: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks(monkeypatch, world)
    assert problems(*argv.split()) == [expected]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8])
def test_the_demo_runs_on_any_usual_number_of_ranks(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks(monkeypatch, world)
    config = read_pretrain_config([])
    assert (config.train.global_batch, config.train.micro_batch) == (24, 24 // world)


@pytest.mark.usefixtures("folder")
def test_epochs_as_a_flag_clear_the_steps_of_the_file() -> None:
    config = read("--train.epochs", "2")
    assert (config.train.steps, config.train.epochs) == (None, 2.0)
    windows = sum((tokens - 1) // 32 for tokens in SIZES.values())
    assert plan_run(config).total_steps == -(-2 * windows // 24)


@pytest.mark.usefixtures("folder")
def test_epochs_count_the_sources_in_use_only() -> None:
    plan = plan_run(read("--train.epochs", "1.5", "--data.weights.oscar", "0"))
    assert plan.total_steps == -(-1.5 * (100 + 31) // 24)
    assert list(plan.epochs) == ["ptwiki", "europarl"]


@pytest.mark.usefixtures("folder")
def test_the_plan_says_what_the_recipe_amounts_to(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks(monkeypatch, 2)
    config = read("--train.micro_batch", "4")
    plan = plan_run(config)
    assert (plan.total_steps, plan.tokens, plan.accumulation) == (40, 40 * 24 * 32, 3)
    assert plan.shape.vocab_size == 500
    assert plan.weights == {"ptwiki": 0.25, "europarl": 0.25, "oscar": 0.5}
    assert plan.epochs == pytest.approx({"ptwiki": 240 / 100, "europarl": 240 / 31, "oscar": 480 / 203}, rel=0.02)
    assert plan.warnings == (
        'source "europarl": 7.7 epochs (above 4 they teach little); set data.weights.europarl to 0.1112 to avoid it',
        'source "oscar" has no validation: its 10 held-out tokens hold no window of 32 + 1',
    )
    text = describe(config, plan, "fp16", "T4 has no bf16", True, gathered_here(config, plan, "fp16"))
    for line in (
        "precision   fp16: T4 has no bf16",
        "step        24 windows x 32 = 768 tokens (2 ranks x 3 passes x micro-batch 4)",
        "length      40 steps, 30.7k tokens (30,720)",
        "lr          peak 0.0001, warm-up over 4 steps, then cosine to 0; 40 steps in\n            all",
        "source                    tokens     windows   tail  weight   share  epochs",
        "ptwiki                     3,201         100      0    0.25  0.2500    2.40",
        "europarl                   1,000          31      7    0.25  0.2500    7.74",
    ):
        assert line in text, line


@pytest.mark.usefixtures("folder")
def test_weights_that_no_choice_can_save_are_reported_once() -> None:
    (line, *_) = plan_run(read("--train.steps", "400")).warnings
    assert line.startswith("up to 77.")
    assert line.endswith(
        "the run needs 9,600 windows, there are 334; reweighting can't help: shorten the run or find more text"
    )


@pytest.mark.usefixtures("folder")
def test_a_changed_shard_is_found() -> None:
    path = Path("corpus/ptwiki/train-00000.bin")
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    for flags, what in (([], "sample's hash"), (["--verify"], "hash")):
        (line,) = problems(*flags, plan=True)
        assert line.startswith(f"corpus/ptwiki/train-00000.bin: its {what} is ")


@pytest.mark.usefixtures("folder")
def test_a_config_survives_the_trip_through_a_checkpoint() -> None:
    config = read("--data.weights.ptwiki", "0.5")
    again = from_mapping(PretrainConfig, to_mapping(config), "trainer.json")
    assert again == config
    assert again.train.micro_batch == 24


def test_all_recipes_are_right_and_keep_the_original_lengths(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks(monkeypatch, 4)
    monkeypatch.chdir(repository)
    steps = {}
    for name in ("gloria-1.3b", "gloria-2.7b", "gpt2-124m"):
        config = read_pretrain_config(["--config", f"launch/{name}.toml"])
        steps[name] = config.train.steps
        assert config.model.preset == name
        assert (config.train.global_batch, config.train.sequence_length) == (512, 512)
        assert (config.optim.lr, config.optim.weight_decay, config.train.clip_norm) == (1e-4, 0.01, 3.0)
        assert config.schedule.warmup_steps * 16 == 10_000
        assert config.schedule.restart_steps * 16 == 500_000
        assert sum(config.data.weights.values()) == pytest.approx(1.01)
    assert {name: count * 16 for name, count in steps.items()} == {
        "gloria-1.3b": 3_000_000,
        "gloria-2.7b": 1_000_000,
        "gpt2-124m": 2_000_000,
    }


def test_without_an_argument_it_is_the_demo_and_no_torch_is_needed(folder: Path) -> None:
    code = (
        "import sys; from gloria.train.config import read_pretrain_config, plan_run\n"
        "assert read_pretrain_config([]).source_file == sys.argv[1]\n"
        "plan_run(read_pretrain_config(['--config', 'recipe.toml']))\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(DEMO)],
        cwd=folder,
        env={"PYTHONPATH": str(DEMO.parent.parent)},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.usefixtures("folder")
def test_errors_end_a_command_with_status_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda argv: read_pretrain_config(argv) and 0, ["--config", "no.toml"]) == 2
    assert capsys.readouterr().err == "error: no.toml: no such file; check the path\n"
