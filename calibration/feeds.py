"""A batch compared with what it should be: arrays by name, as a model's inputs want them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnxslim.calibration.sources.arrays import Array, Feeds
from onnxslim.errors import CalibrationError, nearest
from onnxslim.ir.model import InputSpec

Shape = Sequence["int | str | None"]


def batch_samples(feeds: Mapping[str, Array]) -> int:
    """Samples in a batch: the size of the first axis of its first input that has one."""
    return next((array.shape[0] for array in feeds.values() if array.ndim), 1)


# Samples per batch where neither the user nor the model says how many.
BATCH_SIZE = 8


def batch_for(specs: Sequence[InputSpec]) -> int:
    """Samples per batch: what all inputs are fixed to, or `BATCH_SIZE`."""
    fixed = {spec.shape[0] if spec.shape else None for spec in specs if spec.required}
    only = fixed.pop() if len(fixed) == 1 else None
    return only if isinstance(only, int) and only > 0 else BATCH_SIZE


def arrays_of(feeds: Mapping[str, Array], where: str) -> Feeds:
    if not isinstance(feeds, Mapping):
        raise CalibrationError(f"{where} is a {type(feeds).__name__}, not a dict from input name to array")
    for name, array in feeds.items():
        if not isinstance(array, np.ndarray):
            raise CalibrationError(f"{where}: input {name!r} is a {type(array).__name__}, not a numpy array")
    return dict(feeds)


def checked(feeds: Feeds, specs: Sequence[InputSpec], where: str) -> Feeds:
    """The batch under the model's names; CalibrationError where the model cannot take it."""
    named = {_positional(name, specs): array for name, array in feeds.items()}
    known = [spec.name for spec in specs]
    for name in named:
        if name not in known:
            raise CalibrationError(f"{where}: the model has no input {name!r}; {nearest(name, known)}")
    for spec in specs:
        if spec.name in named:
            _check_array(named[spec.name], spec, where)
        elif spec.required:
            raise CalibrationError(
                f"{where}: input {spec.name!r} is missing; given: {', '.join(named) or 'none'}"
            )
    return named


def _positional(name: str, specs: Sequence[InputSpec]) -> str:
    position = re.fullmatch(r"#(\d+)", name)
    return specs[int(position[1])].name if position and int(position[1]) < len(specs) else name


def _check_array(array: Array, spec: InputSpec, where: str) -> None:
    if spec.dtype is None:
        raise CalibrationError(
            f"{where}: input {spec.name!r} of the model is not a tensor; only tensors can be fed"
        )
    if array.dtype != spec.dtype and not (_is_text(array.dtype) and _is_text(spec.dtype)):
        expected = f"the model expects {spec.dtype}; convert it, such as with astype"
        raise CalibrationError(f"{where}: input {spec.name!r} is {array.dtype}, {expected}")
    if spec.shape is None or _fits(array.shape, spec.shape):
        return
    sizes = ", ".join("?" if size is None else str(size) for size in spec.shape)
    same_samples = array.ndim == len(spec.shape) and _fits(array.shape[1:], spec.shape[1:])
    hint = f"; use batches of {spec.shape[0]}" if same_samples else ""
    raise CalibrationError(
        f"{where}: input {spec.name!r} has shape {array.shape}, the model expects ({sizes}){hint}"
    )


def _is_text(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "OSUT"


def _fits(shape: Sequence[int], expected: Shape) -> bool:
    return len(shape) == len(expected) and all(
        not isinstance(want, int) or size == want for size, want in zip(shape, expected, strict=True)
    )
