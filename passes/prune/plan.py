"""A pruning plan: which units of which family go. Data, to look at, keep, compare and replay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from onnxslim.engine.plans import PassPlan, distinct, strict
from onnxslim.errors import UsageError
from onnxslim.families.analysis import Analysis, Family
from onnxslim.families.branches import Branch
from onnxslim.families.removal import Removal
from onnxslim.passes.prune.standin import Kind


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
class BranchEntry:
    """A branch that goes.

    Attributes:
        sum: what the sum makes that it flowed into.
        end: what it made itself.
        stand_in: what stands in for it.
        position: its number among all branches of the model.
        total: how many of these there were.
    """

    sum: str
    end: str
    stand_in: Kind
    position: _Count
    total: _Count


def _once(branches: tuple[BranchEntry, ...]) -> tuple[BranchEntry, ...]:
    distinct(each.sum for each in branches)
    return branches


@strict
class PruningPlan(PassPlan):
    """What goes of a model. A plan fits any model with the same families: another export or precision of it.

    Attributes:
        sizes: numbers of units of all families of the model it was made for, in the order of the graph;
            without the branches, if any go.
        entries: of the families that lose units.
        branches: that go before any units do; a file of none does not have the key.
    """

    sizes: tuple[_Count, ...]
    entries: tuple[Entry, ...]
    branches: Annotated[tuple[BranchEntry, ...], AfterValidator(_once)] = ()
    kind: str = field(default="prune", init=False)
    version: int = field(default=1, init=False)

    def to_dict(self) -> dict[str, Any]:
        """See `PassPlan`."""
        found = super().to_dict()
        return found if self.branches else {key: each for key, each in found.items() if key != "branches"}

    @classmethod
    def of(
        cls,
        removal: Removal,
        cuts: Mapping[Branch, Kind] = MappingProxyType({}),
        all_of: Sequence[Branch] = (),
    ) -> PruningPlan:
        """The plan that removes these units.

        Args:
            removal: of units, from the model without the branches that go.
            cuts: the branches that go, and what stands in for each.
            all_of: all branches of the model.
        """
        families = removal.analysis.families
        entries = tuple(
            Entry(family.name, family.size, position, members_of(family), tuple(removal.units[family.name]))
            for position, family in enumerate(families)
            if family.name in removal.counts
        )
        branches = tuple(
            BranchEntry(each.sum, each.end, cuts[each], position, len(all_of))
            for position, each in enumerate(all_of)
            if each in cuts
        )
        return cls(tuple(family.size for family in families), entries, branches)

    def joined(self, other: PruningPlan) -> PruningPlan:
        """What both remove, of a model whose families they agree on."""
        return replace(
            self, entries=(*self.entries, *other.entries), branches=(*self.branches, *other.branches)
        )

    def cuts(self, found: Sequence[Branch]) -> dict[Branch, Kind]:
        """The branches that go of a model, and what stands in for each.

        They are found by the names of tensors; where another exporter gave others, by their position, if the
        model has as many.

        Args:
            found: all branches of the model.

        Raises:
            UsageError: a branch is not there.
        """
        named = {(each.sum, each.end): each for each in found}
        cuts: dict[Branch, Kind] = {}
        for entry in self.branches:
            branch = named.get((entry.sum, entry.end))
            if branch is None and entry.position < entry.total == len(found):
                branch = found[entry.position]
            if branch is None:
                raise UsageError(f"the model has no branch into '{entry.sum}', which the plan drops")
            cuts[branch] = entry.stand_in
        return cuts

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
        """What two plans do differently, one line per branch and per family."""
        mine, theirs = ({each.family: each for each in plan.entries} for plan in (self, other))
        own, others = ({each.sum: each.stand_in for each in plan.branches} for plan in (self, other))
        lines = [
            f"{name}: branch {_told(own.get(name))} against {_told(others.get(name))}"
            for name in dict.fromkeys([*own, *others])
            if own.get(name) != others.get(name)
        ]
        for name in dict.fromkeys([*mine, *theirs]):
            first, second = (
                set(plan[name].removed) if name in plan else set[int]() for plan in (mine, theirs)
            )
            if first != second:
                lines.append(
                    f"{name}: {len(first)} units against {len(second)}, {len(first & second)} in common"
                )
        return lines


def _told(stand_in: Kind | None) -> str:
    return "kept" if stand_in is None else f"dropped ({stand_in} in its place)"


def members_of(family: Family) -> tuple[str, ...]:
    """The axes of constants along which a family lies."""
    return tuple(f"{member.tensor}:{member.axis}" for member in family.members if member.constant)
