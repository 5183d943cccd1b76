"""Samples held out."""

from __future__ import annotations

import math
from typing import NamedTuple

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.feeds import batch_samples
from onnxslim.calibration.fidelity import SAMPLES


class Split(NamedTuple):
    """Data to work with, data to judge on, and the share of these; 0 if they are the same."""

    fit: CalibrationData
    held: CalibrationData
    share: float


def split(data: CalibrationData, samples: int = SAMPLES, most: float = 0.5) -> Split:
    """Hold out batches of about as many samples, and of no more than a part of all.

    Where that part would be less than a batch, all data serve for both.
    """
    batches = data.count()
    if batches * most < 1:
        return Split(data, data, 0.0)
    wanted = math.ceil(samples / max(batch_samples(next(iter(data))), 1))
    share = min(wanted / batches, most)
    return Split(*data.holdout(share, seed=0), share)
