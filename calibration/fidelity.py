"""How far the outputs of a rewritten model are from those of the original, in one number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from onnxslim.calibration.collect import Runner
from onnxslim.calibration.data import CalibrationData, Feeds
from onnxslim.calibration.gram import batch_samples
from onnxslim.model import Model
from onnxslim.runtime import Target

# With fewer batches none can be spared.
FEW = 4


class Fidelity:
    """Keeps what a model makes of some samples, to compare others with it.

    Args:
        model: the reference.
        data: batches of its inputs.
        samples: how many to use; whole batches from the beginning, until there are as many.
        target: where to run.
    """

    def __init__(self, model: Model, data: CalibrationData, samples: int, target: Target) -> None:
        self._target = target
        self._batches = list(_first(data.bind(model.inputs()), samples))
        self._names = [tensor.name for tensor in model.graph.outputs]
        self._expected = list(self._run(model))

    def __call__(self, model: Model) -> float:
        """Squared error over variance, averaged over floating-point outputs; 0 is the reference."""
        found = list(self._run(model))
        shares = [
            _share([want[name] for want in self._expected], [got[name] for got in found])
            for name in self._names
        ]
        known = [share for share in shares if share is not None]
        return float(np.mean(known)) if known else 0.0

    def _run(self, model: Model) -> Iterator[dict[str, Any]]:
        runner = Runner(model, self._target)
        for feeds in self._batches:
            yield runner.run(feeds, self._names)


def _first(data: CalibrationData, samples: int) -> Iterator[Feeds]:
    seen = 0
    for feeds in data:
        if seen >= samples:
            return
        yield feeds
        seen += batch_samples(feeds)


def _share(wanted: Sequence[Any], found: Sequence[Any]) -> float | None:
    """Squared error over variance of one output; None if it has none or is not in floating point."""
    if any(not isinstance(want, np.ndarray) or want.dtype.kind != "f" for want in wanted):
        return None
    whole = np.concatenate([want.ravel() for want in wanted], dtype=np.float64)
    noise = np.concatenate([got.ravel() for got in found], dtype=np.float64) - whole
    power = float(np.square(whole - whole.mean()).sum()) if whole.size else 0.0
    return float(np.square(noise).sum()) / power if power else None


def parts(data: CalibrationData | None) -> tuple[CalibrationData | None, CalibrationData | None]:
    """Data to choose and fit by, and other data to measure the outcome on where there are enough batches."""
    if data is None or sum(1 for _ in islice(data, FEW)) < FEW:
        return data, data
    return data.holdout(0.25)
