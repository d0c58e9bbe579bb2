"""Prevents: ranks that take each other's number or GPU or meet nowhere, a batch script that thinks it is many, and
ranks that crowd a node's cores, or leave them idle, against the user's word."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest
import torch

from gloria.dist.environment import Environment, check_rendezvous, omp_threads_are_torchruns, read_environment
from gloria.dist.process import set_cpu_threads
from gloria.errors import UserError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "6",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2)",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_JOB_ID": "123456",
}


@pytest.fixture
def environ(monkeypatch):
    """An environment without anything of the launchers; gives `put(**variables)`."""
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in {*TORCHRUN, "MASTER_ADDR", "MASTER_PORT"}:
            monkeypatch.delenv(name)
    # What read_environment itself sets goes with the test.
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def put(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


def test_alone(environ):
    assert read_environment() == Environment(0, 1, 0, 1, "python")


def test_torchrun(environ):
    environ(**TORCHRUN)
    assert read_environment() == Environment(5, 8, 1, 4, "torchrun")


def test_torchrun_inside_a_job_step_counts_its_own_ranks(environ):
    """srun starts one torchrun a node: Slurm's numbers are those of the agents."""
    environ(**SRUN, **TORCHRUN)
    assert read_environment() == Environment(5, 8, 1, 4, "torchrun")


def test_srun_starts_every_rank(environ):
    environ(**SRUN, MASTER_ADDR="gpu03")
    assert read_environment() == Environment(4, 6, 1, 3, "srun")
    assert os.environ["MASTER_PORT"] == str(20000 + 123456 % 12000)


def test_the_port_of_any_job_is_below_the_ephemeral_ones(environ):
    for job in ("0", "11999", "12000", "4294967295"):
        os.environ.pop("MASTER_PORT", None)
        environ(**SRUN | {"SLURM_JOB_ID": job}, MASTER_ADDR="gpu03")
        read_environment()
        assert 20000 <= int(os.environ["MASTER_PORT"]) < 32768


def test_a_named_address_and_port_stay(environ):
    environ(**SRUN, MASTER_ADDR="gpu03-ib", MASTER_PORT="29999")
    read_environment()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("gpu03-ib", "29999")


def test_the_batch_script_itself_is_one_process(environ):
    """sbatch sets SLURM_NTASKS and SLURM_PROCID for the script, too."""
    environ(SLURM_NTASKS="8", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_JOB_ID="7")
    assert read_environment() == Environment(0, 1, 0, 1, "python")


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        (
            {"RANK": "0"},
            "environment: WORLD_SIZE is not set though RANK is; start the run with torchrun, or unset both for one "
            "process",
        ),
        (
            {"RANK": "x", "WORLD_SIZE": "2"},
            "environment: RANK='x' is not a number from 0 to 1; start the run with torchrun or srun",
        ),
        (
            SRUN | {"SLURM_PROCID": ""},
            "environment: SLURM_PROCID='' is not a number from 0 to 5; start the run with torchrun or srun",
        ),
        *(
            (
                variables,
                f"environment: {name}={variables[name]!r} is not a number {range_}; "
                "start the run with torchrun or srun",
            )
            for name, range_, variables in (
                ("RANK", "from 0 to 1", {"RANK": "5", "WORLD_SIZE": "2"}),
                ("RANK", "from 0 to 1", {"RANK": "-1", "WORLD_SIZE": "2"}),
                ("WORLD_SIZE", "of at least 1", {"RANK": "0", "WORLD_SIZE": "0"}),
                ("LOCAL_RANK", "from 0 to 3", TORCHRUN | {"LOCAL_RANK": "4"}),
                ("SLURM_NTASKS", "of at least 1", SRUN | {"SLURM_NTASKS": "x"}),
                ("SLURM_STEP_TASKS_PER_NODE", "of at least 1", SRUN | {"SLURM_STEP_TASKS_PER_NODE": "(x2)"}),
                ("SLURM_JOB_ID", "of at least 0", SRUN | {"SLURM_JOB_ID": "x", "MASTER_ADDR": "gpu03"}),
            )
        ),
    ],
)
def test_half_an_environment_is_one_line(environ, variables, line):
    environ(**variables)
    with pytest.raises(UserError) as error:
        read_environment()
    assert error.value.problems == (line,)


def test_no_scontrol_and_no_address_is_one_line(environ, tmp_path):
    environ(**SRUN, PATH=str(tmp_path))
    with pytest.raises(UserError) as error:
        read_environment()
    (line,) = error.value.problems
    assert line.startswith("environment: cannot list the nodes of 'gpu[03-04]' (")
    assert line.endswith("); export MASTER_ADDR in the job script")


def test_an_address_that_does_not_resolve_is_one_line(environ):
    environ(MASTER_ADDR="nowhere.invalid", MASTER_PORT="21000")
    with pytest.raises(UserError) as error:
        check_rendezvous(Environment(3, 4, 1, 2, "torchrun"))
    (line,) = error.value.problems
    begin = f"environment: MASTER_ADDR=nowhere.invalid MASTER_PORT=21000: does not resolve on {socket.gethostname()} ("
    assert line.startswith(begin)
    assert line.endswith("); export the name of rank 0's node and a number from 1024 to 32767")


