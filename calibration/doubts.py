"""What keeps calibration data from standing for real inputs, as far as it can be seen in the data alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from onnxslim.calibration.feeds import batch_samples
from onnxslim.ir.graph import Array


def doubts(data: Iterable[Mapping[str, Array]]) -> tuple[str, ...]:
    """Why ranges and fits that are made on data may not hold for others; nothing where no reason is seen.

    That is a single sample, or several that are all equal, inputs that hold a NaN, and those that are one
    and the same number everywhere. Integers may be that, as masks are, and so may numbers, such as a
    threshold. Data is read only until it has been seen to vary.
    """
    seen: dict[str, _Seen] = {}
    samples = 0
    for feeds in data:
        count = batch_samples(feeds)
        samples += count
        for name, array in feeds.items():
            seen.setdefault(name, _Seen()).add(array, count)
        if any(each.differs for each in seen.values()) and not any(each.uniform for each in seen.values()):
            break
    alike = not any(each.differs for each in seen.values())
    found = [f"input '{name}' is {each.low:g} everywhere" for name, each in seen.items() if each.uniform]
    found += [f"input '{name}' holds NaN" for name, each in seen.items() if each.holds_nan]
    if alike and samples:
        found.append("it is one single sample" if samples == 1 else f"all its {samples} samples are equal")
    return tuple(found)


class _Seen:
    """What was seen of one input.

    Attributes:
        low, high: of its values.
        differs: whether two of its samples do.
        holds_nan: whether it has a value that is no number.
    """

    def __init__(self) -> None:
        self.low, self.high = np.inf, -np.inf
        self.differs = self.holds_nan = False
        self._varies = False  # as it may, being of a type or size of which nothing else is to be expected
        self._first: Array | None = None

    @property
    def uniform(self) -> bool:
        """Whether it should vary, and does not."""
        return not self._varies and self.low == self.high

    def add(self, array: Array, samples: int) -> None:
        """Take in a batch of so many samples."""
        cut = array if array.ndim and 0 < len(array) == samples else array[None]
        if self._first is None:
            self._first = cut[0]
        self.differs |= any(not np.array_equal(sample, self._first) for sample in cut)
        self.holds_nan |= array.dtype.kind == "f" and bool(np.isnan(array).any())
        if array.dtype.kind != "f" or cut[0].size <= 1:
            self._varies = True
        elif array.size:
            self.low, self.high = min(self.low, float(array.min())), max(self.high, float(array.max()))
