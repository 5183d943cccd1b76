"""How operators pass scales of slices on, where they do not just move them.

Relu, sums and pooling let scales through (they are positively homogeneous), layers and normalizations take
them in, and whatever has no rule fixes what it reads at one.
"""

from __future__ import annotations

import numpy as np

from onnxslim.ir.graph import Constant, Node, Tensor
from onnxslim.ops.channels import movement
from onnxslim.ops.channels.elementwise import shifted
from onnxslim.ops.channels.scale_labels import ScaleTrace
from onnxslim.ops.layers import Layer
from onnxslim.ops.spec import layer_of, spec_of


def layer(trace: ScaleTrace) -> None:
    """The weight takes in the scales of what it reads and makes, if nobody else reads it."""
    found = layer_of(trace.node)
    if not isinstance(found, Layer) or not _own(trace.node.inputs[1]) or not _floats(trace.node.input(2)):
        return
    if found.data_axis == found.axis:
        reads = trace.only(len(trace.shape(0)) + found.axis)
        trace.mix(found, reads, trace.makes(len(trace.made()) + found.axis))


def normalization(trace: ScaleTrace) -> None:
    """What it reads is fixed; what it makes, its scale and bias take in."""
    node, rank = trace.node, len(trace.shape(0))
    along = spec_of(node).norm_axis
    scale = node.constant(1)
    if along is None or scale is None or scale.ndim != 1 or not all(map(_floats, node.inputs[1:3])):
        return
    by_group = node.attrs.get("num_groups") == scale.size  # until opset 20, it has one scale per group
    partly = along == -1 and node.attrs.get("axis", -1) % rank != rank - 1
    if not by_group and not partly and not _has_more(node):
        made = trace.makes(along % rank)
        for index in (1, 2):
            trace.absorb(index, (-1,), made, -1)


def batch_normalization(trace: ScaleTrace) -> None:
    """It takes in what it reads, and what it makes."""
    node = trace.node
    inference = not node.attrs.get("training_mode", 0) and not _has_more(node)
    if not inference or not all(map(_own, node.inputs[1:5])):
        return
    reads = trace.only(1)
    if reads is None:
        return
    made = trace.makes(1)
    trace.absorb(1, (-1,), reads, 1)
    trace.absorb(3, (-1,), reads, -1)
    for index in (1, 2):
        trace.absorb(index, (-1,), made, -1)


def add(trace: ScaleTrace) -> None:
    """Add and Sub: all operands have the same scales; a constant takes them in."""
    rank, node = len(trace.made()), trace.node
    constant = {index for index in (0, 1) if isinstance(node.inputs[index], Constant)}
    found = [
        shifted(trace.blocks(index), rank - len(trace.shape(index)))
        for index in (0, 1)
        if index not in constant
    ]
    axes = [[block.axes for block in blocks] for blocks in found]
    if any(each != axes[0] for each in axes) or not all(_floats(node.inputs[index]) for index in constant):
        for block in (block for blocks in found for block in blocks):
            trace.pin(block.labels, "it is added to what is scaled in another way")
        return
    for block, other in zip(found[0], found[-1], strict=True):
        trace.tie(block.labels, other.labels)
        for index in constant:
            trace.absorb(index, [axis - rank for axis in block.axes], block.labels, -1)
    trace.emit(found[0])


def multiply(trace: ScaleTrace) -> None:
    """Of two tensors the second, or the gate, has no scale; nor has a constant, which may become integers."""
    tensors = trace.node.inputs
    _scaled_as(trace, 0 if trace.tracer.blocks(tensors[0]) else 1)


def gate(trace: ScaleTrace) -> None:
    """SwiGLU: what goes through the gate, the second tensor, may be scaled."""
    _scaled_as(trace, 1)


def divide(trace: ScaleTrace) -> None:
    """The divisor has no scale."""
    _scaled_as(trace, 0)


def _scaled_as(trace: ScaleTrace, index: int) -> None:
    trace.emit(shifted(trace.blocks(index), len(trace.made()) - len(trace.shape(index))))


def pool(trace: ScaleTrace) -> None:
    """Windows over space; positions of maxima, a second output, have no scale."""
    for axis in range(2, len(trace.shape(0))):
        trace.release(0, axis, "it moves a window along this axis")
    trace.emit(trace.blocks(0))


def sample(trace: ScaleTrace) -> None:
    """What lies between pixels, or in a region of them, is scaled as they are."""
    pool(trace)


def pad(trace: ScaleTrace) -> None:
    """With zeros, or with elements of its own."""
    filling = trace.node.constant(2) if trace.has(2) else np.zeros(1)
    if filling is not None and not filling.any() and not trace.node.attrs.get("value", 0.0):
        movement.pad(trace)


def resize(trace: ScaleTrace) -> None:
    """Unless it fills in what lies outside of its input."""
    if trace.node.attrs.get("coordinate_transformation_mode") != "tf_crop_and_resize":
        movement.upsample(trace)


def _has_more(node: Node) -> bool:
    """Whether more than its first output is there."""
    return any(tensor.name for tensor in node.outputs[1:])


def _own(tensor: Tensor | None) -> bool:
    return isinstance(tensor, Constant) and len(tensor.outputs) == 1 and _floats(tensor)


def _floats(tensor: Tensor | None) -> bool:
    """Whether it is not there, or a constant in single precision."""
    if tensor is None or not tensor.name:
        return True
    return (
        isinstance(tensor, Constant) and tensor.dtype == np.float32 and bool(np.isfinite(tensor.values).all())
    )
