"""Forward functions by families, as `onnxslim/ops/` has its rows."""

from __future__ import annotations

import importlib
from functools import cache

FAMILIES = (
    "elementwise",
    "reductions",
    "normalizations",
    "pooling",
    "linear",
    "recurrent",
    "movement",
    "indexing",
    "sampling",
    "generate",
    "control",
)


@cache
def load() -> None:
    """Have all rows registered."""
    for name in FAMILIES:
        importlib.import_module(f"{__name__}.{name}")
