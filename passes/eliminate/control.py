"""Control flow whose course is known."""

from __future__ import annotations

from onnxslim.graph import Graph, Node
from onnxslim.passes import facts
from onnxslim.rewrite import Editor, Rule


class If(Rule[tuple[Node, Graph]]):
    """An If with a constant condition is the branch that is taken."""

    name = "if"
    ops = frozenset(("If",))

    def pattern(self, node: Node, edit: Editor) -> tuple[Node, Graph] | None:
        condition = facts.constant(node, 0)
        if condition is None or condition.size != 1:
            return None
        branch = node.attrs.get("then_branch" if condition.any() else "else_branch")
        return (node, branch) if isinstance(branch, Graph) else None

    def check(self, match: tuple[Node, Graph], edit: Editor) -> str | None:
        node, branch = match
        if len(branch.outputs) != len(node.outputs):
            return "its branch does not make its outputs"
        if not edit.can_edit(branch) or any(edit.is_shadowed(tensor) for tensor in node.outputs):
            return "a body uses a name for another tensor than the graph around it does"
        return None

    def rewrite(self, match: tuple[Node, Graph], edit: Editor) -> str:
        node, branch = match
        edit.inline(node, branch)
        return "replaced it by the branch that is taken"


RULES = (If(),)
