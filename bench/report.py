"""What `gloria.report` costs for a run of a million log lines: seconds to make, size, seconds until it is drawn.

    python bench/report.py [LINES]

The log is made here, with four sources, a spike of the loss, checkpoints and skips. The last figure needs Chromium.
"""

from __future__ import annotations

import json
import math
import random
import sys
import tempfile
import time
from pathlib import Path

from gloria import report
from tests.browser import MISSING, browser

SOURCES = ("wiki", "parliament", "literature", "news")


def write_log(path: Path, lines: int) -> None:
    """A log as pre-training writes it, a line every 10 steps."""
    generator = random.Random(0)
    with path.open("w") as file:
        for number in range(1, lines + 1):
            loss = 2.5 + 6 / math.sqrt(number) + 0.1 * generator.random() + 40 * (number == lines // 2)
            sources = {
                name: {"asked": 0.25, "share": 0.25, "loss": loss + place / 10, "epoch": number / 1e5}
                for place, name in enumerate(SOURCES)
            }
            values = {"loss": loss, "lr": 1e-3 * (1 - number / lines), "grad_norm": generator.random()}
            values |= {"tokens": 5_000_000 * number, "tokens_per_s": 4e5 + 1e4 * generator.random(), "step_s": 1.2}
            values |= {"data_s": 0.01 * generator.random(), "skipped": 0, "memory": 60 << 30, "mfu": 0.45}
            line = {"kind": "train", "step": 10 * number, **values, "perplexity": math.exp(loss), "sources": sources}
            file.write(json.dumps(line | {"time": 12.0 * number}, separators=(",", ":")) + "\n")
            if number % 1000 == 0:
                for event in ("checkpoint", "skipped") if number % 7000 == 0 else ("checkpoint",):
                    about = {"kind": "event", "step": 10 * number, "event": event, "time": 12.0 * number}
                    file.write(json.dumps(about) + "\n")


def main() -> None:
    lines = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        run, out = Path(folder, "run"), Path(folder, "page.html")
        run.mkdir()
        write_log(run / "metrics.jsonl", lines)
        print(f"log        {lines:,} lines, {(run / 'metrics.jsonl').stat().st_size / 1e6:.0f} MB")
        started, cpu = time.perf_counter(), time.process_time()
        report.main([str(run), "--out", str(out)])
        taken = f"{time.perf_counter() - started:.1f} s ({time.process_time() - cpu:.1f} s of one core)"
        print(f"made       in {taken}, {out.stat().st_size / 1e6:.2f} MB")
        drawn = json.loads(out.read_text().split('type="application/json">')[1].split("</script>")[0])
        (loss,) = drawn["plots"]["loss"]["curves"]
        print(f"kept       the spike of the loss: greatest {max(loss['y'])} of {len(loss['y']):,} rows")
        if MISSING:
            print(f"drawn      not measured: {MISSING}")
            return
        with browser() as window:
            for width in (1400, 400):
                window.open(out, width)
                seconds = int(window.run("return document.documentElement.dataset.drawn")) / 1000
                print(f"drawn      {width} wide: {seconds:.2f} s after the page began to load; {window.errors()}")


if __name__ == "__main__":
    main()