@pytest.mark.parametrize("port", ["99999", "0", "x", ""])
def test_a_port_that_is_none_is_one_line(environ, port: str):
    environ(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    with pytest.raises(UserError) as error:
        check_rendezvous(Environment(1, 2, 1, 2, "torchrun"))
    assert error.value.problems == (
        f"environment: MASTER_PORT={port!r} is not a number from 1 to 65535; start the run with torchrun or srun",
    )


def test_an_interface_that_is_not_there_is_one_line(environ):
    environ(GLOO_SOCKET_IFNAME="lo,nope")
    with pytest.raises(UserError, match=r"GLOO_SOCKET_IFNAME=nope: .* has no such interface; name one of .*lo"):
        check_rendezvous(Environment(0, 1, 0, 1, "python"))


ALONE = """
import sys
from gloria.dist.process import start_process_group
from gloria.dist.signals import install_stop_handlers
from gloria.dist import process
process.QUIET_SECONDS = 0.1
install_stop_handlers()
from gloria.errors import run_command
sys.exit(run_command(lambda _: start_process_group("cpu", float(sys.argv[1])) and 0))
"""


@pytest.fixture
def alone(repository):
    """`alone(minutes)`: the one rank of two that was started, once it says that it waits."""
    started = []

    def start(minutes: float) -> subprocess.Popen:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        about = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-c", ALONE, str(minutes)]
        process = subprocess.Popen(command, env=os.environ | about, cwd=repository, stderr=subprocess.PIPE, text=True)
        started.append(process)
        lines = iter(process.stderr.readline, "")
        waits = f"rank 1: waiting for the other 1 at 127.0.0.1:{port}\n"
        assert waits in lines
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_rank_whose_others_never_come_is_reported_and_is_ended_by_sigterm(alone):
    process = alone(30)
    process.terminate()
    assert process.wait(30) == -signal.SIGTERM


def test_a_rank_whose_others_never_come_ends(alone):
    process = alone(0.02)
    assert process.wait(60) == 2
    assert "the 2 ranks do not find each other at 127.0.0.1:" in process.stderr.read()


def test_a_port_in_use_is_one_line_from_rank_0_under_srun(environ):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        environ(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        check_rendezvous(Environment(1, 2, 1, 2, "srun"))  # only rank 0 listens there
        check_rendezvous(Environment(0, 2, 0, 2, "torchrun"))  # its agent listens there
        with pytest.raises(UserError) as error:
            check_rendezvous(Environment(0, 2, 0, 2, "srun"))
    assert error.value.problems == (
        f"environment: MASTER_ADDR=127.0.0.1 MASTER_PORT={port}: rank 0 cannot listen there on {socket.gethostname()} "
        "(Address already in use); export another MASTER_PORT in the job script",
    )
    check_rendezvous(Environment(0, 2, 0, 2, "srun"))


def test_alone_needs_no_address(environ):
    check_rendezvous(Environment(0, 1, 0, 1, "python"))


# --- threads


@pytest.fixture
def on_this_node(environ, monkeypatch):
    """`on_this_node(launcher, ranks, cores, agent, **variables)`: threads of a rank, and the reason in words.

    `agent` is what torchrun itself, the ranks' parent, was started with.
    """
    agents = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def threads(launcher: str, ranks: int, cores: int, agent: dict[str, str], **variables: str) -> tuple[int, str]:
        command = [
            "sh",
            "-c",
            "echo ready; exec sleep 60",
        ]  # before that the kernel may have no environment to show yet
        agents.append(subprocess.Popen(command, env={"PATH": os.environ["PATH"], **agent}, stdout=subprocess.PIPE))
        assert agents[-1].stdout.readline() == b"ready\n"
        chosen = []
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            patch.setattr(os, "getppid", lambda: agents[-1].pid)
            patch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
            patch.setattr(torch, "set_num_threads", chosen.append)
            reported = set_cpu_threads(Environment(0, ranks, 0, ranks, launcher))
        return (chosen or [0])[0], reported  # 0: torch has taken OMP_NUM_THREADS already

    yield threads
    for process in agents:
        process.kill()
        process.communicate()


def test_ranks_share_the_cores_of_their_node(on_this_node):
    assert on_this_node("python", 1, 8, {}) == (8, "8 cores, 1 rank on this node")
    assert on_this_node("srun", 3, 8, {}) == (2, "8 cores, 3 ranks on this node")
    assert on_this_node("torchrun", 16, 8, {}, OMP_NUM_THREADS="1") == (1, "8 cores, 16 ranks on this node")


def test_what_torchrun_sets_is_not_the_users_word_and_what_the_user_sets_is(on_this_node):
    shared, obeyed = (4, "8 cores, 2 ranks on this node"), (0, "OMP_NUM_THREADS is 1")
    assert on_this_node("torchrun", 2, 8, {}, OMP_NUM_THREADS="1") == shared
    assert on_this_node("torchrun", 2, 8, {"OMP_NUM_THREADS": "1"}, OMP_NUM_THREADS="1") == obeyed
    assert on_this_node("torchrun", 1, 8, {}, OMP_NUM_THREADS="1") == obeyed, "torchrun sets it for several ranks only"
    assert on_this_node("srun", 2, 8, {}, OMP_NUM_THREADS="1") == obeyed
    assert on_this_node("torchrun", 2, 8, {}, OMP_NUM_THREADS="3") == (0, "OMP_NUM_THREADS is 3")


def test_where_torchruns_own_environment_is_hidden_a_1_is_taken_for_its(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(os, "getppid", lambda: 2**31)
    assert omp_threads_are_torchruns(Environment(0, 2, 0, 2, "torchrun"))


def test_cores_that_srun_has_bound_to_a_rank_are_not_shared_again(on_this_node):
    reported = on_this_node("srun", 2, 4, {}, SLURM_CPUS_PER_TASK="4")
    assert reported == (4, "SLURM_CPUS_PER_TASK is 4")
    assert on_this_node("torchrun", 2, 4, {}, SLURM_CPUS_PER_TASK="4") == (2, "4 cores, 2 ranks on this node")
