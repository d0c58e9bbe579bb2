"""The process group: one way in and one way out for one process, torchrun and bare srun."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from gloria.dist.environment import Environment, check_rendezvous, omp_threads_are_torchruns, read_environment
from gloria.dist.gpus import has_code_for
from gloria.errors import UserError
from gloria.files import os_errors

QUIET_SECONDS = 20.0  # of waiting for the other ranks, before a line says so


OTHER_TORCH = "install a torch with code for it (before sm_75, as V100: one built for CUDA 12.6)"


@dataclass(frozen=True)
class Process:
    """This rank once the group stands."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes what a person reads."""
        return self.rank == 0


def start_process_group(device: str, timeout_minutes: float) -> Process:
    """Join the run's process group: NCCL beside gloo on CUDA, gloo on CPU; `device` is auto, cpu or cuda.

    A single process makes a group of one (an in-process store, no port), so that one code path serves every size.
    Raises UserError where the ranks cannot meet, CUDA is asked for and absent, or a node has more ranks than GPUs.
    """
    environment = read_environment()
    check_rendezvous(environment)
    kind = choose_device(device, environment)
    if kind == "cuda":
        target = torch.device("cuda", gpu_index(environment))
        check_card(target.index)
        torch.cuda.set_device(target)
        backend = "cpu:gloo,cuda:nccl"
    else:
        target = torch.device("cpu")
        why = set_cpu_threads(environment)
        if environment.rank == 0:
            print(f"{'threads':<11} {torch.get_num_threads()} a rank: {why}", flush=True)
        backend = "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    # Collectives that torch remembers, for dist.watchdog to write.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    if environment.world == 1 and environment.launcher == "python":
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        if environment.launcher == "srun":
            os.environ.update(RANK=str(environment.rank), WORLD_SIZE=str(environment.world))
        with _meeting(environment, timeout_minutes):
            dist.init_process_group(backend, timeout=timeout, device_id=target if kind == "cuda" else None)
    return Process(environment.rank, environment.world, target)


@contextmanager
def _meeting(environment: Environment, minutes: float) -> Iterator[None]:
    """Say that this rank waits for the others; SIGTERM and Ctrl-C end it meanwhile, and `UserError` where they fail.

    Torch waits in native code, where no handler of ours would run.
    """
    who, place = f"rank {environment.rank}", f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    met = threading.Event()

    def report() -> None:
        if not met.wait(QUIET_SECONDS):
            print(f"{who}: waiting for the other {environment.world - 1} at {place}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=report, name="meeting", daemon=True)
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT)}
    thread.start()
    try:
        yield
    except (RuntimeError, ValueError) as error:  # torch's own, of which some have no class
        reason = str(error).partition("\n")[0][:200]
        raise UserError(
            f"{who} on {socket.gethostname()}: the {environment.world} ranks do not find each other at {place} within "
            f"{minutes:g} min ({reason}); are all of them started, and does a firewall or GLORIA_INTERFACE stand "
            "between?"
        ) from None
    finally:
        met.set()
        thread.join()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def choose_device(device: str, environment: Environment) -> str:
    """`cuda` or `cpu`: what was asked, or for `auto` the GPU when there is one."""
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError("run.device: cuda is asked for and torch sees no GPU; use --run.device cpu or auto")
    if device == "cpu" or not available:
        return "cpu"
    if environment.local_world > torch.cuda.device_count() and not has_own_gpu(environment):
        raise UserError(
            f"run.device: {environment.local_world} ranks on a node with {torch.cuda.device_count()} GPUs; "
            "start one rank a GPU (torchrun --nproc_per_node)"
        )
    return "cuda"


def has_own_gpu(environment: Environment) -> bool:
    """Whether Slurm shows each rank of this node one GPU, its own (`--gpus-per-task 1`, `--gpu-bind`)."""
    own = "SLURM_GPUS_PER_TASK" in os.environ or "SLURM_GPU_BIND" in os.environ or "SLURM_TRES_PER_TASK" in os.environ
    return environment.launcher == "srun" and own and torch.cuda.device_count() == 1


def gpu_index(environment: Environment) -> int:
    """Which of the GPUs that it sees is this rank's."""
    return 0 if has_own_gpu(environment) else environment.local_rank


def without_code(device: int) -> str:
    """The GPU and what this torch is built for instead of it, or ""."""
    (major, minor), built_for = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    if has_code_for((major, minor), built_for):
        return ""
    return (
        f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}, and torch {torch.__version__} has code for "
        f"{' '.join(built_for)}"
    )


def check_card(device: int) -> None:
    """A `UserError` where torch has no code for the card: its own error would come with the first kernel."""
    if problem := without_code(device):
        raise UserError(f"run.device: {problem}; {OTHER_TORCH}, or use --run.device cpu")


def set_cpu_threads(environment: Environment) -> str:
    """Give this rank its share of the node's cores, unless the user has set OMP_NUM_THREADS; says by what rule."""
    if os.environ.get("OMP_NUM_THREADS") and not omp_threads_are_torchruns(environment):
        return f"OMP_NUM_THREADS is {os.environ['OMP_NUM_THREADS']}"
    own = os.environ.get("SLURM_CPUS_PER_TASK", "") if environment.launcher == "srun" else ""
    if own.isdigit():  # what srun binds a rank to is its own already, and not to be shared again
        torch.set_num_threads(int(own))
        return f"SLURM_CPUS_PER_TASK is {own}"
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // environment.local_world))
    return f"{cores} cores, {environment.local_world} {'ranks' if environment.local_world > 1 else 'rank'} on this node"


def rank0_decides(process: Process, decide: Callable[[], int]) -> int:
    """A number >= 0 that rank 0 decides and every rank returns; where rank 0 fails, every rank ends.

    Without this a UserError on rank 0 (no valid checkpoint, a live lock) would leave the others in a collective. What
    is decided is about the run folder, so an OSError is a UserError too: a folder that cannot be used.
    """
    failed, value, problem = -1, -1, None
    if process.is_main:
        try:
            with os_errors("choose another run.dir, or make this one usable"):
                value = decide()
        except UserError as error:
            problem = error
    message = torch.tensor([failed if problem else value], dtype=torch.int64)
    dist.broadcast(message, src=0)
    if problem:
        raise problem
    if int(message) == failed:
        raise SystemExit(2)  # rank 0 reports why
    return int(message)


def on_any_rank(here: bool) -> bool:
    """Whether `here` is true on any rank: a collective, with the same answer on every rank."""
    count = torch.tensor(int(here))
    dist.all_reduce(count)
    return bool(count)


def leave_process_group() -> None:
    """Leave without waiting for the other ranks: they end on their own, at the same mistake or when rank 0 ends."""
    dist.destroy_process_group()


def stop_process_group() -> None:
    """Leave together: without the barrier half of 4-rank gloo runs abort after a clean run."""
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
