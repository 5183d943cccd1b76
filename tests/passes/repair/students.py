"""Models that have lost something, with those they come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.samples import Samples
from onnxslim.engine.base import Changes
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.passes.repair import repair
from onnxslim.runtime.session import Session
from tests.helpers import normal, parse, replaced

Feeds = Mapping[str, Array]


def mixing(size: int, groups: int = 1) -> Array:
    """A well-conditioned invertible map that keeps groups of channels apart."""
    blocks = [
        np.eye(size // groups) + 0.3 * normal(size // groups, size // groups, seed=i) for i in range(groups)
    ]
    found = np.zeros((size, size), np.float32)
    for i, block in enumerate(blocks):
        at = slice(i * len(block), (i + 1) * len(block))
        found[at, at] = block
    return found


def batches(*shape: int, count: int = 4, name: str = "x", seed: int = 5) -> CalibrationData:
    """So many batches of this shape for one input."""
    return CalibrationData([{name: normal(*shape, seed=seed + i)} for i in range(count)])


def refit(student: Model, teacher: Model, data: CalibrationData, **options: Any) -> Changes:
    """Repair a student with what a pipeline would make of the data."""
    return repair(student, teacher, Samples(data, teacher), **options)


def error(student: Model, teacher: Model, feeds: Feeds, output: str = "y") -> float:
    """Root mean square difference of an output, relative to the teacher's."""
    wanted, found = (Session(model).run(feeds)[output].astype(float) for model in (teacher, student))
    return float(np.sqrt(np.square(found - wanted).mean() / np.square(wanted).mean()))


def restored(student: Model, teacher: Model, feeds: Feeds, limit: float = 1e-4, **options: Any) -> Changes:
    """Assert that repair brings a student, which is far off, back to the teacher on other data."""
    fresh = {
        name: array[::-1] * array.dtype.type(0.9) if array.dtype.kind == "f" else array
        for name, array in feeds.items()
    }
    assert error(student, teacher, fresh) > 0.02
    data = options.pop("data", None) or CalibrationData([feeds])
    changes = refit(student, teacher, data, **options)
    assert error(student, teacher, fresh) < limit
    return changes


# ------------------------------------------------------------------------------------------------- the method


def block(width: int = 4) -> tuple[Model, Model]:
    """A residual block behind a layer whose output has suffered, and the same block unharmed."""
    text = """g (float[N,4,H,W] x) => (float[N,4,A,B] y)
    { s = Conv(x, v) r = Relu(s) a = Conv<pads=[1,1,1,1]>(r, w, b) p = Relu(a)
      c = Conv<pads=[1,1,1,1]>(p, z, d) y = Add(c, r) }"""
    weights = {"w": normal(width, 4, 3, 3), "z": normal(4, width, 3, 3, seed=1) / np.float32(width)}
    weights |= {"b": normal(width), "d": normal(4)}
    teacher = parse(text, {"v": mixing(4).reshape(4, 4, 1, 1), **weights})
    harmed = (mixing(4) + 0.3 * normal(4, 4, seed=2)).reshape(4, 4, 1, 1).astype(np.float32)
    return replaced(teacher, v=harmed), teacher


# ----------------------------------------------------------------------------------------------- same results


def run_repair(data: CalibrationData, **options: Any) -> tuple[Model, Changes]:
    """A harmed block, repaired with this data, and what was done to it."""
    student, teacher = block()
    return student, refit(student, teacher, data, **options)
