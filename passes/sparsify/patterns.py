"""Where zeros may lie: anywhere, in blocks, or such that n of every m inputs in a row are left."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxslim.errors import UsageError
from onnxslim.ops.layers import Layer
from onnxslim.passes.repair.support import LEAST_ZEROS, Mask

_NUMBERS = {"pattern": re.compile(r"([1-9]\d*):([1-9]\d*)"), "block": re.compile(r"([1-9]\d*)x([1-9]\d*)")}


def parsed(option: str, text: str) -> tuple[int, int]:
    """The two numbers of a pattern such as 2:4, or of a block such as 4x1.

    Raises:
        UsageError: it is none.
    """
    found = _NUMBERS[option].fullmatch(text)
    if found is None:
        example = "2:4" if option == "pattern" else "4x1"
        raise UsageError(f"pass 'sparsify': option '{option}': such as {example}, not {text!r}")
    return int(found[1]), int(found[2])


@dataclass(frozen=True)
class Pattern:
    """What zeros have in common. Inputs are channels, at the same place of the kernel.

    Attributes:
        outputs, inputs: of a block that is zero, or not, as a whole.
        kept, of: how many of so many neighbouring inputs may be other than zero; 0 of 0 if only their share
            counts.
    """

    outputs: int = 1
    inputs: int = 1
    kept: int = 0
    of: int = 0

    @property
    def share(self) -> float | None:
        """The share of zeros, where the pattern says it."""
        return 1.0 - self.kept / self.of if self.of else None

    def hindrance(self, layer: Layer) -> str | None:
        """Why the weight of a layer cannot have zeros in this pattern."""
        if self.of and layer.inputs % self.of:
            return f"it sums over {layer.inputs} channels, no multiple of {self.of}"
        if layer.outputs % self.outputs or layer.inputs % self.inputs:
            whole, block = f"{layer.outputs}x{layer.inputs}", f"{self.outputs}x{self.inputs}"
            return f"its outputs and inputs, {whole}, cannot be cut into blocks of {block}"
        return None

    def stays(self, share: float, count: int) -> int:
        """How many of the values of a weight stay with a share of zeros, if any is to be zero."""
        if self.of:
            return count * self.kept // self.of
        blocks = count // (self.outputs * self.inputs)
        # With fewer zeros than that, nobody would know that the weight is sparse.
        most = int((1.0 - LEAST_ZEROS) * blocks)
        return max(min(round((1.0 - share) * blocks), most), 1) * self.outputs * self.inputs

    def mask(self, scores: NDArray[Any], share: float, positions: int = 1) -> Mask:
        """Where weights stay: those of the highest scores.

        Args:
            scores: not negative, (groups, outputs, inputs), inputs by channel, then by place of the kernel.
            share: of zeros; without effect where the pattern says it.
            positions: places of the kernel.
        """
        groups, outputs, width = scores.shape
        by_place = scores.reshape(groups, outputs, width // positions, positions).swapaxes(2, 3)
        found = self._n_of_m(by_place) if self.of else self._blocks(by_place, share)
        return np.ascontiguousarray(found.swapaxes(2, 3)).reshape(scores.shape)

    def _n_of_m(self, scores: NDArray[Any]) -> Mask:
        apart = scores.reshape(*scores.shape[:3], -1, self.of)
        best = np.argsort(-apart, axis=-1, kind="stable")[..., : self.kept]
        found = np.zeros(apart.shape, np.bool_)
        np.put_along_axis(found, best, True, axis=-1)
        return found.reshape(scores.shape)

    def _blocks(self, scores: NDArray[Any], share: float) -> Mask:
        groups, outputs, places, inputs = scores.shape
        split = scores.reshape(
            groups, outputs // self.outputs, self.outputs, places, inputs // self.inputs, self.inputs
        )
        sums = split.sum(axis=(2, 5), keepdims=True)
        kept = np.zeros(sums.size, np.bool_)
        count = self.stays(share, scores.size) // (self.outputs * self.inputs)
        kept[np.argpartition(-sums.ravel(), count - 1)[:count]] = True
        return np.broadcast_to(kept.reshape(sums.shape), split.shape).reshape(scores.shape)

    def __str__(self) -> str:
        """For people."""
        if self.of:
            return f"{self.kept} of {self.of} inputs stay"
        return f"in blocks of {self.outputs}x{self.inputs}" if self.outputs * self.inputs > 1 else "anywhere"


def positions_of(layer: Layer) -> int:
    """Places of its kernel."""
    return prod(layer.kernel)
