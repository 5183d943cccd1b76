"""Half precision: weights, and where it is safe computation, in float16 or bfloat16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from onnxslim import shapes
from onnxslim.calibration.collect import collect
from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.observers import Histogram
from onnxslim.engine.base import Changes, Context, InterfacePart, Log, PassWork, options
from onnxslim.engine.demands import Demand, Demanding, LeastSqnr, MostDrop
from onnxslim.engine.matching import GLOBS, excluded, tell_idle
from onnxslim.errors import UsageError
from onnxslim.ir.graph import Node
from onnxslim.ir.model import Model
from onnxslim.passes.dead import Dead
from onnxslim.passes.eliminate import Eliminate
from onnxslim.passes.fold.weights import store_weights
from onnxslim.passes.half.convert import Converter, narrow_interface, store
from onnxslim.passes.half.facts import SINGLE, TYPES, delicate, squares, unfit
from onnxslim.passes.half.measure import lossy, worst_first, worst_weights_first
from onnxslim.passes.half.normalize import put_together
from onnxslim.passes.unfuse import unfuse
from onnxslim.runtime.kernels import first_breaking, kernel_key, require_type, without_kernel

# Kinds of nodes that are looked for, one by one, where a target does not run the model with all of them.
MOST_BREAKING = 8
# Why a node, or a weight, stays in single precision where that was asked for by what is to be kept.
REASON = "in half precision, the outputs would keep less than is required"


@dataclass(frozen=True)
class _NodesTrial:
    """A model in half precision but for some nodes, by id."""

    model: Model
    kept: frozenset[int]


@dataclass(frozen=True)
class _WeightsTrial:
    """A model whose weights are stored in half precision but for some, by name."""

    model: Model
    kept: dict[str, str]


@options
class Half(Demanding):
    """Compute in half precision where measured ranges allow it, and store weights so.

    Inputs and outputs of the model keep their types, unless `everywhere` is asked for. A node stays in single
    precision if a tensor it reads or makes exceeds a quarter of what the type can hold on the calibration
    data (all nodes count as safe without data, but for constants), or if rounding to the type costs much of
    its result on it. So does one whose operator is sensitive to rounding, which computes angles, or
    which has to do with a constant that is lost in the type; one beside a part in integers; one that does not
    take the type or has no kernel for it. Steps of a normalization are made one operator, which does not
    overflow between them, if need be in opset 17.

    Where the outputs lose more than `require_sqnr` or `max_drop` allows, more nodes stay in single precision,
    those first which lose most to rounding; with `weights_only`, more weights.
    """

    name: ClassVar[str] = "half"

    dtype: Literal["float16", "bfloat16"] = Field("float16", description="the type")
    weights_only: bool = Field(
        False, description="compute in single precision; weights are turned back when the model is loaded"
    )
    everywhere: bool = Field(False, description="inputs and outputs of the model too")
    exclude: tuple[str, ...] = Field((), description=f"{GLOBS} to keep in float")
    require_sqnr: LeastSqnr = None
    max_drop: MostDrop = None

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if self.everywhere and self.weights_only:
            raise UsageError("pass 'half': inputs and outputs cannot be converted with weights_only")
        if self.everywhere and self.needs_data:
            raise UsageError(
                "pass 'half': other inputs and outputs (everywhere) cannot be compared with what they were, "
                "as require_sqnr and max_drop want"
            )

    @property
    def interface(self) -> frozenset[InterfacePart]:
        """Types of inputs and outputs, where that was asked for."""
        return frozenset(("types",) if self.everywhere else ())

    @property
    def work(self) -> PassWork:
        """See `Pass.work`."""
        return PassWork(0.5, 5e-3, 3.0)

    def run(self, model: Model, ctx: Context) -> Changes:
        """Convert the model in place.

        Raises:
            CalibrationError: the data does not fit the model.
            TargetError: the target does not compute in the type.
        """
        log, kind = Log(), TYPES[self.dtype]
        if not self.weights_only:
            require_type(kind, ctx.target)
        tell_idle(self.exclude, model, log)
        for skip in unfuse(model, "free").skipped:
            log.skip(skip.node, skip.reason)
        store_weights(model)
        demand = self.demand(model, ctx)
        if self.weights_only:
            kept = self._kept_weights(model, kind, demand) if demand is not None else {}
            if kept is None:
                return self._none(model, demand, log)
            store(model, kind, self.exclude, log, kept)
            return log.done()
        put_together(model, ctx, log)
        shapes.infer(model)
        reasons = self._reasons(model, ctx)
        chosen = [node for node in model.graph.nodes if id(node) not in reasons]
        reasons |= self._breaking(model, chosen, ctx)
        chosen = [node for node in chosen if id(node) not in reasons]
        if demand is not None and chosen:
            wanted = self._kept_nodes(model, chosen, demand, ctx)
            if wanted is None:
                return self._none(model, demand, log)
            reasons |= dict.fromkeys(wanted, REASON)
            chosen = [node for node in chosen if id(node) not in wanted]
        for node in model.graph.nodes:
            if id(node) in reasons and SINGLE in {each.dtype for each in (*node.inputs, *node.outputs)}:
                log.skip(node.label, reasons[id(node)])
        Converter(model, kind, log).apply(chosen)
        if self.everywhere:
            narrow_interface(model, kind, log)
            for step in (Eliminate(), Dead()):
                step.run(model, ctx)
        return log.done()

    def _none(self, model: Model, demand: Demand | None, log: Log) -> Changes:
        """Nothing is done, as nothing keeps enough."""
        assert demand is not None
        name = model.graph.name or "model"
        why = demand.shortfall or f"with any weight in half precision, {demand.refused}"
        log.skip(name, f"left as it is, however little is converted: {why}")
        return Changes((), log.done().skipped)

    def _kept_nodes(
        self, model: Model, chosen: Sequence[Node], demand: Demand, ctx: Context
    ) -> frozenset[int] | None:
        """Ids of as few of these nodes as have to stay in single precision; None if it had to be all."""
        kind = TYPES[self.dtype]
        order = worst_first(model, chosen, kind, ctx.given.fit.bind(model.inputs()), ctx)

        def make(back: int) -> _NodesTrial:
            return _NodesTrial(self._converted(model, order[back:]), frozenset(map(id, order[:back])))

        made = demand.least(make, len(order) - 1)
        # What is left may be nodes without weights, for which Casts are no gain.
        useful = made is not None and made.model.stats().bytes < model.stats().bytes
        return made.kept if made is not None and useful else None

    def _breaking(self, model: Model, chosen: Sequence[Node], ctx: Context) -> dict[int, str]:
        """Why nodes have to stay for the target to run the model, by id; nothing if that is in vain."""
        reasons: dict[int, str] = {}
        for _ in range(MOST_BREAKING):
            left = [node for node in chosen if id(node) not in reasons]
            make = partial(self._first, model, left, ctx)
            found = first_breaking(make, len(left), ctx.target, ctx.sample)
            if found is None:
                return reasons
            alike = kernel_key(left[found])
            why = f"with it, or one alike, in {self.dtype}, {ctx.target.name} does not run the model"
            reasons |= {id(node): why for node in left if kernel_key(node) == alike}
        return {}

    def _first(self, model: Model, nodes: Sequence[Node], ctx: Context, many: int) -> Model:
        if ctx.progress:
            ctx.progress("trying kernels", len(nodes) - many, None)
        return self._converted(model, nodes[:many])

    def _converted(self, model: Model, nodes: Sequence[Node]) -> Model:
        """A copy with these nodes in half precision."""
        trial, places = model.copy(), {id(node): index for index, node in enumerate(model.graph.nodes)}
        Converter(trial, TYPES[self.dtype], Log()).apply(
            [trial.graph.nodes[places[id(node)]] for node in nodes]
        )
        return trial

    def _kept_weights(self, model: Model, kind: np.dtype[Any], demand: Demand) -> dict[str, str] | None:
        """As few weights as have to stay in single precision, and why; None if it had to be all."""
        stored = Log()
        store(model.copy(), kind, self.exclude, stored)
        names = [change.node for change in stored.done().changed]
        order = worst_weights_first(model, names, kind)

        def make(back: int) -> _WeightsTrial:
            trial, kept = model.copy(), dict.fromkeys(order[:back], REASON)
            store(trial, kind, self.exclude, Log(), kept)
            return _WeightsTrial(trial, kept)

        made = demand.least(make, max(len(order) - 1, 0))
        return None if made is None else made.kept

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
        reasons = {**delicate(nodes, kind), **(squares(nodes, kind) if data is None else {}), **reasons}
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
