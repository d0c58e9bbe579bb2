"""The test suite in settings that other machines have: `make test-hard`, or `python -m tests.hard SETTING...`.

What passes on one machine can hang on its cores, its kernels' rounding, its quietness or the order of its tests. Each
run names its settings, joined by `+`; when a combined run fails, run its settings alone to see which of them does it.
Kernel settings are those of torch, MKL and oneDNN: they choose the kernels an older processor would get.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
ENVIRONMENTS = {
    "plain": {},
    "omp-2": {"OMP_NUM_THREADS": "2"},
    "aten-default": {"ATEN_CPU_CAPABILITY": "default"},
    "aten-avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "mkl-compatible": {"MKL_CBWR": "COMPATIBLE"},
    "mkl-avx2": {"MKL_CBWR": "AVX2"},
    "onednn-sse41": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "onednn-avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "one-core": {},
    "load": {},
    **{f"order-{number}": {"GLORIA_TEST_ORDER": str(number)} for number in range(1, 6)},
}
RUNS = (
    "plain",
    "one-core+order-1",
    "load+order-2",
    "omp-2+aten-default+order-3",
    "mkl-compatible+onednn-sse41+order-4",
    "aten-avx2+mkl-avx2+onednn-avx2+order-5",
)
BUSY = 4
# Ends by itself when its parent is gone, whatever ended that.
BUSY_CODE = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(10**6))"


@dataclass
class Result:
    """What one run of the suite gave; `failed` are the tests that failed or broke."""

    settings: str
    seconds: float
    tests: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)

    def row(self) -> str:
        passed = self.tests - self.skipped - len(self.failed)
        return f"{self.settings:42}{passed:7}{len(self.failed):7}{self.skipped:8}{self.seconds:8.0f}"


@contextmanager
def busy(count: int) -> Iterator[None]:
    """`count` processes that compute all the time; they end with the block, also when it is interrupted."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY_CODE]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


@contextmanager
def cores(count: int | None) -> Iterator[None]:
    """Everything started in the block runs on the first `count` of our cores."""
    all_of_them = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(all_of_them)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, all_of_them)


def run(settings: str, pytest_arguments: list[str]) -> Result:
    """The suite in settings joined by `+`."""
    names = settings.split("+")
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    for name in names:
        environment |= ENVIRONMENTS[name]
    start = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        cores(1 if "one-core" in names else None),
        busy(BUSY if "load" in names else 0),
    ):
        # torch's cache of compiled code does not know ATEN_CPU_CAPABILITY: code for 16 lanes, built for 8, gives NaN.
        environment["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", f"--junitxml={report}"]
        done = subprocess.run([*command, *pytest_arguments], cwd=REPOSITORY, env=environment)
        result = Result(settings, time.monotonic() - start)
        if report.exists():
            read(report, result)
    if done.returncode and not result.failed:
        result.failed = [f"pytest ended with status {done.returncode}"]
        result.tests += 1
    return result


def read(report: Path, result: Result) -> None:
    """Count the tests of pytest's JUnit report."""
    for case in ElementTree.parse(report).iter("testcase"):
        result.tests += 1
        kinds = {child.tag for child in case}
        result.skipped += "skipped" in kinds
        if kinds & {"failure", "error"}:
            result.failed.append(f"{case.get('classname')}::{case.get('name')}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "settings", nargs="*", help=f"joined by +: {', '.join(ENVIRONMENTS)}; default: {' '.join(RUNS)}"
    )
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="what follows goes to pytest")
    options = parser.parse_args()
    runs = options.settings or list(RUNS)
    unknown = {name for settings in runs for name in settings.split("+")} - set(ENVIRONMENTS)
    if unknown:
        parser.error(f"unknown settings {', '.join(sorted(unknown))}; there are {', '.join(ENVIRONMENTS)}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    results = []
    for settings in runs:
        print(f"== {settings}", flush=True)
        results.append(run(settings, options.pytest))
    print(f"\n{'settings':42}{'passed':>7}{'failed':>7}{'skipped':>8}{'seconds':>8}")
    for result in results:
        print(result.row(), *result.failed, sep="\n    ")
    return int(any(result.failed for result in results))


if __name__ == "__main__":
    sys.exit(main())
