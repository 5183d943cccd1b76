"""Operators of later opsets as formulas, for where they are not there yet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from onnxslim.ir.graph import Tensor
from onnxslim.ops.body import Body, UnwrittenError, WriteBody

Results: TypeAlias = Sequence[Tensor | None]

# In half precision squares overflow, which ONNX Runtime's own kernels of normalizations are spared.
_WIDE = (None, np.dtype(np.float32), np.dtype(np.float64))
# The end of anything.
_ALL = 2**63 - 1


def gelu(b: Body, x: Tensor, like: Tensor) -> Tensor:
    """x/2 · (1 + erf(x / sqrt 2))."""
    if b.opset >= 20:
        return b.add("Gelu", x)
    error = b.add("Erf", b.add("Div", x, b.number(math.sqrt(2.0), like)))
    product = b.add("Mul", x, b.add("Add", error, b.number(1.0, like)))
    return b.add("Mul", product, b.number(0.5, like))


def tanh_gelu(b: Body, x: Tensor, like: Tensor) -> Tensor:
    """x/2 · (1 + tanh(sqrt(2/pi) (x + 0.044715 x³)))."""
    if b.opset >= 20:
        return b.add("Gelu", x, approximate="tanh")
    cubed = b.add("Mul", b.add("Pow", x, b.number(3.0, like)), b.number(0.044715, like))
    inner = b.add("Mul", b.add("Add", x, cubed), b.number(math.sqrt(2.0 / math.pi), like))
    factor = b.add("Add", b.add("Tanh", inner), b.number(1.0, like))
    return b.add("Mul", b.add("Mul", x, b.number(0.5, like)), factor)


def either_gelu(b: Body) -> Results:
    """Gelu, of either kind, where the opset does not have it."""
    x, kind = b.input(0), b.attr("approximate", "none")
    return [tanh_gelu(b, x, x) if kind == "tanh" else gelu(b, x, x)]


def swish(b: Body, alpha: float) -> Tensor:
    """x · sigmoid(alpha x)."""
    x = b.input(0)
    inner = x if alpha == 1.0 else b.add("Mul", x, b.number(alpha, x))
    return b.add("Mul", x, b.add("Sigmoid", inner))


def swiglu(b: Body) -> Results:
    """x · sigmoid(alpha x) · z."""
    return [b.add("Mul", swish(b, b.attr("alpha", 1.0)), b.input(1))]


def normalized(
    b: Body, x: Tensor, scale: Tensor, bias: Tensor | None, epsilon: float, like: Tensor
) -> Tensor:
    """LayerNormalization over the last axis."""
    if b.opset >= 17:
        return b.add("LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon)
    centred = b.add("Sub", x, b.reduced("ReduceMean", x, -1))
    made: Tensor = b.add("Mul", _divided(b, centred, epsilon, like), scale)
    return made if bias is None else b.add("Add", made, bias)


def root_normalized(b: Body, x: Tensor, scale: Tensor, epsilon: float, like: Tensor) -> Tensor:
    """RMSNormalization over the last axis."""
    if b.opset >= 23:
        return b.add("RMSNormalization", x, scale, axis=-1, epsilon=epsilon)
    return b.add("Mul", _divided(b, x, epsilon, like), scale)


def _divided(b: Body, x: Tensor, epsilon: float, like: Tensor) -> Tensor:
    """x over the root of the mean of its squares."""
    kind = b.dtype(like)
    b.require(kind in _WIDE, f"its steps would overflow in {kind}")
    mean = b.reduced("ReduceMean", b.add("Pow", x, b.number(2.0, like)), -1)
    return b.add("Div", x, b.add("Sqrt", b.add("Add", mean, b.number(epsilon, like))))


def layer_norm(b: Body) -> Results:
    """LayerNormalization, where the opset does not have it."""
    x, scale, bias = b.input(0), b.input(1), b.optional(2)
    return [normalized(b, x, scale, bias, _epsilon(b, x), x)]


def root_norm(b: Body) -> Results:
    """RMSNormalization and SimplifiedLayerNormalization, which is the same, where the opset has neither."""
    x, scale = b.input(0), b.input(1)
    return [root_normalized(b, x, scale, _epsilon(b, x), x)]


def _epsilon(b: Body, x: Tensor) -> float:
    """That of a normalization over the last axis alone."""
    axis, stash = b.attr("axis", -1), b.attr("stash_type", 1)
    b.require(b.is_last(x, axis), f"it normalizes from axis {axis} on, not over the last one")
    b.require(stash == 1, f"its stash_type is {stash}")
    return b.attr("epsilon", 1e-5)


def cast_like(b: Body) -> Results:
    """CastLike, where the type to cast to is known."""
    x, like = b.input(0), b.input(1)
    b.require(not b.attributes, "it rounds or saturates in a way of its own")
    kind = b.dtype(like)
    if kind is None:
        raise UnwrittenError(f"the type of '{like.name}' is not known")
    return [b.cast(x, kind)]


def part_of_shape(b: Body) -> Results:
    """Shape from one axis to another, before opset 15."""
    whole = b.add("Shape", b.input(0))
    start, end = b.attr("start", 0), b.attr("end", _ALL)
    if (start, end) == (0, _ALL):
        return [whole]
    return [b.add("Slice", whole, b.integers(start), b.integers(end), b.integers(0))]


def parts(b: Body) -> Results:
    """Split into a number of parts, the last of which may be smaller, before opset 18."""
    x, sizes, axis, count = b.input(0), b.optional(1), b.attr("axis", 0), b.attr("num_outputs", 0)
    if sizes is not None and b.opset < 13:
        stated = b.values(sizes)
        if stated is None:
            raise UnwrittenError("the sizes of its parts are no constants")
        return b.split(x, stated.tolist(), axis)
    if sizes is not None or not count:
        return b.add_many("Split", b.results, x, sizes, axis=axis)
    size = b.size(x, axis)
    each = -(-size // count)
    return b.split(x, [min(each, size - at * each) for at in range(count)], axis)


def reshaped(b: Body) -> Results:
    """Reshape, before opset 14 said whether a zero stands for a size of the input or for nothing."""
    x, target, zeros = b.input(0), b.input(1), b.attr("allowzero", 0)
    sizes = b.values(target)
    b.require(not zeros or (sizes is not None and 0 not in sizes), "a size of its target may be zero")
    return [b.add("Reshape", x, target)]


def over_axes(op: str) -> WriteBody:
    """A reduction, Squeeze or Unsqueeze whose axes are an attribute: before opset 13, most before 18."""

    def write(b: Body) -> Results:
        x, axes, idle = b.input(0), b.optional(1), b.attr("noop_with_empty_axes", 0)
        picked = () if axes is None else b.values(axes)
        if picked is None:
            raise UnwrittenError("its axes are no constants")
        b.require(len(picked) > 0 or not idle, "it runs over no axis at all")
        given = {"axes": tuple(map(int, picked))} if len(picked) else {}
        return [b.add(op, x, **given, **b.passed("keepdims"))]

    return write


def along_axis(op: str) -> WriteBody:
    """Softmax and its like over one axis, before opset 13 let that be another one than the last."""

    def write(b: Body) -> Results:
        x, axis = b.input(0), b.attr("axis", -1)
        if b.is_last(x, axis):
            return [b.add(op, x, axis=-1)]
        order = list(range(b.rank(x)))
        order[axis], order[-1] = order[-1], order[axis]
        return [b.swapped(b.add(op, b.swapped(x, *order), axis=-1), *order)]

    return write
