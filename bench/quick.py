"""The ratios that must not get worse, in about two minutes on two cores: run it before and after a change.

    python bench/quick.py

Each is measured side by side in one process by a script of this folder, so that the machine cancels out, and stands
beside its bound. Ends with status 1 where one is beyond it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

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
    ("local attention by blocks, ms / band mask", "attention.py --repeats 2", None, "<", 0.5),
    ("loop outside forward, backward, optimizer, %", "loop.py --steps 20", r"optimizer: ([\d.]+) %", "<", 2.0),
)


def main() -> int:
    outputs: dict[str, str] = {}
    worse = 0
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
        good = value > bound if sense == ">" else value < bound
        worse += not good
        took = time.monotonic() - start
        print(f"{what:52}{value:8.3f}  {sense} {bound:g}  {'' if good else 'WORSE  '}({took:.0f} s)", flush=True)
    return int(worse > 0)


if __name__ == "__main__":
    sys.exit(main())
