"""Half precision: weights, and where it is safe computation, in float16 or bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from onnxslim import shapes
from onnxslim.calibration.collect import collect
from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.observers import Histogram
from onnxslim.engine.base import Changes, Context, InterfacePart, Log, Pass, options
from onnxslim.engine.matching import GLOBS, excluded, tell_idle
from onnxslim.errors import UsageError
from onnxslim.ir.graph import Node
from onnxslim.ir.model import Model
from onnxslim.passes.dead import Dead
from onnxslim.passes.eliminate import Eliminate
from onnxslim.passes.fold.weights import store_weights
from onnxslim.passes.half.convert import Converter, narrow_interface, store
from onnxslim.passes.half.facts import SINGLE, TYPES, delicate, unfit
from onnxslim.passes.half.measure import lossy
from onnxslim.runtime.kernels import without_kernel


@options
class Half(Pass):
    """Compute in half precision where measured ranges allow it, and store weights so.

    Inputs and outputs of the model keep their types, unless `everywhere` is asked for. A node stays in single
    precision if a tensor it reads or makes exceeds a quarter of what the type can hold on the calibration
    data (all nodes count as safe without data, but for constants), or if rounding to the type costs much of
    its result on it. So does one whose operator is sensitive to rounding, which computes angles, or
    which has to do with a constant that is lost in the type; one beside a part in integers; one that does not
    take the type or has no kernel for it.
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
        store_weights(model)
        if self.weights_only:
            store(model, kind, self.exclude, log)
            return log.done()
        shapes.infer(model)
        reasons = self._reasons(model, ctx)
        for node in model.graph.nodes:
            if id(node) in reasons and SINGLE in {each.dtype for each in (*node.inputs, *node.outputs)}:
                log.skip(node.label, reasons[id(node)])
        chosen = [node for node in model.graph.nodes if id(node) not in reasons]
        Converter(model, kind, log).apply(chosen)
        if self.everywhere:
            narrow_interface(model, kind, log)
            for step in (Eliminate(), Dead()):
                step.run(model, ctx)
        return log.done()

    def _reasons(self, model: Model, ctx: Context) -> dict[int, str]:
        """Why nodes stay in single precision, by id; what takes longest to find out is asked last."""
        kind, nodes, reasons = TYPES[self.dtype], model.graph.nodes, dict[int, str]()

        def rest() -> list[Node]:
            return [node for node in nodes if id(node) not in reasons]

        data = None if ctx.data is None else ctx.data.seen
        seen = _ranges(model, data, ctx) if data is not None else {}
        for node in nodes:
            reason = excluded(self.exclude, node) or unfit(node, model.opset, kind, seen)
            if reason is not None:
                reasons[id(node)] = reason
        reasons = {**delicate(nodes, kind), **reasons}
        for number in without_kernel(rest(), model, kind, ctx.target):
            reasons[number] = f"{ctx.target.name} has no kernel for it in {kind.name}"
        if data is not None:
            reasons |= lossy(model, rest(), kind, data.bind(model.inputs()), ctx)
        return reasons


def _ranges(model: Model, data: CalibrationData, ctx: Context) -> Mapping[str, Histogram]:
    """What the data makes of every floating-point tensor."""
    made = [tensor for node in model.graph.nodes for tensor in node.outputs if tensor.name]
    names = [tensor.name for tensor in (*model.graph.inputs, *made) if tensor.dtype == SINGLE]
    found = collect(model, data, names, target=ctx.target, jobs=ctx.jobs, progress=ctx.progress, empty=True)
    return found.histograms
