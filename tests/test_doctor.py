"""Prevents: a check that says "ok" of nodes that differ, or does not say which node differs and what to do."""

from __future__ import annotations

import copy
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from gloria import doctor
from gloria.dist.manifest import checkpoint_path
from gloria.doctor import Row
from gloria.errors import UserError
from gloria.train.config import plan_run, read_pretrain_config
from tests.launch import SMALL, flags

CARD = "NVIDIA A100-SXM4-40GB, 40 GB"
FACT = {
    "node": "gpu01",
    "rank": 0,
    "first": True,
    "local_world": 4,
    "cores": 64,
    "versions": {"torch": "2.13.0", "nccl": "2.28.9", "nvidia driver": "550.54.15"},
    "gpus": [CARD] * 4,
    "own_gpu": False,
    "no_code": "",
    "compiler": "/usr/bin/gcc",
    "interface": "ib0 (100 Gbit/s)",
    "nccl": "",
    "faster": "",
    "recipe": "0123456789abcdef",
    "tokenizer": "fedcba9876543210",
    "problem": "",
}


def two_nodes(**changes: Any) -> list[doctor.Facts]:
    """Facts of a rank on each of two nodes, of which the second differs by `changes`."""
    return [copy.deepcopy(FACT), copy.deepcopy(FACT) | {"node": "gpu02", "rank": 4} | changes]


@pytest.fixture
def recipe(sample_corpus: Path, repository: Path) -> dict[str, Any]:
    return {"config": repository / "launch/demo.toml", "data.corpus": sample_corpus, **SMALL}


def test_nodes_that_are_alike_have_nothing_wrong():
    facts = two_nodes()
    assert doctor._versions_row(facts) == Row("versions", "nccl 2.28.9, nvidia driver 550.54.15, torch 2.13.0")
    assert doctor._gpu_row(facts) == Row("gpus", f"4 x {CARD} a node, 4 ranks")
    assert doctor._compiler_row(facts) == Row("compiler", "/usr/bin/gcc")
    assert doctor._network_row(facts) == Row("network", "gloo by ib0 (100 Gbit/s); NCCL by its own choice")
    assert doctor._recipe_row(facts) == Row("recipe", "the same on all ranks, and nothing wrong with it")
    assert doctor._clock_row(facts, [0.0, -0.4]) == Row("clocks", "within 0.400 s of each other")


@pytest.mark.parametrize(
    ("row", "changes", "found", "remedy"),
    [
        (
            doctor._versions_row,
            {"versions": FACT["versions"] | {"nvidia driver": "535.1"}},
            "nvidia driver 550.54.15 on gpu01; 535.1 on gpu02",
            "use one environment on all nodes (a shared folder, or one image)",
        ),
        (
            doctor._versions_row,
            {"versions": {"torch": "2.11.0", "nccl": "2.28.9"}},
            "nvidia driver 550.54.15 on gpu01; none on gpu02 | torch 2.13.0 on gpu01; 2.11.0 on gpu02",
            "use one environment on all nodes (a shared folder, or one image)",
        ),
        (
            doctor._compiler_row,
            {"compiler": ""},
            "/usr/bin/gcc on gpu01; none on gpu02",
            "torch.compile needs gcc there: install it, load its module, or set train.compile to false",
        ),
        (
            doctor._gpu_row,
            {"no_code": "Tesla V100 is sm_70, and torch 2.13.0 has code for sm_75"},
            "Tesla V100 is sm_70, and torch 2.13.0 has code for sm_75",
            "install a torch with code for it (before sm_75, as V100: one built for CUDA 12.6)",
        ),
        (
            doctor._gpu_row,
            {"gpus": [CARD] * 3},
            f"4 x {CARD} on gpu01; 3 x {CARD} on gpu02",
            "ask for nodes of one kind: sbatch --constraint or --gres=gpu:KIND:N",
        ),
        (
            doctor._gpu_row,
            {"gpus": []},
            f"4 x {CARD} on gpu01; none on gpu02",
            "ask for nodes of one kind: sbatch --constraint or --gres=gpu:KIND:N",
        ),
        (
            doctor._network_row,
            {"interface": "eth0 (1 Gbit/s)", "nccl": "eth0", "faster": "ib0 (100 Gbit/s)"},
            "gloo by ib0 (100 Gbit/s) on gpu01; eth0 (1 Gbit/s) on gpu02; NCCL by its own choice on gpu01; eth0 on "
            "gpu02; gpu02 has ib0 (100 Gbit/s)",
            "if it leads to the other nodes, name it: GLORIA_INTERFACE=ib0 sbatch ...",
        ),
        (
            doctor._recipe_row,
            {"problem": "data/x: no such folder; make one"},
            "right on gpu01; data/x: no such folder; make one on gpu02",
            "fix it and rerun",
        ),
        (
            doctor._recipe_row,
            {"recipe": "ffff0000ffff"},
            "recipe 01234567 on gpu01; ffff0000 on gpu02",
            "give all nodes the same file, flags and corpus",
        ),
        (
            doctor._recipe_row,
            {"tokenizer": "ffff0000ffff"},
            "tokenizer fedcba98 on gpu01; ffff0000 on gpu02",
            "give all nodes the same file, flags and corpus",
        ),
    ],
)
def test_a_node_that_differs_is_named(row, changes, found, remedy):
    reported = row(two_nodes(**changes))
    assert (reported.found, reported.remedy) == (found, remedy)


