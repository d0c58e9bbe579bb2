"""What an audit has found: a line for each check that holds, and for each thing that does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MOST = 5  # lines of one check that fails; the others are counted


@dataclass(frozen=True)
class Finding:
    """One line of an audit."""

    subject: str
    ok: bool
    what: str

    def __str__(self) -> str:
        return f"{'ok' if self.ok else 'FAILED':<7} {self.subject:<12} {self.what}"


def conclude(subject: str, problems: Sequence[str], holds: str) -> Iterator[Finding]:
    """`holds` where there are no problems, else a line for each of the first ones."""
    if not problems:
        yield Finding(subject, True, holds)
    for problem in problems[:MOST]:
        yield Finding(subject, False, problem)
    if len(problems) > MOST:
        yield Finding(subject, False, f"and {len(problems) - MOST:,} more of this kind")
