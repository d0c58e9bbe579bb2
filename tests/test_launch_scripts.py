"""Prevents: a job script that goes on with a wrong setting, or asks for another run of a job that can never be right.

Slurm's commands are stand-ins here; tests/slurm has the real ones.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.launch import SMALL, flags

COMMANDS = {
    "scontrol": 'case "$1" in show) echo node1; echo node2;; *) echo "scontrol $*"; exit "${REQUEUE:-0}";; esac',
    "srun": 'echo "srun $*"; [ -z "${ANSWER:-}" ] || (eval "$ANSWER")',
    "scancel": "exit 1",
    "sleep": "exit 0",
}
INTERFACES = ", ".join(sorted(os.listdir("/sys/class/net")))


@pytest.fixture
def job(tmp_path):
    """Runs launch/SCRIPT.sbatch as Slurm would: `job(script, *arguments, **environment)`, with its exit status."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in COMMANDS.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    spool = tmp_path / "spool"
    spool.mkdir()

    def run(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        copy = spool / "slurm_script"
        copy.write_text((REPOSITORY / f"launch/{script}.sbatch").read_text())
        own = {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "SLURM_JOB_ID": "77",
            "SLURM_SUBMIT_DIR": str(REPOSITORY),
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_GPUS_PER_NODE": "a100:3",
            "GLORIA_VENV": sys.prefix,
        }
        command = ["bash", str(copy), *map(str, arguments)]
        env = own | environment
        return subprocess.run(command, cwd=spool, env=env, capture_output=True, text=True)

    return run


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"SLURM_JOB_ID": ""}, "{spool}/slurm_script: this is no Slurm job; submit it with sbatch"),
        ({"GLORIA_LAUNCHER": "mpirun"}, "GLORIA_LAUNCHER: mpirun is neither torchrun nor srun; set it to one of them"),
        (
            {"GLORIA_VENV": "/nowhere"},
            "GLORIA_VENV: /nowhere has no bin/python here; name a virtual environment that all nodes see",
        ),
        (
            {"GLORIA_INTERFACE": "ib7"},
            f"GLORIA_INTERFACE: {os.uname().nodename} has no ib7; it has {INTERFACES}",
        ),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_one_line_before_anything_starts(job, tmp_path, environment, line):
    done = job("pretrain", **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {line.format(spool=tmp_path / 'spool')}\n"


def test_outside_the_repository(job, tmp_path):
    done = job("pretrain", SLURM_SUBMIT_DIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path}: is not the repository; call sbatch in its root folder\n"


def test_a_setup_that_fails(job, tmp_path):
    (tmp_path / "site").write_text("return 3\n")
    done = job("pretrain", GLORIA_SETUP=str(tmp_path / "site"))
    assert (done.returncode, done.stderr) == (2, f"error: GLORIA_SETUP: {tmp_path}/site fails; see above\n")


def test_no_torch_in_the_environment(job, tmp_path):
    """-S: the interpreter alone, without what is installed."""
    (tmp_path / "venv/bin").mkdir(parents=True)
    python = tmp_path / "venv/bin/python"
    python.write_text(f'#!/bin/bash\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    done = job("pretrain", GLORIA_VENV=str(tmp_path / "venv"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {python}: has no gloria and torch; run make setup, or set GLORIA_VENV\n"


def test_no_scontrol(job, tmp_path):
    (tmp_path / "tools/scontrol").write_text("#!/bin/bash\nexit 127\n")
    done = job("pretrain")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: scontrol: does not list the nodes of node[1-2]; put Slurm's commands in the PATH (GLORIA_SETUP)\n"
    )


@pytest.mark.parametrize(
    ("script", "flag", "line"),
    [
        ("pretrain", "--train.stepz=3", "--train.stepz: unknown flag; did you mean --train.steps?"),
        ("finetune", "--train.stepz=3", "--train.stepz: unknown flag; did you mean --train.steps?"),
    ],
)
def test_a_wrong_recipe_starts_no_rank_and_is_not_requeued(job, sample_corpus, script, flag, line):
    done = job(script, *({"finetune": ["--task=assin2", "--run.dir=x", "--model=launch"]}.get(script, [])), flag)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {line}\n")


def test_a_batch_that_the_jobs_ranks_do_not_divide(job, sample_corpus):
    done = job("pretrain", *flags(SMALL, data__corpus=sample_corpus, train__global_batch=10))
    assert (done.returncode, done.stdout) == (2, "")
    where = "--train.micro_batch"
    assert done.stderr == f"error: {where}: 6 ranks do not divide train.global_batch 10; set that to 18\n"


def test_replicas_that_the_jobs_ranks_do_not_divide(job, sample_corpus):
    done = job("pretrain", *flags(SMALL, data__corpus=sample_corpus, train__micro_batch=1, dist__replicas=4))
    assert (done.returncode, done.stdout) == (2, "")
    line = "error: --dist.replicas: 4 does not divide the number of ranks, 6; give one of 1, 2, 3, 6\n"
    assert done.stderr == line


def test_replicas_of_a_fine_tuning_are_held_against_the_jobs_ranks(job, tmp_path):
    """And not against the batch script, which is one process."""
    arguments = ["--task=assin2", "--model=launch", f"--run.dir={tmp_path / 'run'}"]
    done = job("finetune", *arguments, "--dist.replicas=4")
    assert (done.returncode, done.stdout) == (2, "")
    line = "error: --dist.replicas: 4 does not divide the number of ranks, 6; give one of 1, 2, 3, 6\n"
    assert done.stderr == line
    assert "does not divide" not in job("finetune", *arguments, "--dist.replicas=3").stderr


def status(run: Path, state: str, step: int) -> str:
    """Shell that leaves a run in a state, as ranks would."""
    fields = f'"status": "{state}",\\n "step": {step},\\n "reason": "",\\n "launch": "x",\\n "heartbeat": 0'
    return f"mkdir -p {run}; printf '{{\\n {fields}\\n}}\\n' > {run}/status.json"


def test_three_failures_without_a_step_are_the_end_and_a_step_is_another_chance(job, sample_corpus, tmp_path):
    run = tmp_path / "run"
    recipe = flags(SMALL, data__corpus=sample_corpus, run__dir=run, train__micro_batch=1)
    done = job("pretrain", *recipe, ANSWER=f"{status(run, 'failed', 4)}; exit 1", GLORIA_LAUNCHER="srun")
    assert done.returncode == 1
    assert len(re.findall(r"^== job 77, requeued 0 times: 2 x 3 ranks on node\[1-2\]", done.stdout, re.M)) == 3
    assert done.stderr.splitlines()[-1] == f"error: {run}: 3 failures in a row without a step of progress; see above"
    assert "scontrol requeue" not in done.stdout
    advance = f"n=$(sed -n 's/^ \"step\": \\([0-9]*\\),/\\1/p' {run}/status.json); n=$((n + 1)); "
    advance += f"[ $n -lt 10 ] || {{ {status(run, 'done', 10)}; exit 0; }}; "
    advance += status(run, "failed", 0).replace('"step": 0', '"step": %d').replace(" >", " $n >") + "; exit 1"
    done = job("pretrain", *recipe, ANSWER=advance)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("another try on the same nodes") == 5


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        (
            {"SLURM_RESTART_COUNT": "2", "GLORIA_MAX_REQUEUES": "2"},
            "error: {run}: not done after 2 requeues; GLORIA_MAX_REQUEUES allows more",
        ),
        (
            {"REQUEUE": "1"},
            "{run}: to be continued, and this job is not requeued; submit it again, or the next one of a chain goes on",
        ),
    ],
)
def test_a_stopped_run_is_requeued_but_not_for_ever(job, sample_corpus, tmp_path, environment, line):
    run = tmp_path / "run"
    recipe = flags(SMALL, data__corpus=sample_corpus, run__dir=run, train__micro_batch=1)
    answer = f"{status(run, 'stopped', 4)}; exit 0"
    done = job("pretrain", *recipe, ANSWER=answer)
    assert "scontrol requeue 77\n" in done.stdout
    done = job("pretrain", *recipe, ANSWER=answer, **environment)
    assert done.returncode == 75
    assert line.format(run=run) in done.stderr.splitlines()


