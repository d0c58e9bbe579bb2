"""Prevents: nodes that are not fit for a run and say so only hours later, and a check that hangs where one node is."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.launch import flags
from tests.slurm.jobs import REPOSITORY

pytestmark = pytest.mark.timeout(300)


def look(cluster, command: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a shell command on both nodes; "$PYTHON" is the tests' own."""
    own = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    return subprocess.run(
        ["srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "sh", "-c", command],
        env=cluster.environment | own | environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_two_nodes_that_do_not_share_a_folder_and_disagree_on_the_recipe(cluster, recipe, tmp_path):
    """Node2 has a file system of its own where the run is to be, and another number of steps."""
    del recipe["train.steps"]
    (tmp_path / "own").mkdir()
    look_at = f'"$PYTHON" -m gloria.doctor {" ".join(flags(recipe, run__dir=tmp_path / "own" / "run"))}'
    on_node2 = f"mount -t tmpfs none {tmp_path}/own && exec {look_at} --train.steps=41"
    command = f"if [ $SLURM_NODEID = 1 ]; then exec unshare --mount sh -c '{on_node2}'; fi; {look_at} --train.steps=40"
    done = look(cluster, command)
    lines = [line for line in done.stdout.splitlines() if not line.startswith("threads ")]
    assert lines[0] == "2 ranks on 2 nodes, started by srun", done.stdout + done.stderr
    wrong = {line.split()[1]: line for line in lines if line.startswith("WRONG")}
    assert set(wrong) == {"recipe", "run"}, done.stdout
    assert "on node1; " in wrong["recipe"]
    assert (
        wrong["run"] == f"WRONG  run folder  {tmp_path}/own/run: right on node1; what node1 writes is not seen on node2"
    )
    assert "choose a run.dir in a folder that all nodes share and may write" in done.stdout
    assert done.stdout.endswith("2 of 9 checks found something wrong\n")
    assert "exit code 2" in done.stderr
    assert list((tmp_path / "own").iterdir()) == []


@pytest.mark.slurm
def test_an_address_that_does_not_resolve_and_a_port_in_use_are_one_line(cluster, recipe, tmp_path):
    arguments = " ".join(map(str, flags(recipe, run__dir=tmp_path / "run")))
    command = f'exec "$PYTHON" -m gloria.doctor {arguments}'
    done = look(cluster, command, MASTER_ADDR="nowhere.invalid", MASTER_PORT="21000")
    assert "error: environment: MASTER_ADDR=nowhere.invalid MASTER_PORT=21000: does not resolve on node1" in done.stderr
    done = look(cluster, command, MASTER_ADDR="node1", MASTER_PORT=str(cluster.port))
    assert (
        f"error: environment: MASTER_ADDR=node1 MASTER_PORT={cluster.port}: rank 0 cannot listen there on node1 "
        "(Address already in use); export another MASTER_PORT in the job script"
    ) in done.stderr
    assert "Traceback" not in done.stderr
