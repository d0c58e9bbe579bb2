"""Prevents: a mistake reported by every rank, or by none, and an exit status that a script takes for a crash."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import gloria.dist.torchrun
from gloria.errors import INTERRUPTED, PIPE_CLOSED, UserError, run_command, write_line
from tests.conftest import REPOSITORY
from tests.launch import SMALL, flags
from tests.world import PATIENCE


def mistaken(argv: list[str] | None) -> int:
    raise UserError("a: is wrong; correct it", "b: is too")


@pytest.fixture(autouse=True)
def _signals_as_they_were():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


def test_every_problem_is_a_line_and_the_status_is_2(capsys, slept):
    assert run_command(mistaken) == 2
    assert capsys.readouterr().err == "error: a: is wrong; correct it\nerror: b: is too\n"
    assert slept == []


def test_another_rank_waits_for_rank_0_and_speaks_only_if_it_is_left(monkeypatch, capsys, slept):
    monkeypatch.setenv("RANK", "1")
    assert run_command(mistaken) == 2
    assert capsys.readouterr().err.startswith("error: a: is wrong")
    assert slept == [10]
    # The launcher has ended rank 0 and ended this one while it was still importing.
    assert run_command(mistaken, asked_to_end=lambda: "SIGTERM") == 2
    assert capsys.readouterr().err == ""


def test_a_defect_of_ours_keeps_its_traceback_and_ctrl_c_is_130():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda argv: 1 // 0)

    def interrupted(argv: list[str] | None) -> int:
        raise KeyboardInterrupt

    assert run_command(interrupted) == 130


def python(*words: str, **environment: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, *words]
    return subprocess.Popen(
        command, cwd=REPOSITORY, env={**os.environ, **environment}, stdout=pipe, stderr=pipe, text=True
    )


def test_a_wrong_torch_logs_is_one_line():
    """Torch reads it while it is imported, before any command has begun."""
    out, err = python("-m", "gloria.generate", "--model", "x", TORCH_LOGS="garbage").communicate(timeout=PATIENCE)
    assert (out, err) == ("", "error: TORCH_LOGS='garbage': torch knows no such setting; unset it, or try help\n")


def test_a_missing_package_is_one_line_that_says_what_to_do(tmp_path):
    """-S: the interpreter without what is installed, as where .venv is not activated."""
    process = python("-S", "-m", "gloria.pretrain")
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (2, "")
    assert err.count("\n") == 1
    assert re.match(r"error: .*python\S* has no package \w+; activate the environment that has gloria's", err), err


def test_ctrl_c_during_the_imports_is_one_line(tmp_path):
    """A package that is slow to import stands for the others."""
    (tmp_path / "numpy.py").write_text("import time\nprint('now', flush=True)\ntime.sleep(60)\n")
    process = python("-m", "gloria.show", PYTHONPATH=str(tmp_path))
    assert process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=PATIENCE) == ("", "interrupted\n")
    assert process.returncode == INTERRUPTED


def test_a_pipe_that_nobody_reads_ends_quietly():
    process = python("-u", "-m", "gloria.pretrain", "--help")
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(PATIENCE) == PIPE_CLOSED


def test_a_broken_pipe_of_another_kind_is_a_defect_of_ours():
    code = "from gloria.errors import run_command\ndef main(argv): raise BrokenPipeError('a socket')\nrun_command(main)"
    process = python("-c", code)
    _, err = process.communicate(timeout=PATIENCE)
    assert "BrokenPipeError: a socket" in err


@pytest.mark.parametrize(
    ("exit_status", "status", "err"),
    [(2, 2, ""), (-9, 137, "error: rank 1: ended by SIGKILL; its last lines are above\n")],
)
def test_our_torchrun_leaves_out_the_report_of_a_rank_that_has_reported_itself(
    exit_status, status, err, monkeypatch, capsys
):
    def run(arguments: object) -> None:
        raise ChildFailedError("gloria.pretrain", {1: ProcessFailure(1, 1, exit_status, "<none>")})

    monkeypatch.setattr(gloria.dist.torchrun, "run", run)
    monkeypatch.setattr(gloria.dist.torchrun.signal, "signal", lambda *_: None)
    monkeypatch.setattr(gloria.dist.torchrun.logging, "disable", lambda *_: None)
    assert gloria.dist.torchrun.main(["-m", "gloria.pretrain"]) == status
    assert capsys.readouterr() == ("", err)


@pytest.mark.torchrun
def test_our_torchrun_has_no_report_of_its_own(sample_corpus, tmp_path):
    """Ctrl-C saves and stops, where torchrun would add a traceback."""
    command = ["-m", "gloria.dist.torchrun", "--standalone", "--nproc_per_node", "1", "-m", "gloria.pretrain"]
    recipe = flags(SMALL, data__corpus=sample_corpus, run__dir=tmp_path / "run", train__steps=100_000)
    process = python(*command, *recipe)
    for line in process.stdout:
        if line.startswith("started at step"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert "the same command goes on from here" in out
    assert "Traceback" not in err


def test_a_line_is_written_at_once():
    """Two writes a line let the lines of ranks run into one another."""
    written = []

    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            written.append(text)
            return len(text)

    write_line("warning: one", Stream())
    assert [text for text in written if text] == ["warning: one\n"]
