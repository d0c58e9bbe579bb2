"""Python's garbage collection, at the same step on all ranks and of little.

By itself it would stop each rank at another moment, for 0.1 to 0.5 s where a full collection goes through the 300,000
objects of torch, and the others would wait. A step leaves about 20 objects in circles, none of them a tensor.
"""

from __future__ import annotations

import gc

COLLECT_EVERY = 100  # steps


def collect_garbage(steps: int) -> None:
    """Behind each step of a launch, of which `steps` are done: behind the first one leave alone all that is there and
    end automatic collection; then collect what is new, now and then.
    """
    if steps == 1:
        gc.collect()
        gc.freeze()
        gc.disable()
    elif steps % COLLECT_EVERY == 0:
        gc.collect()


def collect_by_itself() -> None:
    """Give collection back to Python, at the end of a run."""
    gc.unfreeze()
    gc.enable()
