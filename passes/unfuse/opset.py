"""Later versions of the standard operators, where what is to be written is not there yet."""

from __future__ import annotations

import onnx
import onnx.version_converter

from onnxslim.errors import LoadError, SaveError, one_line
from onnxslim.ir.model import Model


def raise_opset(model: Model, version: int) -> str | None:
    """Convert the standard operators of a model to a later version, in place.

    Returns:
        Why that cannot be; None where it is done.
    """
    try:
        original = model.to_proto()
        converted = onnx.version_converter.convert_version(original, version)
        _declare_as(original.graph, converted.graph)
        newer = Model.from_proto(converted)
    except (RuntimeError, LoadError, SaveError, ValueError) as error:
        problem = f"opset {model.opset} could not be raised: {one_line(error)}"
        return f"{problem}; export the model again with a newer opset"
    # Of the rest, the converter drops functions and metadata.
    model.graph, model.opsets = newer.graph, newer.opsets
    return None


def _declare_as(original: onnx.GraphProto, converted: onnx.GraphProto) -> None:
    """Declare inputs and outputs as they were: the converter replaces symbols by what it infers."""
    for before, after in ((original.input, converted.input), (original.output, converted.output)):
        declared = {info.name: info for info in before}
        for info in after:
            if info.name in declared:
                info.CopyFrom(declared[info.name])
