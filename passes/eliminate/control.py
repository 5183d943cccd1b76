"""Control flow whose course is known."""

from __future__ import annotations

import numpy as np

from onnxslim.engine.editor import Editor
from onnxslim.engine.rewrite import Rule
from onnxslim.ir.graph import Graph, Node
from onnxslim.passes import predicates
from onnxslim.passes.eliminate import ranks
from onnxslim.passes.eliminate.ranks import branch_results, possible, wanted


class If(Rule[tuple[Node, Graph]]):
    """An If with a constant condition is the branch that is taken."""

    name = "if"
    ops = frozenset(("If",))

    def pattern(self, node: Node, edit: Editor) -> tuple[Node, Graph] | None:
        condition = predicates.constant(node, 0)
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


class IfByRank(Rule[tuple[Node, bool]]):
    """Of an If, one branch makes a tensor of another number of axes than what reads it can take.

    So in every run that does not fail the other one is taken, and the condition is known. Exporters write
    such Ifs for squeezes of axes whose size they do not know.
    """

    name = "if-rank"
    ops = frozenset(("If",))
    matches = ranks.MATCHES

    def pattern(self, node: Node, edit: Editor) -> tuple[Node, bool] | None:
        home = edit.home(node)
        if home is None or predicates.constant(node, 0) is not None:
            return None
        for index, output in enumerate(node.outputs):
            count = wanted(output, edit, home) if output.name else None
            ranks = [possible(result, edit) for result in branch_results(node, index)] if count else []
            fits = [found is None or count in found for found in ranks]
            if fits in ([True, False], [False, True]):
                return node, fits[0]
        return None

    def check(self, match: tuple[Node, bool], edit: Editor) -> str | None:
        return None

    def rewrite(self, match: tuple[Node, bool], edit: Editor) -> str:
        node, taken = match
        condition, home = node.inputs[0], edit.home(node)
        known = edit.constant(f"{condition.name}_known", np.array(taken))
        for reader in list(dict.fromkeys(condition.outputs)):
            if reader.op == "If" and edit.home(reader) is home:
                edit.set_input(reader, 0, known)
        return f"its condition can only be {str(taken).lower()}"


RULES = (If(), IfByRank())
