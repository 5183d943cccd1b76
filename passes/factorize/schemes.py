"""Ways to write one layer as a chain of smaller ones, each exact at full rank.

Weights are [groups, inputs, outputs, *kernel]. A pair of factors is a matrix decomposition of the weight
unfolded in one of three ways; Tucker-2 takes the outputs of the second factor of a pair apart once more.

    output   kernel → 1x1   [inputs·kernel | outputs]    without kernel, of matrices and 1x1 convolutions: svd
    input    1x1 → kernel   [inputs | outputs·kernel]
    spatial  kx1 → 1xk      [inputs·k | outputs·k]       Jaderberg et al. 2014 (arXiv:1405.3866); also of
                                                         depthwise convolutions, with one of each a channel
    tucker   1x1 → kernel → 1x1                          Kim et al. 2016 (arXiv:1511.06530)

`separable` filters every channel by itself, with a few kernels for each, and mixes the results by a 1x1
convolution: network decoupling (Guo et al. 2018, arXiv:1808.05517). Its matrices are those of single
channels, [kernel | outputs].

With the second moments of the data, each is fitted to what the layer makes of that data instead of to the
weight: the pair is then a principal component analysis of the layer's results (Zhang et al. 2015,
arXiv:1505.06798), and the last factor the least-squares solution for given first ones.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, TypeAlias

import numpy as np
import scipy.linalg

from onnxslim.ir.graph import Array
from onnxslim.passes.factorize.layers import Factor, Sizes, Whole

# Inner widths of the factors, per group: one, or two for Tucker-2.
Ranks: TypeAlias = tuple[int, ...]

# From this size of the smaller side on, up to this share of the directions is found by random projection.
LARGE, SHARE = 4096, 8
# Added to moments that are to be inverted, relative to their mean diagonal.
RIDGE = 1e-6
# How often filters of channels are fitted to what mixes their results, and the other way round.
TURNS = 2
# Keeps quotients of what may be zero finite.
_NOTHING = 1e-30


@dataclass(frozen=True)
class Problem:
    """What factors have to come close to.

    Attributes:
        weight: [groups, inputs, outputs, *kernel], float64.
        gram: second moments of patches of the data, [groups, inputs·kernel, inputs·kernel]; None to come
            close to the weight itself.
    """

    weight: Array
    gram: Array | None = None

    @property
    def kernel(self) -> Sizes:
        """Size along each kernel axis."""
        return self.weight.shape[3:]

    def matrix(self) -> Array:
        """The weight as [groups, inputs·kernel, outputs]."""
        moved: Array = np.moveaxis(self.weight, 2, -1)
        return moved.reshape(len(moved), -1, moved.shape[-1])

    def unfolded(self, first: Sizes) -> Array:
        """The weight as [groups, inputs·first, outputs·rest], where `first` are the sizes of leading axes."""
        groups, inputs, outputs = self.weight.shape[:3]
        split: Array = self.weight.reshape(groups, inputs, outputs, math.prod(first), -1)
        found: Array = split.transpose(0, 1, 3, 2, 4).reshape(groups, inputs * math.prod(first), -1)
        return found

    def metric(self, first: Sizes) -> Array | None:
        """Second moments of the rows of `unfolded`, averaged over the rest of the kernel."""
        if self.gram is None:
            return None
        sizes = (self.weight.shape[1], math.prod(first), math.prod(self.kernel) // math.prod(first))
        whole = self.gram.reshape(-1, *sizes, *sizes)
        rows = sizes[0] * sizes[1]
        found: Array = np.einsum("giajhbj->giahb", whole).reshape(-1, rows, rows) / sizes[2]
        return found

    def lifted(self, first: Array) -> Problem:
        """What remains for the factors after the first: its best continuation, and the moments it makes."""
        assert self.gram is not None
        lift = _lift(first, self.kernel)
        gram = lift.swapaxes(1, 2) @ self.gram @ lift
        right = lift.swapaxes(1, 2) @ (self.gram @ self.matrix())
        solved = np.stack([solve(each, wanted) for each, wanted in zip(gram, right, strict=True)])
        kernel = tuple(
            size if axis == 1 else 1 for size, axis in zip(self.kernel, first.shape[3:], strict=True)
        )
        back = solved.reshape(len(solved), first.shape[2], *kernel, -1)
        return Problem(np.moveaxis(back, -1, 2), gram)

    @cached_property
    def power(self) -> float:
        """Of the results of the weight on the data, or of the weight itself."""
        matrix = self.matrix()
        if self.gram is None:
            return float(np.square(matrix).sum())
        return float((matrix * (self.gram @ matrix)).sum())


def _lift(first: Array, kernel: Sizes) -> Array:
    """The matrix that makes patches of the second factor's data of patches of the first one's.

    Args:
        first: weight of the first factor, with the leading axes of the kernel or none of them.
        kernel: of the whole.

    Returns:
        [groups, inputs·kernel, outputs·rest of the kernel].
    """
    groups, inputs, outputs = first.shape[:3]
    mine = math.prod(first.shape[3:])
    rest = math.prod(kernel) // mine
    lift = np.zeros((groups, inputs, mine, rest, outputs, rest))
    for position in range(rest):
        lift[:, :, :, position, :, position] = first.reshape(groups, inputs, outputs, mine).swapaxes(2, 3)
    return lift.reshape(groups, inputs * mine * rest, outputs * rest)


class Decomposition(ABC):
    """A weight taken apart once, for all ranks."""

    @abstractmethod
    def weights(self, ranks: Ranks) -> list[Array]:
        """The weights of the factors at these ranks, float64."""

    @abstractmethod
    def lost(self, ranks: Ranks) -> float:
        """Share of the power (`Problem.power`) that factors of these ranks do not explain."""


class Scheme(ABC):
    """One way to factorize.

    Attributes:
        name: in options and reports.
        optimistic: whether its multiply-accumulates promise more speed than there is: candidates are then
            kept only where those of other schemes are slower or cost the outputs more.
        within_channels: whether there are factors of depthwise convolutions that are depthwise themselves.
    """

    name: str
    optimistic: ClassVar[bool] = False
    within_channels: ClassVar[bool] = False

    @abstractmethod
    def refuses(self, layer: Whole) -> str | None:
        """Why a layer cannot have factors of this kind, or never smaller ones."""

    @abstractmethod
    def axes(self, layer: Whole) -> tuple[Sizes, ...]:
        """The kernel axes of every factor."""

    @abstractmethod
    def largest(self, layer: Whole) -> Ranks:
        """The ranks at which the factors are exact."""

    @abstractmethod
    def decompose(self, layer: Whole, problem: Problem, most: Ranks) -> Decomposition:
        """Factors of every rank up to `most`."""

    def parts(self, layer: Whole) -> int:
        """How many parts of the layer have these ranks each."""
        return layer.groups

    def shapes(self, layer: Whole, ranks: Ranks) -> list[Sizes]:
        """Shapes of the weights of every factor."""
        widths = (layer.inputs, *ranks, layer.outputs)
        kernels = [_kernel(layer, axes) for axes in self.axes(layer)]
        return [(layer.groups, widths[i], widths[i + 1], *kernel) for i, kernel in enumerate(kernels)]

    def macs(self, layer: Whole, ranks: Ranks) -> int:
        """Multiply-accumulates of one run of the factors."""
        return layer.cost(self.shapes(layer, ranks), self.axes(layer))

    def parameters(self, layer: Whole, ranks: Ranks) -> int:
        """Elements of all weights."""
        return sum(math.prod(shape) for shape in self.shapes(layer, ranks))

    def factors(self, layer: Whole, weights: Sequence[Array]) -> list[Factor]:
        """Factors with these weights, in the layer's own element type."""
        dtype = layer.weight.dtype
        pairs = zip(balanced(weights), self.axes(layer), strict=True)
        return [Factor(weight.astype(dtype), axes) for weight, axes in pairs]


