"""Teach onnxslim an operator that it does not know, here ONNX Runtime's `com.microsoft.CDist`.

python examples/custom_operator.py
"""

from __future__ import annotations

import math

import onnx.parser

from onnxslim import Pipeline, load
from onnxslim.ir.graph import Node
from onnxslim.ops import OpSpec, register
from onnxslim.ops.spec import sizes
from onnxslim.passes import Dedupe
from onnxslim.shapes.cost import macs

MODEL = """
<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
example (float[2,4] x) => (float[2,3] y) <float[3,4] w = {1,2,3,4, 5,6,7,8, 9,10,11,12}> {
  a = com.microsoft.CDist <metric = "euclidean"> (x, w)
  b = com.microsoft.CDist <metric = "euclidean"> (x, w)
  y = Add (a, b)
}
"""


def _macs(node: Node) -> int | None:
    """Elements of a row, for every pair of rows; shape inference knows nothing of the output."""
    left, right = sizes(node.inputs[0].shape), sizes(node.inputs[1].shape)
    if left is None or right is None:
        return None
    return math.prod(left) * right[0]


ROW = OpSpec("CDist", domain="com.microsoft", macs=_macs)


def main() -> None:
    """What is known of the model before and after the row."""
    model = load(onnx.parser.parse_model(MODEL))
    for what in ("without a row", "with a row"):
        result = Pipeline(Dedupe())(model)
        count, nodes = macs(model), len(result.model.graph.nodes)
        print(f"{what}: {count} MACs, {nodes} nodes after dedupe")
        register(ROW)


if __name__ == "__main__":
    main()
