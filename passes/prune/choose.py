"""Which units go: an order within each family, and numbers across families."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.fidelity import Judge
from onnxslim.calibration.gram import Gram, covariances
from onnxslim.calibration.samples import SAMPLES, Samples
from onnxslim.calibration.stream import Channels
from onnxslim.engine.allocate import convex
from onnxslim.engine.base import Context, Effort, Log
from onnxslim.engine.matching import hit, names_of
from onnxslim.errors import TimeUp
from onnxslim.families.analysis import Analysis, Family
from onnxslim.families.removal import Removal
from onnxslim.ir.graph import Array, Constant
from onnxslim.ir.model import Model
from onnxslim.passes.prune.budget import Allowance
from onnxslim.passes.prune.compensate import compensate
from onnxslim.passes.prune.cut import cut
from onnxslim.passes.prune.importance import WITH_DATA, Ranking, rank
from onnxslim.passes.repair.onward import Onward
from onnxslim.shapes import cost

# Covariances of more channels than this would take gigabytes.
MAX_CHANNELS = 4096


@dataclass(frozen=True)
class Measuring:
    """How closely damage is looked at.

    Attributes:
        shares: of what may go, where it is measured.
        samples: how many of those to choose by are run.
    """

    shares: tuple[float, ...]
    samples: int


MEASURED: Mapping[Effort, Measuring] = {
    "quick": Measuring((0.5, 1.0), 8),
    "normal": Measuring((0.25, 0.5, 0.75, 1.0), SAMPLES // 2),
    "thorough": Measuring(tuple(share / 8 for share in range(1, 9)), SAMPLES),
}


@dataclass(frozen=True)
class Candidates:
    """What could go.

    Attributes:
        analysis: of the model.
        families: that may lose units, by name.
        limits: how many units each may lose.
        rankings: in which order they would go.
        grams: moments of what layers read of them; empty without data.
    """

    analysis: Analysis
    families: Mapping[str, Family]
    limits: Mapping[str, Allowance]
    rankings: Mapping[str, Ranking]
    grams: Mapping[Channels, Gram]

    def removal(self, gone: Mapping[str, int]) -> Removal:
        """Of the first so many units of each order."""
        units = {name: sorted(self.rankings[name].order[:count]) for name, count in gone.items() if count}
        return Removal(self.analysis, units)


def candidates(
    model: Model,
    analysis: Analysis,
    *,
    criterion: str,
    align: int,
    max_ratio: float,
    spared: Mapping[str, str],
    data: CalibrationData | None,
    ctx: Context,
    log: Log,
    most: Mapping[str, int] | None = None,
) -> Candidates:
    """Order the units of all families that may lose some.

    Args:
        model: the analyzed model; not modified.
        analysis: of the model.
        criterion: one of `importance.Importance` but "auto".
        align, max_ratio: options of the pass.
        spared: what is to stay whole, see `spared`.
        data: what moments are taken of; criteria that need none still use them to compensate.
        ctx, log: of the pass.
        most: if numbers are chosen already, how many units go of each family that loses any: no others are
            ordered.
    """
    open_ = [family for family in analysis.families if most is None or most.get(family.name)]
    families = {family.name: family for family in open_ if not _left_alone(family, spared, log)}
    limits = {name: Allowance.of(family, align, max_ratio) for name, family in families.items()}
    for name, limit in limits.items():
        if len(limit.allowed) == 1:
            family = families[name]
            log.skip(name, f"{family.size} units of {family.width} channels leave no multiple of {align}")
    families = {name: family for name, family in families.items() if len(limits[name].allowed) > 1}
    grams = _grams(model, families.values(), data, ctx, log)
    if data is not None:
        families = {name: each for name, each in families.items() if not _unseen(each, grams, log)}
    constants = values_of(model)
    rankings = {
        name: rank(family, constants, grams, criterion, (most or {}).get(name))
        for name, family in families.items()
    }
    return Candidates(analysis, families, {name: limits[name] for name in families}, rankings, grams)


def _left_alone(family: Family, spared: Mapping[str, str], log: Log) -> bool:
    glob = next((spared[member.tensor] for member in family.members if member.tensor in spared), None)
    if glob is not None:
        log.skip(family.name, f"excluded by '{glob}'")
    return glob is not None


def spared(model: Model, exclude: Sequence[str]) -> dict[str, str]:
    """Tensors that are to stay whole, with the globs that mean them.

    A node that is meant itself, and not by one of its tensors, keeps the channels of all it reads and makes.
    """
    found: dict[str, str] = {}
    for node in model.graph.nodes if exclude else ():
        tensors = [tensor.name for tensor in (*node.inputs, *node.outputs)]
        whole = hit(exclude, *names_of(node))
        for name in tensors:
            glob = whole or hit(exclude, name)
            if glob is not None:
                found.setdefault(name, glob)
    return found


def values_of(model: Model) -> dict[str, Array]:
    """Values of the constants that nodes of the main graph read, by name."""
    return {
        tensor.name: tensor.values
        for node in model.graph.nodes
        for tensor in node.inputs
        if isinstance(tensor, Constant)
    }


def _grams(
    model: Model, families: Iterable[Family], data: CalibrationData | None, ctx: Context, log: Log
) -> dict[Channels, Gram]:
    if data is None:
        return {}
    axes: dict[Channels, None] = {}
    for consumer in (each for family in families for each in family.consumers):
        key = consumer.data.tensor, consumer.data.axis
        if consumer.data.constant or key in axes:
            continue
        if consumer.data.units.size > MAX_CHANNELS:
            log.skip(consumer.node, f"covariances of {consumer.data.units.size} channels are not taken")
        else:
            axes[key] = None
    if not axes:
        return {}
    return covariances(model, data, list(axes), target=ctx.target, progress=ctx.progress)


def _unseen(family: Family, grams: Mapping[Channels, Gram], log: Log) -> bool:
    """Whether the data tell nothing of a family: all that layers read of it is empty, as a cache at first.

    Nothing would be lost on such data whatever went.
    """
    read = [each.data for each in family.consumers if not each.data.constant]
    small = [each for each in read if each.units.size <= MAX_CHANNELS]
    if not small or len(small) < len(read) or any((each.tensor, each.axis) in grams for each in small):
        return False
    log.skip(
        family.name, f"'{small[0].tensor}' is empty in all of the calibration data, so nothing of it is cut"
    )
    return True


def damages(
    model: Model,
    found: Candidates,
    data: CalibrationData | None,
    ctx: Context,
    log: Log,
    effort: Effort = "normal",
) -> dict[str, dict[int, float]]:
    """For each family the damage of every number of units that may go, as a convex curve.

    With data it is measured: the family alone is cut, the rest of it compensates, and the outputs are
    compared on a few samples, which should be others than those the moments were taken of. Without, it is
    what the criterion says.
    """
    measuring = MEASURED[effort]
    judge = Judge(model, data, ctx.target, measuring.samples) if data is not None else None
    onward = Onward.of(model, _macs(model, data), ctx.target) if data is not None else None
    curves = dict[str, dict[int, float]]()
    for index, name in enumerate(found.families):
        allowed = found.limits[name].allowed
        if judge is None:
            points = {count: found.rankings[name].damage[count] for count in allowed}
        else:
            points = _measured(model, found, name, judge, onward, measuring)
        curves[name] = convex(points)
        try:
            if ctx.progress:
                ctx.progress("measuring", index + 1, len(found.families))
        except TimeUp as error:
            for missed in [each for each in found.families if each not in curves]:
                log.skip(missed, f"left whole, as it was not measured what it does: {error}")
            break
    return curves


def _macs(model: Model, data: CalibrationData) -> dict[str, int]:
    """Multiply-accumulates of nodes on the first batch, by label."""
    feeds: Mapping[str, Array] = next(iter(data), {})
    return cost.by_label(model, {name: array.shape for name, array in feeds.items()})


def _measured(
    model: Model, found: Candidates, name: str, judge: Judge, onward: Onward | None, measuring: Measuring
) -> dict[int, float]:
    """What some numbers of units of a family do to the outputs, and in between."""
    allowed = found.limits[name].allowed
    places = sorted({allowed[round(share * (len(allowed) - 1))] for share in (0.0, *measuring.shares)})

    def error(trial: Model) -> float:
        if onward is None or judge.is_wary:
            return judge(trial).error
        return onward.judged(judge, trial, measuring.samples).error

    errors = [0.0, *(error(_trial(model, found, {name: count})) for count in places[1:])]
    curve = np.interp(allowed, places, np.maximum.accumulate(np.minimum(errors, 1e6)))
    return dict(zip(allowed, curve.tolist(), strict=True))


def _trial(model: Model, found: Candidates, gone: Mapping[str, int]) -> Model:
    trial = model.copy()
    removal = found.removal(gone)
    compensate(trial, removal, found.grams)
    cut(trial, removal)
    return trial


def criterion_of(importance: str, data: Samples | None, log: Log, model: Model) -> str:
    """The criterion that a choice of importance stands for."""
    if importance == "auto":
        return "obs" if data is not None else "l2"
    if importance in WITH_DATA and data is None:
        log.skip(model.graph.name or "model", f"importance '{importance}' needs calibration data: l2 is used")
        return "l2"
    return importance
