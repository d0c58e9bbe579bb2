"""Kill runs at random until they are done, and compare what comes out with runs that nobody touched.

    python bench/chaos.py [--kills 50] [--ends 20] [--seed 1] [--folder DIR]

Same ranks: a run on 2 ranks is killed (SIGKILL) at random moments: all ranks, one rank only, and while a checkpoint
is written in the background; it is started again until it is done. Parameters, optimizer state, losses, validation
losses and sample ids must be those of the undisturbed run, bit for bit. Other ranks: the same, started again on 1, 2
and 4 ranks in turn: the same samples, and losses within 1e-5. Clean ends: runs on 4 ranks that must all end with
status 0.

Also told: seconds from a signal to the status `stopped` and to the end of the last process, and from the start of the
ranks (torch loaded) to the first step of a resume. Leaves with status 1 at the first difference.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gloria.dist.checkpoint
from gloria.data.mixture import mixture_from_state
from gloria.dist.checkpoint_read import find_checkpoint, read_full_tensors, read_trainer
from gloria.dist.manifest import checkpoints_folder
from gloria.dist.run_lock import read_status
from gloria.prepare import main as prepare
from tests import launch
from tests.launch import SMALL, flags, losses, metrics

STEPS = 60
WAYS = ("all ranks", "one rank", "in a background save")
REPOSITORY = Path(__file__).resolve().parent.parent


def slow_saves() -> None:
    """In each rank: a save in the background takes long enough to be hit, in the midst and before and behind."""
    honest = gloria.dist.checkpoint.write_tensor_file

    def write_tensor_file(*args: Any, **kwargs: Any) -> Any:
        background = threading.current_thread() is not threading.main_thread()
        time.sleep(0.05 if background else 0)
        written = honest(*args, **kwargs)
        time.sleep(0.05 if background else 0)
        return written

    gloria.dist.checkpoint.write_tensor_file = write_tensor_file


def kill_somehow(way: str, under_way: launch.Launch, run_dir: Path, chance: random.Random) -> bool:
    """Kill at a random moment in the given way; False where the run was done before."""
    done = wait_for_moment(way, under_way, run_dir, chance)
    if done:
        return False
    if way == "one rank":
        victim = chance.choice(under_way.processes)
        victim.kill()
        victim.join()
        for process in under_way.processes:  # ends by itself, or by its launcher where it waits for others to start
            process.join(15)
    under_way.kill()
    return True


def wait_for_moment(way: str, under_way: launch.Launch, run_dir: Path, chance: random.Random) -> bool:
    """Wait for a random moment: in start-up, some steps later, or behind the begin of a save. True: it was too late."""

    def ended() -> bool:
        return any(process.exitcode is not None for process in under_way.processes)

    if way == "in a background save":
        seen = set(half_written(run_dir))
        wait_until(lambda: set(half_written(run_dir)) - seen or ended())
        time.sleep(chance.uniform(0, 0.12))
    elif chance.random() < 0.25:  # in start-up
        time.sleep(chance.uniform(0, 1.5))
    else:
        goal = last_step(run_dir) + chance.randrange(1, 15)
        wait_until(lambda: last_step(run_dir) >= goal or ended())
        time.sleep(chance.uniform(0, 0.05))
    return ended()


def half_written(run_dir: Path) -> list[str]:
    folder = checkpoints_folder(run_dir)
    return [path.name for path in folder.iterdir() if ".tmp-" in path.name] if folder.is_dir() else []


def last_step(run_dir: Path) -> int:
    """The last step in metrics.jsonl, read from its end."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes()[-20_000:].split(b"\n")[1:-1] if path.exists() else []
    return max((line["step"] for line in map(json.loads, lines) if line["kind"] == "train"), default=0)


