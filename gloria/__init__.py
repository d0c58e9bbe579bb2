"""GlórIA: pre-train, fine-tune, evaluate and publish GPT-2 and GPT-Neo language models."""

import sys

from gloria.errors import end_without_traceback

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # `python -m gloria.VERB`, which imports this package first
    sys.excepthook = end_without_traceback
