"""Codes that are moved about, as numbers that are."""

from __future__ import annotations

from typing import TypeAlias

from onnxslim.engine.editor import Editor
from onnxslim.engine.rewrite import Rule
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Node
from onnxslim.ir.model import DEFAULT_DOMAINS, constant_of
from onnxslim.ops import Trait, has
from onnxslim.passes import predicates

# What moves codes, and the DQ that read them.
Moved: TypeAlias = tuple[Node, list[Node]]


class MovedCodes(Rule[Moved]):
    """DQ of codes that an operator moves is DQ before it, which then moves the numbers.

    ONNX Runtime moves codes, which is faster, and does so again when it loads the file. But a tensor that
    comes out of an integer kernel is no longer between Q and DQ.
    """

    name = "moved-codes"
    ops = makes = frozenset(("DequantizeLinear",))

    def pattern(self, node: Node, edit: Editor) -> Moved | None:
        found = mover(node)
        if found is None:
            return None
        readers = {id(reader): reader for made in found.outputs for reader in made.outputs}
        return found, list(readers.values())

    def check(self, match: Moved, edit: Editor) -> str | None:
        moving, readers = match
        grids = [_grid(reader) for reader in readers]
        if any(map(edit.is_output, moving.outputs)) or grids[0] is None or len(set(grids)) > 1:
            return "the codes are read by something else than DQ of one positive scale"
        if any(edit.is_shadowed(reader.outputs[0]) for reader in readers):
            return "a body has another tensor of the name of what comes out"
        return None

    def rewrite(self, match: Moved, edit: Editor) -> str:
        moving, readers = match
        source = moving.inputs[0]
        values = edit.variable(f"{source.name}_dequantized")
        edit.add(moving, readers[0].op, [source, *readers[0].inputs[1:]], [values])
        moved = {id(made): edit.variable(f"{made.name}_dequantized") for made in moving.outputs}
        inputs, outputs = [values, *moving.inputs[1:]], [moved[id(made)] for made in moving.outputs]
        edit.add(moving, moving.op, inputs, outputs, moving.attrs, name=moving.name)
        for reader in readers:
            edit.bypass(reader, moved[id(reader.inputs[0])])
        edit.remove(moving)
        return f"moved before {moving.label}"


def mover(node: Node) -> Node | None:
    """What moves the codes that a DQ reads."""
    maker = ir.producer(node.inputs[0]) if has(node, Trait.DEQUANTIZES) and node.inputs else None
    if maker is None or not {node.domain, maker.domain} <= set(DEFAULT_DOMAINS):
        return None
    if not has(maker, Trait.MOVES | Trait.SEARCHES):
        return None
    # Weights are moved ahead of time.
    return None if constant_of(predicates.origin(maker.inputs[0])) is not None else maker


def _grid(node: Node) -> tuple[float, float] | None:
    """Scale and zero point of a DQ with a positive scale for all; None of others, and of other nodes."""
    if not has(node, Trait.DEQUANTIZES) or node.domain not in DEFAULT_DOMAINS:
        return None
    scale, zero = (predicates.plain_number(predicates.constant(node, index)) for index in (1, 2))
    if scale is None or scale <= 0 or (zero is None and node.input(2) is not None):
        return None
    return scale, zero or 0.0
