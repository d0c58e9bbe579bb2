"""From the command to the first step: `python -m gloria.pretrain` on the demo, with what importing torch takes of it.

python bench/startup.py [--runs 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LAUNCH = Path(__file__).resolve().parent.parent / "launch"


def first_step_seconds(corpus: str, run_dir: Path) -> float:
    """Seconds until metrics.jsonl has step 1."""
    command = [
        *(sys.executable, "-m", "gloria.pretrain", "--config", str(LAUNCH / "demo.toml"), "--data.corpus", corpus),
        *("--run.dir", str(run_dir), "--train.steps", "1", "--schedule.warmup_steps", "0", "--log.every", "1"),
        *("--valid.every", "0"),
    ]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and any(json.loads(line)["kind"] == "train" for line in _whole_lines(metrics))):
        assert process.poll() in (None, 0), "the run failed; its error is above"
        time.sleep(0.005)
    seconds = time.perf_counter() - start
    process.wait()
    return seconds


def _whole_lines(path: Path) -> list[str]:
    return path.read_text().split("\n")[:-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        corpus = f"{folder}/sample"
        subprocess.run(
            [sys.executable, "-m", "gloria.prepare", str(LAUNCH / "sample.toml"), "--out", corpus],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        imports, starts = [], []
        for number in range(runs):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", "import torch"], check=True)
            imports.append(time.perf_counter() - start)
            starts.append(first_step_seconds(corpus, Path(folder, f"run-{number}")))
    print(f"import torch alone:         {statistics.median(imports):.2f} s (median of {runs})")
    print(f"launch to first step done:  {statistics.median(starts):.2f} s (median of {runs})")


if __name__ == "__main__":
    main()
