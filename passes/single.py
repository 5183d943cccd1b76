"""A model in half precision in single precision again."""

from __future__ import annotations

from typing import ClassVar

import ml_dtypes
import numpy as np
from onnx import AttributeProto, TensorProto, numpy_helper

from onnxslim.engine.base import Changes, Context, InterfacePart, Log, Pass, options
from onnxslim.errors import UsageError
from onnxslim.ir.graph import Array, Constant, Node, Variable
from onnxslim.ir.model import Model

_HALVES, _SINGLE = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)), np.dtype(np.float32)
# The same in attributes.
_HALF_TYPES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
# Attributes that name the element type of a result.
_TYPE_ATTRIBUTES = ("to", "dtype")


@options
class Single(Pass):
    """Compute in single precision where the model does in half (float16, bfloat16), inputs and outputs too.

    Whatever is said of the result, by calibration data, checks and reports, refers to the model in single
    precision.
    """

    name: ClassVar[str] = "single"
    prepares: ClassVar[bool] = True

    @property
    def interface(self) -> frozenset[InterfacePart]:
        """Inputs and outputs in half precision are in single precision then."""
        return frozenset(("types",))

    def run(self, model: Model, ctx: Context) -> Changes:
        """Convert the model in place.

        Raises:
            UsageError: the model has functions of its own, whose types are not known.
        """
        if model.shell.functions:
            raise UsageError(
                "pass 'single' does not work for models with functions of their own; slim the model before"
            )
        log = Log()
        _convert(model, log)
        return log.done()


def _convert(model: Model, log: Log) -> None:
    for graph in model.graphs():
        # A copy shares its defaults with the original.
        graph.defaults = {name: Constant(name, _wide(value)) for name, value in graph.defaults.items()}
    for constant in model.constants():
        if constant.dtype in _HALVES:
            constant.values = _wide(constant)
            log.change(constant.name, "stored as float32", "single precision")
    for graph in model.graphs():
        made = (tensor for node in graph.nodes for tensor in node.outputs)
        for tensor in (*graph.inputs, *graph.outputs, *made):
            if isinstance(tensor, Variable) and tensor.dtype in _HALVES:
                tensor.dtype = _SINGLE
                log.change(tensor.name, "computed in float32", "single precision")
        for node in graph.nodes:
            if _widen(node):
                log.change(node.label, f"{node.op} makes float32", "single precision")


def _wide(constant: Constant) -> Array:
    return constant.values.astype(_SINGLE) if constant.dtype in _HALVES else constant.values


def _widen(node: Node) -> bool:
    """Let a node make single precision where its attributes say half precision; whether they did."""
    named = [name for name in _TYPE_ATTRIBUTES if node.attrs.get(name) in _HALF_TYPES]
    for name in named:
        node.attrs[name] = int(TensorProto.FLOAT)
    value = node.attrs.get("value")
    if isinstance(value, AttributeProto) and value.t.data_type in _HALF_TYPES:
        wide = numpy_helper.from_array(numpy_helper.to_array(value.t).astype(_SINGLE), value.t.name)
        node.attrs["value"] = AttributeProto(name="value", type=AttributeProto.TENSOR, t=wide)
        return True
    return bool(named)
