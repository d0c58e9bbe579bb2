"""A ladder: three small runs that tell what a large one will come to. Imports no torch.

The small models have the large one's family and proportions, its mixture, and its tokens for each parameter of the
layers (N; embeddings are not counted). Rate and batch follow N as in the OLMo ladder (arXiv 2412.04403): the peak as
N^(-1/3), the batch as N^(2/3). The loss is fitted as L = E + A / N^alpha + B / D^beta (arXiv 2203.15556) over D tokens,
with a Huber loss of its logarithm.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares, nnls

from gloria.config.cli import to_mapping
from gloria.config.schema import flatten
from gloria.config.toml import show_value
from gloria.dist.manifest import TRAINER, checkpoint_path, saved_steps
from gloria.dist.run_lock import read_status
from gloria.errors import UserError, warn
from gloria.files import open_plain, parse_json_object, read_bounded
from gloria.model.config import TransformerConfig, count_parameters, flops_per_token, resolve_shape
from gloria.train.config import PretrainConfig, located
from gloria.train.metrics import METRICS, perplexity, short_number

SHARES = (1 / 64, 1 / 24, 1 / 8)  # of the large model's layers: about 2 % of its operations
LARGEST_RATE = 1e-2
HUBER = 1e-3  # log-loss beyond which a run counts as an outlier, as in arXiv 2203.15556
MOST_MISFIT = 0.005  # of a loss; seeds make less
MANY = 5  # runs that tell the two terms apart, if their tokens a parameter differ


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta, in nats a token."""

    source: str
    floor: float
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        return self.floor + self.a / parameters**self.alpha + self.b / tokens**self.beta


# With few runs the exponents, and how the terms compare, are these; that they differ is part of the interval.
PUBLISHED = (
    Law("arXiv 2203.15556", 1.69, 406.4, 410.7, 0.34, 0.28),
    Law("arXiv 2404.10102", 1.8172, 482.01, 2085.43, 0.3478, 0.3658),
    Law("arXiv 2305.16264", 1.87, 521.0, 1488.0, 0.353, 0.353),
)


@dataclass(frozen=True)
class Rung:
    """A small run as it is proposed."""

    config: PretrainConfig
    shape: TransformerConfig
    steps: int

    @property
    def tokens(self) -> int:
        return self.steps * self.config.train.global_batch * self.config.train.sequence_length


@dataclass(frozen=True)
class Point:
    """What a run came to."""

    run: str
    parameters: int  # of the layers
    tokens: int
    loss: float  # the last validation's


@dataclass(frozen=True)
class Prediction:
    """A loss with an interval of about 95 %, and the fits that it is the mean of, one for each of `PUBLISHED`."""

    loss: float
    half_width: float
    laws: tuple[Law, ...]
    terms_fitted: bool  # A and B apart, and not only their common scale
    misfit: float  # the largest share by which a run is off the fit


def layer_parameters(shape: TransformerConfig) -> int:
    """Parameters without those of embeddings and head."""
    counts = count_parameters(shape)
    return sum(counts.get(part, 0) for part in ("attention", "mlp", "norms"))


