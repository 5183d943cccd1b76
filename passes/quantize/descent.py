"""Coordinate descent over integer codes: one input's after the other, each the best while the others stay.

Arrays are [inputs, groups, outputs], so that what a step reads and writes lies together. What the steps of a
block of inputs have in common, the errors of all other inputs, is one matrix product (the lazy batches of
Frantar et al., "GPTQ", ICLR 2023); what is left of a step is a product of a vector and that block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from onnxslim.passes.quantize.blocks import Limit
from onnxslim.passes.quantize.rate import Rate
from onnxslim.passes.quantize.weights import MAX_PAIR, QMAX
from onnxslim.passes.repair.support import support

Floats = NDArray[np.float32]
# Inputs whose steps have one matrix product in common, where no scale says how many.
BLOCK = 32
_ZERO = np.zeros((), np.float32)


def by_input(array: Floats) -> Floats:
    """[groups, outputs, inputs] as [inputs, groups, outputs]."""
    return np.ascontiguousarray(np.moveaxis(array, 2, 0))


def by_output(array: Floats) -> Floats:
    """The other way round."""
    return np.ascontiguousarray(np.moveaxis(array, 0, 2))


@dataclass(frozen=True)
class Pulls:
    """What errors of inputs ask of each other, for covariances C of the inputs of each group.

    Attributes:
        shares: of the error of one input (last axis), what that of another (middle axis) had best be the
            opposite of, float32 (groups, inputs, inputs); zero on the diagonal.
        weight: what the square of an input's error, less that, counts, float32 (inputs, groups, 1).
    """

    shares: Floats
    weight: Floats

    @classmethod
    def of(cls, curvature: Floats) -> Pulls:
        """Each input makes up for all others: rows of C by its diagonal."""
        diagonal = np.einsum("gkk->gk", curvature)
        shares = curvature / diagonal[..., None]
        np.einsum("gkk->gk", shares)[...] = 0.0
        return cls(shares, diagonal.T[..., None])

    @classmethod
    def in_order(cls, curvature: Floats) -> Pulls:
        """Each input makes up for those before it, those behind it being free to make up for it: GPTQ.

        With C = U U^T and U upper triangular, what is lost is the sum of squares of U^T e, and all of e from
        the first input to the last has a square that depends on no later one.
        """
        flipped = curvature[:, ::-1, ::-1].astype(np.float64)
        upper = np.linalg.cholesky(flipped)[:, ::-1, ::-1]
        diagonal = np.einsum("gkk->gk", upper)
        shares = np.tril((upper / diagonal[:, None]).swapaxes(1, 2), -1).astype(np.float32)
        return cls(shares, np.square(diagonal).astype(np.float32).T[..., None])

    def on(self, block: slice, errors: Floats) -> Floats:
        """On the inputs of a block, by errors of all inputs."""
        found: Floats = self.shares[:, block] @ errors.swapaxes(0, 1)
        return np.asarray(found.swapaxes(0, 1))

    def times(self, values: Floats) -> Floats:
        """C times values, where every input pulls at every other."""
        return self.weight * (self.on(slice(None), values) + values)


class Descent:
    """Codes of one weight on their way down; those of zeros of a sparse weight stay that of zero.

    Args:
        target: weights wanted.
        codes: to start from, within the limits; not modified.
        steps: what a code is worth, of the same shape, or one for all inputs.
        limits: lowest and highest code, of all or of each weight.
        neighbours: which codes must not add up to more than `weights.MAX_PAIR`, if any.
        size: inputs that are worked on at a time: those of a block that has steps of its own.
        rate: what codes cost besides the error; None for nothing.

    Attributes:
        codes, steps: as they are now.
    """

    def __init__(
        self,
        target: Floats,
        codes: Floats,
        steps: Floats,
        limits: tuple[Limit, Limit],
        neighbours: Neighbours | None = None,
        size: int = BLOCK,
        rate: Rate | None = None,
    ) -> None:
        self.codes = codes.copy()
        self._rate = rate
        self._weight: Floats = np.ones((len(codes), 1, 1), np.float32)
        self._target = np.asarray(target)  # slices of one that lies in a file take ten times as long
        self._held = support(self._target)
        self._limits = limits
        self._size = size
        self._neighbours = neighbours
        self.take(steps)

    def take(self, steps: Floats) -> None:
        """Have codes be worth something else from now on."""
        self.steps = np.array(np.broadcast_to(steps, self._target.shape))
        self._errors = self.codes * self.steps - self._target

    def sweep(self, pulls: Pulls, *, scaled: bool = False) -> int:
        """One round over all inputs; returns how many codes changed.

        Args:
            pulls: what errors ask of each other.
            scaled: whether each block of inputs has steps of its own, which are then refitted as well.
        """
        changed, self._weight = 0, pulls.weight
        if self._rate is not None:
            self._rate.renew(self.codes)
        for start in range(0, len(self.codes), self._size):
            block = slice(start, start + self._size)
            inner = pulls.shares[:, block, block]
            own = (inner @ self._errors[block].swapaxes(0, 1)).swapaxes(0, 1)
            outer = pulls.on(block, self._errors) - own
            before = self.codes[block].copy()
            self._round(start, inner, outer)
            changed += int(np.count_nonzero(before != self.codes[block]))
            if scaled:
                self._rescale(block, Pulls(inner, pulls.weight[block]), outer)
        return changed

    def _round(self, start: int, inner: Floats, outer: Floats) -> None:
        """The codes of one block, given how all others pull at it."""
        block = slice(start, start + self._size)
        errors, target = self._errors[block], self._target[block]
        free, turned = target - outer, errors.swapaxes(0, 1)
        for j in range(len(free)):
            wanted = free[j] - (inner[:, j : j + 1] @ turned)[:, 0]
            self.codes[start + j], values = self._nearest(start + j, wanted)
            np.subtract(values, target[j], out=errors[j])

    def _nearest(self, at: int, wanted: Floats) -> tuple[Floats, Floats]:
        """The codes of one input that are worth what comes next to this, and what they are worth."""
        least: Limit
        most: Limit
        if self._neighbours:
            least, most = self._neighbours.bounds(self.codes, at)
        else:
            least, most = (each if isinstance(each, int) else each[at] for each in self._limits)
        steps = self.steps[at]
        code = wanted / steps
        np.rint(code, out=code)
        np.maximum(code, least, out=code)
        np.minimum(code, most, out=code)
        if self._rate is not None:
            weight, place = self._weight[at] * np.square(steps), wanted / steps
            code = self._rate.best(code, lambda each: weight * np.square(each - place), least, most)
        if self._held is not None:
            code *= self._held[at]
        return code, code * steps

    def _rescale(self, block: slice, pulls: Pulls, outer: Floats) -> None:
        """The step of least error for the codes of a block; as before where that is nothing sensible."""
        codes, target, step = self.codes[block], self._target[block], self.steps[block][0]
        weighted = pulls.times(codes)
        along = (weighted * target - pulls.weight * codes * outer).sum(axis=0)
        own = (weighted * codes).sum(axis=0)
        ratio = np.where(own > 0, along / np.maximum(own, 1e-30), step)
        self.steps[block] = np.where(ratio / step > 0.5, ratio, step)
        self._errors[block] = codes * self.steps[block] - target


class Neighbours:
    """Which codes of a row are summed in one 16-bit step with which others.

    Kernels run over input channels fastest: the neighbours of a code are those of the channels before and
    after it at the same kernel position, and at the ends those of the next position where they may meet.

    Args:
        channels: input channels of a group.
        positions: kernel positions; inputs are ordered by channel, then position.
    """

    def __init__(self, channels: int, positions: int) -> None:
        order = np.arange(channels * positions).reshape(channels, positions).T.ravel()
        crosses = channels % 2 == 1
        self._of: list[list[int]] = [[] for _ in order]
        for place, (one, other) in enumerate(pairwise(order)):
            if crosses or (place + 1) % channels:
                self._of[one].append(int(other))
                self._of[other].append(int(one))

    def bounds(self, codes: Floats, at: int) -> tuple[Floats, Floats]:
        """Least and largest value the codes of an input may take, by group and output, or one for all."""
        others = [codes[other] for other in self._of[at]] or [_ZERO]
        top, bottom = reduce(np.maximum, others), reduce(np.minimum, others)
        return np.maximum(-MAX_PAIR - bottom, -QMAX), np.minimum(MAX_PAIR - top, QMAX)
