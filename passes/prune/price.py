"""What is left of a model costs, in the unit of a budget: multiply-accumulates, parameters or time.

Time is measured on whole models: without as much of each family as may go, and without each branch, all in
turn on the target. What each node takes is then found by least squares, so that these times come out, from a
first guess by what the nodes compute. That is what choices are made by; the model that is chosen is timed
itself (`Stopwatch`), and the budget corrected by what it really takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from scipy.optimize import nnls

from onnxslim.errors import UsageError
from onnxslim.families.branches import Branch
from onnxslim.families.costs import Costs, Counts, NodeWork
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.passes.prune.depth import Cuts, Price
from onnxslim.passes.prune.standin import Kind
from onnxslim.runtime.session import no_latency
from onnxslim.runtime.targets import Target
from onnxslim.runtime.timing import Maker, compare

Unit: TypeAlias = Literal["macs", "params", "latency"]
NAMES: Mapping[Unit, str] = {"macs": "MACs", "params": "parameters", "latency": "latency"}
# First guess of what takes time, in multiply-accumulates: an element that a node makes, and its call.
_ELEMENT, _CALL = 25.0, 5e4
# How far a node may be from the first guess, as a share of it, and how exact times are, of 1.
_DOUBT, _NOISE = 0.5, 0.01
# Models in memory at a time, turns of all, and seconds for these.
_PORTION, _TURNS, _SECONDS = 24, 40, 4.0


def counted(unit: Unit, costs: Costs, sizes: Mapping[str, tuple[int, ...]]) -> Price:
    """The price in multiply-accumulates or parameters.

    Args:
        unit: which of the two.
        costs: of the model with all its branches.
        sizes: shapes of its tensors.
    """

    def price(gone: Counts, cuts: Cuts) -> float:
        own = _outermost(cuts)
        count = costs.macs if unit == "macs" else costs.parameters
        return count(gone, _gone_with(own)) + sum(
            _stand_in(branch, kind, unit, sizes) for branch, kind in own.items()
        )

    return price


def left_of(cuts: Cuts, costs: Costs, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
    """What is left where branches go: what stands in for one is told as a share of all that goes with it.

    Args:
        cuts: the branches.
        costs: of the model with them.
        sizes: shapes of its tensors.

    Returns:
        See `Costs.shares`.
    """
    left: dict[str, float] = {}
    for branch, kind in _outermost(cuts).items():
        macs = costs.macs({}) - costs.macs({}, branch.nodes)
        params = costs.parameters({}) - costs.parameters({}, branch.constants)
        left |= dict.fromkeys(branch.nodes, _stand_in(branch, kind, "macs", sizes) / max(macs, 1))
        left |= dict.fromkeys(branch.constants, _stand_in(branch, kind, "params", sizes) / max(params, 1))
    return left


def _outermost(cuts: Cuts) -> Cuts:
    """Without those that lie in what another one cuts."""
    if len(cuts) < 2:
        return cuts
    inner = {name for branch in cuts for name in branch.nodes}
    return {branch: kind for branch, kind in cuts.items() if branch.sum not in inner}


def _gone_with(cuts: Iterable[Branch]) -> set[str]:
    return {name for branch in cuts for name in (*branch.nodes, *branch.constants)}


def _stand_in(branch: Branch, kind: Kind, unit: Unit, sizes: Mapping[str, tuple[int, ...]]) -> int:
    """What a stand-in costs."""
    shape = sizes.get(branch.sum, ())
    if kind == "nothing" or branch.axis is None or len(shape) < -branch.axis:
        return 0
    channels = shape[branch.axis]
    if unit == "macs":
        return math.prod(shape) * channels if kind == "linear" else 0
    return {"mean": channels, "affine": 2 * channels, "linear": channels * (channels + 1)}[kind]


@dataclass(frozen=True)
class Probe:
    """A model that differs from the whole by this alone."""

    make: Maker
    gone: Counts
    cuts: Cuts


class Stopwatch:
    """Times models against one of them, in turn, on one thread unless the target says otherwise.

    Args:
        first: what times are relative to.
        feeds: inputs of one run.
        target: where to run.

    Raises:
        UsageError: times say nothing about the target.
    """

    def __init__(self, first: Model, feeds: Mapping[str, Array], target: Target) -> None:
        if why := no_latency(target):
            raise UsageError(f"pass 'prune': a budget of latency needs a target with one: {why}")
        self._first, self._feeds = first, feeds
        self._target = target if target.threads else target.with_threads(1)

    def __call__(self, models: Iterable[Maker]) -> list[float]:
        """Time of each, relative to that of the first."""
        found: list[float] = []
        makers = list(models)
        for start in range(0, len(makers), _PORTION):
            part = [make() for make in makers[start : start + _PORTION]]
            _, ratios = compare(
                (self._first, *part), self._feeds, self._target, rounds=_TURNS, seconds=_SECONDS
            )
            found += ratios[1:]
        return found


def timed(
    costs: Costs, sizes: Mapping[str, tuple[int, ...]], probes: Sequence[Probe], times: Sequence[float]
) -> Price:
    """The price in time, relative to that of the model that `times` are relative to.

    Args:
        costs: of the model with all its branches.
        sizes: shapes of its tensors.
        probes: models of which times are known.
        times: theirs.
    """
    works = costs.works
    guess = np.array([each.macs + _ELEMENT * each.elements + _CALL for each in works])
    guess *= times[0] / float(guess.sum())
    rows = np.array([_left(works, probe.gone, probe.cuts) for probe in probes])
    system = np.concatenate((rows / _NOISE, np.diag(1.0 / (_DOUBT * guess))))
    wanted = np.concatenate((np.asarray(times) / _NOISE, np.full(guess.size, 1.0 / _DOUBT)))
    each_takes, _ = nnls(system, wanted)
    macs = np.array([each.macs for each in works])
    rate = float(each_takes[macs > 0].sum()) / max(int(macs.sum()), 1)

    def price(gone: Counts, cuts: Cuts) -> float:
        own = _outermost(cuts)
        stand_ins = sum(_stand_in(branch, kind, "macs", sizes) for branch, kind in own.items())
        return float(each_takes @ _left(works, gone, own)) + rate * stand_ins

    return price


def _left(works: Sequence[NodeWork], gone: Counts, cuts: Cuts) -> Array:
    """What is left of every node, of 1."""
    without = _gone_with(cuts)
    return np.array([0.0 if each.name in without else each.left(gone) for each in works])
