"""Operators with weights, normalizations, and what else treats the channel axis as such."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from onnxslim.ops.channels.cut import Cut
from onnxslim.ops.channels.labels import Block, Labels, Trace


def convolution(trace: Trace) -> None:
    """Conv and ConvInteger: W[O, I/g, k...]; positions in a group are the same in all groups."""
    _convolve(trace, bias=2)


def _convolve(trace: Trace, bias: int, alike: bool = True) -> None:
    _keep_space(trace, 0)
    _keep_space(trace, 1)
    group, outputs = trace.node.attrs.get("group", 1), trace.labels(1, 0)
    if 1 < group == trace.shape(0)[1] and trace.shape(1)[1] == 1:
        _per_channel(trace, outputs, group)
    elif group == 1 and alike:
        trace.contract(0, 1, 1, 1)
    else:
        _tie_groups(trace, trace.labels(0, 1), group, trace.labels(1, 1))
        _tie_groups(trace, outputs, group)
    _emit_channels(trace, outputs, bias)


def integer_convolution(trace: Trace) -> None:
    """ConvInteger (x, w, zero points) and QLinearConv (x, scale, zero, w, scale, zero, scale, zero, bias)."""
    linear = trace.node.op == "QLinearConv"
    weight, per_output = (3, (4, 5, 8)) if linear else (1, (3,))
    _keep_space(trace, 0)
    _keep_space(trace, weight)
    group, outputs = trace.node.attrs.get("group", 1), trace.labels(weight, 0)
    if 1 < group == trace.shape(0)[1] and trace.shape(weight)[1] == 1:
        _per_channel(trace, outputs, group)
    elif group == 1:
        trace.contract(0, 1, weight, 1)
    else:
        _tie_groups(trace, trace.labels(0, 1), group, trace.labels(weight, 1))
        _tie_groups(trace, outputs, group)
    for index in per_output:
        trace.tie_axis(index, 0, outputs)
    trace.emit([Block((0,), trace.labels(0, 0)), Block((1,), outputs)])


def integer_matmul(trace: Trace) -> None:
    """MatMulInteger and QLinearMatMul: as MatMul, with a scale and zero point for all, or one per column."""
    linear = trace.node.op == "QLinearMatMul"
    right, per_column = (3, (4, 5)) if linear else (1, (3,))
    _multiply(trace, right)
    columns = trace.labels(right, len(trace.shape(right)) - 1)
    for index in per_column:
        trace.tie_axis(index, 0, columns)


def transposed_convolution(trace: Trace) -> None:
    """ConvTranspose: W[I, O/g, k...]."""
    _keep_space(trace, 0)
    _keep_space(trace, 1)
    group, inputs = trace.node.attrs.get("group", 1), trace.labels(0, 1)
    if group == 1:
        trace.contract(0, 1, 1, 0)
        outputs = trace.labels(1, 1)
    elif group == inputs.size and trace.shape(1)[1] == 1:
        outputs = trace.labels(1, 0)
        trace.tie(inputs, outputs)
    else:
        _tie_groups(trace, inputs, group)
        trace.tie(inputs, trace.labels(1, 0))
        outputs = np.tile(trace.labels(1, 1), group)
    _emit_channels(trace, outputs, bias=2)


def cut_integer_convolution(cut: Cut) -> None:
    """The same where the weight is the fourth input."""
    cut_convolution(cut, weight=3)


def cut_convolution(cut: Cut, weight: int = 1) -> None:
    """A convolution with one input channel per group has as many groups as channels; others keep theirs."""
    node = cut.node
    depthwise = node.attrs.get("group", 1) == cut.before(0)[1] and 1 in cut.before(weight)[:2]
    if depthwise and node.attrs.get("group", 1) > 1:
        node.attrs["group"] = cut.size(0, 1)


def gemm(trace: Trace) -> None:
    """y = A' B' + C, with A and B transposed or not."""
    flip_a, flip_b = trace.node.attrs.get("transA", 0), trace.node.attrs.get("transB", 0)
    trace.contract(0, 0 if flip_a else 1, 1, 1 if flip_b else 0)
    rows, columns = trace.labels(0, 1 if flip_a else 0), trace.labels(1, 0 if flip_b else 1)
    if trace.has(2):
        trace.ignore(2)
        rank = len(trace.shape(2))
        if rank:
            trace.tie_axis(2, rank - 1, columns)
        if rank == 2:
            trace.tie_axis(2, 0, rows)
    trace.emit([Block((0,), rows), Block((1,), columns)])


def matmul(trace: Trace) -> None:
    """Axes in front of the last two are batch axes and broadcast; vectors have no axis of their own."""
    _multiply(trace, 1)


def _multiply(trace: Trace, second: int) -> None:
    left, right = len(trace.shape(0)), len(trace.shape(second))
    for index, axes in ((0, (left - 1, left - 2)), (second, (right - 1, right - 2))):
        _split_off(trace, index, [axis for axis in axes if axis >= 0])
    trace.contract(0, left - 1, second, max(right - 2, 0))
    if not trace.is_fixed(0) and not trace.is_fixed(second):
        # Of two computed tensors, a removed channel would have added to the sum even with weights of zero.
        trace.inexact(trace.labels(0, left - 1))
    _batch(trace, second)


def _batch(trace: Trace, second: int) -> None:
    left, right, rank = len(trace.shape(0)), len(trace.shape(second)), len(trace.made())
    found: dict[int, Labels] = {}
    if left > 1:
        found[rank - (2 if right > 1 else 1)] = trace.labels(0, left - 2)
    if right > 1:
        found[rank - 1] = trace.labels(second, right - 1)
    batch = rank - (left > 1) - (right > 1)
    for axis in range(batch):
        # Batch axes are aligned at their end, wherever the result has the axes that are multiplied along.
        sides = ((0, axis - batch + left - 2), (second, axis - batch + right - 2))
        wide = [(index, at) for index, at in sides if at >= 0 and trace.shape(index)[at] > 1]
        labels = [trace.labels(index, at) for index, at in wide]
        if labels:
            trace.tie(labels[0], labels[-1], "its batch axis is fixed on the other side")
            found[axis] = labels[0]
    trace.emit(Block((axis,), labels) for axis, labels in found.items())


def _split_off(trace: Trace, index: int, axes: list[int]) -> None:
    """Where batch axes and others are one block, it is the batch axes that stay: whole heads."""
    for block in trace.blocks(index):
        if len(block.axes) > 1 and not set(block.axes) <= set(axes):
            for axis in set(block.axes) & set(axes):
                trace.release(index, axis, "")


def causal_convolution(trace: Trace) -> None:
    """CausalConvWithState: input [N, C, L], W[C, 1, k], bias [C] and a state [N, C, k - 1], per channel."""
    trace.release(1, 2, "it moves a window along this axis")
    channels = trace.labels(1, 0)
    for index in (0, 3):
        if trace.has(index):
            for axis in (0, 2):
                trace.release(index, axis, "it runs over steps, or samples")
            trace.tie(trace.labels(index, 1), channels, "its input channels are fixed")
    if trace.has(2):
        trace.tie_axis(2, 0, channels)
    for index in range(2):
        trace.emit([Block((1,), channels)], index)


def deformable_convolution(trace: Trace) -> None:
    """DeformConv: as Conv, with offsets and a mask for each output position and group of channels.

    They say where to look, so that all of their axes but that of samples stay. Channels that are looked at in
    different places cannot stand in for each other.
    """
    offsets = trace.node.attrs.get("offset_group", 1)
    if offsets > 1:
        _tie_groups(trace, trace.labels(0, 1), offsets)
    for index in (2, 4):
        for axis in range(1, len(trace.shape(index))) if trace.has(index) else ():
            trace.release(index, axis, "it says where to look, and with which weight")
        if trace.has(index):
            trace.tie(trace.labels(index, 0), trace.labels(0, 0))
    _convolve(trace, bias=3, alike=offsets == 1)


def batch_norm(trace: Trace) -> None:
    """Scale, bias, mean and variance run along axis 1."""
    channels = trace.labels(0, 1)
    for index in range(1, 5):
        trace.tie_axis(index, 0, channels)
    trace.emit(trace.blocks(0))
    for index in range(1, len(trace.node.outputs)):
        trace.emit([Block((0,), channels)], index)


def instance_norm(trace: Trace) -> None:
    """Statistics over the space of each channel; over the channels of a group where axis 2 holds them."""
    for block in trace.blocks(0):
        if 1 in block.axes and len(block.axes) > 1:
            trace.release(0, 1, "")
    channels = trace.labels(0, 1)
    for index in (1, 2):
        trace.tie_axis(index, 0, channels)
    for block in trace.blocks(0):
        if max(block.axes) > 1:
            trace.inexact(block.labels)
    trace.emit(trace.blocks(0))


def group_norm(trace: Trace) -> None:
    """Statistics over all channels of a group, so every group has the same positions."""
    groups = trace.node.attrs["num_groups"]
    if groups == trace.shape(0)[1]:
        trace.release(0, 1, "each of its channels is a group")
    channels = trace.labels(0, 1)
    _tie_groups(trace, channels, groups)
    for block in trace.blocks(0):
        if max(block.axes) > 0:
            trace.inexact(block.labels)
    for index in (1, 2):
        trace.ignore(index)
        trace.tie_axis(index, 0, channels)
    trace.emit(trace.blocks(0))


def layer_norm(trace: Trace) -> None:
    """LayerNormalization and RMSNormalization: statistics over the axes from `axis` on."""
    rank = len(trace.shape(0))
    first = trace.node.attrs.get("axis", -1) % rank
    normalized = range(first, rank)
    for axis in normalized:
        _leave_block(trace, 0, axis, normalized)
    for index in range(1, len(trace.node.inputs)):
        if trace.has(index):
            trace.ignore(index)
            shift = rank - len(trace.shape(index))
            for axis in range(len(trace.shape(index))):
                trace.tie_axis(index, axis, trace.labels(0, axis + shift))
    for axis in normalized:
        trace.inexact(trace.labels(0, axis))
    trace.emit(trace.blocks(0))
    for index in range(1, len(trace.node.outputs)):
        trace.emit([block for block in trace.blocks(0) if max(block.axes) < first], index)


def lp_norm(trace: Trace) -> None:
    """LpNormalization: divided by the norm along an axis, to which all of its slices add."""
    _normalize(trace, [trace.node.attrs.get("axis", -1)])


def mean_variance_norm(trace: Trace) -> None:
    """MeanVarianceNormalization: statistics over several axes."""
    _normalize(trace, trace.node.attrs.get("axes", (0, 2, 3)))


def _normalize(trace: Trace, axes: Sequence[int]) -> None:
    rank = len(trace.shape(0))
    inside = {axis % rank for axis in axes}
    for axis in inside:
        _leave_block(trace, 0, axis, inside)
    for block in trace.blocks(0):
        if inside.intersection(block.axes):
            trace.inexact(block.labels)
    trace.emit(trace.blocks(0))


def _leave_block(trace: Trace, index: int, axis: int, inside: Collection[int]) -> None:
    for block in trace.blocks(index):
        if axis in block.axes and not set(block.axes) <= set(inside):
            trace.release(index, axis, "")


def local_response(trace: Trace) -> None:
    """Every channel reads its neighbours."""
    trace.release(0, 1, "it normalizes over neighbouring channels")
    trace.emit(trace.blocks(0))


def along_axis(trace: Trace) -> None:
    """Softmax and its kind compare all elements along an axis: that axis stays."""
    rank = len(trace.shape(0))
    axis = trace.node.attrs.get("axis")
    old = trace.opset < 13
    first = (axis if axis is not None else (1 if old else -1)) % rank
    for each in range(first, rank) if old else [first]:
        trace.release(0, each, "it compares all elements along this axis")
    trace.emit(trace.blocks(0))


def pool(trace: Trace) -> None:
    """Windows over space, channel by channel; a second output holds flat indices."""
    _keep_space(trace, 0)
    if len(trace.node.outputs) > 1 and trace.node.outputs[1].name:
        for axis in range(len(trace.shape(0))):
            trace.release(0, axis, "its second output numbers all elements")
    trace.emit(trace.blocks(0))


def quantize(trace: Trace) -> None:
    """QuantizeLinear and DequantizeLinear: scale and zero point, one for all or one per slice of an axis."""
    rank = len(trace.shape(0))
    for index in (1, 2):
        if trace.has(index) and len(trace.shape(index)) == 1 and trace.shape(index)[0] > 1:
            trace.tie_axis(index, 0, trace.labels(0, trace.node.attrs.get("axis", 1) % rank))
        elif trace.has(index) and len(trace.shape(index)) == rank and rank > 1:
            for axis in range(rank):
                trace.release(0, axis, "it is scaled in blocks")
    trace.emit(trace.blocks(0))


def _keep_space(trace: Trace, index: int) -> None:
    for axis in range(2, len(trace.shape(index))):
        trace.release(index, axis, "it moves a window along this axis")


def _per_channel(trace: Trace, outputs: Labels, group: int) -> None:
    """Depthwise: all outputs of a channel go with it."""
    trace.tie(outputs.reshape(group, -1), trace.labels(0, 1)[:, None], "its input channels are fixed")


def _tie_groups(trace: Trace, labels: Labels, group: int, row: Labels | None = None) -> None:
    rows = labels.reshape(group, -1)
    trace.tie(rows, rows[:1] if row is None else row[None], "a group must lose as much as the others")


def _emit_channels(trace: Trace, outputs: Labels, bias: int) -> None:
    batch = trace.labels(0, 0)
    if trace.has(bias):
        trace.tie_axis(bias, 0, outputs)
    trace.emit([Block((0,), batch), Block((1,), outputs)])
