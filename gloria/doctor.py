"""Is this machine, or every node of this job, fit for a run? Looked at before the hours are spent.

    python -m gloria.doctor [the arguments of gloria.pretrain]
    srun --nodes 4 --ntasks-per-node 8 --gpus-per-node 8 python -m gloria.doctor --config launch/gloria-1.3b.toml

Every rank looks at its node, the ranks exchange what they found, and rank 0 prints a table: what was found, what
is wrong and what to do about it. Exit status 2 where something is wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import socket
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import gloria
from gloria.config.cli import to_mapping
from gloria.dist import interface
from gloria.dist.agreement import gather
from gloria.dist.environment import Environment, read_environment
from gloria.dist.gpus import c_compiler
from gloria.dist.manifest import saved_steps
from gloria.dist.process import (
    OTHER_TORCH,
    gpu_index,
    has_own_gpu,
    start_process_group,
    stop_process_group,
    without_code,
)
from gloria.errors import UserError, run_command
from gloria.files import size_text
from gloria.model.memory import saved_bytes
from gloria.train.config import PretrainConfig, RunPlan, plan_run, read_pretrain_config

PACKAGES = ("numpy", "safetensors", "tokenizers", "torch", "transformers")
WAIT_MINUTES = 2.0  # for the slowest rank to start
MOST_SKEW = 2.0  # seconds between clocks: beyond it, times in logs of several nodes mislead
READ_BYTES, READ_SECONDS = 256 << 20, 5.0  # of the corpus, by each node: the first limit that is met
CHUNK_BYTES = 8 << 20

Facts = dict[str, Any]  # what one rank found out: plain JSON


@dataclass(frozen=True)
class Row:
    """A line of the table; an empty `remedy` says that nothing is wrong."""

    check: str
    found: str
    remedy: str = ""


def main(argv: list[str] | None = None) -> int:
    """Look and report; exit status 2 where something is wrong."""
    environment = read_environment()
    config, plan, problem = _read_recipe(argv)
    start_process_group("cpu", WAIT_MINUTES)
    facts = gather(
        {
            "node": socket.gethostname(),
            "rank": environment.rank,
            "first": environment.local_rank == 0,  # of its node
            "local_world": environment.local_world,
            "cores": len(os.sched_getaffinity(0)),
            "versions": versions(),
            "gpus": gpus(),
            "own_gpu": has_own_gpu(environment),
            "no_code": next(filter(None, map(without_code, range(torch.cuda.device_count()))), ""),
            "compiler": c_compiler(),
            "interface": interface.in_use(),
            "nccl": os.environ.get("NCCL_SOCKET_IFNAME", ""),
            "faster": interface.faster_than_used(),
            "recipe": hashlib.sha256(json.dumps(to_mapping(config)).encode()).hexdigest() if config else "",
            "problem": problem,
            "tokenizer": plan.corpus.manifest.tokenizer.fingerprint if plan else "",
        }
    )
    rows = [_versions_row(facts), _gpu_row(facts), _network_row(facts), _recipe_row(facts)]
    if config and (any(fact["gpus"] for fact in facts) if config.train.compile == "auto" else config.train.compile):
        rows.append(_compiler_row(facts))
    rows.append(_clock_row(facts, _clock_offsets()))
    rows.append(_all_reduce_row(environment, facts, plan))
    # With a recipe that is wrong anywhere, no rank goes into what needs it: the others would wait there.
    if config and plan and not any(fact["problem"] for fact in facts):
        rows.append(_corpus_row(environment, plan))
        rows.append(_shared_row(environment, facts, Path(config.run.dir)))
        rows.append(_disk_row(config, plan))
    problems = sum(bool(row.remedy) for row in rows)
    if environment.rank == 0:
        nodes = len({fact["node"] for fact in facts})
        print(f"{environment.world} ranks on {nodes} nodes, started by {environment.launcher}")
        for row in rows:
            print(f"{'WRONG' if row.remedy else 'ok':<6} {row.check:<11} {row.found}")
            if row.remedy:
                print(f"{'':<18} -> {row.remedy}")
        print("nothing is wrong" if not problems else f"{problems} of {len(rows)} checks found something wrong")
    stop_process_group()
    return 2 if problems else 0


def versions() -> dict[str, str]:
    """Of what decides about numbers and file formats."""
    found = {"gloria": gloria.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    if torch.cuda.is_available():
        found |= {"cuda": str(torch.version.cuda), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    driver = Path("/proc/driver/nvidia/version")
    if driver.exists() and (number := re.search(r"\d+\.\d+(\.\d+)?", driver.read_text())):
        found["nvidia driver"] = number[0]
    return found


def gpus() -> list[str]:
    """Name and memory of each GPU that this rank sees."""
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [f"{card.name}, {card.total_memory / 2**30:.0f} GB" for card in found]


def _read_recipe(argv: list[str] | None) -> tuple[PretrainConfig | None, RunPlan | None, str]:
    """The recipe and its plan, or what is wrong with them: on one node alone that must not leave the others waiting."""
    try:
        config: PretrainConfig = read_pretrain_config(
            argv,
            prog="python -m gloria.doctor",
            description="Check whether this machine, or every node of this job, is fit for a run of gloria.pretrain.",
        )
        return config, plan_run(config), ""
    except UserError as error:
        return None, None, "; ".join(error.problems)


def by_value(facts: list[Facts], value: Callable[[Facts], str]) -> str:
    """`2.13.0 on node1; 2.11.0 on node2, node3`, or the one value all nodes share."""
    nodes: dict[str, list[str]] = {}
    for fact in facts:
        held = nodes.setdefault(value(fact), [])
        if fact["node"] not in held:
            held.append(fact["node"])
    if len(nodes) == 1:
        return next(iter(nodes))
    return "; ".join(f"{text} on {', '.join(names)}" for text, names in nodes.items())


def alike(facts: list[Facts], value: Callable[[Facts], str]) -> bool:
    """Whether all ranks say the same."""
    return len({value(fact) for fact in facts}) == 1


def _versions_row(facts: list[Facts]) -> Row:
    names = sorted({name for fact in facts for name in fact["versions"]})
    found_on = [{**dict.fromkeys(names, "none"), **fact["versions"], "node": fact["node"]} for fact in facts]
    others = [name for name in names if not alike(found_on, itemgetter(name))]
    if others:
        found = [f"{name} {by_value(found_on, itemgetter(name))}" for name in others]
        return Row("versions", " | ".join(found), "use one environment on all nodes (a shared folder, or one image)")
    return Row("versions", ", ".join(f"{name} {number}" for name, number in sorted(facts[0]["versions"].items())))


def _gpu_row(facts: list[Facts]) -> Row:
    def cards(fact: Facts) -> str:
        names = sorted(set(fact["gpus"]))
        return f"{len(fact['gpus'])} x {' and '.join(names)}" if names else "none"

    if not any(fact["gpus"] for fact in facts):
        threads = max(1, facts[0]["cores"] // facts[0]["local_world"])
        return Row("gpus", f"none: ranks run on CPU, each with {threads} of its node's {facts[0]['cores']} cores")
    if not alike(facts, cards):
        return Row(
            "gpus", by_value(facts, cards), "ask for nodes of one kind: sbatch --constraint or --gres=gpu:KIND:N"
        )
    if any(len(set(fact["gpus"])) > 1 for fact in facts):
        return Row(
            "gpus", cards(facts[0]), "use cards of one kind: the slowest, and the smallest memory, sets the pace"
        )
    if without := next((fact["no_code"] for fact in facts if fact["no_code"]), ""):
        return Row("gpus", without, OTHER_TORCH)
    if facts[0]["own_gpu"]:
        return Row("gpus", f"{cards(facts[0])} for each of {facts[0]['local_world']} ranks of a node")
    if facts[0]["local_world"] > len(facts[0]["gpus"]):
        ranks, count = facts[0]["local_world"], len(facts[0]["gpus"])
        return Row("gpus", f"{cards(facts[0])} for {ranks} ranks a node", f"start {count} ranks a node, one a GPU")
    return Row("gpus", f"{cards(facts[0])} a node, {facts[0]['local_world']} ranks")


def _compiler_row(facts: list[Facts]) -> Row:
    found = by_value(facts, lambda fact: fact["compiler"] or "none")
    if all(fact["compiler"] for fact in facts):
        return Row("compiler", found)
    remedy = "torch.compile needs gcc there: install it, load its module, or set train.compile to false"
    return Row("compiler", found, remedy)


def _network_row(facts: list[Facts]) -> Row:
    """Which interface connects the nodes, and whether one of them has a faster one."""
    if len({fact["node"] for fact in facts}) == 1:
        return Row("network", "one node: nothing goes over it")
    found = f"gloo by {by_value(facts, lambda fact: fact['interface'])}"
    if any(fact["gpus"] for fact in facts):
        found += f"; NCCL by {by_value(facts, lambda fact: fact['nccl'] or 'its own choice')}"
    slow = next((fact for fact in facts if fact["faster"]), None)
    if slow:
        name = slow["faster"].partition(" ")[0]
        return Row(
            "network",
            f"{found}; {slow['node']} has {slow['faster']}",
            f"if it leads to the other nodes, name it: GLORIA_INTERFACE={name} sbatch ...",
        )
    return Row("network", found)


def _recipe_row(facts: list[Facts]) -> Row:
    if any(fact["problem"] for fact in facts):
        return Row("recipe", by_value(facts, lambda fact: fact["problem"] or "right"), "fix it and rerun")
    for key in ("recipe", "tokenizer"):
        if not alike(facts, itemgetter(key)):
            found = by_value([{**fact, key: fact[key][:8]} for fact in facts], itemgetter(key))
            return Row("recipe", f"{key} {found}", "give all nodes the same file, flags and corpus")
    return Row("recipe", "the same on all ranks, and nothing wrong with it")


def _clock_offsets() -> list[float]:
    """Each rank's clock less rank 0's, in seconds: the median of some looks, each right after a meeting."""
    looks = []
    for _ in range(9):
        dist.all_reduce(torch.zeros(1))
        now = torch.tensor([time.time()], dtype=torch.float64)
        times = [torch.zeros_like(now) for _ in range(dist.get_world_size())]
        dist.all_gather(times, now)
        looks.append([float(moment - times[0]) for moment in times])
    return [statistics.median(column) for column in zip(*looks)]


def _clock_row(facts: list[Facts], offsets: list[float]) -> Row:
    worst = max(range(len(offsets)), key=lambda rank: abs(offsets[rank]))
    found = f"within {abs(offsets[worst]):.3f} s of each other"
    if abs(offsets[worst]) <= MOST_SKEW:
        return Row("clocks", found)
    found = f"{facts[worst]['node']} is {offsets[worst]:+.1f} s off {facts[0]['node']}"
    return Row("clocks", found, "have chrony or ntpd running on all nodes")


def _all_reduce_row(environment: Environment, facts: list[Facts], plan: RunPlan | None) -> Row:
    """Time of an all-reduce between all ranks, by NCCL where every rank has a GPU of its own."""
    if environment.world == 1:
        return Row("all-reduce", "one rank: nothing to measure")
    on_gpu = all(fact["own_gpu"] or len(fact["gpus"]) >= fact["local_world"] for fact in facts)
    device = torch.device("cuda", gpu_index(environment)) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    group = dist.new_group(backend="nccl" if on_gpu else "gloo")
    values = torch.ones((64 if on_gpu else 4) << 20, device=device)
    right, seconds = True, []
    for _ in range(6):
        values.fill_(1.0)
        dist.all_reduce(torch.zeros(1))  # all begin together
        started = time.perf_counter()
        dist.all_reduce(values, group=group)
        right &= bool((values == environment.world).all())  # waits for the device
        seconds.append(time.perf_counter() - started)
    slowest = max(fact["seconds"] for fact in gather({"seconds": statistics.median(seconds[1:])}))
    # What each link carries, whatever the number of ranks (nccl-tests' "bus bandwidth").
    speed = 2 * (environment.world - 1) / environment.world * values.numel() * 4 / slowest
    found = f"{speed / 1e9:.2f} GB/s by {'NCCL' if on_gpu else 'gloo'} between {environment.world} ranks"
    if plan:
        # Weights are gathered twice and gradients (fp32) scattered once.
        moved = (8 if on_gpu else 12) * plan.parameters["total"]
        found += f"; a step of this model moves {size_text(moved)}, that is {moved / speed:.2g} s if nothing overlaps"
    if not all(fact["right"] for fact in gather({"right": right})):
        return Row("all-reduce", f"{found}; the sums are wrong", "take the nodes out one by one to find the broken one")
    return Row("all-reduce", found)


def _corpus_row(environment: Environment, plan: RunPlan) -> Row:
    """Every node reads some of the shards at once, past its page cache."""
    own: Facts = {"node": socket.gethostname(), "problem": "", "bytes": 0}
    if environment.local_rank == 0:
        try:
            own["bytes"], own["seconds"] = _read_some(plan.corpus.folder)
        except OSError as error:
            own["problem"] = f"{error.filename}: cannot be read ({error.strerror})"
    facts = [fact for fact in gather(own) if fact["bytes"] or fact["problem"]]
    if any(fact["problem"] for fact in facts):
        found = by_value(facts, lambda fact: fact["problem"] or "right")
        return Row("corpus", found, "put the corpus where all nodes can read it")
    slowest = min(facts, key=lambda fact: fact["bytes"] / fact["seconds"])
    speed = slowest["bytes"] / slowest["seconds"] / 1e6
    where = f"{slowest['node']}, the slowest of {len(facts)} nodes that read at once, " if len(facts) > 1 else ""
    return Row("corpus", f"{speed:,.0f} MB/s ({where}{size_text(slowest['bytes'])})")


def _read_some(folder: Path) -> tuple[int, float]:
    """Bytes read, and seconds."""
    buffer, taken, started = bytearray(CHUNK_BYTES), 0, time.perf_counter()
    for path in sorted(folder.rglob("*.bin")):
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while count := file.readinto(buffer):
                taken += count
                if taken >= READ_BYTES or time.perf_counter() - started > READ_SECONDS:
                    return taken, time.perf_counter() - started
    return taken, time.perf_counter() - started


def _shared_row(environment: Environment, facts: list[Facts], folder: Path) -> Row:
    """Every node must see what rank 0 writes in the run's folder, and rank 0 what they write."""
    rank, node = environment.rank, socket.gethostname()
    mark = gather({"mark": secrets.token_hex(8)})[0]["mark"]
    files = {fact["rank"]: folder / f".doctor-{mark}-{fact['rank']}" for fact in facts if fact["first"]}
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    problem = ""
    if rank == 0:
        problem = _attempt(lambda: folder.mkdir(parents=True, exist_ok=True)) or _attempt(files[0].touch)
    seen = gather({"node": node, "problem": problem})
    if not seen[0]["problem"]:
        if rank in files and rank != 0:
            problem = f"what {seen[0]['node']} writes is not seen"
            if files[0].exists():
                problem = _attempt(files[rank].touch)
        seen = gather({"node": node, "problem": problem})
        if rank == 0:
            lost = [
                seen[other]["node"] for other, file in files.items() if not seen[other]["problem"] and not file.exists()
            ]
            problem = f"what {', '.join(lost)} writes is not seen" if lost else ""
        seen = gather({"node": node, "problem": problem})
        with suppress(OSError):
            if rank in files:
                files[rank].unlink()
    gather({})  # nobody looks any more
    if rank == 0:
        with suppress(OSError):
            for path in made:
                path.rmdir()
    if any(fact["problem"] for fact in seen):
        found = by_value(seen, lambda fact: fact["problem"] or "right")
        return Row(
            "run folder", f"{folder}: {found}", "choose a run.dir in a folder that all nodes share and may write"
        )
    return Row("run folder", f"{folder}: seen and written by {'all nodes' if len(files) > 1 else 'this node'}")


def _attempt(action: Callable[[], Any]) -> str:
    """What the file system has against it, or ""."""
    try:
        action()
    except OSError as error:
        return f"cannot be written ({error.strerror})"
    return ""


def _disk_row(config: PretrainConfig, plan: RunPlan) -> Row:
    """Room for the checkpoints that will be there at once, less those already there."""
    each = saved_bytes(plan.shape, config.optim.name)
    there = len(saved_steps(Path(config.run.dir)))
    count = max(config.checkpoint.most_at_once(plan.total_steps) - there, 1)
    place = next(path for path in (Path(config.run.dir), *Path(config.run.dir).absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    found = f"{size_text(free)} free at {place}; {count} checkpoints of {size_text(each)} are {size_text(count * each)}"
    if free >= count * each:
        return Row("disk", found)
    return Row("disk", found, "free some space, choose another run.dir, or keep fewer (checkpoint.keep, keep_every)")


if __name__ == "__main__":
    raise SystemExit(run_command(main, sys.argv[1:]))
