"""In which order the units of a family are given up, and what that costs the layers that read them.

Criteria on the weights alone: "l1" and "l2" (norms of all slices of a unit, each tensor scaled to mean
one), "fpgm" (distance to the other units, He et al. 2019), "lamp" (square over all that are at least as
large, Lee et al. 2021). Criteria on what flows through: "energy" (mean square of a channel times the
squared norm of the weights that read it, after Sun et al. 2023), "thinet" (greedy, by what the reading
layers lose if weights stay, Luo et al. 2017) and "obs" (optimal brain surgeon: greedy, by what they lose if
the remaining channels make up for it as well as they linearly can, after Hassibi and Stork 1993).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxslim.calibration.gram import Gram
from onnxslim.calibration.stream import Channels
from onnxslim.families.analysis import Consumer, Family
from onnxslim.ir.graph import Array

Doubles: TypeAlias = NDArray[np.float64]
Importance: TypeAlias = Literal["auto", "l1", "l2", "fpgm", "lamp", "energy", "thinet", "obs"]
WITH_DATA = ("energy", "thinet", "obs")
# Ridge for inverting covariances, relative to the mean variance of a channel.
DAMPING = 1e-3
# A round of the greedy elimination removes the square of what is left over this many units, at least one:
# one by one below 256, five percent at a time above 1536, where a round moves the most data.
AT_ONCE = 2**15


@dataclass(frozen=True)
class Ranking:
    """Units in the order in which they go.

    Attributes:
        order: units, the first to go first.
        damage: with the first n of them gone, the loss by the criterion, from 0 for none to about 1 for all;
            n from 0 to the size of the family.
    """

    order: tuple[int, ...]
    damage: tuple[float, ...]


def rank(
    family: Family,
    constants: Mapping[str, Array],
    grams: Mapping[Channels, Gram],
    criterion: str,
    most: int | None = None,
) -> Ranking:
    """Order the units of a family.

    Args:
        family: whose units.
        constants: values by name.
        grams: moments of the data each consumer reads; a family with none is ranked by "l2".
        criterion: see above.
        most: how many units of it may go, at the most; all by default. Of more, nothing need be told.
    """
    sources = [_source(each, family.size, constants, grams) for each in family.consumers]
    known = [source for source in sources if source is not None]
    if criterion == "obs" and known:
        return _obs(known, family.size, family.size if most is None else most)
    if criterion in WITH_DATA and known:
        return _GREEDY[criterion](known, family.size)
    scores = _weight_scores(family, constants, criterion)
    order = np.argsort(scores, kind="stable")
    total = scores.sum() or 1.0
    return Ranking(tuple(order.tolist()), (0.0, *np.cumsum(scores[order] / total).tolist()))


@dataclass(frozen=True)
class _Source:
    """What a consumer reads of the units: one row per channel.

    Attributes:
        data: the tensor and its axis.
        units: the unit of each channel.
        gram: second moments of the channels, around zero: no bias is adjusted here.
        weight: W W^T, how alike the weights are that read two channels.
    """

    data: Channels
    units: NDArray[np.int64]
    gram: Doubles
    weight: Doubles

    @property
    def total(self) -> float:
        """Mean square of what the consumer makes of its data."""
        return float(np.sum(self.gram * self.weight)) or 1.0


def _source(
    consumer: Consumer, size: int, constants: Mapping[str, Array], grams: Mapping[Channels, Gram]
) -> _Source | None:
    channels = (consumer.data.tensor, consumer.data.axis)
    gram = grams.get(channels)
    if gram is None or consumer.weight.tensor not in constants:
        return None
    weight = np.moveaxis(constants[consumer.weight.tensor], consumer.weight.axis, 0)
    rows = weight.reshape(weight.shape[0], -1).astype(np.float64)
    return _Source(channels, consumer.data.units, gram.raw().gram[0], rows @ rows.T)


def _weight_scores(family: Family, constants: Mapping[str, Array], criterion: str) -> Doubles:
    scores = np.zeros(family.size)
    for member in family.members:
        if not member.constant or constants[member.tensor].dtype.kind not in "fV":
            continue
        slices = np.moveaxis(constants[member.tensor], member.axis, 0).astype(np.float64)
        rows = slices.reshape(slices.shape[0], -1)[member.units >= 0]
        units = member.units[member.units >= 0]
        each = np.bincount(units, _row_scores(rows, criterion), family.size)
        scores += each / (each.mean() or 1.0)
    return _lamp(scores) if criterion == "lamp" else scores


def _row_scores(rows: Doubles, criterion: str) -> Doubles:
    if criterion == "l1":
        return np.asarray(np.abs(rows).sum(axis=1))
    if criterion == "fpgm":
        squares = np.square(rows).sum(axis=1)
        distances = squares[:, None] + squares[None] - 2 * rows @ rows.T
        return np.asarray(np.sqrt(np.maximum(distances, 0.0)).sum(axis=1))
    return np.asarray(np.square(rows).sum(axis=1))


def _lamp(squares: Doubles) -> Doubles:
    order = np.argsort(squares, kind="stable")
    tail = np.cumsum(squares[order][::-1])[::-1]
    scores = np.empty_like(squares)
    scores[order] = squares[order] / np.maximum(tail, 1e-300)
    return scores


def _energy(sources: Sequence[_Source], size: int) -> Ranking:
    scores = np.zeros(size)
    for source in sources:
        inside = source.units >= 0
        each = np.diag(source.gram) * np.diag(source.weight)
        scores += np.bincount(source.units[inside], each[inside], size) / (each.sum() or 1.0)
    order = np.argsort(scores, kind="stable")
    total = scores.sum() or 1.0
    return Ranking(tuple(order.tolist()), (0.0, *np.cumsum(scores[order] / total).tolist()))


def _thinet(sources: Sequence[_Source], size: int) -> Ranking:
    """What goes with a set S is the sum of G * W over S x S; add the unit that makes it least."""
    joint = np.zeros((size, size))
    for source in sources:
        inside = source.units >= 0
        units, both = source.units[inside], (source.gram * source.weight)[np.ix_(inside, inside)]
        np.add.at(joint, (units[:, None], units[None]), both / source.total)
    left, cross = np.ones(size, bool), np.zeros(size)
    order: list[int] = []
    damage = [0.0]
    for _ in range(size):
        grows = np.where(left, np.diag(joint) + 2 * cross, np.inf)
        unit = int(np.argmin(grows))
        order.append(unit)
        damage.append(damage[-1] + float(grows[unit]))
        left[unit] = False
        cross += joint[unit]
    return Ranking(tuple(order), tuple(np.maximum.accumulate(damage).tolist()))


def _obs(sources: Sequence[_Source], size: int, most: int) -> Ranking:
    """Remove, one by one, the unit that the others predict best where it counts.

    With H = G + damping, the part of channels P that the remaining ones cannot express has covariance
    ((H^-1)_PP)^-1; weighted by the weights that read P, this is what the consumer loses. The inverse is then
    taken down to the remaining channels by block elimination. In large families a round removes several of
    the units that came out lowest; among those, the order is that of removing one by one.
    """
    states = [_Elimination.of(source) for source in _merged(sources)]
    left = np.ones(size, bool)
    order: list[int] = []
    damage = [0.0]
    while len(order) < most:
        count = max(1, int(left.sum()) ** 2 // AT_ONCE)
        losses = np.where(left, sum(state.losses(size) for state in states), np.inf)
        if count == 1:
            chosen = [int(np.argmin(losses))]
            lost = [float(losses[chosen[0]])]
        else:
            near = np.argsort(losses, kind="stable")[: 4 * count]
            chosen, lost = _one_by_one([state.part(near) for state in states], near[left[near]], count, size)
        order += chosen
        damage += (damage[-1] + np.cumsum(lost)).tolist()
        left[chosen] = False
        for state in states:
            state.remove(chosen)
    return Ranking(tuple(order), tuple(damage))


def _merged(sources: Sequence[_Source]) -> list[_Source]:
    """Consumers of one tensor as a single one: they share the moments, and losses are linear in W W^T."""
    merged: dict[Channels, _Source] = {}
    for source in sources:
        weight = source.weight / source.total
        known = merged.get(source.data)
        merged[source.data] = replace(source, weight=weight if known is None else known.weight + weight)
    return list(merged.values())


def _one_by_one(
    states: Sequence[_Elimination], units: NDArray[np.intp], count: int, size: int
) -> tuple[list[int], list[float]]:
    """The first `count` of these units to go, and what each of them costs when the ones before are gone."""
    left = np.zeros(size, bool)
    left[units] = True
    chosen: list[int] = []
    lost: list[float] = []
    while len(chosen) < count and left.any():
        losses = np.where(left, sum(state.losses(size) for state in states), np.inf)
        unit = int(np.argmin(losses))
        chosen.append(unit)
        lost.append(float(losses[unit]))
        left[unit] = False
        for state in states:
            state.remove([unit])
    return chosen, lost


class _Elimination:
    """The inverse moments of the channels that are left, and how the weights of those that went live on.

    Rows and columns of channels that went say nothing; once there are many, they are taken out.
    """

    def __init__(self, units: NDArray[np.int64], inverse: Doubles, weight: Doubles) -> None:
        self._units = units
        self._inverse = inverse
        self._weight = weight
        self._gone = 0

    @classmethod
    def of(cls, source: _Source) -> _Elimination:
        """All channels of a consumer."""
        scale = float(np.mean(np.diag(source.gram))) or 1.0
        gram = source.gram + DAMPING * scale * np.eye(len(source.gram))
        return cls(source.units.copy(), np.asarray(np.linalg.inv(gram), np.float64), np.array(source.weight))

    def part(self, units: NDArray[np.intp]) -> _Elimination:
        """A copy of what concerns some units; eliminating any of them does not need the others."""
        at = np.flatnonzero(np.isin(self._units, units))
        return _Elimination(self._units[at], self._inverse[np.ix_(at, at)], self._weight[np.ix_(at, at)])

    def losses(self, size: int) -> Doubles:
        """Share of what the consumer makes that would go with each unit."""
        inside = np.flatnonzero(self._units >= 0)
        counts = np.bincount(self._units[inside], minlength=size)
        if counts.max(initial=0) <= 1:
            diagonal = np.maximum(self._inverse[inside, inside], 1e-300)
            each = self._weight[inside, inside] / diagonal
            return np.asarray(np.bincount(self._units[inside], each, size), np.float64)
        found = np.zeros(size)
        channels = inside[np.argsort(self._units[inside], kind="stable")]
        for count in np.unique(counts[counts > 0]):  # those of as many channels at once
            units = np.flatnonzero(counts == count)
            at = channels[np.isin(self._units[channels], units)].reshape(-1, count)
            blocks = at[:, :, None], at[:, None, :]
            residual = np.linalg.pinv(self._inverse[blocks], hermitian=True)
            found[units] = (residual * self._weight[blocks]).sum(axis=(1, 2))
        return found

    def remove(self, units: Sequence[int]) -> None:
        """Let the remaining channels take over as well as they can.

        Weights change by -moved times the weights of the block, and so does their product W W^T.
        """
        gone = np.flatnonzero(self._units == units[0] if len(units) == 1 else np.isin(self._units, units))
        if not gone.size:
            return
        columns = self._inverse[:, gone]
        moved = columns @ _inverted(columns[gone])
        rows = self._weight[gone]
        change = moved @ (0.5 * rows[:, gone] @ moved.T - rows)
        self._inverse -= moved @ columns.T
        self._weight += change
        self._weight += change.T
        self._units[gone] = _GONE
        self._gone += gone.size
        if 4 * self._gone > len(self._units):
            at, self._gone = np.flatnonzero(self._units != _GONE), 0
            self._inverse, self._weight = (each[np.ix_(at, at)] for each in (self._inverse, self._weight))
            self._units = self._units[at]


# Of a channel that no unit has any more; those that never went with any have -1.
_GONE = -2


def _inverted(block: Doubles) -> Doubles:
    """The pseudo-inverse of a covariance."""
    if block.size == 1:
        return np.divide(1.0, block, out=np.zeros_like(block), where=block != 0)
    return np.asarray(np.linalg.pinv(block, hermitian=True))


_GREEDY = {"energy": _energy, "thinet": _thinet}
