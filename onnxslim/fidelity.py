"""How far a rewritten model is from another, in figures that passes choose by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnxslim.graph import MASK_MAGNITUDE, Array
from onnxslim.model import Model
from onnxslim.probe import probes
from onnxslim.runtime import Session, Target


def relative_difference(
    first: Model, second: Model, target: Target, samples: Sequence[Mapping[str, Array]] = ()
) -> float | None:
    """Largest difference of an output, relative to its largest magnitude, over probe inputs.

    Both models run as they are written, without ONNX Runtime's own optimizations.

    Args:
        first, second: models with one interface.
        target: where they run.
        samples: real inputs, preferred to made-up ones.

    Returns:
        None if no inputs are found on which the first runs.

    Raises:
        LoadError: ONNX Runtime refuses one of them.
    """
    session, other = (Session(each, target, optimize="none") for each in (first, second))
    worst: float | None = None
    for feeds in probes(first, session, samples):
        expected, actual = session.run(feeds), other.run(feeds)
        found = [_relative(expected[name], actual[name]) for name in expected]
        worst = max([worst or 0.0, *found])
    return worst


def _relative(expected: Array, actual: Array) -> float:
    if not isinstance(expected, np.ndarray) or expected.dtype.kind not in "fV" or not expected.size:
        return 0.0
    if expected.shape != actual.shape:
        return float("inf")
    usable = np.isfinite(expected) & (np.abs(expected) < MASK_MAGNITUDE)
    if not np.isfinite(actual[usable]).all():
        return float("inf")
    difference = np.abs(expected[usable].astype(np.float64) - actual[usable].astype(np.float64))
    scale = np.abs(expected[usable].astype(np.float64)).max(initial=0.0)
    return float(difference.max(initial=0.0) / (scale or 1.0))


class Fidelity:
    """Compares models with a teacher on a few batches.

    Args:
        teacher: what the outputs should be.
        batches: inputs to compare on.
        target: where to run.
    """

    def __init__(self, teacher: Model, batches: Sequence[Mapping[str, Array]], target: Target) -> None:
        self._batches = batches
        self._target = target
        self._expected = self._outputs(teacher)

    def loss(self, model: Model) -> float:
        """Squared error of the outputs over their variance, averaged over outputs; 0 is a perfect copy.

        Args:
            model: with the teacher's interface.

        Returns:
            Infinity if an output is not finite.
        """
        actual = self._outputs(model)
        return float(np.mean([_loss(expected, actual[name]) for name, expected in self._expected.items()]))

    def _outputs(self, model: Model) -> dict[str, list[Array]]:
        session = Session(model, self._target)
        found: dict[str, list[Array]] = {}
        for feeds in self._batches:
            for name, value in session.run(feeds).items():
                if isinstance(value, np.ndarray) and value.dtype.kind == "f":
                    found.setdefault(name, []).append(value.astype(np.float64))
        return found


def _loss(expected: Sequence[Array], actual: Sequence[Array]) -> float:
    """Each batch may have sizes of its own."""
    power = error = 0.0
    for one, other in zip(expected, actual, strict=True):
        usable = np.isfinite(one) & (np.abs(one) < MASK_MAGNITUDE)
        if one.shape != other.shape or not np.isfinite(other[usable]).all():
            return float("inf")
        power += float(np.sum(np.square(one[usable] - np.mean(one[usable]))))
        error += float(np.sum(np.square(one[usable] - other[usable])))
    return error / power if power else float(error > 0)
