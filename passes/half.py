"""Half precision: weights, and where it is safe computation, in float16 or bfloat16."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import ml_dtypes
import numpy as np
import onnx
from pydantic import Field

from onnxslim import shapes
from onnxslim.calibration.collect import collect
from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.observers import Histogram
from onnxslim.engine.base import Changes, Context, InterfacePart, Log, Pass, options
from onnxslim.engine.matching import GLOBS, excluded, tell_idle
from onnxslim.errors import UsageError
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Array, Constant, Graph, Namer, Node, Tensor, Variable
from onnxslim.ir.model import DEFAULT_DOMAINS, Model
from onnxslim.ops import Trait, has
from onnxslim.passes.dead import Dead
from onnxslim.passes.eliminate import Eliminate

MATCHES = MAKES = ("Cast",)

SINGLE = np.dtype(np.float32)
TYPES: Mapping[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
LARGEST: Mapping[str, float] = {"float16": 65504.0, "bfloat16": 3.3e38}
# Values of a tensor may exceed what was measured by this factor before they become infinite.
HEADROOM = 4.0
MIN_BYTES = 4096


@options
class Half(Pass):
    """Compute in half precision where measured ranges allow it, and store weights so.

    Inputs and outputs of the model keep their types, unless `everywhere` is asked for. A node stays in single
    precision if a tensor it reads or makes exceeds a quarter of what the type can hold on the calibration
    data (all nodes count as safe without data, but for constants), if its operator is sensitive to rounding,
    or if it does not take the type.
    """

    name: ClassVar[str] = "half"

    dtype: Literal["float16", "bfloat16"] = Field("float16", description="the type")
    weights_only: bool = Field(
        False, description="compute in single precision; weights are turned back when the model is loaded"
    )
    everywhere: bool = Field(False, description="inputs and outputs of the model too")
    exclude: tuple[str, ...] = Field((), description=f"{GLOBS} to keep in float")

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if self.everywhere and self.weights_only:
            raise UsageError("pass 'half': inputs and outputs cannot be converted with weights_only")

    @property
    def interface(self) -> frozenset[InterfacePart]:
        """Types of inputs and outputs, where that was asked for."""
        return frozenset(("types",) if self.everywhere else ())

    def run(self, model: Model, ctx: Context) -> Changes:
        """Convert the model in place.

        Raises:
            CalibrationError: the data does not fit the model.
        """
        log, kind = Log(), TYPES[self.dtype]
        tell_idle(self.exclude, model, log)
        if self.weights_only:
            _store(model, kind, self.exclude, log)
            return log.done()
        shapes.infer(model)
        seen = _ranges(model, ctx)
        chosen = []
        for node in model.graph.nodes:
            reason = excluded(self.exclude, node) or _unfit(node, model.opset, kind, seen)
            if reason is None:
                chosen.append(node)
            elif any(tensor.dtype == SINGLE for tensor in (*node.inputs, *node.outputs)):
                log.skip(node.label, reason)
        _Converter(model, kind, log).apply(chosen)
        if self.everywhere:
            _narrow_interface(model, kind, log)
            for step in (Eliminate(), Dead()):
                step.run(model, ctx)
        return log.done()


def _ranges(model: Model, ctx: Context) -> Mapping[str, Histogram]:
    """What the data makes of every floating-point tensor; nothing without data."""
    if ctx.data is None:
        return {}
    data = ctx.data if isinstance(ctx.data, CalibrationData) else CalibrationData(ctx.data)
    made = [tensor for node in model.graph.nodes for tensor in node.outputs if tensor.name]
    names = [tensor.name for tensor in (*model.graph.inputs, *made) if tensor.dtype == SINGLE]
    return collect(model, data, names, target=ctx.target, jobs=ctx.jobs, progress=ctx.progress).histograms


def _unfit(node: Node, opset: int, kind: np.dtype[Any], seen: Mapping[str, Histogram]) -> str | None:
    """Why a node stays in single precision."""
    if node.domain not in DEFAULT_DOMAINS or node.bodies:
        return "what it computes inside is not known"
    if has(node, Trait.SENSITIVE):
        return f"{node.op} is sensitive to rounding"
    touched = [
        tensor for tensor in (*node.inputs, *node.outputs) if tensor.name or isinstance(tensor, Constant)
    ]
    if all(tensor.dtype != SINGLE for tensor in touched):
        return "it has nothing in single precision"
    if "dtype" in node.attrs or isinstance(node.attrs.get("value"), onnx.AttributeProto):
        return "an attribute of it states its type"
    if not _takes(node, opset, kind):
        return f"{node.op} does not take {kind.name}"
    most = LARGEST[kind.name] / HEADROOM
    for tensor in touched:
        if tensor.dtype == SINGLE and _largest(tensor, seen) > most:
            return f"'{tensor.name}' exceeds what {kind.name} holds"
    return None


def _largest(tensor: Tensor, seen: Mapping[str, Histogram]) -> float:
    if isinstance(tensor, Constant):
        values = np.asarray(tensor.values)
        return float(np.abs(values[np.isfinite(values)]).max(initial=0.0))
    histogram = seen.get(tensor.name)
    if histogram is None:
        return 0.0
    return np.inf if histogram.irregular else max(-histogram.low, histogram.high, 0.0)


def _takes(node: Node, opset: int, kind: np.dtype[Any]) -> bool:
    """Whether every float32 input and output of an operator may be of another type, all of them the same."""
    try:
        schema = onnx.defs.get_schema(node.op, opset, "")
    except onnx.defs.SchemaError:
        return False
    allowed = {each.type_param_str: set(each.allowed_type_strs) for each in schema.type_constraints}
    slots = (*_formal(node.inputs, schema.inputs), *_formal(node.outputs, schema.outputs))
    return all(f"tensor({kind.name})" in allowed.get(each, set()) for each in slots)


def _formal(tensors: Any, formals: Any) -> Iterator[str]:
    for index, tensor in enumerate(tensors):
        if tensor.dtype == SINGLE and formals:
            yield formals[min(index, len(formals) - 1)].type_str


class _Converter:
    """Makes some nodes of a model compute in another type, with Casts around them."""

    def __init__(self, model: Model, kind: np.dtype[Any], log: Log) -> None:
        self._graph = model.graph
        self._kind = kind
        self._log = log
        self._name = Namer(model.graph)
        self._outputs = {id(tensor) for tensor in model.graph.outputs}
        self._captured = {id(t) for node in model.graph.nodes if node.bodies for t in ir.captures(node)}
        self._halves: dict[int, Tensor] = {}
        self._new: list[Node] = []

    def apply(self, chosen: list[Node]) -> None:
        """Convert these nodes."""
        half = {id(node) for node in chosen}
        for node in chosen:
            label = node.label
            if node.op == "Cast" and node.attrs.get("to") == onnx.TensorProto.FLOAT:
                node.attrs["to"] = int(onnx.helper.np_dtype_to_tensor_dtype(self._kind))
            for index, tensor in enumerate(node.outputs):
                if tensor.dtype == SINGLE and tensor.name:
                    node.outputs[index] = self._made(tensor, half)
            for index, read in enumerate(node.inputs):
                if read.dtype == SINGLE and (read.name or isinstance(read, Constant)):
                    node.inputs[index] = self._read(read)
            self._log.change(label, f"{node.op} computes in {self._kind.name}", "half precision")
        self._graph.nodes.extend(self._new)
        self._drop_unread()
        ir.sort(self._graph)

    def _made(self, tensor: Variable, half: set[int]) -> Variable:
        """The half-precision result that takes the place of a tensor, and what others read instead."""
        known = self._halves.get(id(tensor))
        result = known if isinstance(known, Variable) and not known.inputs else self._twin(tensor)
        self._halves[id(tensor)] = result
        fixed = id(tensor) in self._outputs or id(tensor) in self._captured
        if fixed or any(id(reader) not in half for reader in tensor.outputs):
            self._new.append(Node("Cast", self._name(f"{tensor.name}_Cast"), {"to": 1}, [result], [tensor]))
        return result

    def _read(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._halves:
            if isinstance(tensor, Constant):
                values = np.asarray(tensor.values).astype(self._kind)
                self._halves[id(tensor)] = Constant(self._name(f"{tensor.name}_{self._kind.name}"), values)
            else:
                result = self._twin(tensor)
                attrs = {"to": int(onnx.helper.np_dtype_to_tensor_dtype(self._kind))}
                self._new.append(Node("Cast", self._name(f"{result.name}_Cast"), attrs, [tensor], [result]))
                self._halves[id(tensor)] = result
        return self._halves[id(tensor)]

    def _twin(self, tensor: Variable) -> Variable:
        return Variable(self._name(f"{tensor.name}_{self._kind.name}"), self._kind, tensor.shape)

    def _drop_unread(self) -> None:
        kept = self._graph.initializers
        for name in [name for name, constant in kept.items() if id(constant) in self._halves]:
            if not kept[name].outputs and id(kept[name]) not in self._outputs:
                del kept[name]


def _narrow_interface(model: Model, kind: np.dtype[Any], log: Log) -> None:
    """Take and give half precision where it was single precision; Casts to what the model computes in."""
    graph, name = model.graph, Namer(model.graph)
    graph.defaults = {
        key: Constant(key, value.values.astype(kind) if value.dtype == SINGLE else value.values)
        for key, value in graph.defaults.items()
    }
    for tensor in graph.inputs:
        if tensor.dtype == SINGLE:
            wide = Variable(name(f"{tensor.name}_float32"), SINGLE, tensor.shape)
            ir.replace_uses(tensor, wide)
            tensor.dtype = kind
            graph.nodes.insert(0, Node("Cast", name(f"{tensor.name}_Cast"), {"to": 1}, [tensor], [wide]))
            log.change(tensor.name, f"taken in {kind.name}", "half precision")
    for index, output in enumerate(graph.outputs):
        if output.dtype == SINGLE and not any(output is tensor for tensor in graph.outputs[:index]):
            _narrow_output(graph, output, kind, name)
            log.change(graph.outputs[index].name, f"given in {kind.name}", "half precision")


def _narrow_output(graph: Graph, output: Tensor, kind: np.dtype[Any], name: Namer) -> None:
    """Give an output, which keeps its name, the type of half precision."""
    narrow = Variable(output.name, kind, output.shape)
    graph.outputs[:] = [narrow if tensor is output else tensor for tensor in graph.outputs]
    if isinstance(output, Constant):
        graph.initializers.pop(output.name, None)
    output.name = name(f"{output.name}_float32")
    attrs = {"to": int(onnx.helper.np_dtype_to_tensor_dtype(kind))}
    graph.nodes.append(Node("Cast", name(f"{narrow.name}_Cast"), attrs, [output], [narrow]))


def _store(model: Model, kind: np.dtype[Any], exclude: Sequence[str], log: Log) -> None:
    """Keep large constants in half precision, with a Cast that runtimes compute once on loading."""
    name, added = Namer(model.graph), []
    most = LARGEST[kind.name]
    fixed = {id(tensor) for tensor in model.graph.outputs}
    for constant in list(model.graph.initializers.values()):
        if constant.dtype != SINGLE or constant.nbytes < MIN_BYTES or id(constant) in fixed:
            continue
        values: Array = constant.values
        reason = next(filter(None, (excluded(exclude, node) for node in constant.outputs)), None)
        if reason is None and not np.abs(values).max(initial=0.0) < most:
            reason = f"it exceeds what {kind.name} holds"
        if reason is not None:
            log.skip(constant.name, reason)
            continue
        half = Constant(name(f"{constant.name}_{kind.name}"), values.astype(kind))
        restored = Variable(name(f"{constant.name}_float32"), SINGLE, constant.shape)
        ir.replace_uses(constant, restored)
        added.append(Node("Cast", name(f"{constant.name}_Cast"), {"to": 1}, [half], [restored]))
        if not constant.outputs:
            del model.graph.initializers[constant.name]
        log.change(constant.name, f"stored as {kind.name}", "half precision")
    model.graph.nodes.extend(added)
    ir.sort(model.graph)