def _kernel(layer: Whole, axes: Sizes) -> Sizes:
    return tuple(size if axis in axes else 1 for axis, size in enumerate(layer.kernel))


class TwoFactors(Scheme):
    """Two factors; the first has the leading kernel axes, as many as `leading` says."""

    @abstractmethod
    def leading(self, layer: Whole) -> int:
        """Number of kernel axes of the first factor."""

    def axes(self, layer: Whole) -> tuple[Sizes, ...]:
        """Leading axes, and the rest."""
        every, count = tuple(range(len(layer.kernel))), self.leading(layer)
        return every[:count], every[count:]

    def largest(self, layer: Whole) -> Ranks:
        """The smaller side of the unfolded weight."""
        first, second = (math.prod(_kernel(layer, axes)) for axes in self.axes(layer))
        return (min(layer.inputs * first, layer.outputs * second),)

    def decompose(self, layer: Whole, problem: Problem, most: Ranks) -> Decomposition:
        """One truncated decomposition per group."""
        first, second = (_kernel(layer, axes) for axes in self.axes(layer))
        return PairDecomposition.of(problem, first, second, most[0])


class Output(TwoFactors):
    """The kernel first, with fewer outputs; then 1x1."""

    name = "output"

    def refuses(self, layer: Whole) -> str | None:
        """Of a kernel of one position this is `svd`."""
        return "its kernel has one position" if math.prod(layer.kernel) == 1 else None

    def leading(self, layer: Whole) -> int:
        """All."""
        return len(layer.kernel)


