"""Which factors ONNX Runtime really runs faster than the layer, measured on models of that one layer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial

import numpy as np
import onnx

from onnxslim.engine.editor import Editor
from onnxslim.ir.graph import Array, Constant, Graph, Node, Tensor, Variable
from onnxslim.ir.model import Model, constant_of
from onnxslim.passes.factorize.layers import Factor, Sizes, Whole
from onnxslim.passes.factorize.schemes import Ranks, Scheme
from onnxslim.runtime.timing import Bench, Timing


class SpeedGate:
    """Times factors against their layer.

    Args:
        model: what the layers are from; its opset counts.
        bench: does and remembers the timing.
    """

    def __init__(self, model: Model, bench: Bench) -> None:
        self._shell = onnx.ModelProto(ir_version=model.ir_version)
        for domain, version in model.opsets.items():
            self._shell.opset_import.add(domain=domain, version=version)
        self._bench = bench

    def __call__(self, layer: Whole, candidates: Sequence[tuple[Scheme, Ranks]]) -> Timing:
        """Time of the layer in one run, and ratios to it of candidates, by `label`."""
        feeds = {"x": _made_up(layer.shape, layer.weight.dtype)}
        others = {label(*each): partial(self._factored, layer, *each) for each in candidates}
        return self._bench(_description(layer), lambda: self._alone(layer), others, feeds)

    def _alone(self, layer: Whole) -> Model:
        """A model of a copy of the layer, with weights that are made up."""
        node = layer.node
        data = Variable("x", layer.weight.dtype, layer.shape)
        result = Variable("y", layer.weight.dtype)
        inputs: list[Tensor] = [self._twin(tensor) for tensor in node.inputs]
        inputs[1 - layer.view.weight_index] = data
        if len(inputs) > 2 and not isinstance(inputs[2], Constant):
            del inputs[2:]  # computed; it is added in the same way to both
        graph = Graph("layer")
        graph.inputs, graph.outputs = [data], [result]
        graph.nodes = [Node(node.op, "layer", node.attrs, inputs, [result])]
        return Model(graph, self._shell)

    def _factored(self, layer: Whole, scheme: Scheme, ranks: Ranks) -> Model:
        """The same model with factors in place of the layer."""
        model = self._alone(layer)
        edit = Editor(model)
        shapes = zip(scheme.shapes(layer, ranks), scheme.axes(layer), strict=True)
        factors = [Factor(_made_up(shape, layer.weight.dtype), axes) for shape, axes in shapes]
        layer.install(edit, model.graph.nodes[0], factors, None)
        edit.commit()
        return model

    def _twin(self, tensor: Tensor) -> Tensor:
        values = constant_of(tensor)
        if values is None:
            return Variable(tensor.name)
        return Constant(tensor.name, _made_up(values.shape, values.dtype))


def label(scheme: Scheme, ranks: Ranks) -> str:
    """Names a candidate of a layer."""
    return f"{scheme.name} {'x'.join(map(str, ranks))}"


def _description(layer: Whole) -> str:
    """Everything that the time a layer takes depends on."""
    node = layer.node
    attrs = dict(sorted(node.attrs.items()))
    values = [constant_of(tensor) for tensor in node.inputs]
    inputs = [None if each is None else each.shape for each in values]
    return json.dumps([node.op, attrs, layer.shape, inputs, str(layer.weight.dtype)], default=str)


def _made_up(shape: Sizes, dtype: np.dtype[np.generic]) -> Array:
    return (np.random.default_rng(0).random(shape, np.float32) - 0.5).astype(dtype)
