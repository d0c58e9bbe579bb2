"""How much of a step is neither forward, backward nor optimizer: the price of the loop itself.

    python bench/loop.py [--steps 30]

Runs the steps of `gloria.train.loop` in this process, on the sample corpus, with clocks around the model and the
optimizer, and prints the rest as a share of the whole: waiting for data, the packed all-reduce, gradient norm and
clipping, the log. One rank, so that nothing here is the waiting of one rank for another.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gloria.pretrain as pretrain
from gloria.prepare import main as prepare
from gloria.train import loop
from gloria.train.group import process_group
from gloria.train.pretraining import open_pretraining
from gloria.train.run import close_run

RECIPE = Path(__file__).resolve().parent.parent / "launch"


def timed(function: Callable[..., Any], clock: dict[str, float], name: str) -> Callable[..., Any]:
    """`function` with its seconds added to `clock[name]`."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        clock[name] = clock.get(name, 0.0) + time.perf_counter() - start
        return result

    return wrapped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        corpus = f"{folder}/sample"
        prepare([str(RECIPE / "sample.toml"), "--out", corpus])
        config, plan = pretrain.check(
            [
                *("--config", str(RECIPE / "demo.toml"), "--data.corpus", corpus, "--run.dir", f"{folder}/run"),
                *("--train.steps", str(steps), "--checkpoint.every", "1000000", "--valid.every", "0"),
            ]
        )
        clock: dict[str, float] = {}
        with process_group(config) as process:
            run = open_pretraining(config, plan, process)
            for name in ("forward_backward", "update", "gradient_square_sum", "all_reduce_sums", "finish_step"):
                setattr(loop, name, timed(getattr(loop, name), clock, name))
            loop.take_step(run, run.objective.next_batch(run))  # the first step allocates
            clock.clear()
            start = time.perf_counter()
            loop.take_steps(run)
            whole = time.perf_counter() - start
            close_run(run, "stopped")
    rest = whole - clock["forward_backward"] - clock["update"]
    print(f"{steps - 1} steps of the demo, one rank: {1000 * whole / (steps - 1):.1f} ms a step")
    for name, seconds in sorted(clock.items(), key=lambda item: -item[1]):
        print(f"  {name:<22}{100 * seconds / whole:7.2f} %")
    print(f"outside forward, backward and optimizer: {100 * rest / whole:.2f} % (aim: 1 %)")


if __name__ == "__main__":
    main()
