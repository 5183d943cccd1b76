"""Sizes of inputs fixed, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from onnxslim import shapes
from onnxslim.engine.base import Changes, Context, InterfacePart, Log, Pass, options
from onnxslim.errors import UsageError, nearest
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Variable
from onnxslim.ir.model import Model
from onnxslim.shapes.given import by_name, require_rank


def _read(given: Any) -> Any:
    return given if isinstance(given, Mapping) or not isinstance(given, str | Iterable) else by_name(given)


@options
class FixShapes(Pass):
    """Fix the sizes of inputs, and forget or infer anew what followed from the old ones.

    Whatever is said of the result, by calibration data, checks and reports, refers to the model with these
    sizes. Sizes of inner tensors and outputs are inferred where they are certain.
    """

    name: ClassVar[str] = "shapes"
    lossless: ClassVar[bool] = True
    prepares: ClassVar[bool] = True

    inputs: Annotated[dict[str, tuple[int, ...]], BeforeValidator(_read)] = Field(
        default_factory=dict, description="sizes of inputs: name:1,3,224,224"
    )
    infer: bool = Field(True, description="infer the sizes of outputs; without, they are left open")

    @property
    def interface(self) -> frozenset[InterfacePart]:
        """Sizes of outputs follow from those of inputs, and types that nobody declared become known."""
        return frozenset(("types", "shapes"))

    def run(self, model: Model, ctx: Context) -> Changes:
        """Fix the sizes in place.

        Raises:
            UsageError: there is no such input, or it has another number of axes.
        """
        log = Log()
        specs = {spec.name: spec for spec in model.inputs()}
        for name, sizes in self.inputs.items():
            if name not in specs:
                raise UsageError(f"pass 'shapes': there is no input '{name}'; {nearest(name, specs)}")
            require_rank(specs[name], sizes)
            log.change(name, f"sizes fixed to {'x'.join(map(str, sizes)) or 'those of a scalar'}")
        if self.inputs:
            _fix(model, self.inputs, self.infer)
        return log.done()


def _fix(model: Model, wanted: Mapping[str, tuple[int, ...]], infer: bool) -> None:
    for tensor in model.graph.inputs:
        tensor.shape = wanted.get(tensor.name, tensor.shape)
    ranks = {id(out): len(out.shape) for out in model.graph.outputs if out.shape is not None}
    for tensor in _made(model):
        tensor.shape = None
    if infer:
        learn(model)
    for out in model.graph.outputs:
        if isinstance(out, Variable) and out.shape is None and id(out) in ranks:
            out.shape = (None,) * ranks[id(out)]


def learn(model: Model) -> None:
    """Fill in types, and shapes in numbers and symbols of the inputs, where they are certain."""
    symbols = {dim for tensor in model.graph.inputs for dim in tensor.shape or ()}
    facts = shapes.deduce(model)
    for tensor in _made(model):
        fact = facts.get(id(tensor))
        if fact is None or fact.dtype is None:
            continue
        tensor.dtype = fact.dtype
        if fact.shape is not None:
            # Sizes that are only declared may be wrong, as exporters write 0 for some.
            tensor.shape = tuple(
                dim if isinstance(dim, int) or dim in symbols else None for dim in fact.shape
            )


def _made(model: Model) -> Iterator[Variable]:
    """The tensors that are not inputs of the model."""
    for graph in model.graphs():
        for tensor in ir.tensors(graph):
            if isinstance(tensor, Variable) and (tensor.inputs or graph is not model.graph):
                yield tensor
