"""Prevents: advice on weights that, when followed, leaves a source above four epochs or lowers one needlessly."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from gloria.data.prepare.report import weights_within


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.01, 100), st.integers(1, 10**9)), min_size=1, max_size=8),
    st.integers(1, 10**10),
)
def test_lowered_weights_keep_every_source_within_the_epochs(sources: list[tuple[float, int]], budget: int) -> None:
    weights = {str(number): weight for number, (weight, _) in enumerate(sources)}
    tokens = {str(number): count for number, (_, count) in enumerate(sources)}
    lowered = weights_within(weights, tokens, budget)
    if lowered is None:
        assert budget >= 4 * sum(tokens.values()) * (1 - 1e-9)
        return
    total = sum(lowered.values())
    for name in weights:
        assert budget * lowered[name] / total <= 4 * tokens[name] * (1 + 1e-6)
        if budget * lowered[name] / total < 4 * tokens[name] * (1 - 1e-6):
            assert lowered[name] == weights[name]