class Svd(Output):
    """A matrix, or a convolution that is one at every position, as two."""

    name = "svd"

    def refuses(self, layer: Whole) -> str | None:
        """With a kernel there is more than one way."""
        return "its kernel has several positions" if math.prod(layer.kernel) > 1 else None


class Input(TwoFactors):
    """1x1 first, to fewer channels; then the kernel."""

    name = "input"

    def refuses(self, layer: Whole) -> str | None:
        """Of a kernel of one position this is `svd`."""
        return "its kernel has one position" if math.prod(layer.kernel) == 1 else None

    def leading(self, layer: Whole) -> int:
        """None."""
        return 0


class Spatial(TwoFactors):
    """Along the first kernel axis, then along the others; of depthwise convolutions, channel by channel."""

    name = "spatial"
    within_channels = True

    def refuses(self, layer: Whole) -> str | None:
        """There must be something on both sides."""
        if min(layer.kernel[:1], default=1) == 1 or math.prod(layer.kernel[1:]) == 1:
            return "its kernel has one axis"
        return "its output shape is fixed" if "output_shape" in layer.node.attrs else None

    def leading(self, layer: Whole) -> int:
        """The first."""
        return 1


class Tucker(Scheme):
    """1x1 to fewer channels, the kernel among those, and 1x1 back: `input`, then `output` of its kernel."""

    name = "tucker"

    def refuses(self, layer: Whole) -> str | None:
        """Of a kernel of one position this is `svd` twice."""
        return "its kernel has one position" if math.prod(layer.kernel) == 1 else None

    def axes(self, layer: Whole) -> tuple[Sizes, ...]:
        """All in the middle."""
        return (), tuple(range(len(layer.kernel))), ()

    def largest(self, layer: Whole) -> Ranks:
        """What `input`, and then `output`, can do at most."""
        inner = min(layer.inputs, layer.outputs * math.prod(layer.kernel))
        return inner, min(layer.outputs, inner * math.prod(layer.kernel))

    def decompose(self, layer: Whole, problem: Problem, most: Ranks) -> Decomposition:
        """Of the inputs; the outputs follow for every rank of the inputs."""
        ones = (1,) * len(layer.kernel)
        return TuckerDecomposition(
            PairDecomposition.of(problem, ones, layer.kernel, most[0]), layer.kernel, most[1]
        )


