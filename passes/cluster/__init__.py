"""Parameter sharing: weights as codes of a few bits into tables of values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from onnxslim.calibration.samples import Samples
from onnxslim.engine.base import Changes, Context, Effort, Figures, Log, PassWork, captioned, options
from onnxslim.engine.demands import LEVELS, Demand, LeastSqnr, MostDrop
from onnxslim.engine.matching import GLOBS, tell_idle
from onnxslim.engine.moves import Move
from onnxslim.engine.plans import PlanOf
from onnxslim.errors import UsageError
from onnxslim.formats import size
from onnxslim.ir.download import deflated, download
from onnxslim.ir.model import Model
from onnxslim.passes.cluster.apply import apply
from onnxslim.passes.cluster.choose import BitChoice, PriceChoice
from onnxslim.passes.cluster.fit import Clustering
from onnxslim.passes.cluster.plan import ClusteringPlan
from onnxslim.passes.cluster.weights import WIDTHS, Weight, find
from onnxslim.passes.codes.tables import MOST_BITS, Codebook
from onnxslim.passes.distill.behind import Learning, StepsBehind
from onnxslim.passes.fold.weights import store_weights
from onnxslim.passes.unfuse import unfuse

# What codes have if nothing is said.
DEFAULT_BITS = 4
# How often a size is tried until what is left of it once deflated is what was wanted, and how exactly.
DOWNLOAD_ROUNDS: Mapping[Effort, int] = {"quick": 2, "normal": 5, "thorough": 8}
DOWNLOAD_MET = 0.98
# Bits of a value, once it is deflated, below which nothing sensible is left.
LEAST_RATE = 0.5


@dataclass(frozen=True)
class ClusterFigures(Figures):
    """What clustering has to tell of a model.

    Attributes:
        weights: by the node that reads them, the codes of each weight that has some.
        bits: of a code, on average over all weights that are codes.
        codes, tables: bytes that these take.
        fitted: to what they were fitted, if not to data.
        plan: what was chosen, to keep and to replay.
    """

    weights: Mapping[str, str] | None = captioned("codes")
    bits: float | None = captioned("bits of a code, on average")
    codes: str | None = captioned("all codes")
    tables: str | None = captioned("all tables, and factors of output channels")
    fitted: str | None = captioned("fitted")
    plan: ClusteringPlan | None = None


@options
class Cluster(Learning):
    """Store weights as codes of 1 to 8 bits into tables of values, looked up when the model is loaded.

    The file and the download become smaller, as there is no kernel for fewer bits to need: operators are
    standard ones, the runtime folds them as it loads the model, and it runs as fast, and in as much memory,
    as before. With calibration data, codes and tables are fitted to what each layer computes on them, one
    layer after the other; without, to the weights, which costs much more accuracy below 6 bits.

    Every weight gets `bits`; or those that cost the outputs least, so that the file has `size` of its bytes.
    With `download`, codes are chosen for their error and for the bits that they take once the file is
    deflated, so that this share of the download is left: bytes of even steps, which need no table, or codes
    of few bits, whichever loses less for what is sent; the file itself may be larger than with `size`.
    Where the outputs lose more than `require_sqnr` or `max_drop` allows, weights get more bits, those first
    that lose most.
    """

    name: ClassVar[str] = "cluster"
    beside_plan: ClassVar[tuple[str, ...]] = ("fitted", "effort", "distill")

    bits: int | None = Field(
        None, ge=1, le=MOST_BITS, description=f"bits of every code [default: {DEFAULT_BITS}]"
    )
    group: int = Field(
        0, ge=0, description="output channels that share a table; 0: one table for all of a weight"
    )
    scaled: bool | None = Field(
        None, description="a factor for each output channel besides [default: of depthwise convolutions]"
    )
    size: float | None = Field(
        None, gt=0, lt=1, description="share of the bytes of the file to keep; chooses bits for each weight"
    )
    download: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="the same of the bytes that are left once the file is deflated, as it is when it is sent",
    )
    fitted: bool = Field(True, description="fit codes and tables to the calibration data, if there are any")
    exclude: tuple[str, ...] = Field((), description=f"{GLOBS} to leave as they are")
    effort: Effort = Field(
        "normal", description="how often codes and tables are fitted in turn, and samples to measure on"
    )
    distill: StepsBehind = None
    require_sqnr: LeastSqnr = None
    max_drop: MostDrop = None
    plan: Annotated[Path | ClusteringPlan | None, PlanOf(ClusteringPlan)] = Field(
        None, description="file of a plan to replay, instead of choosing"
    )

    def __post_init__(self) -> None:
        """Refuse two ways to choose bits, and a choice beside a plan."""
        if self.plan is not None:
            self.require_alone()
        given = [name for name in ("bits", "size", "download") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError(
                f"pass 'cluster' takes one of bits, size and download, not {' and '.join(given)}"
            )
        if self.download is not None and (self.require_sqnr is not None or self.max_drop is not None):
            raise UsageError(
                "pass 'cluster': require_sqnr and max_drop find the smallest file, so download says nothing"
            )

    @property
    def work(self) -> PassWork:
        """See `Pass.work`."""
        return PassWork(0.5, 1e-2, 5.0, 2e-6)

    def run(self, model: Model, ctx: Context) -> Changes:
        """Store weights as codes, in place.

        Raises:
            CalibrationError: the calibration data does not fit the model.
            UsageError: the plan cannot be read, or does not fit the model.
        """
        return _ClusterRun(self, model, ctx)()

    def propose(self, model: Model, ctx: Context) -> Sequence[Move]:
        """Of every weight, codes of 8 bits down to 1."""
        return _ClusterRun(self, model.copy(), ctx).moves()


@dataclass(frozen=True)
class _ClusterTrial:
    """A model with weights as codes."""

    model: Model
    chosen: Mapping[Weight, Clustering]


class _ClusterRun:
    """One run of the pass.

    Args:
        wish: its options.
        model: edited in place.
        ctx: see `Context`.
    """

    def __init__(self, wish: Cluster, model: Model, ctx: Context) -> None:
        self._wish, self._model, self._ctx = wish, model, ctx
        self._plan = None if wish.plan is None else ClusteringPlan.given(wish.plan)
        self._log = Log()
        self._name = model.graph.name or "model"
        self._demand = wish.demand(model, ctx)
        # What is held to something must not have been fitted to what it is judged by.
        given = ctx.given.apart if self._demand else ctx.data
        self._data = given if wish.fitted else None

    def __call__(self) -> Changes:
        """Find, choose, fit, write."""
        weights = self._found()
        if not weights:
            self._log.skip(self._name, "it has no weights that would be smaller as codes")
            return self._log.done()
        chosen = self._chosen(weights)
        if not chosen:
            return self._log.done()
        data = self._ctx.data if self._wish.fitted else None
        books = apply(self._model, chosen, data, self._ctx, self._log)
        return self._log.done(self._figures(chosen, books, data))

    def moves(self) -> list[Move]:
        """What could be done to which weight; see `Pass.propose`."""
        weights = self._found()
        choice = self._choice(weights)
        return [
            Move(
                step=self._wish.name,
                group=weight.name,
                option=f"{bits} bits",
                left={weight.name: weight.nbytes(choice.how(weight, bits)) / weight.constant.nbytes},
                damage=choice.damage[weight.name][bits],
                measured=choice.measured,
                plan=ClusteringPlan.of({weight: choice.how(weight, bits)}),
            )
            for weight in weights
            for bits in reversed(WIDTHS)
            if weight.saves(choice.how(weight, bits))
        ]

    def _found(self) -> list[Weight]:
        tell_idle(self._wish.exclude, self._model, self._log)
        for skip in (*unfuse(self._model, "layers").skipped, *store_weights(self._model)):
            self._log.skip(skip.node, skip.reason)
        return find(self._model, self._wish.exclude, self._log)

    @property
    def _how(self) -> Clustering:
        """How weights are stored if nothing is chosen."""
        wish = self._wish
        return Clustering(wish.bits or DEFAULT_BITS, wish.group, wish.scaled, effort=wish.effort)

    def _choice(self, weights: Sequence[Weight]) -> BitChoice:
        return BitChoice(self._model, weights, self._how, self._ctx.data, self._ctx)

    def _chosen(self, weights: Sequence[Weight]) -> dict[Weight, Clustering]:
        """How weights are stored; empty if nothing is to be done."""
        if self._plan is not None:
            return self._plan.choice({weight.name: weight for weight in weights}, self._wish.effort)
        if self._demand is not None:
            return self._as_demanded(self._demand, weights)
        if self._wish.download is not None:
            return self._sent(self._wish.download, weights)
        if self._wish.size is None:
            return self._alike(weights)
        choice, budget = self._choice(weights), self._wish.size * self._model.stats().bytes
        chosen = choice.within(budget)
        if choice.nbytes(chosen) > budget:
            least = f"{choice.nbytes(chosen) / self._model.stats().bytes:.1%} of its bytes"
            self._log.skip(self._name, f"with one bit for every weight there is {least} left")
        return chosen

    def _sent(self, share: float, weights: Sequence[Weight]) -> dict[Weight, Clustering]:
        """Codes for error and bits at a price that leaves so much of the download."""
        whole = download(self._model).deflate
        goal, data = share * whole, self._ctx.data if self._wish.fitted else None
        larger = [each for each in weights if each.saves(each.stored(Clustering(MOST_BITS, price=1.0)))]
        choice = PriceChoice(self._model, larger, self._choice(larger), data, self._ctx)
        codes = goal - whole + deflated(weight.constant.values.tobytes() for weight in larger)
        fewest = LEAST_RATE / 8 * sum(weight.constant.size for weight in larger)
        best, least, most = dict[Weight, Clustering](), dict[Weight, Clustering](), 0
        known: dict[
            bool, tuple[float, int]
        ] = {}  # by whether it is few enough: codes, and what is sent with them
        for _ in range(DOWNLOAD_ROUNDS[self._wish.effort]):
            codes = max(codes, fewest)
            least, trial = choice.within(codes), self._model.copy()
            apply(trial, least, data, self._ctx, Log())
            sent = download(trial).deflate
            met = sent <= goal
            if met and sent > most:
                best, most = least, sent
            if DOWNLOAD_MET * goal <= sent <= goal or (codes == fewest and not met):
                break
            known[met] = codes, sent
            codes += (DOWNLOAD_MET + 1.0) / 2.0 * goal - sent
            if len(known) > 1:  # in between, as other tables take other sizes
                (few, little), (many, much) = known[True], known[False]
                codes = few + (many - few) * min(max((goal - little) / (much - little), 0.2), 0.8)
        if not best:
            self._log.skip(self._name, f"with {size(sent)} it is above {size(int(goal))} once it is deflated")
        return best or least

    def _alike(self, weights: Sequence[Weight]) -> dict[Weight, Clustering]:
        """The same bits for all that get smaller by it."""
        chosen = {}
        for weight in weights:
            how = weight.stored(self._how)
            if weight.saves(how):
                chosen[weight] = how
            else:
                as_codes, now = size(weight.nbytes(how)), size(weight.constant.nbytes)
                self._log.skip(weight.label, f"'{weight.name}' takes {now}, and {as_codes} as codes")
        return chosen

    def _as_demanded(self, demand: Demand, weights: Sequence[Weight]) -> dict[Weight, Clustering]:
        """The fewest bytes, from those asked for, that keep enough; empty if nothing does."""
        choice = self._choice(weights)
        least = choice.bytes_at(self._wish.bits or 1)
        if self._wish.size is not None:
            least = self._wish.size * self._model.stats().bytes
        most = choice.bytes_at(MOST_BITS)

        def make(back: int) -> _ClusterTrial:
            alike = self._wish.bits is not None and not back
            # In equal factors: the first bits count most.
            budget = least * (most / least) ** (back / LEVELS)
            chosen = self._alike(weights) if alike else choice.within(budget)
            trial = self._model.copy()
            apply(trial, chosen, self._data, self._ctx, Log())
            return _ClusterTrial(trial, chosen)

        made = demand.least(make, LEVELS)
        if made is None:
            why = f"left as it is, even with codes of {MOST_BITS} bits: {demand.shortfall}"
            self._log.skip(self._name, why)
            return {}
        if demand.refused:
            self._log.skip(self._name, f"with fewer bits, {demand.refused}")
        return dict(made.chosen)

    def _figures(
        self, chosen: Mapping[Weight, Clustering], books: Mapping[str, Codebook], data: Samples | None
    ) -> ClusterFigures:
        told, values, codes, tables = {}, 0, 0, 0
        for weight in chosen:
            book = books[weight.name]
            count = len(book.tables)
            tabled = "even steps" if book.even else f"{count} table{'s' if count > 1 else ''}"
            told[weight.label] = f"{book.bits} bits, {tabled}"
            self._log.change(weight.label, f"'{weight.name}' as codes: {told[weight.label]}")
            values += book.codes.size
            codes += book.codes.size * book.bits
            tables += 0 if book.even else book.tables.nbytes
            tables += 0 if book.scales is None else book.scales.nbytes
        return ClusterFigures(
            weights=told,
            bits=round(codes / values, 2),
            codes=size(codes // 8),
            tables=size(tables),
            fitted=None if data else "to the weights: with calibration data, codes lose much less",
            plan=ClusteringPlan.of(chosen),
        )


__all__ = ["DEFAULT_BITS", "Cluster", "ClusterFigures"]
