"""Models that have the shape of well-known ones and random weights: for costs, never for accuracy."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class _Net:
    """Collects the nodes of a network whose tensors are named by what made them."""

    def __init__(self, seed: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(seed)

    def add(self, op: str, inputs: list[str], name: str, **attrs: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"n_{name}", **attrs))
        return name

    def weight(self, name: str, *shape: int, scale: float) -> str:
        values = (self._random.standard_normal(shape) * scale).astype(np.float32)
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def conv(
        self, x: str, name: str, inputs: int, outputs: int, kernel: int, stride: int, gain: float
    ) -> str:
        scale = gain * float(np.sqrt(2.0 / (inputs * kernel * kernel)))
        weight = self.weight(f"{name}.w", outputs, inputs, kernel, kernel, scale=scale)
        bias = self.weight(f"{name}.b", outputs, scale=0.01)
        pad = kernel // 2
        return self.add("Conv", [x, weight, bias], name, strides=[stride] * 2, pads=[pad] * 4)


def resnet50(seed: int = 0) -> onnx.ModelProto:
    """ResNet-50 with batch normalization folded: 53 convolutions, input `x` [N, 3, 224, 224]."""
    net = _Net(seed)
    out = net.add("Relu", [net.conv("x", "stem", 3, 64, 7, 2, 1.0)], "stem.relu")
    out = net.add("MaxPool", [out], "pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    channels = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            stride = 2 if block == 0 and stage > 0 else 1
            out = _bottleneck(net, out, f"s{stage}b{block}", channels, width, stride)
            channels = 4 * width
    out = net.add("Flatten", [net.add("GlobalAveragePool", [out], "gap")], "flat")
    net.add("Gemm", [out, net.weight("fc.w", channels, 1000, scale=0.02)], "logits")
    graph = helper.make_graph(
        net.nodes,
        "resnet50",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 224, 224])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 1000])],
        net.weights,
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def _bottleneck(net: _Net, x: str, name: str, inputs: int, width: int, stride: int) -> str:
    out = net.add("Relu", [net.conv(x, f"{name}.1", inputs, width, 1, 1, 1.0)], f"{name}.r1")
    out = net.add("Relu", [net.conv(out, f"{name}.2", width, width, 3, stride, 1.0)], f"{name}.r2")
    # A small gain keeps the residual sums from growing from block to block.
    out = net.conv(out, f"{name}.3", width, 4 * width, 1, 1, 0.3)
    shortcut = x
    if inputs != 4 * width:
        shortcut = net.conv(x, f"{name}.s", inputs, 4 * width, 1, stride, 1.0)
    return net.add("Relu", [net.add("Add", [out, shortcut], f"{name}.add")], f"{name}.out")