def test_every_rank_of_both_forms_ignores_the_signal_until_it_can_keep_it(job, sample_corpus, tmp_path):
    run = tmp_path / "run"
    recipe = flags(SMALL, data__corpus=sample_corpus, run__dir=run, train__micro_batch=1)
    for launcher, ranks in (("torchrun", "--ntasks-per-node=1 --ntasks=2"), ("srun", "--ntasks-per-node=3 --ntasks=6")):
        done = job("pretrain", *recipe, ANSWER=f"{status(run, 'done', 12)}; exit 0", GLORIA_LAUNCHER=launcher)
        assert done.returncode == 0
        assert f"srun --kill-on-bad-exit=1 --cpu-bind=none {ranks}" in done.stdout
        assert "bash -c trap '' USR1; " in done.stdout


def test_what_runs_before_the_ranks_needs_no_torch():
    """Seconds, and a gigabyte, on a busy login node."""
    modules = ["checkpoints", "train.config", "train.demo", "train.finetune_config", "dist.interface"]
    code = "".join(f"import gloria.{module}; " for module in modules) + "import sys; "
    code += "print(*sys.modules.keys() & {'torch', 'transformers', 'scipy'})"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


def test_the_status_of_a_run_is_reported_without_torch(tmp_path):
    subprocess.run(["bash", "-c", status(tmp_path / "run", "stopped", 4)], check=True)
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "gloria.checkpoints",
        "--run",
        str(tmp_path / "run"),
        "--status",
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 75
    assert done.stdout.startswith("stopped, step 4; launch x, heartbeat ")
    assert not re.search(r"\| +(torch|numpy|transformers)$", done.stderr, re.M)
