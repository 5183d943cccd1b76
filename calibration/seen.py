"""Types and shapes that no rule tells: behind operators nobody here knows, those of one run are taken.

They are seen, not proved: what is of one size in one run may be of another in the next. Lossless passes take
nothing of it; others, which are judged on data in the end, may.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxslim.calibration.stream import Taps
from onnxslim.errors import CalibrationError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.ops.spec import sizes
from onnxslim.runtime.targets import Target
from onnxslim.shapes import cost

NOTE = "its type and shape follow from no rule: those of a run on the data are taken, seen and not proved"


@dataclass(frozen=True)
class Sight:
    """What a tensor was in one run."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def seen(model: Model, feeds: Mapping[str, Array], target: Target | None = None) -> dict[str, Sight]:
    """Types and shapes, by name, of the tensors of the main graph of which inference cannot tell them.

    Args:
        model: not modified.
        feeds: inputs of the run; nothing is run if inference can tell all.
        target: where to run; processors by default.

    Returns:
        Nothing of sequences and optionals, and nothing at all if the model does not run on these inputs.
    """
    inferred = cost.sized(model, {name: array.shape for name, array in feeds.items()})
    unknown = [
        tensor.name
        for node in inferred.graph.nodes
        for tensor in node.outputs
        if tensor.name and (tensor.dtype is None or sizes(tensor.shape) is None)
    ]
    if not unknown:
        return {}
    try:
        values = Taps(model, unknown, target)(0, feeds)
    except CalibrationError:
        return {}
    found = {name: values[name] for name in unknown if isinstance(values.get(name), np.ndarray)}
    return {name: Sight(array.dtype, array.shape) for name, array in found.items()}