def test_more_ranks_than_gpus_and_no_gpu_at_all():
    facts = two_nodes(gpus=[CARD] * 2)
    facts[0]["gpus"] = [CARD] * 2
    assert doctor._gpu_row(facts) == Row("gpus", f"2 x {CARD} for 4 ranks a node", "start 2 ranks a node, one a GPU")
    facts = two_nodes(gpus=[])
    facts[0]["gpus"] = []
    assert doctor._gpu_row(facts).found == "none: ranks run on CPU, each with 16 of its node's 64 cores"


def test_clocks_apart():
    row = doctor._clock_row(two_nodes(), [0.0, -61.0])
    assert row == Row("clocks", "gpu02 is -61.0 s off gpu01", "have chrony or ntpd running on all nodes")


@pytest.fixture
def one_process(monkeypatch):
    """Leaves no process group behind where `main` was expected to fail."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_one_process_has_nothing_wrong_and_leaves_nothing(recipe, tmp_path, capsys, one_process):
    assert doctor.main(flags(recipe, run__dir=tmp_path / "runs" / "new")) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("threads ")]
    assert lines[0] == "1 ranks on 1 nodes, started by python"
    assert [line.split()[:2] for line in lines[1:-1]] == [
        ["ok", name]
        for name in ("versions", "gpus", "network", "recipe", "clocks", "all-reduce", "corpus", "run", "disk")
    ]
    assert lines[-1] == "nothing is wrong"
    assert list(tmp_path.iterdir()) == []


def test_no_room_and_a_folder_that_is_none_are_reported_together(recipe, tmp_path, capsys, monkeypatch, one_process):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**9, 10**9 - 1000, 1000))
    (tmp_path / "file").touch()
    assert doctor.main(flags(recipe, run__dir=tmp_path / "file" / "run", checkpoint__keep=2)) == 2
    out = capsys.readouterr().out
    assert f"WRONG  run folder  {tmp_path}/file/run: cannot be written (Not a directory)\n" in out
    # 99,008 parameters of 12 bytes; of three in all two are kept and one is being written
    assert "3 checkpoints of 1.19 MB are 3.56 MB\n" in out
    assert out.endswith("2 of 9 checks found something wrong\n")


def test_checkpoints_that_are_there_or_never_will_be_need_no_room(recipe, tmp_path):
    config = read_pretrain_config(flags(recipe, run__dir=tmp_path, checkpoint__keep=9))
    assert "; 3 checkpoints of 1.19 MB are 3.56 MB" in doctor._disk_row(config, plan_run(config)).found
    for step in (4, 8):
        checkpoint_path(tmp_path, step).mkdir(parents=True)
    assert "; 1 checkpoints of 1.19 MB are 1.19 MB" in doctor._disk_row(config, plan_run(config)).found


def test_a_wrong_recipe_is_a_row_and_ends_what_needs_it(recipe, capsys, one_process):
    assert doctor.main(flags(recipe | {"data.corpus": "/nowhere"})) == 2
    out = capsys.readouterr().out
    assert "WRONG  recipe      /nowhere: no such folder" in out
    assert "corpus  " not in out


def test_ranks_that_do_not_meet_are_one_line(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(doctor, "WAIT_MINUTES", 0.02)
    with pytest.raises(UserError) as error:
        doctor.main([])
    (line,) = error.value.problems
    assert line.startswith("rank 1 on ")
    assert "the 2 ranks do not find each other at 127.0.0.1:1 within 0.02 min (" in line
    assert json.dumps(line).count("\\n") == 0


def test_a_gpu_of_its_own_for_each_rank_is_right():
    facts = two_nodes(own_gpu=True, gpus=[CARD])
    facts[0] |= {"own_gpu": True, "gpus": [CARD]}
    assert doctor._gpu_row(facts) == Row("gpus", f"1 x {CARD} for each of 4 ranks of a node")
