"""GlórIA: pre-train, fine-tune, evaluate and publish language models: GPT-2, GPT-Neo, LLaMA and kin."""

import os
import sys

from gloria.errors import end_without_traceback

__version__ = "0.1.0"

# Read when torch is imported. Segments that grow leave no gaps in a GPU's memory where shapes change.
if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

if sys.argv[:1] == ["-m"]:  # `python -m gloria.VERB`, which imports this package first
    sys.excepthook = end_without_traceback
