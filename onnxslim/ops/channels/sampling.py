"""Operators that look at maps at computed places: channels go through, places do not."""

from __future__ import annotations

from onnxslim.ops.channels.labels import Block, Trace

_LOOKS = "it is looked at in computed places along this axis"


def grid_sample(trace: Trace) -> None:
    """GridSample: X [N, C, space...] at a grid [N, space..., coordinates]."""
    for axis in range(2, len(trace.shape(0))):
        trace.release(0, axis, _LOOKS)
    for axis in range(1, len(trace.shape(1))):
        trace.release(1, axis, "it says where to look")
    batch = trace.labels(0, 0)
    trace.tie(batch, trace.labels(1, 0))
    trace.emit([Block((0,), batch), Block((1,), trace.labels(0, 1))])


def regions(trace: Trace) -> None:
    """RoiAlign and MaxRoiPool: X [N, C, H, W] in regions, which the result has in the place of samples."""
    for axis in (0, 2, 3):
        trace.release(0, axis, _LOOKS)
    trace.emit([Block((1,), trace.labels(0, 1))])


def columns(trace: Trace) -> None:
    """Col2Im: [N, C * places in a block, blocks] becomes [N, C, space...]."""
    trace.ignore(1, 2)
    trace.release(0, 2, "its blocks are added up")
    places = trace.labels(0, 1).reshape(trace.made()[1], -1)
    trace.tie(places, places[:, :1])
    trace.emit([Block((0,), trace.labels(0, 0)), Block((1,), places[:, 0])])


def crop(trace: Trace) -> None:
    """CenterCropPad: axes that are not named keep their slices."""
    trace.ignore(1)
    rank = len(trace.shape(0))
    for axis in trace.node.attrs.get("axes", range(rank)):
        trace.release(0, axis, "its size is given")
    trace.emit(trace.blocks(0))


def triangle(trace: Trace) -> None:
    """Trilu: what stays is told by places along the last two axes."""
    trace.ignore(1)
    for axis in (-2, -1):
        trace.release(0, axis, "it keeps a triangle along this axis")
    trace.emit(trace.blocks(0))
