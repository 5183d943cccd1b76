"""How good a model is, as its user measures it: a number for a function that runs the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np

from onnxslim.errors import CalibrationError, LoadError, OnnxSlimError, UsageError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target

Run: TypeAlias = Callable[[Mapping[str, Array]], dict[str, Any]]
"""From the inputs of a model to its outputs, both by name."""
Metric: TypeAlias = Callable[[Run], float]
"""Runs a model on data of its own and says how good it is; more is better."""


def measure(metric: Metric, model: Model, target: Target) -> float:
    """The value of a metric.

    Raises:
        LoadError: the model does not run.
        UsageError: the metric fails, or gives no number.
    """
    session = Session(model, target, spin=False)
    name = getattr(metric, "__name__", "metric")
    try:
        value = float(metric(lambda feeds: session.run(feeds)))
    except LoadError as error:
        raise LoadError(f"metric '{name}': {error}") from error
    except OnnxSlimError:
        raise
    except Exception as error:  # whatever code of the caller's raises
        raise UsageError(f"metric '{name}' fails: {type(error).__name__}: {error}") from error
    if math.isnan(value):
        raise UsageError(f"metric '{name}' is not a number (NaN)")
    return value


def labels_of(labels: Array, start: int, size: int) -> Array:
    """The labels of some samples, shape (size,).

    Raises:
        CalibrationError: they are not one integer per sample, or too few.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise CalibrationError(
            f"labels are one integer per sample, not {labels.dtype} of shape {labels.shape}"
        )
    if len(labels) < start + size:
        raise CalibrationError(f"there are {len(labels)} labels for at least {start + size} samples")
    return labels[start : start + size]


def hits(scores: Array, labels: Array) -> int:
    """How often the largest of some scores, shape (samples, classes), is where the label says.

    Raises:
        CalibrationError: a label is none of the classes.
    """
    classes = scores.shape[1]
    strange = labels[(labels < 0) | (labels >= classes)]
    if strange.size:
        raise CalibrationError(f"label {strange[0]} is none of the {classes} classes, which count from 0")
    return int((np.argmax(scores, axis=1) == labels).sum())


def accuracy(data: Iterable[Mapping[str, Array]], labels: Array) -> Metric:
    """Share of samples whose largest value, in the first output of shape (samples, classes), is the label.

    Args:
        data: batches, gone through for every model.
        labels: the class of every sample, shape (samples,).
    """

    def accuracy(run: Run) -> float:
        right = seen = 0
        for feeds in data:
            found = next((each for each in run(feeds).values() if np.ndim(each) == 2), None)
            if found is None:
                raise CalibrationError("labels were given, but no output has shape (samples, classes)")
            right += hits(found, labels_of(labels, seen, len(found)))
            seen += len(found)
        return right / max(seen, 1)

    return accuracy
