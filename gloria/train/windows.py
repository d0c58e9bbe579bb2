"""Windows of tokens on the device, and the model's loss on them: what training and validation share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gloria.data.loader import document_bounds
from gloria.dist.transfer import to_device
from gloria.train.run import Run


class Windows(NamedTuple):
    """A micro-batch, on the device."""

    tokens: Tensor  # (rows, seq + 1) int64
    documents: Tensor | None  # of the first seq tokens, see `document_bounds`; None: they see each other


def windows_on_device(
    run: Run, tokens: np.ndarray, more: Mapping[str, np.ndarray]
) -> tuple[list[Windows], dict[str, Tensor]]:
    """Windows of tokens (n, seq + 1) as micro-batches, and other arrays by name, in one transfer."""
    size, bounds = run.config.train.filled_micro_batch, {}
    if run.config.data.mask_documents:
        eos_id = run.objective.plan.corpus.manifest.tokenizer.eos_id
        cuts = range(0, len(tokens), size)
        bounds = {f"documents {at // size}": document_bounds(tokens[at : at + size, :-1], eos_id) for at in cuts}
    there = to_device({**more, **bounds, "tokens": tokens}, run.process.device)
    # As small as they are on disk until here; the embedding takes int64.
    parts = there["tokens"].to(torch.int64).split(size)
    return [Windows(part, there.get(f"documents {number}")) for number, part in enumerate(parts)], there


def window_losses(run: Run, part: Windows, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The model's loss on windows, a sum, and the cross entropy of each, (rows,)."""
    return run.model(part.tokens[:, :-1], labels, part.documents)
