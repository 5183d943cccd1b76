"""Several passes under one budget: what each of them does is decided by what all of them propose."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple, TypeVar

from onnxslim.calibration.fidelity import Judge
from onnxslim.calibration.samples import SAMPLES
from onnxslim.engine.base import Context, Pass
from onnxslim.engine.moves import BudgetUnit, Load, Move, chosen
from onnxslim.ir.model import Model

P = TypeVar("P", bound=Pass)


@dataclass(frozen=True)
class JointChoice:
    """What passes are to do together.

    Attributes:
        passes: with plans, for a pipeline to run in this order; those that have nothing to do are left out.
        moves: of all their plans.
        left: of the budget's unit, relative to the model as it came in.
        result: what the passes make of the model, unchecked.
        measured: error of its outputs relative to their variance, on the samples held out, or on those to
            choose by where none are; None without data.
    """

    passes: tuple[Pass, ...]
    moves: tuple[Move, ...]
    left: float
    result: Model
    measured: float | None

    @property
    def predicted(self) -> float:
        """What they were expected to lose: the sum over the moves, each tried alone."""
        return math.fsum(move.damage for move in self.moves)


def acting(each: P, moves: Sequence[Move]) -> P:
    """The pass that makes these moves of the model they were proposed for, and nothing else.

    Args:
        each: what proposed them; options that mean something beside a plan are kept.
        moves: at least one.
    """
    plan = reduce(lambda one, other: one.joined(other), (move.plan for move in moves))
    kept = {name: value for name, value in each.given().items() if name in each.beside_plan}
    make: Callable[..., P] = type(each)
    return make(**kept, plan=plan)


def jointly(
    passes: Sequence[Pass],
    model: Model,
    ctx: Context,
    unit: BudgetUnit,
    share: float,
) -> JointChoice:
    """Choose what passes do so that together they keep a model to a budget, with the least damage.

    What a pass finds in a layer that another one has changed is not what it proposed for the model as it
    was. So each pass in turn makes the moves that win against all that can follow, and those behind it
    propose anew.

    Args:
        passes: that propose moves, in the order in which they are to run.
        model: not modified.
        ctx: see `Context`.
        unit, share: what is to be left, of all that the model has to compute or to store.

    Raises:
        UsageError: see `chosen`.
    """
    now = model.copy()
    whole = _load(now, ctx).total(unit)
    steps = planned(passes, now, ctx, unit, share)
    if steps and isinstance(steps[-1].acting, type(passes[-1])):
        steps[-1].acting.run(now, ctx)
    left = _load(now, ctx).total(unit) / whole
    moves = tuple(move for step in steps for move in step.moves)
    return JointChoice(tuple(step.acting for step in steps), moves, left, now, _lost(model, now, ctx))


class PlannedStep(NamedTuple):
    """What one of several passes is to do.

    Attributes:
        acting: the pass with its plan.
        moves: that the plan makes.
    """

    acting: Pass
    moves: tuple[Move, ...]


def planned(
    passes: Sequence[Pass],
    now: Model,
    ctx: Context,
    unit: BudgetUnit,
    share: float,
    proposed: Sequence[Sequence[Move]] | None = None,
) -> list[PlannedStep]:
    """Choose as `jointly` does, without looking at what comes of it; passes with nothing to do are left out.

    Args:
        passes, ctx, unit, share: see there.
        now: the model; what all passes but the last do is done to it.
        proposed: what each pass proposes for the model as it is, where somebody has asked them before.
    """
    whole = _load(now, ctx).total(unit)
    steps: list[PlannedStep] = []
    for index, each in enumerate(passes):
        known = proposed if proposed is not None and not steps else None
        own, *others = known[index:] if known else [other.propose(now, ctx) for other in passes[index:]]
        rest = [move for moves in others for move in moves]
        wanted = {id(move) for move in chosen([*own, *rest], _load(now, ctx), unit, share * whole)}
        if moves := tuple(move for move in own if id(move) in wanted):
            steps.append(PlannedStep(acting(each, moves), moves))
            if index + 1 < len(passes):
                steps[-1].acting.run(now, ctx)
    return steps


def _lost(model: Model, result: Model, ctx: Context) -> float | None:
    if ctx.data is None:
        return None
    unseen = ctx.data.tune if ctx.data.held is None else ctx.data.held
    return Judge(model, unseen, ctx.target, SAMPLES)(result).error


def _load(model: Model, ctx: Context) -> Load:
    feeds = ctx.one_run() or {}
    return Load.of(model, {name: array.shape for name, array in feeds.items()})
