"""Which rank of how many this process is, read from what started it. Torch-free: recipes are checked before torch."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from gloria.errors import UserError


@dataclass(frozen=True)
class Environment:
    """This process among the ranks of the run."""

    rank: int
    world: int
    local_rank: int  # among the ranks of this node: the index of its GPU
    local_world: int
    launcher: str  # "torchrun", "srun" or "python"


def read_environment() -> Environment:
    """Read the rank from torchrun's variables, from Slurm's where `srun` starts every rank itself, or be alone.

    Under `srun` the rendezvous address is filled in where the job script has not: the job's first node and a port
    derived from the job id, below the ephemeral range so that no outgoing connection can hold it.
    """
    get = os.environ.get
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        names = ("RANK", "WORLD_SIZE")
        missing = [name for name in names if name not in os.environ]
        if missing:
            raise UserError(
                f"environment: {' and '.join(missing)} is not set though {' or '.join(set(names) - set(missing))} is; "
                "start the run with torchrun, or unset both for one process"
            )
        world = _number("WORLD_SIZE", at_least=1)
        rank = _number("RANK", below=world)
        local_world = _number("LOCAL_WORLD_SIZE", at_least=1) if "LOCAL_WORLD_SIZE" in os.environ else world
        local_rank = _number("LOCAL_RANK", below=local_world) if "LOCAL_RANK" in os.environ else rank
        return Environment(rank, world, local_rank, local_world, "torchrun")
    # SLURM_STEP_ID is set by srun alone: in the batch script itself SLURM_NTASKS counts ranks that don't exist.
    if "SLURM_STEP_ID" in os.environ and get("SLURM_NTASKS", "1") != "1":
        world = _number("SLURM_NTASKS", at_least=1)
        local_world = world
        if "SLURM_STEP_TASKS_PER_NODE" in os.environ:  # such as 3(x2),1: of the first nodes, and of the others
            local_world = _number("SLURM_STEP_TASKS_PER_NODE", at_least=1, end="[(,].*")
        rank, local_rank = _number("SLURM_PROCID", below=world), _number("SLURM_LOCALID")
        environment = Environment(rank, world, local_rank, local_world, "srun")
        if "MASTER_ADDR" not in os.environ:
            os.environ["MASTER_ADDR"] = _first_node(get("SLURM_STEP_NODELIST") or get("SLURM_JOB_NODELIST", ""))
        job = _number("SLURM_JOB_ID") if "SLURM_JOB_ID" in os.environ else 0
        os.environ.setdefault("MASTER_PORT", str(20000 + job % 12000))
        return environment
    return Environment(rank=0, world=1, local_rank=0, local_world=1, launcher="python")


def omp_threads_are_torchruns(environment: Environment) -> bool:
    """Whether OMP_NUM_THREADS=1 is torchrun's, which sets it for several ranks on a node where the user has not.

    What the user has set is in the environment that torchrun, our parent, was started with. Where that can't be read,
    a 1 is taken for torchrun's.
    """
    several = environment.launcher == "torchrun" and environment.local_world > 1
    if not several or os.environ.get("OMP_NUM_THREADS") != "1":
        return False
    try:
        begun_with = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return True
    return not any(entry.startswith(b"OMP_NUM_THREADS=") for entry in begun_with)


def check_rendezvous(environment: Environment) -> None:
    """A `UserError` where the ranks cannot meet: torch itself would try on until its time-out, half an hour.

    Looks at gloo's interface and the address on every rank and, where `srun` started it, at the port on rank 0, which
    is to listen there (under torchrun its agent listens already).
    """
    interfaces = [name for _, name in socket.if_nameindex()]
    for name in filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if name not in interfaces:
            raise UserError(
                f"environment: GLOO_SOCKET_IFNAME={name}: {socket.gethostname()} has no such interface; "
                f"name one of {', '.join(interfaces)}, or unset it"
            )
    if environment.launcher == "python":
        return
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    place = f"environment: MASTER_ADDR={address} MASTER_PORT={port}"
    try:
        _number("MASTER_PORT", at_least=1, below=65536)
        family, *_, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"{place}: does not resolve on {socket.gethostname()} ({error}); export the name of rank 0's node and a "
            "number from 1024 to 32767"
        ) from None
    if environment.launcher == "srun" and environment.rank == 0:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", where[1]))
            except OSError as error:
                raise UserError(
                    f"{place}: rank 0 cannot listen there on {socket.gethostname()} ({error.strerror}); export another "
                    "MASTER_PORT in the job script"
                ) from None


def _number(name: str, *, at_least: int = 0, below: int | None = None, end: str = "") -> int:
    """A whole number in the environment, of which a regular expression may leave out the `end`."""
    text = os.environ.get(name)
    found = re.fullmatch(f"([0-9]{{1,18}})({end})?", text or "")
    if not found or int(found[1]) < at_least or (below is not None and int(found[1]) >= below):
        bound = f"from {at_least} to {below - 1}" if below is not None else f"of at least {at_least}"
        raise UserError(f"environment: {name}={text!r} is not a number {bound}; start the run with torchrun or srun")
    return int(found[1])


def _first_node(node_list: str) -> str:
    """The first host of a Slurm node list such as `gpu[03-07],big1`."""
    try:
        output = subprocess.run(
            ["scontrol", "show", "hostnames", node_list],
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(
            f"environment: cannot list the nodes of {node_list!r} ({error}); export MASTER_ADDR in the job script"
        ) from None
    return output[0]
