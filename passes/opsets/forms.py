"""A node in the operators of another opset, or in those that its own consists of.

What a form is made of, in this order: the row of the operator; onnx's version converter; the node as it is,
where schemas see no difference in it; the function that the schema writes the operator in. Each is only a
proposal: the node by itself and its form are run side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TypeAlias

import onnx
import onnx.inliner
import onnx.shape_inference
import onnx.version_converter
from onnx import GraphProto, ModelProto, ValueInfoProto, helper

from onnxslim.engine.base import Context
from onnxslim.engine.check import Checker
from onnxslim.engine.editor import Editor
from onnxslim.errors import LoadError, one_line
from onnxslim.ir import files, proto
from onnxslim.ir import graph as ir
from onnxslim.ir.alone import alone, read_name
from onnxslim.ir.graph import Constant, Graph, Node, Tensor, Variable
from onnxslim.ir.model import DEFAULT_DOMAINS, Model, constant_of, is_literal, literal, load
from onnxslim.ops import spec_of, versions
from onnxslim.ops.body import UnwrittenError
from onnxslim.passes.fold import Fold
from onnxslim.passes.opsets.placing import obstacle, put, written
from onnxslim.runtime.targets import Target

# Makes a form of a node by itself in another opset; raises UnwrittenError where there is none.
MakeForm: TypeAlias = Callable[[ModelProto, int], ModelProto]
# Constants of up to so many bytes come along, as they may say what a node does.
MAX_BYTES = 32768


class Forms:
    """Forms of the nodes of one model.

    Args:
        target: where nodes and their forms are run side by side.
    """

    def __init__(self, target: Target) -> None:
        self._targets = (target, Target.reference())
        self._known: dict[tuple[bytes, int], ModelProto | str] = {}

    def beside(self, node: Node, edit: Editor, there: int) -> Graph | None:
        """What a node of the model's opset is in the next one, or the one before.

        Args:
            node: of the standard domain.
            edit: of its model.
            there: the other opset.

        Returns:
            What is to stand in its place, reading what it reads; None if it stays as it is.

        Raises:
            UnwrittenError: it has none, and why.
        """
        if versions.is_alike(node.op, edit.opset, there):
            return None
        if is_literal(node):
            return _stated(node)
        if node.bodies:
            odd = versions.superfluous(node, edit.opset, there)
            if odd:
                raise UnwrittenError(odd if isinstance(odd, str) else f"its attribute '{odd[0]}' is new")
            return None
        why: list[str] = []
        spec = spec_of(node)
        write = spec.body if versions.schema_of(node.op, there) is None else spec.older
        if there > edit.opset:
            write = None
        if write is not None:
            try:
                return written(node, write, edit, there)
            except UnwrittenError as error:
                why.append(str(error))
        before = by_itself(node, edit)
        try:
            return _taken_in(node, self._found(node, before, there), edit)
        except UnwrittenError as error:
            raise UnwrittenError("; ".join([*why, str(error)])) from error

    def inside(self, node: Node, edit: Editor) -> Graph:
        """What a node consists of, in operators of the same opset.

        Raises:
            UnwrittenError: nobody knows.
        """
        write = spec_of(node).body
        if write is not None:
            body = written(node, write, edit, edit.opset)
            if all((each.op, each.domain) != (node.op, node.domain) for each in body.nodes):
                return body
            for each in body.nodes:
                ir.detach(each)
        if node.domain not in DEFAULT_DOMAINS or node.bodies:
            raise UnwrittenError("nothing is known of what it consists of")
        before = by_itself(node, edit)
        form = self._tried(self._by_function, before, edit.opset)
        if isinstance(form, str):
            raise UnwrittenError(form)
        return _taken_in(node, form, edit)

    def _found(self, node: Node, before: ModelProto, there: int) -> ModelProto:
        """A form that computes the same, of those that there are."""
        key = before.SerializeToString(deterministic=True), there
        if key not in self._known:
            self._known[key] = self._looked_for(node, before, there)
        found = self._known[key]
        if isinstance(found, str):
            raise UnwrittenError(found)
        return found

    def _looked_for(self, node: Node, before: ModelProto, there: int) -> ModelProto | str:
        why: list[str] = []
        for make in self._ways(node, before, there):
            form = self._tried(make, before, there)
            if not isinstance(form, str):
                return form
            why.append(form)
        return "; ".join(dict.fromkeys(why)) or f"nothing says what it is without {node.op}"

    def _ways(self, node: Node, before: ModelProto, there: int) -> Iterator[MakeForm]:
        """What may make a form."""
        if versions.schema_of(node.op, there) is not None:
            yield from (_converted, _unchanged)
        if there < before.opset_import[0].version and versions.is_function(
            node.op, before.opset_import[0].version
        ):
            yield self._by_function

    def _tried(self, make: MakeForm, before: ModelProto, there: int) -> ModelProto | str:
        """A form, or why it is none."""
        try:
            form = make(before, there)
            self._require_same(before, form)
        except (UnwrittenError, LoadError) as error:
            return str(error)
        return form

    def _by_function(self, before: ModelProto, there: int) -> ModelProto:
        """What the schema writes the operator in, in the other opset."""
        inner = load(_written_out(before))
        self._tidy(inner)
        self.bring(inner, there)
        self._tidy(inner)
        return inner.to_proto()

    def _tidy(self, model: Model) -> None:
        """Compute what can be: functions work out known sizes, and numbers in the type of a tensor."""
        Fold().run(model, Context(self._targets[0]))

    def bring(self, model: Model, there: int) -> list[tuple[str, str]]:
        """Bring a model without functions of its own to another opset, in place.

        Returns:
            Nodes that were written anew, and in what.

        Raises:
            UnwrittenError: a node has no form there; names it.
        """
        step, notes = 1 if there > model.opset else -1, list[tuple[str, str]]()
        while model.opset != there:
            notes += self._round(model, model.opset + step)
        return notes

    def _round(self, model: Model, there: int) -> Iterator[tuple[str, str]]:
        nodes = [node for node in model.nodes() if _is_other(node, model, there)]
        if nodes:
            edit = Editor(model)
            for node in nodes:
                yield from self._restate(node, edit, there)
            edit.commit()
        model.opsets[""] = there

    def _restate(self, node: Node, edit: Editor, there: int) -> Iterator[tuple[str, str]]:
        label, op = node.label, node.op
        try:
            why_not = obstacle(node, edit)
            if why_not:
                raise UnwrittenError(why_not)
            form = self.beside(node, edit, there)
        except UnwrittenError as error:
            what = f"node '{label}' ({op} of opset {edit.opset}) has no form in opset {there}"
            raise UnwrittenError(f"{what}: {error}") from error
        if form is not None:
            yield (
                label,
                f"{op} as in opset {there}: {', '.join(each.op for each in form.nodes) or 'its value'}",
            )
            put(node, form, edit)

    def _require_same(self, before: ModelProto, form: ModelProto) -> None:
        """Raise LoadError if a form is none, or computes something else."""
        for target in self._targets:
            checker = Checker(load(before), target)
            checker(load(form), lossless=True)
            if checker.feeds:
                return


def _is_other(node: Node, model: Model, there: int) -> bool:
    """Whether the operator of a node may be another one in another opset."""
    if node.domain not in DEFAULT_DOMAINS or ("", node.op) in model.functions:
        return False
    here = versions.since(node.op, model.opset)
    return here != 0 and not versions.is_alike(node.op, model.opset, there)


# --------------------------------------------------------------------------------------- one node


def by_itself(node: Node, edit: Editor) -> ModelProto:
    """A node as a model of its own."""

    def twin(tensor: Tensor, name: str) -> Tensor:
        values = constant_of(tensor)
        if values is not None and values.nbytes <= MAX_BYTES:
            return Constant(name, values)
        return Variable(name, edit.dtype(tensor), edit.shape(tensor), _structure(tensor, name))

    made = alone([node], edit.model, twin)
    made.opsets = {"": made.opset}
    plain = made.to_proto()
    del plain.opset_import[:]
    plain.opset_import.add(domain="", version=made.opset)
    return plain


def _structure(tensor: Tensor, name: str) -> ValueInfoProto | None:
    """The declaration of a tensor that is a sequence or an optional, under another name."""
    info = tensor.proto if isinstance(tensor, Variable) else None
    if info is None or info.type.WhichOneof("value") in (None, "tensor_type"):
        return None
    twin = ValueInfoProto()
    twin.CopyFrom(info)
    twin.name = name
    return twin


def _stated(node: Node) -> Graph | None:
    """What a Constant states, unless that is a tensor, as it may be in every opset."""
    values = None if node.attrs.keys() & {"value", "sparse_value"} else literal(node)
    if values is None:
        return None
    graph = Graph("body")
    graph.outputs = [Constant(node.outputs[0].name, values)]
    return graph


def _converted(before: ModelProto, there: int) -> ModelProto:
    """What onnx's version converter makes of it."""
    plain = _without(before, versions.idle(*_node(before), there))
    try:
        form = onnx.version_converter.convert_version(plain, there)
    except Exception as error:  # it raises several unrelated types
        why_not = one_line(error).rpartition("failed: ")[2]
        raise UnwrittenError(f"onnx's version converter: {why_not}") from error
    # It may forget types and shapes.
    del form.graph.input[:], form.graph.output[:]
    form.graph.input.extend(before.graph.input)
    form.graph.output.extend(before.graph.output)
    return form


