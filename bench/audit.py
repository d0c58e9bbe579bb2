"""How long `gloria.audit` counts: all draws of a run of a thousand million samples, a line of the log every ten steps.

    python bench/audit.py [--samples 1_000_000_000]

Six sources of 35.5 B tokens in windows of 512, as GlórIA's; each line's counts are taken, and the end is compared
with the closed form.
"""

from __future__ import annotations

import argparse
import time

from gloria.data.mixture import Mixture, new_mixture
from gloria.data.weights import Source
from gloria.record.ledger import add_draws, epoch_sums, ledger, new_count

LENGTH, BATCH, LOG_EVERY = 512, 512, 10
WEIGHTS = {"a": 0.6, "b": 0.2, "c": 0.1, "d": 0.06, "e": 0.03, "f": 0.01}


def make_mixture() -> Mixture:
    sources = {name: Source(int(35.5e9 * weight), name) for name, weight in WEIGHTS.items()}
    return new_mixture(0, LENGTH, sources, WEIGHTS, global_batch=BATCH)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000_000)
    samples = parser.parse_args(argv).samples
    mixture = make_mixture()
    counted, started = new_count(mixture), (time.perf_counter(), time.process_time())
    for first in range(0, samples, BATCH * LOG_EVERY):
        add_draws(mixture, counted, first, min(first + BATCH * LOG_EVERY, samples))
    clock, processor = time.perf_counter() - started[0], time.process_time() - started[1]
    assert counted.windows.tolist() == [read.windows for read in ledger(mixture, samples)]
    assert counted.epochs.tolist() == epoch_sums(mixture, samples).tolist()
    print(f"{samples:,} samples: {processor:.1f} s of processor time, {clock:.1f} s by the clock")
    print(f"{1e9 * processor / samples:.1f} ns a sample; counts and epochs are those of the closed form")


if __name__ == "__main__":
    main()
