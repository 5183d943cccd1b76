"""Calibration and test data named by a path: batches for a model, and the labels that lie beside them."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from onnxslim.calibration.data import CalibrationData
from onnxslim.errors import CalibrationError
from onnxslim.graph import Array
from onnxslim.model import Model

T = TypeVar("T")

LABEL_KEYS = ("label", "labels")


def read(
    path: Path | None, batch_size: int, labels_key: str | None, model: Model
) -> tuple[CalibrationData | None, Array | None]:
    """Batches of model inputs, and labels where the file has them.

    Args:
        path: an .npz file with one array per input, or a folder (see `CalibrationData.from_dir`).
        batch_size: samples per batch of an .npz file.
        labels_key: array that holds the class of every sample; by default one of `LABEL_KEYS`, if there.
        model: whose inputs they are.

    Raises:
        CalibrationError: the file cannot be read or does not fit the model.
    """
    if path is None:
        return None, None
    specs = model.inputs()
    if path.is_dir():
        data, labels = CalibrationData.from_dir(path), None
    elif path.suffix == ".npz":
        others = _arrays_but(path, {spec.name for spec in specs})
        data = CalibrationData.from_npz(path, batch_size, exclude=others)
        labels = _labels(path, labels_key, others)
    else:
        raise CalibrationError(f"{path}: expected an .npz file or a folder")
    data = data.bind(specs)
    data.check(specs)
    return data, labels


def _arrays_but(path: Path, inputs: Collection[str]) -> list[str]:
    """Names of the arrays that are not model inputs."""
    names = _npz(path, lambda archive: list(archive.files))
    others = [name for name in names if name not in inputs]
    if len(others) == len(names):
        raise CalibrationError(
            f"{path}: its arrays are {', '.join(names) or 'none'}; the model's inputs are {', '.join(inputs)}"
        )
    return others


def _labels(path: Path, key: str | None, others: Sequence[str]) -> Array | None:
    wanted = [key] if key else LABEL_KEYS
    found = next((name for name in wanted if name in others), None)
    if found is None:
        if key:
            raise CalibrationError(f"{path}: there is no array '{key}' beside the model's inputs")
        return None
    labels: Array = _npz(path, lambda archive: archive[found])
    return labels


def _npz(path: Path, read: Callable[[Any], T]) -> T:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return read(archive)
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise CalibrationError(f"{path}: not an .npz file of plain arrays: {error}") from error
