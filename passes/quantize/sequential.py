"""Weights fitted to quantized inputs, and rounded, in the order in which layers run.

Each layer gets the inputs that the layers already quantized give it, and is to make of them what the float
model makes: first by regression (`repair`), then in integers, by what it really sees. So what rounding and
clipping did before it is taken back as far as that is linear, instead of adding up (Frantar et al., "Optimal
Brain Compression", NeurIPS 2022, section 6).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxslim.calibration.gram import Gram
from onnxslim.engine.base import Context
from onnxslim.ir.files import aside
from onnxslim.ir.graph import Array, Constant, Namer, Node
from onnxslim.ir.model import Model
from onnxslim.ops.layers import Layer
from onnxslim.passes.quantize.blocks import Blocks
from onnxslim.passes.quantize.weights import Encoded
from onnxslim.passes.repair import in_turn

Floats = NDArray[np.float32]
# Of the positions that pruned layers are fitted to: weights that stay close to what they are need fewer.
PART = 0.5
# From a layer, wanted weights as its matrix, moments of what it sees, and whether a bias takes in the mean of
# the error, to integers and the matrix they stand for.
Coder: TypeAlias = Callable[[Layer, Floats, Gram, bool], "tuple[Encoded | Blocks, Floats]"]


class Sequential:
    """Fits and rounds the layers of one model in turn.

    Args:
        student: what the quantized model will be, but for its weights; edited.
        coder: rounds the weights of one layer.

    Attributes:
        codes: by name of the weight, integers of it.
        blocks: the same where they have a scale for every few inputs.
        wanted: by name of the weight, what they are of, in the operator's own layout.
    """

    def __init__(self, student: Model, coder: Coder) -> None:
        self._student = student
        self._coder = coder
        self.codes: dict[str, Encoded] = {}
        self.blocks: dict[str, Blocks] = {}
        self.wanted: dict[str, Array] = {}

    def run(self, teacher: Model, layers: list[str], ctx: Context) -> None:
        """Go through the layers with these output tensors."""
        in_turn(
            self._student,
            teacher,
            ctx.given,
            layers,
            self._store,
            target=ctx.target,
            progress=ctx.progress,
            chosen=False,
            part=PART,
        )

    def _store(self, layer: Layer, wanted: Floats, gram: Gram, corrected: bool) -> Floats:
        name = layer.node.inputs[1].name
        encoded, restored = self._coder(layer, wanted, gram, corrected)
        if isinstance(encoded, Encoded):
            self.codes[name] = replace(encoded, lost=np.zeros(wanted.shape[0] * wanted.shape[1]))
        else:
            self.blocks[name] = encoded
        self.wanted[name] = aside(layer.restored(wanted))
        return restored

    def refitted(self, model: Model) -> Model:
        """A copy of the float model with the weights wanted, and the biases of the student."""
        twin = model.copy()
        unique = Namer(twin.graph)
        students = {node.label: node for node in self._student.graph.nodes}
        for node in twin.graph.nodes:
            student = students.get(node.label)
            if student is not None and student.op == node.op:
                self._copy(node, student, unique)
        return twin

    def _copy(self, node: Node, student: Node, unique: Namer) -> None:
        for index, tensor in enumerate(student.inputs):
            if not isinstance(tensor, Constant):
                continue
            present = node.input(index)
            values = self.wanted.get(tensor.name, tensor.values)
            if present is None:
                node.inputs.append(Constant(tensor.name, values))
            elif isinstance(present, Constant) and present.values is not values:
                if len(present.outputs) == 1:
                    present.values = values
                elif not np.array_equal(present.values, values):
                    node.inputs[index] = Constant(unique(tensor.name), values)
        if "beta" in node.attrs and "beta" not in student.attrs:
            del node.attrs["beta"]
