"""Operators that move elements: their rules do to the labels what the operator does to the elements."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from onnxslim.ir.graph import Node
from onnxslim.ops.channels.cut import Cut
from onnxslim.ops.channels.elementwise import join, shifted
from onnxslim.ops.channels.labels import Block, Trace
from onnxslim.ops.channels.size_vectors import Measured, Written, computed_with, origin

Group = tuple[tuple[int, ...], tuple[int, ...]]  # axes of the input, axes of the output


def regroup(trace: Trace) -> None:
    """Reshape, Flatten, Squeeze, Unsqueeze: elements keep their order."""
    if trace.node.op != "Reshape" or trace.node.constant(1) is not None:
        trace.ignore(*range(1, len(trace.node.inputs)))
    trace.emit(_regrouped(trace, _groups(trace.shape(0), trace.made())))


def reshape(trace: Trace) -> None:
    """Reshape: an axis can lose slices where its size is inferred, copied, written out or measured."""
    regroup(trace)
    trace.ignore(1)
    for axis in range(len(trace.made())):
        _keep_up(trace, axis, 1, axis, implied=-1)


def _keep_up(trace: Trace, axis: int, index: int, position: int, implied: int) -> None:
    """Release an axis of the output unless its size, an element of an input, changes with it."""
    tracer, output = trace.tracer, trace.node.outputs[0]
    found = origin(trace.node, index, position, tracer.shape)
    if isinstance(found, Measured):
        trace.tie(
            tracer.line(output, axis, trace.node),
            tracer.line(found.tensor, found.axis, trace.node),
            f"its size is that of axis {found.axis} of '{found.tensor.name}'",
        )
    elif not isinstance(found, Written) or not (found.alone or found.value == implied):
        tracer.release(output, axis, trace.node, "its size is computed")


def cut_reshape(cut: Cut) -> None:
    """Write the new sizes; -1 stays, 0 too where it copies an axis of the new size."""
    for axis in cut.changed():
        written, size = cut.element(1, axis), cut.size_made(axis)
        copied = written == 0 and not cut.node.attrs.get("allowzero", 0)
        if written != -1 and not (copied and cut.size(0, axis) == size):
            cut.set_element(1, axis, size)


def _groups(before: tuple[int, ...], after: tuple[int, ...]) -> list[Group]:
    """The smallest runs of axes before and after that hold the same elements."""
    groups: list[Group] = []
    left = right = 0
    while left < len(before) or right < len(after):
        first, second = left, right
        products = [1, 1]
        while True:
            if left < len(before) and (products[0] <= products[1] or right >= len(after)):
                products[0] *= before[left]
                left += 1
            elif right < len(after):
                products[1] *= after[right]
                right += 1
            if products[0] == products[1] and left > first and right > second:
                break
            if left >= len(before) and right >= len(after):
                break
        groups.append((tuple(range(first, left)), tuple(range(second, right))))
    return groups


def _regrouped(trace: Trace, groups: list[Group]) -> list[Block]:
    made: list[Block] = []
    for part in _connected(groups, trace.blocks(0)):
        before = [axis for group in part for axis in group[0]]
        after = [axis for group in part for axis in group[1]]
        _one_block(trace, before)
        block = next((block for block in trace.blocks(0) if set(block.axes) & set(before)), None)
        if block is not None:
            made.append(_reshaped(block, trace.shape(0), before, trace.made(), after))
    return made


def _connected(groups: list[Group], blocks: Iterable[Block]) -> list[list[Group]]:
    """Groups that a block connects, together."""
    parts = [[group] for group in groups]
    for block in blocks:
        touched = [part for part in parts if any(set(block.axes) & set(group[0]) for group in part)]
        if len(touched) > 1:
            parts = [part for part in parts if part not in touched]
            parts.append(sorted(group for part in touched for group in part))
    return parts


def _one_block(trace: Trace, axes: list[int]) -> None:
    """Of several labelled axes that become one, only the longest may lose slices."""
    blocks = [block for block in trace.blocks(0) if set(block.axes) & set(axes)]
    longest = max(blocks, key=lambda block: (trace.tracer.is_alive(block), block.labels.size), default=None)
    for block in blocks:
        if block is not longest:
            for axis in block.axes:
                trace.release(0, axis, "it is merged with a longer axis that can lose slices")


def _reshaped(
    block: Block, before: tuple[int, ...], axes: list[int], after: tuple[int, ...], places: list[int]
) -> Block:
    """Spread a block over all axes of its groups, reshape, and drop the axes along which nothing differs."""
    sizes = [before[axis] if axis in block.axes else 1 for axis in axes]
    spread = np.broadcast_to(block.labels.reshape(sizes), [before[axis] for axis in axes])
    labels = spread.reshape([after[axis] for axis in places])
    differs = [at for at in range(len(places)) if (labels != np.take(labels, [0], axis=at)).any()] or [
        int(np.argmax(labels.shape))
    ]
    for at in reversed(range(len(places))):
        if at not in differs:
            labels = np.take(labels, 0, axis=at)
    return Block(tuple(places[at] for at in differs), labels)


def transpose(trace: Trace) -> None:
    """Axes trade places."""
    rank = len(trace.shape(0))
    order = trace.node.attrs.get("perm", tuple(reversed(range(rank))))
    places = {axis: place for place, axis in enumerate(order)}
    trace.emit(block.moved([places[axis] for axis in block.axes]) for block in trace.blocks(0))


def concat(trace: Trace) -> None:
    """Slices of the inputs, one input after the other."""
    made = len(trace.made())
    axis = trace.node.attrs["axis"] % made
    for index in range(len(trace.node.inputs)):
        for block in trace.blocks(index):
            if axis in block.axes and len(block.axes) > 1:
                trace.release(index, axis, "")
    parts = [trace.labels(index, axis) for index in range(len(trace.node.inputs))]
    join(trace, list(range(len(parts))), dict.fromkeys(range(len(parts)), 0), skip=axis)
    output = trace.node.outputs[0]
    trace.emit([*trace.tracer.blocks(output), Block((axis,), np.concatenate(parts))])


def split(trace: Trace) -> None:
    """Runs of slices; their lengths are written out again where they are known to be constant."""
    rank = len(trace.shape(0))
    axis = trace.node.attrs.get("axis", 0) % rank
    computed = trace.has(1) and trace.node.constant(1) is None
    trace.ignore(1)
    _divide_block(trace, axis)
    if computed:
        trace.release(0, axis, "the lengths it is split into are computed")
    labels, start = trace.labels(0, axis), 0
    for index, output in enumerate(trace.node.outputs):
        if not output.name:
            trace.release(0, axis, "a part of it has no name")
            continue
        length = trace.made(index)[axis]
        kept = [block for block in trace.blocks(0) if axis not in block.axes]
        trace.emit([*kept, Block((axis,), labels[start : start + length])], index)
        start += length


def cut_split(cut: Cut) -> None:
    """Write out the lengths of the parts."""
    axis = cut.node.attrs.get("axis", 0) % len(cut.before(0))
    if cut.kept(0, axis) is None:
        return
    lengths = [cut.size_made(axis, index) for index in range(len(cut.node.outputs))]
    cut.node.attrs.pop("num_outputs", None)
    if cut.opset < 13:
        cut.node.attrs["split"] = tuple(lengths)
    else:
        cut.set_input(1, np.array(lengths, np.int64))


def slice_(trace: Trace) -> None:
    """Runs of slices between constant limits."""
    limits = slice_limits(trace.node, trace.shape(0))
    trace.ignore(1, 2, 3, 4)
    if limits is None:
        for axis in _sliced_axes(trace):
            trace.release(0, axis, "it is sliced at computed places")
        limits = {}
    taken: dict[int, slice] = {}
    for axis, (start, end, step) in limits.items():
        size = trace.shape(0)[axis]
        if (start, end, step) == (0, size, 1):
            continue
        _divide_block(trace, axis)
        if step != 1:
            trace.release(0, axis, "it is sliced with a step")
        else:
            taken[axis] = slice(start, end)
    trace.emit(
        Block(block.axes, block.labels[taken[block.axes[0]]]) if block.axes[0] in taken else block
        for block in trace.blocks(0)
    )


def slice_limits(node: Node, shape: tuple[int, ...]) -> dict[int, tuple[int, int, int]] | None:
    """Start, end and step for each sliced axis, counted from the front; None if they are not constants."""
    if "starts" in node.attrs:
        starts, ends = node.attrs["starts"], node.attrs["ends"]
        axes, steps = node.attrs.get("axes", range(len(starts))), [1] * len(starts)
    else:
        found = [node.constant(index) for index in range(1, 5)]
        missing = [node.input(index) is not None and found[index - 1] is None for index in range(1, 5)]
        if any(missing) or found[0] is None or found[1] is None:
            return None
        starts, ends = found[0].tolist(), found[1].tolist()
        axes = found[2].tolist() if found[2] is not None else range(len(starts))
        steps = found[3].tolist() if found[3] is not None else [1] * len(starts)
    limits = {}
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        place = axis % len(shape)
        limits[place] = (*slice(start, end).indices(shape[place])[:2], step)
    return limits


def _sliced_axes(trace: Trace) -> list[int]:
    axes = trace.node.constant(3) if trace.has(3) else None
    rank = len(trace.shape(0))
    return list(range(rank)) if axes is None else [int(axis) % rank for axis in axes.flat]


def cut_slice(cut: Cut) -> None:
    """Count the limits in the slices that are left."""
    limits = slice_limits(cut.node, cut.before(0))
    if limits is None or all(cut.kept(0, axis) is None for axis in limits):
        return
    starts, ends = [], []
    for axis, (start, end, _) in limits.items():
        kept = cut.kept(0, axis)
        if kept is not None:
            start, end = int(kept[:start].sum()), int(kept[:end].sum())
        starts.append(start)
        ends.append(end)
    # Axes whose limits depend on a size that may differ next time keep what they said.
    if "starts" in cut.node.attrs:
        given = (cut.node.attrs["starts"], cut.node.attrs["ends"])
        cut.node.attrs["starts"] = _where(cut, limits, starts, given[0])
        cut.node.attrs["ends"] = _where(cut, limits, ends, given[1])
        return
    for index, new in ((1, starts), (2, ends)):
        old = cut.node.constant(index)
        assert old is not None
        cut.set_input(index, np.array(_where(cut, limits, new, old.tolist()), old.dtype))


def _where(cut: Cut, axes: Iterable[int], new: list[int], old: Iterable[int]) -> tuple[int, ...]:
    return tuple(
        fresh if cut.kept(0, axis) is not None else given
        for axis, fresh, given in zip(axes, new, old, strict=True)
    )


def gather(trace: Trace) -> None:
    """Slices at given indices: constant ones choose among labels, others read what must stay."""
    rank, indices = len(trace.shape(0)), trace.shape(1)
    axis = trace.node.attrs.get("axis", 0) % rank
    chosen = trace.node.constant(1)
    _divide_block(trace, axis)
    if chosen is None or chosen.ndim != 1:
        trace.release(0, axis, "its indices are computed" if chosen is None else "it takes single slices")
    if chosen is not None:
        trace.ignore(1)
    by = len(indices) - 1
    made = []
    for block in trace.blocks(0):
        if axis in block.axes:
            assert chosen is not None
            made.append(Block((axis,), block.labels[chosen]))
        else:
            places = [each + by if each > axis else each for each in block.axes]
            made.append(block.moved(places))
    trace.emit(made)


def cut_gather(cut: Cut) -> None:
    """Number the slices that are left."""
    axis = cut.node.attrs.get("axis", 0) % len(cut.before(0))
    kept, indices = cut.kept(0, axis), cut.node.constant(1)
    if kept is None or indices is None:
        return
    wanted = np.where(indices < 0, indices + kept.size, indices)
    places = np.cumsum(kept) - 1
    cut.set_input(1, places[wanted][kept[wanted]].astype(indices.dtype))


def expand(trace: Trace) -> None:
    """Axes that are stretched get labels of their own, to go wherever the new size goes."""
    trace.ignore(1)
    before, made = trace.shape(0), trace.made()
    shift = len(made) - len(before)
    blocks = shifted(trace.blocks(0), shift)
    stretched = [axis for axis, size in enumerate(made) if axis < shift or before[axis - shift] < size]
    trace.emit([*blocks, *(Block((axis,), trace.tracer.fresh(made[axis])) for axis in stretched)])
    missing = len(made) - trace.shape(1)[0]
    for axis in range(missing, len(made)):
        _keep_up(trace, axis, 1, axis - missing, implied=1)


def cut_expand(cut: Cut) -> None:
    """Write the new sizes where the old ones stood."""
    length = cut.before(1)[0]
    for axis in cut.changed():
        position = axis - (len(cut.made()) - length)
        if position >= 0 and cut.element(1, position) != 1:
            cut.set_element(1, position, cut.size_made(axis))


def constant_of_shape(trace: Trace) -> None:
    """All elements are equal, so slices can go wherever the size goes."""
    trace.ignore(0)
    trace.emit(Block((axis,), trace.tracer.fresh(size)) for axis, size in enumerate(trace.made()))
    for axis in range(len(trace.made())):
        _keep_up(trace, axis, 0, axis, implied=1)


def cut_constant_of_shape(cut: Cut) -> None:
    """Write the new sizes."""
    for axis in cut.changed():
        cut.set_element(0, axis, cut.size_made(axis))


def tile(trace: Trace) -> None:
    """Labels are repeated as the elements are."""
    trace.ignore(1)
    found = [origin(trace.node, 1, axis, trace.tracer.shape) for axis in range(len(trace.made()))]
    repeats = [each.value if isinstance(each, Written) else 1 for each in found]
    for axis, each in enumerate(found):
        if not isinstance(each, Written):
            trace.release(0, axis, "its repeats are computed")
    trace.emit(
        Block(block.axes, np.tile(block.labels, [repeats[axis] for axis in block.axes]))
        for block in trace.blocks(0)
    )


def pad(trace: Trace) -> None:
    """Padded axes stay as they are."""
    before, made = trace.shape(0), trace.made()
    pads = trace.node.constant(1) if "pads" not in trace.node.attrs else np.array(trace.node.attrs["pads"])
    partial = trace.has(3)  # pads only for the axes listed
    for axis in range(len(before)):
        still = pads is not None and not partial and not pads[axis] and not pads[axis + len(before)]
        if before[axis] != made[axis] or not (still or (partial and _is_unlisted(trace, axis))):
            trace.release(0, axis, "it is padded")
    trace.emit(trace.blocks(0))


def _is_unlisted(trace: Trace, axis: int) -> bool:
    axes = trace.node.constant(3)
    rank = len(trace.shape(0))
    return axes is not None and axis not in [int(each) % rank for each in axes.flat]


def resize(trace: Trace) -> None:
    """Axes that keep their size keep their slices; the others are interpolated."""
    trace.ignore(3)
    before, made = trace.shape(0), trace.made()
    for axis in range(len(before)):
        if before[axis] != made[axis] or "axes" in trace.node.attrs:
            trace.release(0, axis, "it is resized")
    trace.emit(trace.blocks(0))
    if trace.has(3):
        for axis in range(len(made)):
            _keep_up(trace, axis, 3, axis, implied=1)


def upsample(trace: Trace) -> None:
    """The forerunner of Resize, with scales only."""
    before, made = trace.shape(0), trace.made()
    for axis in range(len(before)):
        if before[axis] != made[axis]:
            trace.release(0, axis, "it is resized")
    trace.emit(trace.blocks(0))


def cut_resize(cut: Cut) -> None:
    """Write the new sizes, where sizes and not scales are given."""
    if cut.node.input(3) is not None:
        for axis in cut.changed():
            cut.set_element(3, axis, cut.size_made(axis))


def reduce(trace: Trace) -> None:
    """Reduced axes disappear or become one; what is left of the others stays in place."""
    rank, axes = len(trace.shape(0)), reduced_axes(trace)
    if axes is None:
        for axis in range(rank):
            trace.release(0, axis, "the axes it reduces are computed")
        axes = []
    trace.ignore(1)
    for block in trace.blocks(0):
        inside = set(block.axes) & set(axes)
        if inside and inside != set(block.axes):
            for axis in sorted(inside):
                trace.release(0, axis, "")
    for block in trace.blocks(0):
        if set(block.axes) & set(axes):
            trace.inexact(block.labels)
    keep = trace.node.attrs.get("keepdims", 1)
    left = [axis for axis in range(rank) if axis not in axes]
    trace.emit(
        block if keep else block.moved([left.index(axis) for axis in block.axes])
        for block in trace.blocks(0)
        if not set(block.axes) & set(axes)
    )


def reduce_strictly(trace: Trace) -> None:
    """Products and the like, in which every element counts: reduced axes stay."""
    for axis in reduced_axes(trace) or []:
        trace.release(0, axis, "it is reduced over this axis")
    reduce(trace)


def reduced_axes(trace: Trace) -> list[int] | None:
    """The axes a reduction runs over; None if they are computed."""
    rank = len(trace.shape(0))
    given = trace.node.attrs.get("axes")
    if given is None and trace.has(1):
        constant = trace.node.constant(1)
        if constant is None:
            return None
        given = constant.tolist()
    if not given:
        return [] if trace.node.attrs.get("noop_with_empty_axes", 0) else list(range(rank))
    return [int(axis) % rank for axis in given]


def arg_reduce(trace: Trace) -> None:
    """ArgMax and ArgMin number the slices of an axis: it stays."""
    rank = len(trace.shape(0))
    axis = trace.node.attrs.get("axis", 0) % rank
    trace.release(0, axis, "its result numbers the slices of this axis")
    keep = trace.node.attrs.get("keepdims", 1)
    trace.emit(
        block if keep else block.moved([each - (each > axis) for each in block.axes])
        for block in trace.blocks(0)
        if axis not in block.axes
    )


def along(trace: Trace) -> None:
    """CumSum, CumProd, TopK, ReverseSequence and the like: the axis they work along stays."""
    rank = len(trace.shape(0))
    axes = _worked_axes(trace, rank)
    for axis in range(rank) if axes is None else axes:
        trace.release(0, axis, "it works along this axis")
    for index in range(len(trace.node.outputs)):
        trace.emit(trace.blocks(0), index)


def _worked_axes(trace: Trace, rank: int) -> list[int] | None:
    op, attrs = trace.node.op, trace.node.attrs
    if op in ("CumSum", "CumProd"):
        given = trace.node.constant(1)
        return None if given is None else [int(given.reshape(-1)[0]) % rank]
    if op == "ReverseSequence":
        return [int(attrs.get("batch_axis", 1)), int(attrs.get("time_axis", 0))]
    if op == "TopK":
        return [int(attrs.get("axis", -1)) % rank]
    return None


def depth_to_space(trace: Trace) -> None:
    """All b*b positions of a block come from as many channels, which go together."""
    for axis in (2, 3):
        trace.release(0, axis, "channels move into this axis")
    labels, block = trace.labels(0, 1), trace.node.attrs["blocksize"] ** 2
    column_major = trace.node.attrs.get("mode", "DCR") == "CRD"
    rows = labels.reshape(-1, block).T if column_major else labels.reshape(block, -1)
    trace.tie(rows, rows[:1])
    trace.emit([*_others(trace, 1), Block((1,), rows[0])])


def space_to_depth(trace: Trace) -> None:
    """Each channel becomes b*b of them."""
    for axis in (2, 3):
        trace.release(0, axis, "it moves into the channels")
    labels = np.tile(trace.labels(0, 1), trace.node.attrs["blocksize"] ** 2)
    trace.emit([*_others(trace, 1), Block((1,), labels)])


def shape_of(trace: Trace) -> None:
    """An axis stays if its size is computed with; what makes a tensor of the same size follows."""
    tracer = trace.tracer
    for axis in sorted(computed_with(trace.node, len(trace.shape(0)), tracer.shape, tracer.outputs)):
        trace.release(0, axis, "its size is computed with")
    trace.ignore(0)


def _others(trace: Trace, axis: int) -> list[Block]:
    return [block for block in trace.blocks(0) if axis not in block.axes]


def _divide_block(trace: Trace, axis: int) -> None:
    """An axis that is taken apart leaves its block."""
    for block in trace.blocks(0):
        if axis in block.axes and len(block.axes) > 1:
            trace.release(0, axis, "")