class Separable(Scheme):
    """The kernel within each channel, then 1x1; the rank is the number of kernels of a channel."""

    name = "separable"
    optimistic = True  # kernels of single channels do less at a time than dense ones

    def refuses(self, layer: Whole) -> str | None:
        """There must be channels to be kept apart."""
        if math.prod(layer.kernel) == 1:
            return "its kernel has one position"
        return "its groups have one input channel" if layer.inputs == 1 else None

    def axes(self, layer: Whole) -> tuple[Sizes, ...]:
        """All, and none."""
        return tuple(range(len(layer.kernel))), ()

    def parts(self, layer: Whole) -> int:
        """Every input channel."""
        return layer.groups * layer.inputs

    def largest(self, layer: Whole) -> Ranks:
        """The smaller side of what one channel has of the weight."""
        return (min(layer.outputs, math.prod(layer.kernel)),)

    def shapes(self, layer: Whole, ranks: Ranks) -> list[Sizes]:
        """Of the filters, and of what mixes what they make."""
        filters = (self.parts(layer), 1, ranks[0], *layer.kernel)
        return [filters, (layer.groups, layer.inputs * ranks[0], layer.outputs, *_kernel(layer, ()))]

    def decompose(self, layer: Whole, problem: Problem, most: Ranks) -> Decomposition:
        """Channel by channel; how they go together depends on the rank."""
        return SeparableDecomposition.of(problem, most[0])


@dataclass(frozen=True)
class PairDecomposition(Decomposition):
    """Both factors of every group, best direction first.

    Attributes:
        problem: what was taken apart.
        first, second: kernels of the factors.
        parts: the directions of every group.
    """

    problem: Problem
    first: Sizes
    second: Sizes
    parts: Sequence[Directions]

    @staticmethod
    def of(problem: Problem, first: Sizes, second: Sizes, most: int) -> PairDecomposition:
        """Directions of every group, up to `most`."""
        matrices, metrics = problem.unfolded(first), problem.metric(first)
        parts = [
            directions(matrix, most, None if metrics is None else metrics[group])
            for group, matrix in enumerate(matrices)
        ]
        return PairDecomposition(problem, first, second, parts)

    @property
    def _exact(self) -> bool:
        """Whether nothing is left to solve for: there is no data, or the second factor has no kernel."""
        return self.problem.gram is None or math.prod(self.second) == 1

    def weights(self, ranks: Ranks) -> list[Array]:
        """Leading directions; where data says more, the second factor is solved for anew."""
        first = self._first(ranks[0])
        if not self._exact:
            return [first, self.problem.lifted(first).weight]
        groups, _, outputs = self.problem.weight.shape[:3]
        right = np.stack([part.right[: ranks[0]] for part in self.parts])
        return [first, right.reshape(groups, ranks[0], outputs, *self.second)]

    def lost(self, ranks: Ranks) -> float:
        """From the lengths of the directions left out, or of what least squares leaves."""
        if not self._exact:
            kept = self.problem.lifted(self._first(ranks[0])).power
        else:
            kept = sum(float(part.power[: ranks[0]].sum()) for part in self.parts)
        return max(1.0 - kept / (self.problem.power + _NOTHING), 0.0)

    def _first(self, rank: int) -> Array:
        groups, inputs = self.problem.weight.shape[:2]
        left = np.stack([part.left[:, :rank] for part in self.parts]).reshape(groups, inputs, -1, rank)
        return np.moveaxis(left, 3, 2).reshape(groups, inputs, rank, *self.first)


@dataclass(frozen=True)
class TuckerDecomposition(Decomposition):
    """Directions of the inputs, and for each number of them the outputs taken apart.

    Attributes:
        inner: `input`, of which the second factor is taken apart.
        kernel: of the layer.
        most: rank of the outputs.
    """

    inner: PairDecomposition
    kernel: Sizes
    most: int

    def _outer(self, ranks: Ranks) -> tuple[Array, PairDecomposition]:
        first, second = self.inner.weights(ranks[:1])
        gram = None if self.inner.problem.gram is None else self.inner.problem.lifted(first).gram
        ones = (1,) * len(self.kernel)
        return first, PairDecomposition.of(Problem(second, gram), self.kernel, ones, ranks[1])

    def weights(self, ranks: Ranks) -> list[Array]:
        """All three."""
        first, outer = self._outer(ranks)
        return [first, *outer.weights(ranks[1:])]

    def lost(self, ranks: Ranks) -> float:
        """By the inputs, and of the rest by the outputs."""
        before = self.inner.lost(ranks[:1])
        return before + (1.0 - before) * self._outer(ranks)[1].lost(ranks[1:])


