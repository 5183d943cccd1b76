"""Operators of later opsets as formulas, for where they are not there yet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from onnxslim.ir.graph import Tensor
from onnxslim.ops.body import Body

Results: TypeAlias = Sequence[Tensor | None]

# In half precision squares overflow, which ONNX Runtime's own kernels of normalizations are spared.
_WIDE = (None, np.dtype(np.float32), np.dtype(np.float64))


def gelu(b: Body, x: Tensor, like: Tensor) -> Tensor:
    """x/2 · (1 + erf(x / sqrt 2))."""
    if b.opset >= 20:
        return b.add("Gelu", x)
    error = b.add("Erf", b.add("Div", x, b.number(math.sqrt(2.0), like)))
    product = b.add("Mul", x, b.add("Add", error, b.number(1.0, like)))
    return b.add("Mul", product, b.number(0.5, like))


def swiglu(b: Body) -> Results:
    """x · sigmoid(alpha x) · z."""
    x, z, alpha = b.input(0), b.input(1), b.attr("alpha", 1.0)
    inner = x if alpha == 1.0 else b.add("Mul", x, b.number(alpha, x))
    return [b.add("Mul", b.add("Mul", x, b.add("Sigmoid", inner)), z)]


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


def simplified_norm(b: Body) -> Results:
    """SimplifiedLayerNormalization, which is RMSNormalization."""
    x, scale = b.input(0), b.input(1)
    return [root_normalized(b, x, scale, _epsilon(b, x), x)]


def _epsilon(b: Body, x: Tensor) -> float:
    """That of a normalization over the last axis alone."""
    axis, stash = b.attr("axis", -1), b.attr("stash_type", 1)
    b.require(b.is_last(x, axis), f"it normalizes from axis {axis} on, not over the last one")
    b.require(stash == 1, f"its stash_type is {stash}")
    return b.attr("epsilon", 1e-5)
