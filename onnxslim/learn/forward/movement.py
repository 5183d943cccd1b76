"""Operators that move elements as a whole."""

from __future__ import annotations

import math

from onnxslim.learn.door import Tensor, functional, torch
from onnxslim.learn.rows import Call, axes_of, forward, int_list


@forward("Identity")
def identity(call: Call, x: Tensor) -> Tensor:
    return x


@forward("Reshape")
def reshape(call: Call, x: Tensor, shape: Tensor | None = None) -> Tensor:
    wanted = int_list(shape) if shape is not None else call.ints("shape") or []
    if not call.get("allowzero", 0):
        wanted = [x.shape[axis] if size == 0 else size for axis, size in enumerate(wanted)]
    if -1 in wanted and not x.numel():  # PyTorch does not say what is left of nothing
        known = math.prod(size for size in wanted if size != -1)
        wanted = [0 if size == -1 and known else size for size in wanted]
    return x.reshape(wanted)


@forward("Flatten")
def flatten(call: Call, x: Tensor) -> Tensor:
    axis = call.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@forward("Transpose")
def transpose(call: Call, x: Tensor) -> Tensor:
    return x.permute(call.ints("perm") or list(reversed(range(x.ndim))))


@forward("Squeeze")
def squeeze(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = axes_of(call, axes, x.ndim)
    gone = [axis for axis, size in enumerate(x.shape) if size == 1] if chosen is None else chosen
    return x.reshape([size for axis, size in enumerate(x.shape) if axis not in gone])


@forward("Unsqueeze")
def unsqueeze(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    count = len(int_list(axes) if axes is not None else call.ints("axes") or [])
    for axis in sorted(axes_of(call, axes, x.ndim + count) or []):
        x = x.unsqueeze(axis)
    return x


@forward("Concat")
def concat(call: Call, *tensors: Tensor) -> Tensor:
    return torch.cat(tensors, call.get("axis", 1))


@forward("Split")
def split(call: Call, x: Tensor, sizes: Tensor | None = None) -> list[Tensor]:
    axis, parts = call.get("axis", 0), len(call.node.outputs)
    wanted = int_list(sizes) if sizes is not None else call.ints("split")
    if wanted is None:
        each = math.ceil(x.shape[axis] / call.get("num_outputs", parts))
        wanted = [each] * (parts - 1) + [x.shape[axis] - each * (parts - 1)]
    return list(torch.split(x, wanted, axis))


@forward("Slice")
def slice_(
    call: Call,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    first = int_list(starts) if starts is not None else call.ints("starts") or []
    last = int_list(ends) if ends is not None else call.ints("ends") or []
    along = axes_of(call, axes, x.ndim) or list(range(len(first)))
    by = int_list(steps) if steps is not None else [1] * len(first)
    for axis, start, stop, step in zip(along, first, last, by, strict=True):
        x = _sliced(x, axis, start, stop, step)
    return x


def _sliced(x: Tensor, axis: int, start: int, stop: int, step: int) -> Tensor:
    size = x.shape[axis]
    chosen = range(*slice(start, None if step < 0 and stop < -size else stop, step).indices(size))
    if step < 0:
        return x.index_select(axis, torch.tensor(list(chosen), dtype=torch.int64))
    return x[(slice(None),) * axis + (slice(chosen.start, max(chosen.stop, chosen.start), step),)]


@forward("Expand")
def expand(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(tuple(x.shape), tuple(int_list(shape))))


@forward("Tile")
def tile(call: Call, x: Tensor, repeats: Tensor, axis: Tensor | None = None) -> Tensor:
    if axis is None:
        return x.repeat(int_list(repeats))
    counts = [1] * x.ndim  # before opset 6
    counts[int_list(axis)[0]] = int_list(repeats)[0]
    return x.repeat(counts)


@forward("Pad")
def pad(
    call: Call, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    given = int_list(pads) if pads is not None else call.ints("pads") or call.ints("paddings") or []
    along = axes_of(call, axes, x.ndim) or list(range(x.ndim))
    filled = value.reshape(()).item() if value is not None else call.get("value", 0.0)
    mode = call.get("mode", "constant")
    ends = {axis: (given[at], given[at + len(along)]) for at, axis in enumerate(along)}
    if mode == "constant":
        flat = [each for axis in reversed(range(x.ndim)) for each in ends.get(axis, (0, 0))]
        return functional.pad(x, flat, value=bool(filled) if x.dtype == torch.bool else filled)
    for axis, (before, after) in ends.items():
        x = _mirrored(x, axis, before, after, mode)
    return x


def _mirrored(x: Tensor, axis: int, before: int, after: int, mode: str) -> Tensor:
    size = x.shape[axis]
    at = torch.arange(-before, size + after)
    if mode == "edge":
        at = at.clamp(0, size - 1)
    elif mode == "wrap":
        at = at % size
    else:
        turn = max(2 * (size - 1), 1)
        at = at % turn
        at = torch.where(at >= size, turn - at, at)
    return x.index_select(axis, at)


@forward("DepthToSpace")
def depth_to_space(call: Call, x: Tensor) -> Tensor:
    block, (batch, channels, height, width) = call.get("blocksize", 1), x.shape
    left = channels // block**2
    if call.get("mode", "DCR") == "DCR":
        parts = x.reshape(batch, block, block, left, height, width).permute(0, 3, 4, 1, 5, 2)
    else:
        parts = x.reshape(batch, left, block, block, height, width).permute(0, 1, 4, 2, 5, 3)
    return parts.reshape(batch, left, height * block, width * block)


@forward("SpaceToDepth")
def space_to_depth(call: Call, x: Tensor) -> Tensor:
    block, (batch, channels, height, width) = call.get("blocksize", 1), x.shape
    parts = x.reshape(batch, channels, height // block, block, width // block, block)
    mixed = (
        parts.permute(0, 1, 3, 5, 2, 4)
        if call.get("mode", "DCR") == "CRD"
        else parts.permute(0, 3, 5, 1, 2, 4)
    )
    return mixed.reshape(batch, channels * block**2, height // block, width // block)


@forward("Trilu")
def trilu(call: Call, x: Tensor, k: Tensor | None = None) -> Tensor:
    diagonal = 0 if k is None else int_list(k)[0]
    return torch.triu(x, diagonal) if call.get("upper", 1) else torch.tril(x, diagonal)


@forward("ReverseSequence")
def reverse_sequence(call: Call, x: Tensor, lengths: Tensor) -> Tensor:
    time, batch = call.get("time_axis", 0), call.get("batch_axis", 1)
    rows = x.movedim((batch, time), (0, 1))
    turned = [
        torch.cat([row[:end].flip(0), row[end:]]) for row, end in zip(rows, int_list(lengths), strict=True)
    ]
    return torch.stack(turned).movedim((0, 1), (batch, time))