def wait_until(condition: Callable[[], Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"nothing happened for {seconds:g} s"
        time.sleep(0.01)


def outcome(run_dir: Path) -> dict[str, Any]:
    """All that must be the same: tensors, losses by step, validation losses, (source, epoch, window) of each sample."""
    trainer = read_trainer(find_checkpoint(run_dir))
    mixture = mixture_from_state(trainer["mixture"])
    return {
        "tensors": dict(read_full_tensors(find_checkpoint(run_dir))),
        "losses": losses(run_dir),
        "valid": [(line["step"], line["loss"]) for line in metrics(run_dir, "valid")],
        "tokens": [line["tokens"] for line in metrics(run_dir, "train")],
        "samples": [array.tolist() for array in mixture.plan(0, mixture.next_sample)],
    }


def compare(found: dict[str, Any], expected: dict[str, Any], *, bits: bool) -> None:
    assert sorted(found["losses"]) == list(range(1, STEPS + 1)), "a step is missing in metrics.jsonl"
    assert found["samples"] == expected["samples"], "other samples"
    assert found["tokens"] == expected["tokens"], "other token counts"
    if bits:
        assert found["losses"] == expected["losses"], "other losses"
        assert found["valid"] == expected["valid"], "other validation losses"
        one, other = found["tensors"], expected["tensors"]
        assert one.keys() == other.keys()
        different = [name for name in one if not torch.equal(one[name], other[name])]
        assert not different, f"other bits in {different}"
        return
    worst = max(abs(found["losses"][step] / loss - 1) for step, loss in expected["losses"].items())
    assert worst < 1e-5, f"losses differ by {worst:.2g}"
    print(f"  greatest relative difference of a loss: {worst:.2g}")


def disturb(
    recipe: dict[str, Any], expected: dict[str, Any], folder: Path, kills: int, worlds: list[int], chance: random.Random
) -> None:
    """Runs that are killed `kills` times in all, each compared at its end."""
    counts: collections.Counter[str] = collections.Counter()
    runs = starts = killed = 0
    ways = [WAYS[number % len(WAYS)] for number in range(kills)]
    chance.shuffle(ways)
    while killed < kills:
        run_dir = folder / f"run-{len(worlds)}-{runs}"
        while not (run_dir / "status.json").exists() or read_status(run_dir).status != "done":
            world = worlds[starts % len(worlds)]
            options = flags(recipe, run__dir=run_dir, train__micro_batch=3 if world < 4 else 1)
            under_way = launch.start(options, world, folder, prepare=slow_saves)
            starts += 1
            if killed < kills and kill_somehow(ways[killed], under_way, run_dir, chance):
                counts[ways[killed]] += 1
                killed += 1
                continue
            statuses = under_way.wait(300)
            assert set(statuses) == {0}, f"{statuses}\n{under_way.text()}"
        compare(outcome(run_dir), expected, bits=len(worlds) == 1)
        runs += 1
        print(f"  {killed} of {kills} kills, {runs} runs done and compared", flush=True)
    told = ", ".join(f"{number} {way}" for way, number in sorted(counts.items()))
    print(f"{killed} kills ({told}), {starts} starts, {runs} runs: all as the undisturbed one")


def time_stops(recipe: dict[str, Any], folder: Path, repeats: int) -> None:
    """Stop runs and go on with them: see the figures at the top of this file."""
    stopped, ended, resumed = [], [], []
    for number in range(repeats):
        run_dir = folder / f"stop-{number}"
        options = flags(recipe, run__dir=run_dir, train__steps=100_000, checkpoint__every=100_000, valid__every=0)
        under_way = launch.start(options, 2, folder)
        launch.wait_for_step(run_dir, 5, under_way)
        begin = time.monotonic()
        for rank in range(2):
            under_way.signal(signal.SIGTERM, rank)
        while read_status(run_dir).status != "stopped":
            time.sleep(0.005)
        stopped.append(time.monotonic() - begin)
        assert under_way.wait() == [0, 0], under_way.text()
        ended.append(time.monotonic() - begin)

        begin = time.monotonic()
        under_way = launch.start(options, 2, folder)
        launch.wait_for_step(run_dir, read_status(run_dir).step + 1, under_way)
        resumed.append(time.monotonic() - begin)
        under_way.kill()
    stop, end, resume = (statistics.median(seconds) for seconds in (stopped, ended, resumed))
    print(f"SIGTERM to `stopped`: {stop:.2f} s, to the end of the last rank: {end:.2f} s (medians of {repeats})")
    print(f"start of 2 ranks to the first step of a resume: {resume:.2f} s (median of {repeats})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="on the same ranks; a fifth as many more on others")
    parser.add_argument("--ends", type=int, default=20, help="runs on 4 ranks that must end cleanly")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where the runs go; default: a folder that is removed")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        corpus = folder / "corpus"
        prepare([str(REPOSITORY / "launch/sample.toml"), "--out", str(corpus), "--workers", "1"])
        recipe: dict[str, Any] = {"config": REPOSITORY / "launch/demo.toml", "data.corpus": corpus, **SMALL}
        recipe |= {"train.steps": STEPS, "checkpoint.every": 5, "valid.every": 20, "valid.windows": 12}
        recipe |= {"dist.step_timeout_minutes": 5.0}

        dropout = recipe | {"model.dropout": 0.1}
        launch.run(flags(dropout, run__dir=folder / "whole"), 2, folder)
        print(f"the same 2 ranks, {arguments.kills} kills")
        disturb(dropout, outcome(folder / "whole"), folder, arguments.kills, [2], chance)

        # Without dropout, whose random numbers belong to a rank.
        launch.run(flags(recipe, run__dir=folder / "plain"), 2, folder)
        kills = -(-arguments.kills // 5)
        print(f"1, 2 and 4 ranks in turn, {kills} kills")
        disturb(recipe, outcome(folder / "plain"), folder, kills, [1, 2, 4], chance)

        time_stops(recipe, folder, 5)
        for number in range(arguments.ends):
            options = flags(recipe, run__dir=folder / f"end-{number}", train__steps=3, train__micro_batch=1)
            launch.run(options, 4, folder)
        print(f"clean ends on 4 ranks: {arguments.ends} of {arguments.ends}")


if __name__ == "__main__":
    main()
