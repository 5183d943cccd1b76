"""What goes of an analyzed model, in every form that is asked for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from onnxslim.families.analysis import Analysis
from onnxslim.ops.channels.cut import Kept, Masks


@dataclass(frozen=True)
class Removal:
    """Units that go; false if none do.

    Attributes:
        analysis: of the model they go from.
        units: to remove, ascending, by name of their family; families that lose none may be left out.
    """

    analysis: Analysis
    units: Mapping[str, Sequence[int]]

    @classmethod
    def leaving(cls, analysis: Analysis, kept: Kept) -> Removal:
        """The removal after which constants have these slices left."""
        units: dict[str, list[int]] = {}
        for family in analysis.families:
            member = next(each for each in family.members if each.constant)
            left = kept.get((member.tensor, member.axis))
            if left is not None:
                gone = np.setdiff1d(np.arange(family.size), member.units[left])
                units[family.name] = gone.tolist()
        return cls(analysis, units)

    def __bool__(self) -> bool:
        return any(len(units) for units in self.units.values())

    def of(self, families: Collection[str]) -> Removal:
        """What of it concerns these families."""
        return Removal(self.analysis, {name: units for name, units in self.units.items() if name in families})

    @cached_property
    def counts(self) -> dict[str, int]:
        """How many units go, by name of their family; without those that lose none."""
        return {name: len(units) for name, units in self.units.items() if len(units)}

    @cached_property
    def masks(self) -> Masks:
        """For each axis that loses slices, whether each of them stays."""
        masks: dict[tuple[str, int], NDArray[np.bool_]] = {}
        for family in self.analysis.families:
            gone = np.zeros(family.size + 1, bool)  # the last entry stands for the unit -1
            gone[list(self.units.get(family.name, ()))] = True
            for member in family.members if gone.any() else ():
                key = member.tensor, member.axis
                masks[key] = masks.get(key, np.ones(member.units.size, bool)) & ~gone[member.units]
        return {key: stays for key, stays in masks.items() if not stays.all()}

    @cached_property
    def kept(self) -> Kept:
        """For each axis that loses slices, the indices of those that stay, ascending."""
        return {key: np.flatnonzero(stays) for key, stays in self.masks.items()}

    def after(self, earlier: Kept) -> dict[tuple[str, int], NDArray[np.intp]]:
        """Slices of the original that stay when this goes from what an earlier removal has left."""
        now = {key: earlier[key][left] if key in earlier else left for key, left in self.kept.items()}
        return {**earlier, **now}
