"""How far outputs are from what they should be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from onnxslim.calibration.fidelity import OutputPart
from onnxslim.learn.door import Tensor, functional, torch

LossName: TypeAlias = Literal["relative", "kl", "cosine"]
LOSSES: tuple[LossName, ...] = get_args(LossName)
# The share of labels in what is learnt from, where there are any.
LABELLED = 0.5


@dataclass(frozen=True)
class Aim:
    """A tensor, or a part of it, that is to come close to another.

    Attributes:
        part: which one.
        loss: by what.
        variation: mean square of what it should be around its mean.
    """

    part: OutputPart
    loss: LossName
    variation: float


def loss_of(
    wanted: Sequence[Aim], found: Mapping[str, Tensor], goal: Mapping[str, Tensor], label: str | None
) -> Tensor:
    """The mean over parts; with labels, the mean of that and the cross-entropy of classes.

    Args:
        wanted: parts.
        found, goal: tensors by name, and what they should be.
        label: the output that scores classes, whose labels are in the goal under an empty name.
    """
    total = sum(_distance(each, each.part.of(found), each.part.of(goal)) for each in wanted) / len(wanted)
    if label is None:
        return total
    entropy = functional.cross_entropy(found[label].float(), goal[""].long())
    return (1 - LABELLED) * total + LABELLED * entropy


def _distance(wanted: Aim, found: Tensor, goal: Tensor) -> Tensor:
    goal = goal.to(found.dtype)
    if wanted.loss == "kl":
        log_goal, log_found = torch.log_softmax(goal, -1), torch.log_softmax(found, -1)
        return (log_goal.exp() * (log_goal - log_found)).sum(-1).mean()
    if wanted.loss == "cosine":
        return (1 - functional.cosine_similarity(found, goal, dim=-1)).mean()
    counts = torch.isfinite(goal) & (goal.abs() < MASKED)
    difference = torch.where(counts, found - goal, torch.zeros_like(goal))
    return (difference * difference).sum() / counts.sum().clamp(min=1) / wanted.variation


# See `onnxslim/ir/graph.py`: what only hides something is no goal.
MASKED = 1e30