def _unchanged(before: ModelProto, there: int) -> ModelProto:
    """The node as it is, without attributes that say what was so before there were any."""
    odd = versions.superfluous(*_node(before), there)
    if isinstance(odd, str):
        raise UnwrittenError(odd)
    form = _without(before, odd)
    form.opset_import[0].version = there
    return form


def _node(model: ModelProto) -> tuple[Node, int]:
    """The only node of a model, and its opset."""
    (node,) = load(model).graph.nodes
    return node, model.opset_import[0].version


def _without(model: ModelProto, names: Collection[str]) -> ModelProto:
    """A model of one node without some attributes of that."""
    twin = ModelProto()
    twin.CopyFrom(model)
    kept = [item for item in twin.graph.node[0].attribute if item.name not in names]
    del twin.graph.node[0].attribute[:]
    twin.graph.node[0].attribute.extend(kept)
    return twin


def _written_out(before: ModelProto) -> ModelProto:
    """What the schema writes the operator in, one level deep."""
    op = before.graph.node[0].op_type
    try:
        typed = onnx.shape_inference.infer_shapes(before)
        # The inliner looks the types of all that a node reads up, and finds none of constants.
        typed.graph.value_info.extend(
            helper.make_tensor_value_info(each.name, each.data_type, each.dims)
            for each in before.graph.initializer
        )
        typed.graph.node[0].attribute.extend(
            versions.defaults(op, before.opset_import[0].version, typed.graph.node[0].attribute)
        )
        form = onnx.inliner.inline_selected_functions(typed, [("", op)], inline_schema_functions=True)
    except Exception as error:  # they raise several unrelated types
        raise UnwrittenError(f"its function cannot be written out: {one_line(error)}") from error
    if any(node.op_type == op for node in form.graph.node):
        raise UnwrittenError(f"{op} is no function of other operators")
    del form.graph.value_info[:]
    return form


def _taken_in(node: Node, form: ModelProto, edit: Editor) -> Graph:
    """A form as what may stand in the place of a node."""
    scope = {read_name(0, at): each for at, each in enumerate(node.inputs) if each.name}
    code = GraphProto(name="form")
    code.node.extend(form.graph.node)
    code.initializer.extend(each for each in form.graph.initializer if each.name not in scope)
    code.output.extend(ValueInfoProto(name=each.name) for each in form.graph.output)
    graph = proto.import_graph(code, edit.model.ir_version, lambda item: files.decode(item, None), scope)
    label = node.name or f"{node.op}_{node.outputs[0].name}"
    for tensor in ir.tensors(graph):
        tensor.name = edit.name(f"{label}_{tensor.name}")
    for each in graph.nodes:
        each.name = edit.name(f"{label}_{each.op}")
    graph.initializers = {}
    results = iter(graph.outputs)
    graph.outputs = [next(results) if each.name else ir.empty() for each in node.outputs]
    return graph
