"""A pruning plan: which units of which family go. Data, to look at, keep, compare and replay."""

from __future__ import annotations

from dataclasses import field, replace
from typing import Annotated

from pydantic import AfterValidator, Field

from onnxslim.engine.plans import PassPlan, distinct, strict
from onnxslim.errors import UsageError
from onnxslim.families.analysis import Analysis, Family
from onnxslim.families.removal import Removal


def _distinct(units: tuple[int, ...]) -> tuple[int, ...]:
    distinct(map(str, units))
    return tuple(sorted(units))


_Count = Annotated[int, Field(ge=0)]


@strict
class Entry:
    """What goes of one family.

    Attributes:
        family: its name.
        size: how many units it had.
        position: its number among all families of the model.
        members: axes of constants along which its units lay, as "tensor:axis".
        removed: units that go, ascending.
    """

    family: str
    size: _Count
    position: _Count
    members: tuple[str, ...]
    removed: Annotated[tuple[_Count, ...], AfterValidator(_distinct)]


@strict
class PruningPlan(PassPlan):
    """What goes of a model. A plan fits any model with the same families: another export or precision of it.

    Attributes:
        sizes: numbers of units of all families of the model it was made for, in the order of the graph.
        entries: of the families that lose units.
    """

    sizes: tuple[_Count, ...]
    entries: tuple[Entry, ...]
    kind: str = field(default="prune", init=False)
    version: int = field(default=1, init=False)

    @classmethod
    def of(cls, removal: Removal) -> PruningPlan:
        """The plan that removes these units."""
        families = removal.analysis.families
        entries = tuple(
            Entry(family.name, family.size, position, members_of(family), tuple(removal.units[family.name]))
            for position, family in enumerate(families)
            if family.name in removal.counts
        )
        return cls(tuple(family.size for family in families), entries)

    def joined(self, other: PruningPlan) -> PruningPlan:
        """What both remove, of a model whose families they agree on."""
        return replace(self, entries=(*self.entries, *other.entries))

    def removal(self, analysis: Analysis) -> Removal:
        """What goes of an analyzed model.

        Families are found by the names of their tensors; where another exporter named them otherwise, by
        their position, if the model has as many families of the same sizes in the same order.

        Raises:
            UsageError: a family is not there, or has another size.
        """
        found = {}
        for entry in self.entries:
            family = self._match(entry, analysis)
            if family.size != entry.size or not all(0 <= unit < family.size for unit in entry.removed):
                raise UsageError(
                    f"the plan wants {entry.size} units in family '{entry.family}', which has {family.size}"
                )
            if len(entry.removed) >= family.size:
                raise UsageError(f"the plan removes all units of '{entry.family}'")
            found[family.name] = list(entry.removed)
        return Removal(analysis, found)

    def _match(self, entry: Entry, analysis: Analysis) -> Family:
        members = set(entry.members)
        for family in analysis.families:
            if members & set(members_of(family)):
                return family
        known = range(len(analysis.families))
        if self.sizes == tuple(family.size for family in analysis.families) and entry.position in known:
            return analysis.families[entry.position]
        raise UsageError(f"the model has no family like '{entry.family}' of the plan")

    def difference(self, other: PruningPlan) -> list[str]:
        """What two plans do differently, one line per family."""
        mine, theirs = ({each.family: each for each in plan.entries} for plan in (self, other))
        lines = []
        for name in dict.fromkeys([*mine, *theirs]):
            first, second = (
                set(plan[name].removed) if name in plan else set[int]() for plan in (mine, theirs)
            )
            if first != second:
                lines.append(
                    f"{name}: {len(first)} units against {len(second)}, {len(first & second)} in common"
                )
        return lines


def members_of(family: Family) -> tuple[str, ...]:
    """The axes of constants along which a family lies."""
    return tuple(f"{member.tensor}:{member.axis}" for member in family.members if member.constant)
