"""Covariance of the channels of tensors, from one streaming pass over calibration data."""

from __future__ import annotations

from collections.abc import Sequence
from operator import length_hint

import numpy as np

from onnxslim.calibration.collect import Channels, Progress, Runner, tapped
from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.gram import ROWS, Gram, Moments, batch_samples, quota_for, sampled
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.runtime.targets import Target

# Samples to reckon with where the source does not know how many it has.
_MANY = 512


def covariances(
    model: Model,
    data: CalibrationData,
    axes: Sequence[Channels],
    *,
    rows: int = ROWS,
    seed: int = 0,
    target: Target | None = None,
    progress: Progress | None = None,
) -> dict[Channels, Gram]:
    """Mean and covariance over all positions of the slices of a tensor along an axis.

    Args:
        model: not modified.
        data: batches of inputs.
        axes: names of floating-point tensors of the main graph, each with the axis of its channels.
        rows: about how many positions of each tensor to look at, spread evenly over all samples.
        seed: of the choice of positions.
        target: where to run; processors by default.
        progress: called with ("observing", batches done, batches in all).

    Returns:
        Moments with one group (g = 1) of as many inputs as there are channels, and no outputs.

    Raises:
        CalibrationError: the data does not fit the model, is empty, or makes a tensor NaN or infinite.
    """
    source = data.bind(model.inputs())
    moments = {key: Moments() for key in axes}
    wanted = list(dict.fromkeys(name for name, _ in axes))
    runner, first, quota, total = Runner(tapped(model, wanted), target), 0, 0, length_hint(source, -1)
    for index, feeds in enumerate(source):
        values = {**feeds, **runner.run(feeds, [name for name in wanted if name not in feeds])}
        samples = batch_samples(feeds)
        quota = quota or quota_for(rows, samples * total if total > 0 else _MANY)
        for (name, axis), each in moments.items():
            each.update(*_columns(values[name], axis, samples, first, quota, seed))
        first += samples
        if progress:
            progress("observing", index + 1, None if total < 0 else total)
    return {key: each.result() for key, each in moments.items()}


def _columns(array: Array, axis: int, samples: int, first: int, quota: int, seed: int) -> tuple[Array, Array]:
    """Channels by positions, and no outputs."""
    flat = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
    at = sampled(flat.shape[1], samples, first, quota, seed)
    x = flat[:, at].astype(np.float32)[None]
    return x, np.zeros((1, 0, x.shape[2]), np.float32)
