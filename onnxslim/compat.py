"""The function callers of PyPI's OnnxSlim know."""

from __future__ import annotations

import os

import onnx

from onnxslim.model import Model, load
from onnxslim.passes.slim import Slim
from onnxslim.pipeline import Pipeline


def slim(
    model: str | os.PathLike[str] | onnx.ModelProto | Model,
    output_model: str | os.PathLike[str] | None = None,
) -> onnx.ModelProto:
    """Simplify a model without changing what it computes.

    Args:
        model: a file, a ModelProto or a Model; left as it is.
        output_model: where to save the result, if anywhere; may be the file it was read from.

    Returns:
        The simplified model, all data inside.

    Raises:
        LoadError: it is missing, broken, or not an ONNX model.
        SaveError: the result could not be written, or is too large for one protobuf.
    """
    result = Pipeline(Slim())(load(model))
    if output_model is not None:
        result.save(output_model)
    return result.model.to_proto()
