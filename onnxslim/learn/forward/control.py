"""Operators that run graphs of their own."""

from __future__ import annotations

from onnxslim.ir.graph import Graph
from onnxslim.learn.door import Tensor, torch
from onnxslim.learn.rows import Call, forward


def _body(call: Call, name: str) -> Graph:
    graph = call.node.attrs[name]
    assert isinstance(graph, Graph)
    return graph


@forward("If")
def branch(call: Call, condition: Tensor) -> list[Tensor]:
    return call.run(_body(call, "then_branch" if bool(condition) else "else_branch"), [])


@forward("Loop")
def loop(call: Call, most: Tensor | None, condition: Tensor | None, *state: Tensor) -> list[Tensor]:
    body, carried, made = _body(call, "body"), list(state), list[list[Tensor]]()
    goes_on = torch.tensor(True) if condition is None else condition
    step = 0
    while bool(goes_on) and (most is None or step < int(most)):
        goes_on, *outputs = call.run(body, [torch.tensor(step), goes_on, *carried])
        carried = outputs[: len(state)]
        made.append(outputs[len(state) :])
        step += 1
    scanned = len(call.node.outputs) - len(state)
    call.require(bool(made) or not scanned, "a Loop that makes tensors and does not run once")
    return [*carried, *(torch.stack(each) for each in zip(*made, strict=True))]


@forward("Scan")
def scan(call: Call, *inputs: Tensor) -> list[Tensor]:
    call.require(call.opset >= 9, "Scan before opset 9")
    body, count = _body(call, "body"), call.get("num_scan_inputs", 0)
    state, read = list(inputs[:-count]), inputs[-count:]
    axes, turned = (call.ints(name) or [0] * count for name in ("scan_input_axes", "scan_input_directions"))
    rows = [each.movedim(axis, 0) for each, axis in zip(read, axes, strict=True)]
    rows = [each.flip(0) if back else each for each, back in zip(rows, turned, strict=True)]
    made = []
    for step in range(len(rows[0])):
        outputs = call.run(body, [*state, *(each[step] for each in rows)])
        state = outputs[: len(state)]
        made.append(outputs[len(state) :])
    outputs = [torch.stack(each) for each in zip(*made, strict=True)]
    axes, turned = (
        call.ints(name) or [0] * len(outputs) for name in ("scan_output_axes", "scan_output_directions")
    )
    outputs = [each.flip(0) if back else each for each, back in zip(outputs, turned, strict=True)]
    return [*state, *(each.movedim(0, axis) for each, axis in zip(outputs, axes, strict=True))]
