"""What passes could do to a model, as moves that can be compared and chosen together.

A pass that proposes (`Pass.propose`) tells what it has found before it decides: what could be done to which
family or layer, what that would save, and what it would cost the outputs. Moves of several passes compete for
one budget (`chosen`); a pass makes those that win by a plan of them (`Move.plan`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from onnxslim.engine.allocate import Picks, Refunding, allocate
from onnxslim.engine.plans import PassPlan
from onnxslim.errors import UsageError
from onnxslim.ir.model import Model
from onnxslim.shapes import cost

BudgetUnit: TypeAlias = Literal["macs", "bytes"]


@dataclass(frozen=True)
class Move:
    """Something a pass could do to one thing of a model.

    Attributes:
        step: name of the pass.
        group: what it is done to, a family or a layer; of the moves of one group, one is made or none.
        option: what is done, for people.
        left: by names of tensors, the share that is left of what the node which makes it has to compute, or
            of the bytes of a constant.
        damage: what that costs.
        measured: whether damage is the error of the outputs relative to their variance, on samples held out;
            else it is what the criterion of the pass says without data, and compares with its own moves only.
        plan: makes this move and no other.
        seconds: saved in one run, where that was measured.
        gone: names of tensors that are not there any more; moves of nothing but these mean nothing then.
    """

    step: str
    group: str
    option: str
    left: Mapping[str, float]
    damage: float
    measured: bool
    plan: PassPlan
    seconds: float | None = None
    gone: frozenset[str] = frozenset()

    def voids(self, other: Move) -> bool:
        """Whether all that another one changes is gone with this one."""
        return bool(self.gone) and other is not self and other.left.keys() <= self.gone


@dataclass(frozen=True)
class Load:
    """What a model has to compute and to store.

    Attributes:
        macs: multiply-accumulates of one run, by the name of the first tensor that a node makes.
        bytes: of constants, by name.
    """

    macs: Mapping[str, int]
    bytes: Mapping[str, int]

    @classmethod
    def of(cls, model: Model, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Load:
        """The load of a model; of nodes whose shapes are not determined nothing is known.

        Args:
            model: not modified.
            shapes: of its inputs; where there are none, a free axis counts as 1.
        """
        counts = zip(model.graph.nodes, cost.by_node(model, shapes), strict=True)
        return cls(
            {node.outputs[0].name: count for node, count in counts if count},
            {constant.name: constant.nbytes for constant in model.constants()},
        )

    def total(self, unit: BudgetUnit, moves: Iterable[Move] = ()) -> float:
        """What is left with these moves; what several leave of one layer multiplies."""
        whole = self.macs if unit == "macs" else self.bytes
        left: dict[str, float] = dict(whole)
        for move in moves:
            for name in left.keys() & move.left.keys():
                left[name] *= move.left[name]
        return math.fsum(left.values())

    def saved(self, unit: BudgetUnit, move: Move) -> float:
        """What one move saves by itself."""
        return self.total(unit) - self.total(unit, (move,))


def chosen(moves: Sequence[Move], load: Load, unit: BudgetUnit, budget: float) -> list[Move]:
    """The moves that keep a model to a budget, or come nearest to it, with the least damage.

    Args:
        moves: of any passes; in each group in the order in which they are conceded, damage convex.
        load: of the model that they were proposed for.
        unit, budget: what may be left.

    Returns:
        In the order given, so that the moves of a pass make its plan.

    Raises:
        UsageError: moves of several passes of which some are not measured.
    """
    unmeasured = sorted({move.step for move in moves if not move.measured})
    if unmeasured and len({move.step for move in moves}) > 1:
        raise UsageError(
            f"moves of pass '{unmeasured[0]}' are not measured, and compare with no others: give it data"
        )
    groups: dict[str, list[Move]] = {}
    for move in moves:
        groups.setdefault(f"{move.step} {move.group}", []).append(move)
    damage = {key: dict(enumerate([0.0, *(move.damage for move in rungs)])) for key, rungs in groups.items()}

    def picked(picks: Picks) -> list[Move]:
        return [groups[key][pick - 1] for key, pick in picks.items() if pick]

    refunds = {
        key: {
            pick: [name for name, others in groups.items() if name != key and all(map(move.voids, others))]
            for pick, move in enumerate(rungs, 1)
            if move.gone
        }
        for key, rungs in groups.items()
    }
    choices = Refunding(damage, lambda picks: load.total(unit, picked(picks)), refunds)
    made = picked(allocate(choices, budget, dict.fromkeys(damage, 0)))
    taken = {id(move) for move in made if not any(other.voids(move) for other in made)}
    return [move for move in moves if id(move) in taken]