def propose(config: PretrainConfig, shape: TransformerConfig, total_steps: int) -> list[Rung]:
    """Three small runs for a large one; `UserError` where the model is a folder's, or too small for smaller ones."""
    if config.model.from_:
        raise UserError("model.from: a ladder is of models from random weights; give model.preset and the sizes")
    rungs: list[Rung] = []
    for share in SHARES:
        model = _smaller(config, shape, share)
        length = config.train.sequence_length
        small = resolve_shape(model, vocab_size=shape.vocab_size, sequence_length=length)
        ratio = layer_parameters(small) / layer_parameters(shape)
        train, least = config.train, math.gcd(config.train.global_batch, 8)
        batch = max(least, round(train.global_batch * ratio ** (2 / 3) / least) * least)
        steps = max(1, round(total_steps * train.global_batch * ratio / batch))
        schedule, shrunk = config.schedule, steps / total_steps
        schedule = replace(
            schedule,
            warmup_steps=round(schedule.warmup_steps * shrunk),
            decay_steps=schedule.decay_steps and max(1, round(schedule.decay_steps * shrunk)),
            restart_steps=schedule.restart_steps and max(1, round(schedule.restart_steps * shrunk)),
        )
        rate = min(config.optim.lr * ratio ** (-1 / 3), max(LARGEST_RATE, config.optim.lr))
        made = replace(
            config,
            run=replace(config.run, dir=f"{config.run.dir}-ladder-{len(rungs) + 1}"),
            model=model,
            train=replace(train, global_batch=batch, steps=steps, epochs=None),
            schedule=schedule,
            optim=replace(config.optim, lr=float(f"{rate:.3g}")),
        )
        rungs.append(Rung(made, small, steps))
    sizes = [layer_parameters(rung.shape) for rung in rungs]
    if sorted(set(sizes)) != sizes or sizes[-1] * 2 > layer_parameters(shape):
        raise UserError(f"model: {layer_parameters(shape):,} parameters of layers are too few for a ladder below them")
    return rungs


