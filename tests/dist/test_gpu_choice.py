"""Prevents: a rank on another rank's GPU, ranks refused that have a GPU each, and a card that fails with its first
kernel because torch was built without it. CUDA's answers are made up: there is no GPU here."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from gloria.dist.environment import Environment
from gloria.dist.gpus import has_code_for
from gloria.dist.process import check_card, choose_device, gpu_index
from gloria.errors import UserError

CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "built_for", "has"),
    [
        ((7, 0), CU130, False),  # V100
        ((7, 0), ["sm_50", "sm_60", "sm_70", "sm_90"], True),
        ((7, 5), CU130, True),
        ((8, 9), CU130, True),  # code of sm_80 and sm_86
        ((9, 0), ["sm_90a"], True),
        ((9, 0), ["sm_80"], False),  # another generation
        ((9, 0), ["sm_80", "compute_80"], True),  # compiled when it is loaded
        ((12, 1), CU130, True),
        ((11, 0), CU130, False),
        ((9, 0), [], False),
    ],
)
def test_code_runs_on_later_cards_of_its_generation(capability, built_for, has) -> None:
    assert has_code_for(capability, built_for) == has


def test_a_card_that_torch_is_not_built_for_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-32GB")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CU130)
    with pytest.raises(UserError) as caught:
        check_card(0)
    (line,) = caught.value.problems
    assert line.startswith(
        f"run.device: Tesla V100-SXM2-32GB is sm_70, and torch {torch.__version__} has code for sm_75"
    )
    assert line.endswith(
        "; install a torch with code for it (before sm_75, as V100: one built for CUDA 12.6), or use --run.device cpu"
    )
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_70"])
    check_card(0)


@pytest.mark.parametrize(
    ("launcher", "visible", "variables", "index"),
    [
        ("srun", 4, {}, 3),
        ("srun", 4, {"SLURM_GPUS_PER_TASK": "1"}, 3),  # bound, but all are seen
        ("srun", 1, {"SLURM_GPUS_PER_TASK": "1"}, 0),
        ("srun", 1, {"SLURM_GPU_BIND": "single:1"}, 0),
        ("srun", 1, {}, None),
        ("torchrun", 1, {"SLURM_GPUS_PER_TASK": "1"}, None),
    ],
)
def test_a_rank_takes_its_own_gpu(monkeypatch, launcher, visible, variables, index) -> None:
    for name in ("SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND", "SLURM_TRES_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    environment = Environment(rank=3, world=4, local_rank=3, local_world=4, launcher=launcher)
    if index is None:
        with pytest.raises(UserError, match="4 ranks on a node with 1 GPUs"):
            choose_device("auto", environment)
    else:
        assert choose_device("auto", environment) == "cuda"
        assert gpu_index(environment) == index


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "None"),
    ],
)
def test_segments_of_gpu_memory_can_grow_unless_the_user_says_otherwise(given, found) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTORCH_")}
    code = "import gloria, os; print(os.environ.get('PYTORCH_ALLOC_CONF'))"
    done = subprocess.run([sys.executable, "-c", code], env=kept | given, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == found