@dataclass(frozen=True)
class SeparableDecomposition(Decomposition):
    """Every channel's part of the weight taken apart by itself.

    Attributes:
        problem: what was taken apart.
        parts: the directions of every channel of every group.
        moments: of every group; None to come close to the weight, of which the channels do not interact.
    """

    problem: Problem
    parts: Sequence[Directions]
    moments: Sequence[ChannelMoments] | None

    @staticmethod
    def of(problem: Problem, most: int) -> SeparableDecomposition:
        """Directions of every channel, up to `most`, by the moments of that channel."""
        weight = problem.weight
        channels = problem.matrix().reshape(-1, math.prod(problem.kernel), weight.shape[2])
        if problem.gram is None:
            found = [directions(channel, most) for channel in channels]
            return SeparableDecomposition(problem, found, None)
        pairs = zip(problem.gram, problem.matrix(), strict=True)
        moments = [ChannelMoments.of(gram, matrix, weight.shape[1]) for gram, matrix in pairs]
        own = itertools.chain.from_iterable(each.own for each in moments)
        return SeparableDecomposition(
            problem, [directions(*pair) for pair in zip(channels, itertools.repeat(most), own)], moments
        )

    def weights(self, ranks: Ranks) -> list[Array]:
        """Filters, and what mixes their results."""
        groups, inputs, outputs = self.problem.weight.shape[:3]
        found = [self._group(group, ranks[0]) for group in range(groups)]
        filters = np.concatenate([each for each, _ in found]).swapaxes(1, 2)
        mix = np.stack([each for _, each in found])
        ones = (1,) * len(self.problem.kernel)
        return [
            filters.reshape(groups * inputs, 1, ranks[0], *self.problem.kernel),
            mix.reshape(groups, inputs * ranks[0], outputs, *ones),
        ]

    def lost(self, ranks: Ranks) -> float:
        """From the lengths of the directions left out, or of what least squares leaves."""
        if self.moments is None:
            kept = sum(float(part.power[: ranks[0]].sum()) for part in self.parts)
        else:
            found = [self._group(group, ranks[0]) for group in range(len(self.moments))]
            kept = sum(each.explained(*pair) for each, pair in zip(self.moments, found, strict=True))
        return max(1.0 - kept / (self.problem.power + _NOTHING), 0.0)

    def _group(self, group: int, rank: int) -> tuple[Array, Array]:
        """Filters [inputs, kernel, rank] and mix [inputs·rank, outputs] of one group."""
        inputs = self.problem.weight.shape[1]
        mine = self.parts[group * inputs : (group + 1) * inputs]
        filters = np.stack([part.left[:, :rank] for part in mine])
        if self.moments is None:
            return filters, np.concatenate([part.right[:rank] for part in mine])
        return self.moments[group].alternated(filters)


