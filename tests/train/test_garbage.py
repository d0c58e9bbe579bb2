"""Prevents: garbage collection that stops each rank at another moment, or that stays off behind a run."""

from __future__ import annotations

import gc
import weakref

from gloria.train.garbage import COLLECT_EVERY, collect_by_itself, collect_garbage


class Circle:
    def __init__(self) -> None:
        self.own = self


def test_what_is_new_is_collected_at_known_steps_alone():
    try:
        collect_garbage(1)
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 1000
        circle = weakref.ref(Circle())
        collect_garbage(COLLECT_EVERY - 1)
        assert circle() is not None
        collect_garbage(COLLECT_EVERY)
        assert circle() is None
    finally:
        collect_by_itself()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
