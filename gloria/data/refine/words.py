"""datatrove's word tokeniser for Portuguese, spaCy's, imported without what it does not need."""

from __future__ import annotations

import sys

PORTUGUESE = "por"


def load_words() -> None:
    """Import spaCy. Its thinc imports torch where it finds it, which takes most of the time and is never used here."""
    if "spacy" in sys.modules or "torch" in sys.modules:
        return
    sys.modules["torch"] = None  # type: ignore[assignment] # an import of it fails, which thinc takes for "not there"
    try:
        import spacy  # noqa: F401
    finally:
        del sys.modules["torch"]