def _smaller(config: PretrainConfig, shape: TransformerConfig, share: float) -> Any:
    """The [model] section with `share` of the layers' parameters: less wide and deep alike, with heads as wide."""
    heads = max(1, round(shape.num_heads * share ** (1 / 3)))
    hidden = shape.hidden_size * heads // shape.num_heads
    grouped = max(1, heads * shape.kv_heads // shape.num_heads)
    kv_heads = max(count for count in range(1, grouped + 1) if heads % count == 0)
    model = replace(
        config.model,
        hidden_size=hidden,
        num_heads=heads,
        num_layers=1,
        num_kv_heads=kv_heads if config.model.num_kv_heads or "num_kv_heads" in shape.family.sizes else None,
        intermediate_size=hidden * shape.intermediate_size // shape.hidden_size,
    )
    length = config.train.sequence_length
    one = layer_parameters(resolve_shape(model, vocab_size=shape.vocab_size, sequence_length=length))
    return replace(model, num_layers=max(1, round(layer_parameters(shape) * share / one)))


def proposal_lines(config: PretrainConfig, shape: TransformerConfig, total_steps: int) -> Iterator[str]:
    """The ladder of a recipe, with the command of each run."""
    with located(config):
        rungs = propose(config, shape, total_steps)
    length = config.train.sequence_length
    large = Rung(config, shape, total_steps)
    operations = [flops_per_token(rung.shape, length) * rung.tokens for rung in (*rungs, large)]
    row = "{:<14}{:>10}{:>8}{:>8}{:>8}{:>9}{:>9}{:>10}{:>12}".format
    yield row("run", "layers' N", "layers", "hidden", "batch", "steps", "tokens", "peak lr", "operations")
    for name, rung, spent in zip(("ladder 1", "ladder 2", "ladder 3", "the large one"), (*rungs, large), operations):
        sizes = (short_number(layer_parameters(rung.shape)), rung.shape.num_layers, rung.shape.hidden_size)
        numbers = (rung.config.train.global_batch, f"{rung.steps:,}", short_number(rung.tokens))
        yield row(name, *sizes, *numbers, f"{rung.config.optim.lr:.3g}", f"{spent / operations[-1]:.2%}")
    if any(rung.config.optim.lr >= LARGEST_RATE > config.optim.lr for rung in rungs):
        yield f"peak lr: {LARGEST_RATE:g} at most; it would be higher"
    yield ""
    for rung in rungs:
        yield " ".join(["python -m gloria.pretrain --config", config.source_file, *_flags(config, rung)])
    yield f"python -m gloria.plan --config {config.source_file} --ladder " + " ".join(r.config.run.dir for r in rungs)


def _flags(config: PretrainConfig, rung: Rung) -> Iterator[str]:
    """What a rung has otherwise than the recipe's file, as flags; those of this command are among them."""
    before, now = (flatten(to_mapping(part)) for part in (config, rung.config))
    own = {key for key in now if "." in key and (now[key] != before[key] or key in config.key_sources)}
    for key in sorted(own - {"train.micro_batch"}):
        if now[key] is not None:
            text = now[key] if isinstance(now[key], str) else show_value(now[key])
            yield f"--{key} {shlex.quote(text)}"
    train = rung.config.train
    if train.global_batch % train.filled_micro_batch:
        yield f"--train.micro_batch {math.gcd(train.global_batch, train.filled_micro_batch)}"
    if not config.valid.every:
        yield f"--valid.every {rung.steps}"


def read_points(folders: Sequence[str]) -> list[Point]:
    """What the runs in some folders came to; `UserError` has each that is not done, or does not compare."""
    points, tokenizers, weights = [], [], []
    problems: list[str] = []
    for folder in map(Path, folders):
        try:
            point, state, shares = _read_point(folder)
        except UserError as error:
            problems += error.problems
            continue
        points.append(point)
        tokenizers.append(state["mixture"]["fingerprints"]["tokenizer"])
        weights.append(shares)
    if len(set(tokenizers)) > 1:
        problems.append("--ladder: the runs have other tokenizers, so losses do not compare; name runs of one corpus")
    if problems:
        raise UserError(*problems)
    if len(points) < 3:
        raise UserError(f"--ladder: {len(points)} runs are too few for a fit; name three or more")
    if any(shares != weights[0] for shares in weights):
        warn("--ladder: the runs' validation losses are of other weights, so they compare only roughly")
    return points


def _read_point(folder: Path) -> tuple[Point, Mapping[str, Any], Mapping[str, float]]:
    if (status := read_status(folder)).status != "done":
        raise UserError(f"{folder}: its run is {status.status} at step {status.step}; a fit needs runs that are done")
    steps = saved_steps(folder)
    if not steps:
        raise UserError(f"{folder}: holds no checkpoint, which has the model's shape and its tokens")
    file = checkpoint_path(folder, steps[-1]) / TRAINER
    state = parse_json_object(read_bounded(file), file).get("state")
    with open(open_plain(folder / METRICS), encoding="utf-8") as lines:
        valid = [line for line in map(json.loads, lines) if line["kind"] == "valid" and line["loss"] is not None]
    if not valid or valid[-1]["step"] != steps[-1]:
        raise UserError(f"{folder}: has no validation of its last step, {steps[-1]}; train with valid.every above 0")
    try:
        shape = TransformerConfig.from_dict(state["model"])  # type: ignore[index]
        point = Point(str(folder), layer_parameters(shape), int(state["tokens"]), float(valid[-1]["loss"]))  # type: ignore[index]
        return point, state, valid[-1]["weights"]  # type: ignore[return-value]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{file}: is not of a pre-training; name runs of gloria.pretrain") from None


def fit(points: Sequence[Point], published: Law, *, terms_apart: bool = False) -> Law:
    """The law with the exponents of `published` that fits best: E and the scale of both terms, or each term's own.

    Squares of the logarithm's residuals, which Huber's loss bounds where there are runs enough to call one an outlier.
    """
    n, d, losses = (np.array([getattr(p, key) for p in points], float) for key in ("parameters", "tokens", "loss"))
    terms = np.stack([published.a / n**published.alpha, published.b / d**published.beta])  # (2, points)
    terms = terms if terms_apart else terms.sum(axis=0, keepdims=True)
    columns = np.concatenate([np.ones_like(terms[:1]), terms])  # (1 + terms, points)
    start = np.maximum(nnls((columns / losses).T, np.ones_like(losses))[0], 1e-6)
    bounded = {"loss": "huber", "f_scale": HUBER} if len(points) >= MANY else {}
    found = least_squares(lambda logs: np.log(np.exp(logs) @ columns) - np.log(losses), np.log(start), **bounded)
    floor, *scales = np.exp(found.x).tolist()
    return replace(published, floor=floor, a=scales[0] * published.a, b=scales[-1] * published.b)


def predict(points: Sequence[Point], parameters: int, tokens: int) -> Prediction:
    """The loss of a run of `tokens` with `parameters` in its layers.

    The interval is twice the root of two squares: the jackknife's standard error (each run left out in turn), and half
    the range of the predictions by the exponents of `PUBLISHED`.
    """
    ratios = [point.tokens / point.parameters for point in points]
    apart = len(points) >= MANY and max(ratios) > 2 * min(ratios)

    def mean_of(chosen: Sequence[Point]) -> tuple[float, list[float], tuple[Law, ...]]:
        laws = tuple(fit(chosen, published, terms_apart=apart) for published in PUBLISHED)
        losses = [law.loss(parameters, tokens) for law in laws]
        return sum(losses) / len(losses), losses, laws

    loss, by_exponents, laws = mean_of(points)
    left_out = [mean_of([*points[:number], *points[number + 1 :]])[0] for number in range(len(points))]
    error = float(np.std(left_out)) * math.sqrt(len(points) - 1)
    spread = (max(by_exponents) - min(by_exponents)) / 2
    fitted = (sum(law.loss(point.parameters, point.tokens) for law in laws) / len(laws) for point in points)
    misfit = max(abs(value / point.loss - 1) for value, point in zip(fitted, points))
    return Prediction(loss, 2 * math.hypot(error, spread), laws, apart, misfit)


def prediction_lines(shape: TransformerConfig, tokens: int, folders: Sequence[str]) -> Iterator[str]:
    """What the ladder's runs came to, the fit, and the large run's loss."""
    points = read_points(folders)
    parameters = layer_parameters(shape)
    found = predict(points, parameters, tokens)
    row = "{:<32}{:>10}{:>10}{:>9}{:>9}".format
    yield row("run", "layers' N", "tokens", "loss", "fitted")
    for point in points:
        fitted = sum(law.loss(point.parameters, point.tokens) for law in found.laws) / len(found.laws)
        sizes = (short_number(point.parameters), short_number(point.tokens))
        yield row(point.run[-31:], *sizes, f"{point.loss:.4f}", f"{fitted:.4f}")
    what = "E, A and B" if found.terms_fitted else "E and the common scale of both terms"
    yield "fit          L = E + A / N^alpha + B / D^beta"
    yield f"  {what}; the rest is published: {len(points)} runs tell no more"
    for law in found.laws:
        yield f"  {law.source}  E {law.floor:.3f}, A {law.a:.4g}, alpha {law.alpha:g}, B {law.b:.4g}, beta {law.beta:g}"
    low, high = found.loss - found.half_width, found.loss + found.half_width
    large = f"{short_number(parameters)} parameters in the layers, {short_number(tokens)} tokens"
    yield f"prediction   loss {found.loss:.4f}, between {low:.4f} and {high:.4f}, of {large}"
    yield f"  perplexity {perplexity(found.loss):.2f}, between {perplexity(low):.2f} and {perplexity(high):.2f}"
    yield (
        "interval     about 95 %: each run left out in turn, and the exponents of three papers; it knows nothing of "
        "repeated text, other data or a run that diverges"
    )
    if found.misfit > MOST_MISFIT:
        yield (
            f"NOT A LAW    a run is {found.misfit:.1%} off the fit, which seeds do not make, so the interval does not "
            "hold: runs too short (under some million tokens), rates that do not fit, or repeated text"
        )
    anchors = ", ".join(f"{law.loss(parameters, tokens):.2f} ({law.source})" for law in PUBLISHED)
    yield f"published    of other text and tokenizers, for this size: {anchors}"
