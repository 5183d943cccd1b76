"""A pruning plan: which units of which family go. Data, to look at, keep, compare and replay."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from onnxslim.errors import UsageError
from onnxslim.families.analysis import Analysis, Family
from onnxslim.families.removal import Removal
from onnxslim.formats import plain

VERSION = 1


def _distinct(units: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(units)) < len(units):
        raise ValueError("a unit is named twice")
    return tuple(sorted(units))


_Count = Annotated[int, Field(ge=0)]
_STRICT = ConfigDict(strict=True, extra="forbid")


class _Entry(BaseModel):
    """An `Entry` as it is written."""

    model_config = _STRICT
    family: str
    size: _Count
    position: _Count
    members: tuple[str, ...]
    removed: Annotated[tuple[_Count, ...], AfterValidator(_distinct)]


class _File(BaseModel):
    """A `PruningPlan` as it is written."""

    model_config = _STRICT
    version: int
    sizes: tuple[_Count, ...]
    entries: tuple[_Entry, ...]


@dataclass(frozen=True)
class Entry:
    """What goes of one family.

    Attributes:
        family: its name.
        size: how many units it had.
        members: axes of constants along which its units lay, as "tensor:axis".
        position: its number among all families of the model.
        removed: units that go, ascending.
    """

    family: str
    size: int
    members: tuple[str, ...]
    position: int
    removed: tuple[int, ...]


@dataclass(frozen=True)
class PruningPlan:
    """What goes of a model. A plan fits any model with the same families: another export or precision of it.

    Attributes:
        sizes: numbers of units of all families of the model it was made for, in the order of the graph.
        entries: of the families that lose units.
        version: of the format.
    """

    sizes: tuple[int, ...]
    entries: tuple[Entry, ...]
    version: int = VERSION

    @classmethod
    def of(cls, removal: Removal) -> PruningPlan:
        """The plan that removes these units."""
        families = removal.analysis.families
        entries = tuple(
            Entry(family.name, family.size, members_of(family), position, tuple(removal.units[family.name]))
            for position, family in enumerate(families)
            if family.name in removal.counts
        )
        return cls(tuple(family.size for family in families), entries)

    def to_json(self) -> str:
        """Readable JSON, the same for the same plan."""
        entries = [
            {
                "family": each.family,
                "size": each.size,
                "position": each.position,
                "members": list(each.members),
                "removed": list(each.removed),
            }
            for each in self.entries
        ]
        lines = ",\n    ".join(json.dumps(entry) for entry in entries)
        head = f'"version": {self.version},\n  "sizes": {json.dumps(list(self.sizes))}'
        return f'{{\n  {head},\n  "entries": [\n    {lines}\n  ]\n}}\n'

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """The plan in JSON text.

        Raises:
            UsageError: it is not a plan; says why.
        """
        try:
            data = _File.model_validate_json(text)
        except ValidationError as error:
            found = error.errors(include_url=False)[0]
            where = ".".join(map(str, found["loc"])) or "text"
            raise UsageError(f"not a pruning plan: {where}: {found['msg']}") from error
        if data.version != VERSION:
            raise UsageError(f"the plan has version {data.version}, not {VERSION}")
        return cls(data.sizes, tuple(Entry(**each.model_dump()) for each in data.entries))

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """The plan in a file.

        Raises:
            UsageError: the file cannot be read, or is not a plan.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the pruning plan '{path}': {error}") from error
        return cls.from_json(text)

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

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in the JSON of a report."""
        return dict(plain(self))


def members_of(family: Family) -> tuple[str, ...]:
    """The axes of constants along which a family lies."""
    return tuple(f"{member.tensor}:{member.axis}" for member in family.members if member.constant)
