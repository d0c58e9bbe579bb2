"""Heads of our own on any backbone, and their losses.

AutoModelForSequenceClassification would need a pad token that many decoders lack, and lays another stack on
each family. Here the vector of the whole text is, by rule: the last token's for a causal model, for nothing
else has seen everything; otherwise the output of the model's own pooler (BERT), or the first token's.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from gloria.dist.sharding import shard
from gloria.tasks.models.backbones import Backbone, checkpoint_activations

LABEL, SCORE, SPAN = "label", "score", "span"  # the heads there are: classes, a number, first and last token


class TaskModel(nn.Module):
    """A backbone and a head for each kind of answer."""

    def __init__(self, backbone: Backbone, heads: dict[str, int], dropout: float) -> None:
        """`heads` are head names with their number of outputs."""
        super().__init__()
        self.backbone = backbone
        self.dropout = dropout
        self.heads = nn.ModuleDict(
            # Only differences between classes matter, and a bias would add no more than their frequency.
            {name: nn.Linear(backbone.hidden_size, outputs, bias=name != LABEL) for name, outputs in heads.items()}
        )

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """fp32 outputs by head: "label" (batch, classes), "score" (batch, 1), "span" (batch, seq, 2).

        The span logits of tokens that no answer can begin or end with are -inf.
        """
        mask = batch["mask"]
        hidden, pooled = self.backbone(batch["ids"], mask, batch.get("types"))
        if SPAN in self.heads:
            logits = self.heads[SPAN](F.dropout(hidden, self.dropout, self.training)).float()
            return {SPAN: logits.masked_fill(~batch["allowed"].bool().unsqueeze(-1), -torch.inf)}
        if self.backbone.causal:
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(dim=1) - 1]
        elif pooled is None:
            pooled = hidden[:, 0]
        pooled = F.dropout(pooled, self.dropout, self.training)  # (batch, hidden)
        return {name: head(pooled).float() for name, head in self.heads.items()}


@torch.no_grad()
def initialise_heads(model: TaskModel, seed: int, mean_score: float) -> None:
    """Small random weights, the same on every rank; a number starts out as the mean of the training set."""
    generator = torch.Generator().manual_seed(seed)
    for name, head in model.heads.items():
        assert isinstance(head, nn.Linear)
        head.weight.copy_(torch.empty(head.weight.shape).normal_(std=0.02, generator=generator))
        if head.bias is not None:
            head.bias.fill_(mean_score if name == SCORE else 0.0)


def row_losses(outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    """The loss of each row, (batch,): cross entropy of the label, squared error of the score, or the mean of the
    cross entropies of first and last token; with two heads their sum.
    """
    losses = []
    if LABEL in outputs:
        losses.append(F.cross_entropy(outputs[LABEL], batch[LABEL], reduction="none"))
    if SCORE in outputs:
        losses.append((outputs[SCORE][:, 0] - batch[SCORE]).square())
    if SPAN in outputs:
        ends = [F.cross_entropy(outputs[SPAN][..., end], batch[SPAN][:, end], reduction="none") for end in (0, 1)]
        losses.append((ends[0] + ends[1]) / 2)
    return torch.stack(losses).sum(dim=0)


def shard_task_model(
    model: TaskModel,
    mesh: DeviceMesh,
    precision: str,
    *,
    activation_checkpointing: str = "none",
    compile_blocks: bool = False,
    keep_gathered: bool = False,
) -> TaskModel:
    """Spread a whole model over the ranks: each of its layers, and the rest with the root.

    As in `gloria.dist.sharding.shard_model`, gradients are sums over the ranks, which is set on every FSDP module.
    """
    checkpoint_activations(model.backbone, activation_checkpointing)
    if compile_blocks:
        for block in model.backbone.blocks():
            block.compile(dynamic=True)  # a batch is as long as its longest row
    shard(model, model.backbone.blocks(), mesh, precision, keep_gathered=keep_gathered)
    return model


def count_parameters(model: nn.Module) -> int:
    """Parameters of the whole model, shards or not."""
    return sum(math.prod(parameter.shape) for parameter in model.parameters())
