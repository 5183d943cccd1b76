"""A copy of a model in operators that are known in PyTorch, with the weights of the original."""

from __future__ import annotations

from onnxslim.engine.base import Context
from onnxslim.engine.editor import Editor
from onnxslim.ir.model import Model
from onnxslim.learn.net import unknown
from onnxslim.ops.body import UnwrittenError
from onnxslim.passes.inline import Inline
from onnxslim.passes.opsets.forms import Forms
from onnxslim.passes.opsets.placing import obstacle, put
from onnxslim.passes.unfuse import unfuse

# Functions of operators consist of others, that may consist of others.
MOST_LEVELS = 8


def taken_apart(model: Model, ctx: Context) -> Model:
    """A copy with what is not known in PyTorch written in other operators, where there are such.

    Constants keep their names.
    """
    twin = model.copy()
    if twin.functions:
        Inline().run(twin, ctx)
    unfuse(twin, "all")
    forms, stuck = Forms(ctx.target), set[str]()
    for _ in range(MOST_LEVELS):
        nodes = [node for node, _ in unknown(twin) if node.label not in stuck]
        if not nodes:
            break
        edit = Editor(twin)
        for node in nodes:
            label = node.label
            try:
                if obstacle(node, edit):
                    stuck.add(label)
                else:
                    put(node, forms.inside(node, edit), edit)
            except UnwrittenError:
                stuck.add(label)
        edit.commit()
    return twin
