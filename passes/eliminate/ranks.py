"""How many axes a tensor can have, and how many its readers want, where shape inference does not know."""

from __future__ import annotations

from onnxslim.engine.editor import Editor
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Graph, Node, Tensor
from onnxslim.ops import spec_of
from onnxslim.passes import predicates

# Operators on a path that is followed, and nested Ifs.
_MAX_STEPS = 8
_SHIFTING = {"Unsqueeze": 1, "Squeeze": -1}
MATCHES = frozenset(("If", "Conv", "ConvTranspose", "Transpose", *_SHIFTING))


def possible(tensor: Tensor, edit: Editor, steps: int = _MAX_STEPS) -> frozenset[int] | None:
    """Numbers of axes a tensor may have; None if it could be any."""
    shape = edit.shape(tensor)
    if shape is not None:
        return frozenset((len(shape),))
    maker = ir.producer(tensor)
    if maker is None or steps == 0 or not edit.is_standard(maker):
        return None
    if maker.op != "If":
        shift = _shift(maker)
        before = None if shift is None else possible(maker.inputs[0], edit, steps - 1)
        return None if before is None or shift is None else frozenset(count + shift for count in before)
    index = next(i for i, made in enumerate(maker.outputs) if made is tensor)
    found = [possible(each, edit, steps - 1) for each in branch_results(maker, index)]
    return None if None in found else frozenset[int]().union(*(each for each in found if each is not None))


def branch_results(node: Node, index: int) -> list[Tensor]:
    """What the branches of an If make of one of its outputs: if the condition is true, and if not."""
    branches = (node.attrs.get(name) for name in ("then_branch", "else_branch"))
    return [branch.outputs[index] for branch in branches if isinstance(branch, Graph)]


def wanted(tensor: Tensor, edit: Editor, home: Graph, steps: int = _MAX_STEPS) -> int | None:
    """The only number of axes with which what reads a tensor in this graph runs; None if there is none."""
    for node in tensor.outputs if steps else ():
        if edit.home(node) is not home or not edit.is_standard(node):
            continue
        count = _wanted_by(node, tensor, edit)
        if count is not None and _is_used(node, edit, home):
            return count
        shift = _shift(node) if node.inputs[0] is tensor else None
        later = wanted(node.outputs[0], edit, home, steps - 1) if shift is not None else None
        if later is not None and shift is not None:
            return later - shift
    return None


def _wanted_by(node: Node, tensor: Tensor, edit: Editor) -> int | None:
    index = next(i for i, read in enumerate(node.inputs) if read is tensor)
    if node.op in ("Conv", "ConvTranspose") and index == 0:
        return predicates.rank(edit.shape(node.inputs[1]))
    if node.op == "Transpose" and node.attrs.get("perm"):
        return len(node.attrs["perm"])
    return spec_of(node).ranks.get(index)


def _shift(node: Node) -> int | None:
    """How many axes a node adds; None if that is not known."""
    if spec_of(node).is_unary:
        return 0
    axes = predicates.ints(node, "axes", 1) if node.op in _SHIFTING else None
    return None if axes is None else _SHIFTING[node.op] * len(axes)


def _is_used(node: Node, edit: Editor, home: Graph) -> bool:
    """Whether an output of the graph depends on a node; what nobody needs may never be run."""
    seen: set[int] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if any(edit.is_output(made) for made in current.outputs):
            return True
        for reader in (reader for made in current.outputs for reader in made.outputs):
            outer = edit.around(reader, home)
            if outer is not None and id(outer) not in seen:
                seen.add(id(outer))
                pending.append(outer)
    return False
