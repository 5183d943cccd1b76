"""Sparsity: weights that are zero, anywhere or in patterns, and the others fitted to make up for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from onnxslim.engine.allocate import convex
from onnxslim.engine.base import Changes, Context, Effort, Figures, Log, PassWork, captioned, options
from onnxslim.engine.demands import LEVELS, Demand, LeastSqnr, MostDrop
from onnxslim.engine.matching import GLOBS, tell_idle
from onnxslim.engine.moves import Move
from onnxslim.engine.plans import PlanOf
from onnxslim.errors import UsageError
from onnxslim.formats import percent
from onnxslim.ir.model import Model
from onnxslim.passes.distill.behind import Learning, StepsBehind
from onnxslim.passes.fold.weights import StoredWeight, store_weights, stored_weights
from onnxslim.passes.repair.support import LEAST_ZEROS
from onnxslim.passes.sparsify.apply import apply
from onnxslim.passes.sparsify.choose import ShareChoice
from onnxslim.passes.sparsify.fit import Criterion, Thinning
from onnxslim.passes.sparsify.patterns import Pattern, parsed
from onnxslim.passes.sparsify.plan import SparsityPlan
from onnxslim.passes.sparsify.storing import pack
from onnxslim.passes.unfuse import unfuse

# Zeros if nothing is said.
DEFAULT_SPARSITY = 0.5
# What takes no more bytes than this is left alone.
LEAST_BYTES = 256
_NO_LAYER = "'{}' is no weight of one layer that reads it as its second input"


@dataclass(frozen=True)
class SparsifyFigures(Figures):
    """What sparsity has to tell of a model.

    Attributes:
        weights: by the node that reads them, the zeros of each weight that has some.
        zeros: share of all values of these weights that are zero.
        speed: what runs faster by it, and what does not.
        fitted: to what the rest was fitted, if not to data.
        plan: what was chosen, to keep and to replay.
    """

    weights: Mapping[str, str] | None = captioned("zeros")
    zeros: str | None = captioned("zeros of all weights looked at")
    speed: str | None = captioned("speed")
    fitted: str | None = captioned("fitted")
    plan: SparsityPlan | None = None


@options
class Sparsify(Learning):
    """Make weights of layers zero, and fit the others to make up for them.

    Zeros lie anywhere (`sparsity` of all weights), in blocks, or such that n of every m inputs in a row are
    left (`pattern`), along the axis that is summed over: input channels of convolutions, rows of matrices.
    With calibration data, which weights go and what the others are then is fitted to what each layer
    computes, one layer after the other, and layers get as many zeros as cost the outputs least; without, the
    smallest weights of every layer go.

    Weights are stored without their zeros where that is smaller, and put together by standard operators that
    the runtime folds when it loads the model; passes that come later see plain weights. Processors and ONNX
    Runtime's kernels gain no time by zeros; TensorRT does by 2:4, which is stored with them.

    Where the outputs lose more than `require_sqnr` or `max_drop` allows, there are fewer zeros.
    """

    name: ClassVar[str] = "sparsify"
    beside_plan: ClassVar[tuple[str, ...]] = ("criterion", "effort", "storage", "distill")

    sparsity: float | None = Field(
        None,
        ge=LEAST_ZEROS,
        lt=1,
        description=f"share of zeros of all weights of layers; with a pattern, of the layers that have it "
        f"[default: {DEFAULT_SPARSITY}; with a pattern, all that can]",
    )
    pattern: str | None = Field(
        None, description="n:m, such as 2:4: at most n of m inputs in a row are not zero"
    )
    block: str | None = Field(None, description="outputs x inputs, such as 4x1, that are zero as a whole")
    shares: Literal["auto", "same"] = Field(
        "auto",
        description="auto: layers that cost the outputs least get most zeros, with data; or all the same",
    )
    criterion: Literal["auto", "magnitude", "wanda", "surgeon"] = Field(
        "auto", description="which weights go; auto is surgeon with calibration data and magnitude without"
    )
    storage: Literal["auto", "dense", "packed"] = Field(
        "auto",
        description="packed: without zeros, where that is smaller; dense: with them, for runtimes that read "
        "weights themselves; auto is dense with a pattern and packed without",
    )
    effort: Effort = Field(
        "normal", description="how long the surgeon looks for weights that can go, and samples to measure on"
    )
    exclude: tuple[str, ...] = Field((), description=f"{GLOBS} to leave as they are")
    distill: StepsBehind = None
    require_sqnr: LeastSqnr = None
    max_drop: MostDrop = None
    plan: Annotated[Path | SparsityPlan | None, PlanOf(SparsityPlan)] = Field(
        None, description="file of a plan to replay, instead of choosing"
    )

    def __post_init__(self) -> None:
        """Refuse patterns that are none, two of them, and a choice beside a plan."""
        if self.plan is not None:
            self.require_alone()
        if self.pattern is not None and self.block is not None:
            raise UsageError("pass 'sparsify' takes pattern or block, not both")
        _ = self.zeros

    @property
    def zeros(self) -> Pattern:
        """What zeros have in common.

        Raises:
            UsageError: the pattern is none.
        """
        if self.block is not None:
            return Pattern(*parsed("block", self.block))
        if self.pattern is None:
            return Pattern()
        kept, of = parsed("pattern", self.pattern)
        if not kept < of or 1.0 - kept / of < LEAST_ZEROS:
            raise UsageError(
                f"pass 'sparsify': option 'pattern': at least a tenth of them is zero, not {self.pattern!r}"
            )
        return Pattern(kept=kept, of=of)

    @property
    def needs_data(self) -> bool:
        """For what is asked for, and for criteria that are taken from data."""
        return super().needs_data or self.criterion in ("wanda", "surgeon")

    @property
    def work(self) -> PassWork:
        """See `Pass.work`."""
        return PassWork(0.5, 1e-2, 5.0, 4e-6)

    def run(self, model: Model, ctx: Context) -> Changes:
        """Make weights sparse, in place.

        Raises:
            CalibrationError: there is no calibration data where it is needed, or it does not fit the model.
            UsageError: the plan cannot be read, or does not fit the model.
        """
        self.require_data(ctx.data)
        return _SparsifyRun(self, model, ctx)()

    def propose(self, model: Model, ctx: Context) -> Sequence[Move]:
        """Of every weight, more and more zeros."""
        self.require_data(ctx.data)
        return _SparsifyRun(self, model.copy(), ctx).moves()


@dataclass(frozen=True)
class _SparsifyTrial:
    """A model with sparse weights."""

    model: Model
    chosen: Mapping[StoredWeight, Thinning]


class _SparsifyRun:
    """One run of the pass.

    Args:
        wish: its options.
        model: edited in place.
        ctx: see `Context`.
    """

    def __init__(self, wish: Sparsify, model: Model, ctx: Context) -> None:
        self._wish, self._model, self._ctx = wish, model, ctx
        self._plan = None if wish.plan is None else SparsityPlan.given(wish.plan)
        self._log = Log()
        self._name = model.graph.name or "model"
        self._demand = wish.demand(model, ctx)
        # Weights that cannot have the pattern, fitted to what the others leave them all the same.
        self._dense: list[StoredWeight] = []
        # What is held to something must not have been fitted to what it is judged by.
        self._data = ctx.given.apart if self._demand else ctx.data

    def __call__(self) -> Changes:
        """Find, choose, fit."""
        weights = self._found()
        if not weights:
            self._log.skip(self._name, "it has no weights of layers that could be sparse")
            return self._log.done()
        chosen = self._chosen(weights)
        if not any(how.share for how in chosen.values()):
            self._tell_none(chosen)
            return self._log.done()
        apply(self._model, chosen, self._ctx.data, self._ctx, self._log)
        figures = self._figures(chosen)
        self._store(chosen)
        return self._log.done(figures)

    def _tell_none(self, chosen: Mapping[StoredWeight, Thinning]) -> None:
        """Say why no weight becomes sparse, where what was required has not said so."""
        zeros = sum(weight.constant.size - np.count_nonzero(weight.constant.values) for weight in chosen)
        if self._plan is not None:
            self._log.skip(self._name, "the plan leaves all of it as it is")
        elif zeros:
            there = percent(zeros / sum(weight.constant.size for weight in chosen))
            self._log.skip(self._name, f"{there} of its weights are zero already, which is enough")

    def _store(self, chosen: Mapping[StoredWeight, Thinning]) -> None:
        auto = all(not how.pattern.of for how in chosen.values())
        if self._wish.storage == "packed" or (auto and self._wish.storage == "auto"):
            names = {weight.name for weight, how in chosen.items() if how.share}
            why = pack(self._model, [each for each in self._model.constants() if each.name in names])
            if why:
                self._log.skip(self._name, f"zeros are stored, too: {why}")

    def moves(self) -> list[Move]:
        """What could be done to which weight; see `Pass.propose`."""
        weights = self._found()
        choice = self._choice(weights)
        found = []
        for weight in weights:
            curve = convex({share: max(lost, 0.0) for share, lost in choice.damage[weight.name].items()})
            found += [
                Move(
                    step=self._wish.name,
                    group=weight.name,
                    option=f"{share} % zeros",
                    left={weight.name: choice.how(share).left(1.0)},
                    damage=lost,
                    measured=choice.measured,
                    plan=SparsityPlan.of({weight: choice.how(share)}),
                )
                for share, lost in curve.items()
                if share
            ]
        return found

    def _found(self) -> list[StoredWeight]:
        tell_idle(self._wish.exclude, self._model, self._log)
        for skip in (*unfuse(self._model, "layers").skipped, *store_weights(self._model)):
            self._log.skip(skip.node, skip.reason)
        weights = stored_weights(self._model, self._wish.exclude, LEAST_BYTES, self._log)
        return [weight for weight in weights if self._can_be(weight)]

    def _can_be(self, weight: StoredWeight) -> bool:
        why: str | None = weight.unfit or _NO_LAYER
        if weight.layer is not None:
            why = None if self._plan is not None else self._wish.zeros.hindrance(weight.layer)
            if why:
                self._dense.append(weight)
        if why:
            self._log.skip(weight.label, why.format(weight.name))
        return not why

    @property
    def _how(self) -> Thinning:
        """How weights become sparse if nothing is chosen."""
        wish, pattern = self._wish, self._wish.zeros
        share = wish.sparsity if pattern.share is None else pattern.share
        criterion: Criterion = "magnitude" if self._data is None else "surgeon"
        if wish.criterion != "auto":
            criterion = wish.criterion
        return Thinning(share or DEFAULT_SPARSITY, pattern, criterion, wish.effort)

    def _choice(self, weights: Sequence[StoredWeight]) -> ShareChoice:
        return ShareChoice(self._model, weights, self._how, self._ctx.data, self._ctx)

    def _chosen(self, weights: Sequence[StoredWeight]) -> dict[StoredWeight, Thinning]:
        """How weights become sparse; empty if nothing is to be done."""
        how, wish = self._how, self._wish
        if self._plan is not None:
            return self._plan.choice({weight.name: weight for weight in weights}, how)
        if self._demand is not None:
            return self._as_demanded(self._demand, weights)
        if self._alike:
            return self._same(weights)
        return self._choice(weights).within(wish.sparsity or how.share) | self._others

    def _same(self, weights: Sequence[StoredWeight]) -> dict[StoredWeight, Thinning]:
        """What is asked for, for all weights."""
        return dict.fromkeys(weights, self._how) | self._others

    @property
    def _others(self) -> dict[StoredWeight, Thinning]:
        """What becomes of weights that cannot have the pattern."""
        dense = replace(self._how, share=0.0, pattern=Pattern())
        return dict.fromkeys(self._dense if self._data is not None else (), dense)

    @property
    def _alike(self) -> bool:
        """Whether all layers get the same."""
        wish = self._wish
        if wish.pattern is not None:
            return wish.sparsity is None
        return wish.shares == "same" or self._data is None

    def _as_demanded(self, demand: Demand, weights: Sequence[StoredWeight]) -> dict[StoredWeight, Thinning]:
        """The most zeros, from those asked for, that keep enough; empty if none do."""
        most = self._wish.sparsity or self._how.share
        choice = self._choice(weights)

        def make(back: int) -> _SparsifyTrial:
            alike = self._alike and not back
            fewer = choice.within(most * (1 - back / LEVELS)) | self._others
            chosen = self._same(weights) if alike else fewer
            trial = self._model.copy()
            apply(trial, chosen, self._data, self._ctx, Log())
            return _SparsifyTrial(trial, chosen)

        made = demand.least(make, LEVELS - 1)
        if made is None:
            self._log.skip(self._name, f"left as it is, however few zeros: {demand.shortfall}")
            return {}
        if demand.refused:
            self._log.skip(self._name, f"with more zeros, {demand.refused}")
        return dict(made.chosen)

    def _figures(self, chosen: Mapping[StoredWeight, Thinning]) -> SparsifyFigures:
        told, zeros, values = {}, 0, 0
        constants = {constant.name: constant for constant in self._model.constants()}
        for weight, how in chosen.items():
            found = constants[weight.name].values
            gone = int(np.count_nonzero(found == 0))
            zeros, values = zeros + gone, values + found.size
            if how.share:
                told[weight.label] = f"{percent(gone / found.size)}, {how.pattern}"
                self._log.change(weight.label, f"'{weight.name}' is sparse: {told[weight.label]}")
        return SparsifyFigures(
            weights=told,
            zeros=percent(zeros / values),
            speed=_speed(self._wish.zeros),
            fitted=None if self._data else "not at all: with calibration data, the rest makes up for zeros",
            plan=SparsityPlan.of(chosen),
        )


def _speed(pattern: Pattern) -> str:
    slow = "not on processors, whose kernels compute zeros as anything else"
    if (pattern.kept, pattern.of) == (2, 4):
        return f"TensorRT runs wide layers (from about 256 channels) faster by 2:4; {slow}"
    return f"{slow}; TensorRT takes 2:4 alone"


__all__ = ["DEFAULT_SPARSITY", "Sparsify", "SparsifyFigures", "SparsityPlan"]
