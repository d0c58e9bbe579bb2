"""Prevents: a ladder that proposes other models than the large one's smaller kin, and a prediction that is surer of
itself than its runs allow, or that mixes runs which do not compare."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from gloria.errors import UserError, run_command
from gloria.plan import main
from gloria.pretrain import main as pretrain
from gloria.train.config import read_pretrain_config
from gloria.train.ladder import MOST_MISFIT, PUBLISHED, Law, Point, fit, layer_parameters, predict, propose, read_points
from gloria.train.metrics import short_number
from tests.conftest import REPOSITORY
from tests.launch import SMALL, flags

GPT2 = ["--config", str(REPOSITORY / "launch/gpt2-124m.toml"), "--data.corpus", "nowhere", "--gpus", "1xA100-40GB"]
SIZES = [(1.3e6, 26e6), (3.2e6, 64e6), (10.6e6, 212e6), (85e6, 1.7e9)]


def points_of(law: Law) -> list[Point]:
    """Runs at SIZES that came to exactly what the law says."""
    return [Point(f"run {number}", int(n), int(d), law.loss(n, d)) for number, (n, d) in enumerate(SIZES)]


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda law: law.source)
def test_a_law_of_known_exponents_is_found_again(published):
    law = Law("made", 1.2, published.a / 3, published.b / 3, published.alpha, published.beta)
    found = fit(points_of(law)[:3], published)
    assert found.loss(*SIZES[3]) == pytest.approx(law.loss(*SIZES[3]), rel=1e-4)
    assert found.floor == pytest.approx(1.2, rel=1e-3)


def test_runs_held_back_lie_in_their_intervals():
    """Of laws about the published ones, with the noise of a seed: nine of ten at least, and none that says nothing."""
    rng, hits = np.random.default_rng(1), 0
    for _ in range(30):
        published = PUBLISHED[rng.integers(len(PUBLISHED))]
        scales, exponents = rng.uniform(0.5, 1.5, 2), rng.uniform(-0.02, 0.02, 2)
        a, b = published.a * scales[0], published.b * scales[1]
        law = Law("made", rng.uniform(1, 2), a, b, published.alpha + exponents[0], published.beta + exponents[1])
        points = [Point("", int(n), int(d), law.loss(n, d) * (1 + 0.003 * rng.standard_normal())) for n, d in SIZES]
        found = predict(points[:3], *map(int, SIZES[3]))
        hits += abs(found.loss - law.loss(*SIZES[3])) <= found.half_width
        assert found.half_width < 0.25 * found.loss
    assert hits >= 27


def test_runs_that_lie_on_no_law_are_reported():
    """As those of models that have hardly begun to learn: each does better than the law of the two before it."""
    losses = (5.87, 5.55, 4.98)
    short = [Point("", int(n) // 100, int(d) // 400, loss) for (n, d), loss in zip(SIZES, losses)]
    assert predict(short, 792_000, 3_960_000).misfit > MOST_MISFIT
    assert predict(points_of(PUBLISHED[1])[:3], *map(int, SIZES[3])).misfit < MOST_MISFIT


def test_many_runs_of_unlike_shapes_tell_the_terms_apart():
    law = Law("made", 1.4, 100.0, 2000.0, 0.34, 0.28)
    points = [Point("", int(n), int(d * more), law.loss(n, d * more)) for n, d in SIZES[:3] for more in (1, 4)]
    assert predict(points, *map(int, SIZES[3])).terms_fitted
    found = fit(points, PUBLISHED[0], terms_apart=True)
    assert (found.floor, found.a, found.b) == pytest.approx((1.4, 100.0, 2000.0), rel=0.02)


@pytest.mark.parametrize("preset", ["gpt-neo-1.3b", "gpt2-124m", "llama-1b", "smollm-135m", "demo"])
def test_the_small_models_are_the_large_ones_kin(preset):
    from gloria.model.config import PRESETS

    shape = PRESETS[preset]
    config = read_pretrain_config(
        [*GPT2[:4], "--model.preset", preset, "--train.sequence_length", "128"], needs_corpus=False
    )
    rungs = propose(config, shape, 100_000)
    sizes = [layer_parameters(rung.shape) for rung in rungs]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] < layer_parameters(shape) / 4
    for rung, size in zip(rungs, sizes):
        assert rung.shape.architecture == shape.architecture
        assert rung.shape.head_dim == shape.head_dim
        assert rung.shape.num_heads % rung.shape.kv_heads == 0
        wanted = 100_000 * config.train.global_batch * 128 * size / layer_parameters(shape)
        assert rung.tokens == pytest.approx(wanted, rel=0.01)
        assert rung.config.optim.lr >= config.optim.lr


def test_the_printed_commands_are_recipes_of_those_runs(capsys, tmp_path):
    asked = ["--run.dir", str(tmp_path / "my run"), "--optim.betas", "[0.8, 0.9]", "--log.tensorboard", "false"]
    assert main([*GPT2, *asked, "--ladder"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines[1:4]]
    commands = [line for line in lines if line.startswith("python -m gloria.pretrain ")]
    assert len(table) == len(commands) == 3
    for row, command in zip(table, commands):
        config = read_pretrain_config(shlex.split(command)[3:], needs_corpus=False)
        tokens = config.train.steps * config.train.global_batch * config.train.sequence_length
        shown = (str(config.model.num_layers), str(config.model.hidden_size), str(config.train.global_batch))
        assert tuple(row[3:6]) == shown
        assert row[7] == short_number(tokens)
        assert (config.optim.betas, config.log.tensorboard) == ((0.8, 0.9), False)
        assert config.run.dir.startswith(str(tmp_path / "my run-ladder-"))


def test_runs_are_read_and_those_that_do_not_compare_are_named(sample_corpus: Path, tmp_path, capsys):
    recipe = {"config": REPOSITORY / "launch/demo.toml", "data.corpus": sample_corpus, **SMALL, "valid.every": 50}
    recipe |= {"train.steps": 4, "valid.windows": 4, "schedule.warmup_steps": 1}
    runs = [str(tmp_path / f"run {number}") for number in range(3)]
    for number, run in enumerate(runs):
        assert pretrain(flags(recipe, run__dir=run, model__num_layers=number + 1)) == 0
    points = read_points(runs)
    assert [point.tokens for point in points] == [4 * 12 * 32] * 3
    assert points[0].parameters < points[1].parameters < points[2].parameters
    valid = [json.loads(line) for line in Path(runs[0], "metrics.jsonl").read_text().splitlines()]
    assert points[0].loss == [line["loss"] for line in valid if line["kind"] == "valid"][-1]
    capsys.readouterr()
    assert main([*flags(recipe, train__steps=500), "--ladder", *runs]) == 0
    out = capsys.readouterr().out
    assert "\nprediction   loss " in out
    assert "E and the common scale of both terms; the rest is published: 3 runs tell no more" in out

    status = Path(runs[1], "status.json")
    status.write_text(status.read_text().replace('"done"', '"stopped"'))
    with pytest.raises(UserError, match="run 1: its run is stopped at step 4; a fit needs runs that are done"):
        read_points(runs)
    with pytest.raises(UserError, match="2 runs are too few for a fit; name three or more"):
        read_points([runs[0], runs[2]])
    assert run_command(main, [*flags(recipe), "--ladder", "nowhere", *runs[:2]]) == 2
    assert "error: nowhere: holds no run" in capsys.readouterr().err
