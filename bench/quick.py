"""The ratios that must not get worse, in about two minutes on two cores: run it before and after a change.

    python bench/quick.py

Each is measured side by side in one process by a script of this folder, so that the machine cancels out, and stands
beside its bound. Ends with status 1 where one is beyond it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gloria.model.attention import attend, attention_masks

BENCH = Path(__file__).resolve().parent

# What, the script and its flags, where its last output line has the figure, the sense of the bound, the bound.
RATIOS = (
    (
        "loader, tokens by CPU second / bare numpy gather",
        "loader.py --seconds 1 --rounds 2",
        r'cpu_second": ([\d.]+)',
        ">",
        1.0,
    ),
    ("loss at 4096 x 50257, peak memory / plain", "loss_memory.py", r"memory ([\d.]+)", "<", 0.25),
    ("loss at 4096 x 50257, time / plain", "loss_memory.py", r"time ([\d.]+)", "<", 1.0),
    ("loop outside forward, backward, optimizer, %", "loop.py --steps 20", r"optimizer: ([\d.]+) %", "<", 2.0),
)


def local_by_global() -> float:
    """Time of a local layer's attention (window 256 of 2,048) by that of a global one, forward and backward."""
    inputs = [torch.randn(1, 2048, 8, 64, requires_grad=True) for _ in range(3)]
    times = []
    for window in (256, 0):
        masks = attention_masks(1, 2048, window, None, device=torch.device("cpu"), dtype=torch.float32)
        best = 1e9
        for _ in range(4):
            start = time.perf_counter()
            attend(*inputs, masks, window=window, scale=1.0, dropout=0.0).sum().backward()
            best = min(best, time.perf_counter() - start)
        times.append(best)
    return times[0] / times[1]


def report(what: str, value: float, sense: str, bound: float, start: float) -> bool:
    """Print a line; whether the value is beyond its bound."""
    worse = not (value > bound if sense == ">" else value < bound)
    took = time.monotonic() - start
    print(f"{what:52}{value:8.3f}  {sense} {bound:g}  {'WORSE  ' if worse else ''}({took:.0f} s)", flush=True)
    return worse


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    start = time.monotonic()
    worse = int(report("attention at 2048, window 256 / global, time", local_by_global(), "<", 0.6, start))
    outputs: dict[str, str] = {}
    for what, command, pattern, sense, bound in RATIOS:
        start = time.monotonic()
        if command not in outputs:
            script, *flags = command.split()
            done = subprocess.run([sys.executable, str(BENCH / script), *flags], capture_output=True, text=True)
            if done.returncode:
                print(f"{what}: bench/{command} failed: {(done.stderr.splitlines() or ['no word'])[-1]}")
                worse += 1
                continue
            outputs[command] = done.stdout
        output = outputs[command]
        if pattern:
            value = float(re.findall(pattern, output)[-1])
        else:
            blocks, band = (
                float(re.search(rf"^{name} +([\d.]+) ms", output, re.M)[1]) for name in ("blocks", "band mask")
            )
            value = blocks / band
        worse += report(what, value, sense, bound, start)
    return int(worse > 0)


if __name__ == "__main__":
    sys.exit(main())
