"""How many units each family may give up, and what a number of them costs the outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnxslim.families.analysis import Family

# A reached cost this close to what was asked for, relative to the cost before, is not worth a remark.
TOLERANCE = 0.02


@dataclass(frozen=True)
class Allowance:
    """What may be removed of a family.

    Attributes:
        allowed: numbers of units that may go, ascending, 0 first.
    """

    allowed: tuple[int, ...]

    @classmethod
    def of(cls, family: Family, align: int, max_ratio: float) -> Allowance:
        """At least one unit stays; what stays is a multiple of `align` slices wherever something goes."""
        step = max(1, align // family.width)
        least = max(1, int(np.ceil(family.size * (1 - max_ratio) - 1e-9)))
        kept = [count for count in range(step, family.size, step) if count >= least]
        return cls((0, *(family.size - count for count in reversed(kept))))

    def nearest(self, wanted: float) -> int:
        """The allowed number next to a wanted one, at least one step if anything is wanted."""
        if wanted <= 0:
            return 0
        choices = self.allowed[1:] or self.allowed
        return min(choices, key=lambda count: abs(count - wanted))


def uniform(families: Mapping[str, Family], limits: Mapping[str, Allowance], ratio: float) -> dict[str, int]:
    """The same share of every family, as near as the limits allow."""
    return {name: limits[name].nearest(ratio * family.size) for name, family in families.items()}
