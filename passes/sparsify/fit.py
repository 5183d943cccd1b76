"""Which weights become zero, and what the others have to be then, by what a layer sees.

With C the covariance of what a layer sees and E the error of its weights, the error of its outputs is
E C E^T. Which weights go is a question of integers; given that, the others are those of a linear regression
(`passes.repair.support.within`).

Criteria: "magnitude" keeps the largest weights; "wanda" the largest weights times the norm of their input
(Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024). "surgeon" lets
weights make up for one another before it decides: a dense copy of the weights and a sparse one are drawn
together by the method of multipliers, each time the largest entries of the dense one staying in the sparse
one (Meng et al., "ALPS", NeurIPS 2024). In a hurry it takes those that cost most to lose when all others make
up for it, w^2 by the diagonal of C's inverse (Hassibi and Stork, "Optimal Brain Surgeon", NeurIPS 1992).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxslim.calibration.gram import Gram
from onnxslim.engine.base import Effort
from onnxslim.ops.layers import Floats, Layer
from onnxslim.passes.quantize.rounding import damped
from onnxslim.passes.repair.support import Mask, support, within
from onnxslim.passes.sparsify.patterns import Pattern, positions_of

Criterion: TypeAlias = Literal["magnitude", "wanda", "surgeon"]
Scores: TypeAlias = "NDArray[Any]"

# How strongly the two copies are drawn together, of the mean of a normalized covariance's diagonal, and how
# often with each: layers of the bundled networks lose 5 % less with three times as many steps.
PENALTIES = (0.03, 0.06, 0.12, 0.25, 0.5, 1.0)
ROUNDS: Mapping[Effort, int] = {"quick": 0, "normal": 6, "thorough": 20}


@dataclass(frozen=True)
class Thinning:
    """How one weight becomes sparse.

    Attributes:
        share: of zeros.
        pattern: in which they lie.
        criterion: by which they are chosen.
        effort: how long the surgeon looks for them.
    """

    share: float
    pattern: Pattern
    criterion: Criterion = "magnitude"
    effort: Effort = "normal"

    def left(self, values: float) -> float:
        """How many of so many values are not zero."""
        return (1.0 - self.share) * values

    def of(self, layer: Layer) -> Floats:
        """The weights of a layer without the smallest ones, as `Layer.matrix`; no data is asked."""
        matrix = layer.matrix()
        return np.where(self.kept(np.square(matrix), layer), matrix, np.float32(0))

    def fitted(self, layer: Layer, wanted: Floats, gram: Gram, *, corrected: bool) -> Floats:
        """Sparse weights by which a layer makes most nearly what it makes of what it sees.

        What is zero already stays zero.

        Args:
            layer: how its weight is laid out.
            wanted: weights it should have, as `Layer.matrix`.
            gram: moments of what it sees.
            corrected: whether a bias takes in the mean of the error.
        """
        curvature = damped(gram.gram if corrected else gram.raw().gram, gram.count)
        mask = self.mask(layer, wanted, curvature)
        return np.asarray(within(wanted, mask, curvature), np.float32)

    def mask(self, layer: Layer, wanted: Floats, curvature: Floats) -> Mask:
        """Where weights stay; what is zero in a sparse weight already stays zero."""
        given = support(wanted)

        def chosen(scores: Scores) -> Mask:
            return self.kept(scores if given is None else np.where(given, scores, 0.0), layer)

        if self.criterion == "surgeon" and ROUNDS[self.effort]:
            found = drawn_together(wanted, curvature, chosen, ROUNDS[self.effort])
        else:
            found = chosen(scored(self.criterion, wanted, curvature))
        return found if given is None else found & given

    def kept(self, scores: Scores, layer: Layer) -> Mask:
        """Where the weights with the highest scores of a layer are; all that are not zero, with no share."""
        if not self.share:
            return np.asarray(scores != 0)
        return self.pattern.mask(scores, self.share, positions_of(layer))


def scored(criterion: Criterion, wanted: Floats, curvature: Floats) -> Scores:
    """What each weight is worth, not negative, by itself."""
    return _SCORES[criterion](wanted, curvature)


def _magnitude(wanted: Floats, curvature: Floats) -> Scores:
    return np.square(wanted)


def _heard(wanted: Floats, curvature: Floats) -> Scores:
    return np.asarray(np.square(wanted) * np.einsum("gkk->gk", curvature)[:, None])


def _saliency(wanted: Floats, curvature: Floats) -> Scores:
    inverse = np.linalg.inv(curvature.astype(np.float64))
    return np.asarray(np.square(wanted) / np.einsum("gkk->gk", inverse)[:, None])


_SCORES: Mapping[Criterion, Callable[[Floats, Floats], Scores]] = {
    "magnitude": _magnitude,
    "wanda": _heard,
    "surgeon": _saliency,
}


def drawn_together(
    wanted: Floats,
    curvature: Floats,
    chosen: Callable[[Scores], Mask],
    rounds: int,
    penalties: Sequence[float] = PENALTIES,
) -> Mask:
    """Where weights stay when a dense copy and a sparse one have been drawn together.

    Minimizes the error of X over X and D, sparse, while X = D, in the scaled form of the method of
    multipliers: X is a ridge regression towards D - V, D the largest entries of X + V, and V what they still
    differ by.

    Args:
        wanted: float32 (groups, outputs, inputs).
        curvature: float32 (groups, inputs, inputs), with a positive diagonal.
        chosen: the mask of the largest squares.
        rounds: with each penalty.
        penalties: ascending.
    """
    norms = np.sqrt(np.einsum("gkk->gk", curvature))
    alike = curvature / (norms[:, :, None] * norms[:, None, :])
    dense: Floats = wanted * norms[:, None]
    goal = dense @ alike
    mask = chosen(np.square(dense))
    sparse, apart, before = np.where(mask, dense, np.float32(0)), np.zeros_like(dense), penalties[0]
    for penalty in penalties:
        inverse = np.linalg.inv(alike + np.float32(penalty) * np.eye(alike.shape[-1], dtype=np.float32))
        apart *= np.float32(before / penalty)
        before = penalty
        for _ in range(rounds):
            dense = (goal + np.float32(penalty) * (sparse - apart)) @ inverse
            apart += dense
            mask = chosen(np.square(apart))
            sparse = np.where(mask, apart, np.float32(0))
            apart -= sparse
    return mask