@dataclass(frozen=True)
class ChannelMoments:
    """Second moments of patches of one group, by channel, for filters [inputs, kernel, rank] and their mix.

    Attributes:
        gram: [inputs·kernel, inputs·kernel].
        wanted: products of patches and of what is to be made of them, [inputs·kernel, outputs].
        inputs: number of channels.
    """

    gram: Array
    wanted: Array
    inputs: int

    @classmethod
    def of(cls, gram: Array, matrix: Array, inputs: int) -> ChannelMoments:
        """For a weight [inputs·kernel, outputs]."""
        return cls(gram, gram @ matrix, inputs)

    @property
    def own(self) -> Array:
        """Those within channels, [inputs, kernel, kernel]."""
        size = len(self.gram) // self.inputs
        blocks = self.gram.reshape(self.inputs, size, self.inputs, size)
        return np.asarray(np.einsum("iaib->iab", blocks))

    def alternated(self, filters: Array) -> tuple[Array, Array]:
        """The best mix of what filters make, the best filters for that mix, and so on; ends with a mix."""
        for _ in range(TURNS):
            filters = self.filters(filters, self.mix(filters))
        return filters, self.mix(filters)

    def mix(self, filters: Array) -> Array:
        """Least squares for given filters, [inputs·rank, outputs]."""
        return solve(self._within(filters), self._through(filters, self.wanted))

    def filters(self, filters: Array, mix: Array) -> Array:
        """Least squares for a given mix, one channel after the other while those of the others stay.

        Of one channel it is G L Q = R, with moments of its patches on one side and products of its rows of
        the mix on the other, so that both are solved by themselves.
        """
        found: Array = filters.copy()
        _, size, rank = filters.shape
        made, products = self._made(filters), mix @ mix.T
        for channel in range(self.inputs):
            here = slice(channel * size, (channel + 1) * size)
            mine = slice(channel * rank, (channel + 1) * rank)
            gram, own = self.gram[here, here], products[mine, mine]
            others = made[here] @ products[:, mine] - gram @ found[channel] @ own
            right = self.wanted[here] @ mix[mine].T - others
            found[channel] = solve(own, solve(gram, right).T).T
            made[:, mine] = self.gram[:, here] @ found[channel]
        return found

    def explained(self, filters: Array, mix: Array) -> float:
        """Power of what filters and their best mix make."""
        return float((mix * (self._within(filters) @ mix)).sum())

    def _made(self, filters: Array) -> Array:
        """Products of patches and of what filters make of them, [inputs·kernel, inputs·rank]."""
        by_channel: Array = self.gram.reshape(len(self.gram), self.inputs, -1)
        found = np.einsum("rik,ikt->rit", by_channel, filters, optimize=True)
        return np.asarray(found.reshape(len(self.gram), -1))

    def _through(self, filters: Array, values: Array) -> Array:
        """Values [inputs·kernel, n] as filters sum them up, [inputs·rank, n]."""
        split = values.reshape(self.inputs, filters.shape[1], -1)
        found: Array = np.matmul(filters.swapaxes(1, 2), split)
        return found.reshape(-1, values.shape[1])

    def _within(self, filters: Array) -> Array:
        """Second moments of what filters make, [inputs·rank, inputs·rank]."""
        return self._through(filters, self._made(filters))


SCHEMES: dict[str, Scheme] = {
    each.name: each for each in (Svd(), Output(), Input(), Spatial(), Tucker(), Separable())
}


# ---------------------------------------------------------------------------------------- linear algebra


@dataclass(frozen=True)
class Directions:
    """A matrix as a sum of products of a column and a row, in falling order of what they contribute.

    Attributes:
        left: [rows, rank]; orthonormal if no metric was given.
        right: [rank, columns].
        power: [rank], squared length of each product as the metric measures it.
    """

    left: Array
    right: Array
    power: Array


def merged(weights: Sequence[Array], kernel: Sizes) -> Array:
    """The one matrix that a chain of factors comes to, [groups, inputs·kernel, outputs]."""
    first, *rest = weights
    if not rest:
        return Problem(first).matrix()
    first = _together(first, weights[-1].shape[0])
    left = tuple(1 if own > 1 else size for own, size in zip(first.shape[3:], kernel, strict=True))
    return _lift(first, kernel) @ merged(rest, left)


def _together(weight: Array, groups: int) -> Array:
    """The same layer in fewer groups, with zeros between what is now in one."""
    many, inputs, outputs, *kernel = weight.shape
    if many == groups:
        return weight
    each = many // groups
    found = np.zeros((groups, each, inputs, each, outputs, *kernel))
    split: Array = weight.reshape(groups, each, inputs, outputs, *kernel)
    for part in range(each):
        found[:, part, :, part] = split[:, part]
    whole: Array = found.reshape(groups, each * inputs, each * outputs, *kernel)
    return whole


