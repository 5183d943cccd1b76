"""The part of a model between some of its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from onnxslim.engine.base import Changes, Context, InterfacePart, Log, Pass, options
from onnxslim.errors import UsageError, nearest
from onnxslim.ir import graph as ir
from onnxslim.ir import proto
from onnxslim.ir.graph import Namer, Tensor, Variable
from onnxslim.ir.model import Model
from onnxslim.passes import dead
from onnxslim.passes.shapes import learn

_DTYPES: dict[str, np.dtype[Any]] = {
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
    "int32": np.dtype(np.int32),
    "bool": np.dtype(np.bool_),
}


@options
class Extract(Pass):
    """Cut a model out of a larger one: these tensors are its inputs and outputs, and what lies between stays.

    Whatever is said of the result, by calibration data, checks and reports, refers to the model that was cut
    out. Inputs that the new outputs do not need are dropped, but for those that nothing needed before.
    """

    name: ClassVar[str] = "extract"
    lossless: ClassVar[bool] = True
    prepares: ClassVar[bool] = True

    inputs: tuple[str, ...] = Field(
        (), description="its inputs, in this order: tensor, or tensor:type where the type is not known"
    )
    outputs: tuple[str, ...] = Field((), description="its outputs, likewise")

    @property
    def interface(self) -> frozenset[InterfacePart]:
        """Inputs depend on what the outputs need; types and shapes become known."""
        if self.inputs or self.outputs:
            return frozenset(("inputs", "types", "shapes", *(("outputs",) if self.outputs else ())))
        return frozenset()

    def run(self, model: Model, ctx: Context) -> Changes:
        """Cut in place.

        Raises:
            UsageError: there is no such tensor, its type is unknown or another one, or the outputs depend on
                inputs that are not among those named.
        """
        log = Log()
        if self.inputs or self.outputs:
            cut_out(model, self.inputs, self.outputs)
        for word in self.inputs:
            log.change(word, "an input of the model")
        for word in self.outputs:
            log.change(word, "an output of the model")
        return log.done()


def cut_out(model: Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Make tensors the inputs or outputs of the model and remove what is not needed between them."""
    learn(model)
    # What the graph was read from lists other inputs and outputs, in another order.
    if model.graph.proto is not None:
        model.graph.proto = proto.fields_but(
            model.graph.proto, "node", "initializer", "sparse_initializer", "input", "output", "value_info"
        )
    ends = _Ends(model)
    if inputs:
        model.graph.inputs = [ends.input(word) for word in dict.fromkeys(inputs)]
        _drop_unread(model)
        ends.require_no_other()
    if outputs:
        idle = {id(tensor) for tensor in model.graph.inputs if not tensor.outputs}
        model.graph.outputs = [ends.output(word) for word in dict.fromkeys(outputs)]
        _drop_unread(model)
        used = idle | {id(tensor) for tensor in model.graph.outputs}
        model.graph.inputs = [each for each in model.graph.inputs if each.outputs or id(each) in used]
    kept = {tensor.name for tensor in model.graph.inputs}
    model.graph.defaults = {name: value for name, value in model.graph.defaults.items() if name in kept}


def _drop_unread(model: Model) -> None:
    dead.remove_nodes(model, list(model.nodes()))
    dead.remove_constants(model)


class _Ends:
    """Finds the tensors of the main graph by what is said of them."""

    def __init__(self, model: Model) -> None:
        self._model, self._graph = model, model.graph
        self._inputs = list(model.graph.inputs)

    @cached_property
    def _name(self) -> Namer:
        return Namer(self._graph)

    def input(self, word: str) -> Variable:
        """A tensor as an input; what made it makes another one, which nobody reads."""
        tensor, dtype = self._find(word)
        if any(tensor is each for each in self._inputs):
            assert isinstance(tensor, Variable)
            return tensor
        made = Variable(tensor.name, dtype, tensor.shape)
        ir.replace_uses(tensor, made)
        for graph in self._model.graphs():
            graph.outputs = [made if out is tensor else out for out in graph.outputs]
        tensor.name = self._name(f"{tensor.name}_cut")
        return made

    def output(self, word: str) -> Tensor:
        """A tensor as an output."""
        tensor, dtype = self._find(word)
        if isinstance(tensor, Variable):
            tensor.dtype = dtype
        return tensor

    def require_no_other(self) -> None:
        """Raise UsageError if the model still needs an input it no longer has."""
        kept = {id(tensor) for tensor in self._graph.inputs}
        for tensor in self._inputs:
            is_output = any(out is tensor for out in self._graph.outputs)
            if id(tensor) not in kept and (tensor.outputs or is_output):
                raise UsageError(
                    f"the outputs also depend on input '{tensor.name}'; name it among the inputs"
                )

    def _find(self, word: str) -> tuple[Tensor, np.dtype[Any] | None]:
        """A tensor and its type, which is None where there is none."""
        found = {tensor.name: tensor for tensor in ir.tensors(self._graph)}
        name, colon, kind = (word, "", "") if word in found or ":" not in word else word.rpartition(":")
        if name not in found:
            raise UsageError(f"'{word}': there is no tensor '{name}'; {nearest(name, found)}")
        if colon and kind not in _DTYPES:
            raise UsageError(f"'{word}': there is no type '{kind}'; known are: {', '.join(_DTYPES)}")
        return found[name], _dtype(found[name], _DTYPES[kind] if colon else None)


def _dtype(tensor: Tensor, asked: np.dtype[Any] | None) -> np.dtype[Any] | None:
    """The type of a tensor, as known or as asked for."""
    known = tensor.dtype
    if asked is not None and known is not None and asked != known:
        raise UsageError(f"tensor '{tensor.name}' is of type {known}, not {asked}")
    is_unknown = known is None and not (isinstance(tensor, Variable) and tensor.proto is not None)
    if asked is None and is_unknown:
        raise UsageError(f"the type of tensor '{tensor.name}' is not known; add it, as in {tensor.name}:fp32")
    return known if known is not None else asked
