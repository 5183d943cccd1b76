"""What Gemm can do besides multiplying."""

from __future__ import annotations

from typing import ClassVar

from onnxslim.engine.editor import Editor
from onnxslim.engine.rewrite import Rule
from onnxslim.ir.graph import Node
from onnxslim.passes import predicates


class TransposeGemm(Rule[tuple[Node, int, Node]]):
    """Gemm of a transposed matrix reads it as it is, with transA or transB the other way round."""

    name = "transpose-gemm"
    ops = frozenset(("Gemm",))
    matches = frozenset(("Transpose",))
    since: ClassVar[int] = 7

    def pattern(self, node: Node, edit: Editor) -> tuple[Node, int, Node] | None:
        for index in (0, 1):
            inner = predicates.made_by(node.inputs[index], "Transpose")
            if inner is not None and edit.sole_consumer(node.inputs[index]) is node:
                return node, index, inner
        return None

    def check(self, match: tuple[Node, int, Node], edit: Editor) -> str | None:
        _, _, inner = match
        # Gemm takes matrices only, and without an order a Transpose swaps their axes.
        if tuple(inner.attrs.get("perm", (1, 0))) != (1, 0):
            return "it does not swap the axes of a matrix"
        return None

    def rewrite(self, match: tuple[Node, int, Node], edit: Editor) -> str:
        node, index, inner = match
        attr = "transB" if index else "transA"
        node.attrs[attr] = int(not node.attrs.get(attr, 0))
        edit.set_input(node, index, inner.inputs[0])
        return f"took in {inner.label}"


RULES = (TransposeGemm(),)
