"""Prevents: a job that does not come back after what a cluster does to it, or comes back as another run.

The first test is in the default suite; `make slurm-test` runs them all (minutes).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess

import pytest

from tests.launch import losses, metrics
from tests.slurm.jobs import PATIENCE, assert_same_run, samples_of, submit

pytestmark = pytest.mark.timeout(900)
both_launchers = pytest.mark.parametrize("launcher", ["torchrun", "srun"])


def resumes(job) -> list[int]:
    """The steps from which the run went on."""
    return [line["step"] for line in metrics(job.run, "event") if line["event"] == "resume"]


def test_a_signal_saves_and_requeues_and_the_job_after_it_waits(cluster, references, recipe, tmp_path):
    recipe |= {"train.steps": 20}
    job = submit(cluster, tmp_path, recipe, interface="")
    copy = f"--wrap=cp {job.run}/status.json {tmp_path}/afterwards.json"
    cluster.call("sbatch", f"--dependency=afterok:{job.id}", f"--output={tmp_path}/after.txt", copy)
    job.wait_for_step(4)
    cluster.call("scancel", "--signal=USR1", job.id)
    job.wait_for_state("COMPLETED")
    assert job.restarts() == 1
    assert len(resumes(job)) == 1
    for node, peer in (("node1", "node2"), ("node2", "node1")):
        way = (
            f"{node}: its own name leads to lo; GLOO_SOCKET_IFNAME=lo leads to {peer} (GLORIA_INTERFACE names another)"
        )
        assert job.log.read_text().count(way) == 2
    assert_same_run(tmp_path, references.get(recipe, 2))
    after = tmp_path / "afterwards.json"
    cluster.wait_for("the job after it", after.exists, PATIENCE)
    assert json.loads(after.read_text())["status"] == "done"


@pytest.mark.slurm
@both_launchers
def test_a_run_to_its_end(cluster, references, recipe, tmp_path, launcher):
    job = submit(cluster, tmp_path, recipe, launcher=launcher, pause=0, ranks_per_node=2)
    job.wait_for_state("COMPLETED")
    assert (job.restarts(), resumes(job)) == (0, [])
    assert_same_run(tmp_path, references.get(recipe, 4))


@pytest.mark.slurm
def test_a_signal_under_torchrun(cluster, references, recipe, tmp_path):
    job = submit(cluster, tmp_path, recipe, launcher="torchrun")
    for step in (5, 20):
        job.wait_for_step(step)
        cluster.call("scancel", "--signal=USR1", job.id)
        cluster.wait_for("the requeue", lambda: job.state() != "RUNNING", PATIENCE, job.log)
    job.wait_for_state("COMPLETED")
    assert job.restarts() == 2
    assert_same_run(tmp_path, references.get(recipe, 2))


@pytest.mark.slurm
@both_launchers
def test_a_time_limit(cluster, references, recipe, tmp_path, launcher):
    """Slurm looks at limits every 30 s: the signal comes 30 to 60 s after the start, the end a minute later."""
    recipe |= {"train.steps": 240}
    job = submit(cluster, tmp_path, recipe, "--time=2", "--signal=B:USR1@60", launcher=launcher, pause=0.25)
    job.wait_for_state("COMPLETED", patience=800)
    assert job.restarts() >= 1
    assert len(resumes(job)) == job.restarts()
    assert_same_run(tmp_path, references.get(recipe, 2))


@pytest.mark.slurm
@both_launchers
def test_preemption(cluster, references, recipe, tmp_path, launcher):
    job = submit(cluster, tmp_path, recipe, launcher=launcher)
    job.wait_for_step(10)
    urgent = subprocess.Popen(
        ["srun", "--partition=urgent", "--nodes=2", "--exclusive", "sleep", "3"], env=cluster.environment
    )
    assert urgent.wait(PATIENCE) == 0
    job.wait_for_state("COMPLETED")
    assert job.restarts() == 1
    assert_same_run(tmp_path, references.get(recipe, 2))


@pytest.mark.slurm
@both_launchers
def test_a_rank_is_killed(cluster, references, recipe, tmp_path, launcher):
    job = submit(cluster, tmp_path, recipe, launcher=launcher)
    job.wait_for_step(12)
    (rank,) = job.ranks_on("node2")
    os.kill(rank, signal.SIGKILL)
    job.wait_for_state("COMPLETED")
    assert "another try on the same nodes" in job.log.read_text()
    assert job.restarts() == 0
    assert resumes(job) == [8]
    assert_same_run(tmp_path, references.get(recipe, 2))


@pytest.mark.slurm
@both_launchers
@pytest.mark.parametrize("hangs", [False, True], ids=["dies", "hangs"])
def test_a_node_is_lost_and_comes_back(cluster, references, recipe, tmp_path, launcher, hangs):
    job = submit(cluster, tmp_path, recipe, launcher=launcher)
    job.wait_for_step(12)
    if hangs:
        cluster.signal_node("node2", signal.SIGSTOP)
    else:
        cluster.kill_node("node2")
    cluster.wait_for("the requeue", lambda: job.restarts() == 1, PATIENCE, job.log)
    if hangs:
        cluster.kill_node("node2")
    cluster.start_node("node2")
    job.wait_for_state("COMPLETED")
    assert_same_run(tmp_path, references.get(recipe, 2))


@pytest.mark.slurm
@both_launchers
def test_requeued_by_hand(cluster, references, recipe, tmp_path, launcher):
    job = submit(cluster, tmp_path, recipe, launcher=launcher)
    job.wait_for_step(12)
    cluster.call("scontrol", "requeue", job.id)
    job.wait_for_state("COMPLETED")
    assert job.restarts() == 1
    assert_same_run(tmp_path, references.get(recipe, 2))


@pytest.mark.slurm
@both_launchers
def test_cancelled_for_good_and_submitted_again(cluster, references, recipe, tmp_path, launcher):
    job = submit(cluster, tmp_path, recipe, launcher=launcher)
    job.wait_for_step(12)
    cluster.call("scancel", job.id)
    job.wait_for_state("CANCELLED")
    assert job.restarts() == 0
    job = submit(cluster, tmp_path, recipe, launcher=launcher)
    job.wait_for_state("COMPLETED")
    assert_same_run(tmp_path, references.get(recipe, 2))


@pytest.mark.slurm
def test_one_node_instead_of_two(cluster, references, recipe, tmp_path):
    """On another number of ranks the sums round otherwise; the samples are the same."""
    job = submit(cluster, tmp_path, recipe, nodes="1-2")
    job.wait_for_step(12)
    cluster.kill_node("node2")
    try:
        job.wait_for_state("COMPLETED")
    finally:
        cluster.start_node("node2")
        cluster.wait_for("two nodes", cluster.ready, PATIENCE)
    assert "1 x 1 ranks on node1" in job.log.read_text()
    reference = references.get(recipe, 2)
    assert samples_of(tmp_path / "samples") == samples_of(reference / "samples")
    assert losses(job.run) == pytest.approx(losses(reference / "run"), rel=1e-5)


@pytest.mark.slurm
def test_a_chain_where_requeue_is_forbidden(cluster, references, recipe, tmp_path):
    options = ("--no-requeue", "--dependency=singleton", "--job-name=chain")
    first, second, third = [submit(cluster, tmp_path, recipe, *options) for _ in range(3)]
    first.wait_for_step(10)
    cluster.call("scancel", "--signal=USR1", first.id)
    first.wait_for_state("FAILED")
    second.wait_for_state("COMPLETED")
    third.wait_for_state("COMPLETED")
    assert "to be continued, and this job is not requeued; submit it again, or the next one" in first.log.read_text()
    assert_same_run(tmp_path, references.get(recipe, 2))


@pytest.mark.slurm
@both_launchers
def test_a_wrong_recipe_ends_the_job_at_once(cluster, recipe, tmp_path, launcher):
    job = submit(cluster, tmp_path, recipe | {"train.micro_batch": 5}, launcher=launcher)
    job.wait_for_state("FAILED")
    log = job.log.read_text()
    assert log == "error: --train.micro_batch: 5 x 2 ranks = 10 does not divide train.global_batch 12; set it to 6\n"
    assert job.restarts() == 0
    assert not job.run.exists()
