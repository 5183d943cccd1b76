"""Random chains of operators that rules look at, with taps in the middle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np

from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from tests.helpers import parse

Option = TypeVar("Option")


class Choices(Protocol):
    """Where a chain's choices come from."""

    def integer(self, low: int, high: int) -> int:
        """One of these or between them."""

    def one_of(self, options: Sequence[Option]) -> Option:
        """One of these."""

    def order(self, count: int) -> list[int]:
        """The numbers below, in some order."""


@dataclass(frozen=True)
class Drawn:
    """Choices of a random generator."""

    random: np.random.Generator

    def integer(self, low: int, high: int) -> int:
        """One of these or between them."""
        return int(self.random.integers(low, high + 1))

    def one_of(self, options: Sequence[Option]) -> Option:
        """One of these."""
        return options[int(self.random.integers(len(options)))]

    def order(self, count: int) -> list[int]:
        """The numbers below, in some order."""
        return [int(each) for each in self.random.permutation(count)]


@dataclass
class Chain:
    """A model as it grows: nodes in ONNX text, constants, and the shape of the last tensor."""

    choices: Choices
    values: np.random.Generator
    shape: tuple[int, ...]
    body: list[str] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    taps: list[tuple[str, int]] = field(default_factory=list)
    made: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    opset: int = 17
    last: str = "x"
    count: int = 0

    def fresh(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def constant(self, values: object, kind: type = np.float32) -> str:
        name = self.fresh()
        self.constants[name] = np.asarray(values, kind)
        return name

    def add(self, call: str, shape: tuple[int, ...] | None = None) -> None:
        """Append a node that reads the last tensor, `@` in the call, and makes the next one."""
        name = self.fresh()
        self.body.append(f"{name} = {call.replace('@', self.last)}")
        self.last, self.shape = name, self.shape if shape is None else shape
        if "to=11" not in call:
            self.made.append((self.last, self.shape))

    def pick(self, low: int, high: int) -> int:
        return self.choices.integer(low, high)

    def model(self) -> Model:
        declared = [
            f"{_KINDS[each.dtype.name]}{list(each.shape) or ''} {name}"
            for name, each in self.constants.items()
        ]
        outputs = [
            f"float{[f'{name}_{axis}' for axis in range(rank)] or ''} {name}".replace("'", "")
            for name, rank in dict([*self.taps, (self.last, len(self.shape))]).items()
        ]
        text = f"g ({', '.join([START, *declared])}) => ({', '.join(outputs)}) {{ {' '.join(self.body)} }}"
        return parse(text, self.constants, opset=self.opset)


START = "float[N,4,6,6] x, bool flag"
_KINDS = {"float32": "float", "int64": "int64", "bool": "bool"}


def _unary(chain: Chain) -> None:
    ops = ("Relu", "Abs", "Neg", "Ceil", "Sign", "Identity", "Dropout", "Cast<to=1>")
    chain.add(f"{chain.choices.one_of(ops)}(@)")


def _double(chain: Chain) -> None:
    chain.add("Cast<to=11>(@)")
    chain.add("Cast<to=1>(@)")
    # ONNX Runtime drops such a pair even if only a body reads what it makes, and then fails.
    chain.add("Abs(@)")


def _binary(chain: Chain) -> None:
    op = chain.choices.one_of(("Add", "Sub", "Mul", "Div"))
    shape = [size if chain.pick(0, 2) == 0 else 1 for size in chain.shape][chain.pick(0, len(chain.shape)) :]
    neutral = 0.0 if op in ("Add", "Sub") else 1.0
    values = np.full(shape, neutral) if chain.pick(0, 2) == 0 else chain.values.uniform(0.5, 2, shape)
    name = chain.constant(values)
    swap = op in ("Add", "Mul", "Sub") and chain.pick(0, 1)
    chain.add(f"{op}({name}, @)" if swap else f"{op}(@, {name})")


def _clip(chain: Chain) -> None:
    low, high = (chain.constant(chain.pick(-2, 3)) for _ in range(2))
    bounds = chain.choices.one_of((f"{low}, {high}", low, f", {high}"))
    if chain.pick(0, 1):
        chain.add(f"Clip(@, {bounds})")
    else:
        chain.add(f"Max(@, {low})")
        chain.add(f"Min(@, {high})")


def _transpose(chain: Chain) -> None:
    perm = chain.choices.order(len(chain.shape))
    chain.add(f"Transpose<perm={list(perm)}>(@)", tuple(chain.shape[axis] for axis in perm))


def _reshape(chain: Chain) -> None:
    dims = list(chain.shape)
    if len(dims) > 1 and chain.pick(0, 1):
        axis = chain.pick(0, len(dims) - 2)
        dims[axis : axis + 2] = [dims[axis] * dims[axis + 1]]
    elif dims and dims[-1] % 2 == 0:
        dims[-1:] = [2, dims[-1] // 2]
    target = list(dims)
    if dims and chain.pick(0, 1):
        target[chain.pick(0, len(dims) - 1)] = -1
    if dims and dims[0] == chain.shape[0] and target[0] != -1 and chain.pick(0, 1):
        target[0] = 0
    chain.add(f"Reshape(@, {chain.constant(target, np.int64)})", tuple(dims))


def _axes(chain: Chain) -> None:
    ones = [axis for axis, size in enumerate(chain.shape) if size == 1]
    if ones and chain.pick(0, 1):
        axis = chain.choices.one_of(ones)
        shape = (*chain.shape[:axis], *chain.shape[axis + 1 :])
        chain.add(
            f"Squeeze(@, {chain.constant([axis - chain.pick(0, 1) * len(chain.shape)], np.int64)})", shape
        )
    elif len(chain.shape) < 5:
        axis = chain.pick(0, len(chain.shape))
        shape = (*chain.shape[:axis], 1, *chain.shape[axis:])
        chain.add(f"Unsqueeze(@, {chain.constant([axis], np.int64)})", shape)


def _slice(chain: Chain) -> None:
    if not chain.shape:
        return
    axis = chain.pick(0, len(chain.shape) - 1)
    start, end = chain.pick(0, 2), chain.choices.one_of((-1, 2, 3, 4, 2**31 - 1, 2**63 - 1))
    size = len(range(chain.shape[axis])[start:end])
    if size:
        limits = ", ".join(chain.constant([value], np.int64) for value in (start, end, axis))
        chain.add(f"Slice(@, {limits})", tuple(size if a == axis else s for a, s in enumerate(chain.shape)))


def _concat(chain: Chain) -> None:
    if not chain.shape or np.prod(chain.shape) > 2000:
        return
    axis, times = chain.pick(0, len(chain.shape) - 1), chain.pick(1, 2)
    shape = tuple(size * times if each == axis else size for each, size in enumerate(chain.shape))
    chain.add(f"Concat<axis={axis}>({', '.join('@' * times)})", shape)


def _split(chain: Chain) -> None:
    axes = [axis for axis, size in enumerate(chain.shape) if size % 2 == 0]
    if not axes:
        return
    axis = chain.choices.one_of(axes)
    left, right = chain.fresh(), chain.fresh()
    count = ", num_outputs=2" if chain.opset >= 18 else ""
    chain.body.append(f"{left}, {right} = Split<axis={axis}{count}>({chain.last})")
    parts = [left, right] if chain.pick(0, 1) else [right, left]
    chain.add(f"Concat<axis={axis}>({', '.join(parts)})")


def _where(chain: Chain) -> None:
    flag = chain.constant(chain.pick(0, 1), np.bool_)
    chain.add(f"Where({flag}, @, {chain.last})")


def _expand(chain: Chain) -> None:
    ones = chain.constant([1] * len(chain.shape), np.int64)
    chain.add(f"{chain.choices.one_of(('Expand', 'Tile'))}(@, {ones})")


def _layer(chain: Chain) -> None:
    if len(chain.shape) == 4:
        groups = 2 if chain.shape[1] % 2 == 0 and chain.pick(0, 1) else 1
        weight = chain.constant(chain.values.standard_normal((4, chain.shape[1] // groups, 1, 1)))
        chain.add(f"Conv<group={groups}>(@, {weight})", (chain.shape[0], 4, *chain.shape[2:]))
    elif len(chain.shape) >= 2:
        weight = chain.constant(chain.values.standard_normal((chain.shape[-1], 3)))
        chain.add(f"MatMul(@, {weight})", (*chain.shape[:-1], 3))


def _norm(chain: Chain) -> None:
    if len(chain.shape) > 1:
        values = [chain.values.uniform(0.5, 1.5, chain.shape[1]) for _ in range(4)]
        chain.add(f"BatchNormalization(@, {', '.join(map(chain.constant, values))})")


def _pad(chain: Chain) -> None:
    if len(chain.shape) == 4 and max(chain.shape) < 20:
        top, left = chain.pick(0, 1), chain.pick(0, 1)
        shape = (*chain.shape[:2], chain.shape[2] + top, chain.shape[3] + left)
        chain.add(f"Pad(@, {chain.constant([0, 0, top, 0, 0, 0, 0, left], np.int64)})", shape)


def _pool(chain: Chain) -> None:
    if len(chain.shape) == 4 and min(chain.shape[2:]) > 1:
        shape = (*chain.shape[:2], chain.shape[2] - 1, chain.shape[3] - 1)
        chain.add("AveragePool<kernel_shape=[2,2]>(@)", shape)


def _tap(chain: Chain) -> None:
    """The last tensor becomes an output of the model too."""
    if chain.last != "x":
        chain.taps.append((chain.last, len(chain.shape)))


def _capture(chain: Chain) -> None:
    """Both branches of an If read the last tensor."""
    rank = (
        str([f"d{chain.count}_{axis}" for axis in range(len(chain.shape))]).replace("'", "")
        if chain.shape
        else ""
    )
    names = [chain.fresh() for _ in range(3)]
    chain.add(
        f"If(flag) <then_branch = t () => (float{rank} {names[0]}) {{ {names[1]} = Identity(@)"
        f" {names[0]} = Neg({names[1]}) }}, else_branch = e () => (float{rank} {names[2]})"
        f" {{ {names[2]} = Relu(@) }}>"
    )


def _join(chain: Chain) -> None:
    """The last tensor and an earlier one of its shape: what was a chain branches."""
    earlier = [name for name, shape in chain.made[:-1] if shape == chain.shape]
    if earlier:
        other = chain.choices.one_of(earlier)
        chain.add(f"{chain.choices.one_of(('Add', 'Mul', 'Sub'))}(@, {other})")


def _mask(chain: Chain) -> None:
    before = chain.last, chain.shape
    shape = [size if chain.pick(0, 1) else 1 for size in chain.shape]
    flags = np.ones(shape, np.bool_) if chain.pick(0, 1) else chain.values.random(shape) < 0.5
    low, high = chain.constant(-2.0), chain.constant(chain.pick(0, 1))
    chain.add(f"Where({chain.constant(flags, np.bool_)}, {high}, {low})", tuple(shape))
    mask = chain.last
    chain.last, chain.shape = before
    chain.add(f"{chain.choices.one_of(('Add', 'Mul'))}(@, {mask})")


def _mean(chain: Chain, source: str, keep: int = 1) -> str:
    name = chain.fresh()
    if chain.opset >= 18:
        axes = chain.constant([-1], np.int64)
        chain.body.append(f"{name} = ReduceMean<keepdims={keep}>({source}, {axes})")
    else:
        chain.body.append(f"{name} = ReduceMean<axes=[-1], keepdims={keep}>({source})")
    return name


def _reduce(chain: Chain) -> None:
    if len(chain.shape) > 1:
        keep = chain.pick(0, 1)
        chain.last = _mean(chain, chain.last, keep)
        chain.shape = (*chain.shape[:-1], 1) if keep else chain.shape[:-1]


def _normalize(chain: Chain) -> None:
    """A layer normalization or RMS one in single steps, with now and then a step that is none."""
    if not chain.shape or chain.shape[-1] < 2:
        return
    x, centred = chain.last, chain.pick(0, 1)
    if centred:
        chain.add(f"Sub(@, {_mean(chain, x)})")
    d = chain.last
    chain.add(f"Pow(@, {chain.constant(2.0)})")
    deviation = _mean(chain, chain.last)
    chain.body.append(f"{(e := chain.fresh())} = Add({deviation}, {chain.constant(1e-3)})")
    chain.body.append(f"{(r := chain.fresh())} = Sqrt({e})")
    chain.last = d
    chain.add(f"Div(@, {r})")
    size = chain.choices.one_of((chain.shape[-1:], (1,), chain.shape[-1:]))
    chain.add(f"Mul(@, {chain.constant(chain.values.uniform(0.5, 2, size))})")
    if chain.pick(0, 1):
        chain.add(f"Add(@, {chain.constant(chain.values.uniform(0.5, 2, size))})")


def _gelu(chain: Chain) -> None:
    x, exact = chain.last, chain.pick(0, 1)
    if exact:
        chain.add(f"Div(@, {chain.constant(2**0.5)})")
    else:
        chain.add(f"Pow(@, {chain.constant(chain.choices.one_of((3.0, 3.0, 2.0)))})")
        chain.add(f"Mul(@, {chain.constant(0.044715)})")
        chain.add(f"Add(@, {x})")
        chain.add(f"Mul(@, {chain.constant((2 / np.pi) ** 0.5)})")
    chain.add(f"{'Erf' if exact else 'Tanh'}(@)")
    chain.add(f"Add(@, {chain.constant(1.0)})")
    for factor in chain.choices.one_of([(x, half := chain.constant(0.5)), (half, x)]):
        chain.add(f"Mul(@, {factor})")


def _hard_swish(chain: Chain) -> None:
    x = chain.last
    if chain.pick(0, 1):
        chain.add("HardSigmoid<alpha=0.16666667, beta=0.5>(@)")
    else:
        high = chain.constant(chain.choices.one_of((6.0, 6.0, 5.0)))
        chain.add(f"Add(@, {chain.constant(3.0)})")
        chain.add(f"Clip(@, {chain.constant(0.0)}, {high})")
        chain.add(f"Div(@, {high})")
    chain.add(f"Mul(@, {x})")


def _heads(chain: Chain) -> None:
    """A product, split into heads, transposed and scaled, as attention does."""
    if len(chain.shape) == 3:
        weight = chain.constant(chain.values.standard_normal((chain.shape[-1], 4)) / 2)
        chain.add(f"MatMul(@, {weight})", (*chain.shape[:-1], 4))
        if chain.pick(0, 1):
            chain.add(f"Add(@, {chain.constant(chain.values.standard_normal(4))})")
        chain.add(f"Reshape(@, {chain.constant([0, 0, 2, 2], np.int64)})", (*chain.shape[:-1], 2, 2))
        chain.add("Transpose<perm=[0,2,1,3]>(@)", tuple(chain.shape[axis] for axis in (0, 2, 1, 3)))
        chain.add(f"{chain.choices.one_of(('Mul', 'Div'))}(@, {chain.constant(0.5)})")


def _merged(chain: Chain) -> None:
    """The last two axes change places behind a Reshape that merges the others."""
    if len(chain.shape) == 4:
        first, second, third, fourth = chain.shape
        flat = first * second
        chain.add(f"Reshape(@, {chain.constant([-1, third, fourth], np.int64)})", (flat, third, fourth))
        chain.add("Transpose<perm=[0,2,1]>(@)", (flat, fourth, third))
        split = chain.constant([-1, second, fourth, third], np.int64)
        chain.add(f"Reshape(@, {split})", (first, second, fourth, third))


def _parts(chain: Chain) -> None:
    """Slices that are all of an axis, or nearly, put together in another order."""
    axes = [axis for axis, size in enumerate(chain.shape) if size > 2]
    if not axes:
        return
    axis = chain.choices.one_of(axes)
    size, where = chain.shape[axis], chain.constant([axis - chain.pick(0, 1) * len(chain.shape)], np.int64)
    cut, gap = chain.pick(1, size - 2), chain.choices.one_of((0, 0, 0, 1))
    names = []
    for start, end in ((0, cut), (cut + gap, size)):
        limits = ", ".join(chain.constant([value], np.int64) for value in (start, end))
        names.append(chain.fresh())
        chain.body.append(f"{names[-1]} = Slice({chain.last}, {limits}, {where})")
    shape = tuple(each - gap if place == axis else each for place, each in enumerate(chain.shape))
    chain.add(f"Concat<axis={axis}>({', '.join(reversed(names))})", shape)


def _gate(chain: Chain) -> None:
    if len(chain.shape) == 4:
        x, channels = chain.last, chain.shape[1]
        weight = chain.constant(chain.values.standard_normal((channels, channels, 1, 1)))
        chain.add(f"Conv(@, {weight}, {chain.constant(chain.values.standard_normal(channels))})")
        if chain.pick(0, 2):
            chain.add("HardSigmoid<alpha=0.3>(@)")
        chain.add(f"Mul(@, {x})")
        chain.add(f"Add({x}, @)")


def _grid(chain: Chain) -> None:
    """Something larger that is computed from constants."""
    shape = chain.constant(chain.shape, np.int64)
    small = chain.constant(chain.choices.one_of((0.0, 0.5, 0.3)))
    name = chain.fresh()
    call = f"Expand({small}, {shape})" if chain.pick(0, 1) else f"ConstantOfShape({shape})"
    chain.body.append(f"{name} = {call}")
    for _ in range(chain.pick(0, 2)):
        inner, name = name, chain.fresh()
        chain.body.append(f"{name} = Cos({inner})")
    chain.add(f"Add(@, {name})")


def _uniform(chain: Chain) -> None:
    """A layer and a normalization whose values are each one number."""
    if len(chain.shape) != 4:
        return
    wide, long = (chain.constant(shape, np.int64) for shape in ([4, chain.shape[1], 1, 1], [4]))
    weight, scale = chain.fresh(), chain.fresh()
    chain.body.append(f"{weight} = ConstantOfShape<value = float[1] {{0.5}}>({wide})")
    chain.body.append(f"{scale} = ConstantOfShape<value = float[1] {{0.25}}>({long})")
    chain.add(f"Conv(@, {weight})", (chain.shape[0], 4, *chain.shape[2:]))
    if chain.pick(0, 2):
        uneven = chain.constant(chain.values.uniform(0.5, 1.5, 4)) if chain.pick(0, 3) == 0 else scale
        chain.add(f"BatchNormalization(@, {scale}, {uneven}, {scale}, {scale})")


def _recurrent(chain: Chain) -> None:
    if len(chain.shape) == 3:
        steps, batch, size = chain.shape
        w, r = (chain.constant(chain.values.standard_normal((1, 12, each)) / 2) for each in (size, 4))
        ends = [chain.constant([value], np.int64) for value in (1, 4)]
        names = [chain.fresh() for _ in range(3)]
        chain.body.append(f"{names[0]} = Shape<start = 1, end = 2>({chain.last})")
        chain.body.append(f"{names[1]} = Concat<axis = 0>({ends[0]}, {names[0]}, {ends[1]})")
        fill = chain.pick(0, 1)
        chain.body.append(f"{names[2]} = ConstantOfShape<value = float[1] {{{fill}}}>({names[1]})")
        chain.add(f"GRU<hidden_size = 4>(@, {w}, {r}, , , {names[2]})", (steps, 1, batch, 4))


STEPS: tuple[Callable[[Chain], None], ...] = (
    _unary, _double, _binary, _binary, _clip, _transpose, _transpose, _reshape, _reshape, _axes, _slice,
    _concat, _split, _where, _expand, _layer, _layer, _norm, _pad, _pool, _tap, _capture,
    _join, _join, _mask, _reduce, _normalize, _gelu, _hard_swish, _heads, _merged,
    _parts, _parts, _gate, _grid, _uniform, _recurrent,
)  # fmt: skip


def random_chain(choices: Choices, values: np.random.Generator, *, fewest: int = 2, most: int = 16) -> Chain:
    """A chain of some steps."""
    chain = Chain(choices, values, (2, 4, 6, 6), opset=choices.one_of((17, 23)))
    for _ in range(choices.integer(fewest, most)):
        choices.one_of(STEPS)(chain)
        if len(chain.body) >= 30:
            break
    chain.add("Identity(@)")
    return chain