def directions(matrix: Array, most: int, metric: Array | None = None) -> Directions:
    """The leading directions of a matrix.

    Args:
        matrix: [rows, columns].
        most: their number, at most the smaller side.
        metric: [rows, rows], positive semidefinite: for every rank, the difference D from the matrix has the
            least trace of Dᵀ·metric·D. None is the identity: the singular value decomposition.

    The eigenvectors of the smaller Gram matrix are found in float64, no more of them than wanted: an order of
    magnitude faster than a full decomposition, and exact for leading directions.
    """
    rows, columns = matrix.shape
    if metric is None and min(rows, columns) >= LARGE and most * SHARE <= min(rows, columns):
        return _projected(matrix, most)
    if columns <= rows:
        weighted = matrix if metric is None else metric @ matrix
        power, right = leading(matrix.T @ weighted, most)
        left = matrix @ right
        if metric is not None:
            return Directions(left, right.T, power)
        lengths = np.linalg.norm(left, axis=0) + _NOTHING
        return Directions(left / lengths, right.T * lengths[:, None], power)
    root = None if metric is None else cholesky(metric)
    weighted = matrix if root is None else root.T @ matrix
    power, left = leading(weighted @ weighted.T, most)
    right = left.T @ weighted
    if root is not None:
        left = scipy.linalg.solve_triangular(root.T, left, lower=False)
    return Directions(left, right, power)


def leading(symmetric: Array, most: int) -> tuple[Array, Array]:
    """Largest eigenvalues of a positive semidefinite matrix, falling, and their eigenvectors as columns."""
    size = len(symmetric)
    values, vectors = scipy.linalg.eigh(
        symmetric, subset_by_index=(size - most, size - 1), check_finite=False
    )
    return np.maximum(values[::-1], 0.0), vectors[:, ::-1]


def _projected(matrix: Array, most: int, turns: int = 2) -> Directions:
    """Randomized singular value decomposition (Halko et al. 2011, arXiv:0909.4061, algorithm 4.4)."""
    generator = np.random.default_rng(0)
    basis = matrix @ generator.standard_normal((matrix.shape[1], most + 10)).astype(matrix.dtype)
    for _ in range(turns):
        basis = np.linalg.qr(matrix @ (matrix.T @ np.linalg.qr(basis)[0]))[0]
    left, lengths, right = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    scaled = right[:most] * lengths[:most, None]
    return Directions(basis @ left[:, :most], scaled, np.square(lengths[:most]))


def cholesky(gram: Array) -> Array:
    """Lower triangular root of second moments, made positive definite."""
    return np.linalg.cholesky(_ridged(gram))


def solve(gram: Array, wanted: Array) -> Array:
    """Least-squares solution from second moments [k, k] and products with what is wanted [k, n]."""
    factor = scipy.linalg.cho_factor(_ridged(gram), lower=True, check_finite=False)
    return np.asarray(scipy.linalg.cho_solve(factor, wanted, check_finite=False))


def _ridged(gram: Array) -> Array:
    size = len(gram)
    return gram + np.eye(size) * (RIDGE * float(np.trace(gram)) / size + _NOTHING)


def balanced(weights: Sequence[Array]) -> list[Array]:
    """The same chain, with every inner channel scaled to equal weights on both of its sides.

    Rounding to few bits then costs both factors about the same.
    """
    found = [np.array(weight, dtype=np.float64) for weight in weights]
    for before, after in itertools.pairwise(found):
        into = np.square(before).sum(axis=(1, *range(3, before.ndim)), keepdims=True)
        out = np.square(after).sum(axis=tuple(range(2, after.ndim)), keepdims=True)
        # By inner channel; a layer of more groups than the next has the same ones in the same order.
        scale = ((out.ravel() + _NOTHING) / (into.ravel() + _NOTHING)) ** 0.25
        before *= scale.reshape(into.shape)
        after /= scale.reshape(out.shape)
    return found
