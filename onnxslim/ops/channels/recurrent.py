"""LSTM, GRU and RNN: hidden units, whose gates lie one after the other in the weights."""

from __future__ import annotations

from onnxslim.ops.channels.cut import Cut
from onnxslim.ops.channels.labels import Block, Trace

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
PEEPHOLES = 3


def recurrent(trace: Trace) -> None:
    """W[d, G*h, i], R[d, G*h, h], B[d, 2*G*h], P[d, 3*h]; both directions have the same hidden units."""
    gates = GATES[trace.node.op]
    for index, axes in ((0, (0, 1)), (1, (0,)), (2, (0,)), (5, (0, 1)), (6, (0, 1))):
        for axis in axes if trace.has(index) else ():
            trace.release(index, axis, "it runs over steps, samples or directions")
    trace.contract(0, 2, 1, 2)
    hidden = trace.labels(2, 2)
    for index, copies in ((1, gates), (2, gates), (3, 2 * gates), (7, PEEPHOLES)):
        if trace.has(index):
            trace.release(index, 0, "it runs over directions")
            trace.tie(trace.labels(index, 1).reshape(copies, -1), hidden[None])
    if trace.has(4):
        trace.ignore(4)
    for index in (5, 6):
        if trace.has(index):
            trace.tie_axis(index, 2, hidden)
    for index, output in enumerate(trace.node.outputs):
        if output.name:
            trace.emit([Block((len(trace.made(index)) - 1,), hidden)], index)


def cut_recurrent(cut: Cut) -> None:
    """State the new number of hidden units."""
    if cut.kept(2, 2) is not None:
        cut.node.attrs["hidden_size"] = cut.size(2, 2)
