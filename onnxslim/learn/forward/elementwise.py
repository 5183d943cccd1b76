"""Operators that compute element by element."""

from __future__ import annotations

from functools import reduce

import numpy as np

from onnxslim.learn.door import Tensor, functional, torch
from onnxslim.learn.rows import Call, forward

_BOTH = (0, 1)

# ------------------------------------------------------------------------------------------ arithmetic


def _aligned(call: Call, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Before opset 7, the second operand may be broadcast from an axis on."""
    if call.opset < 7 and call.has("axis") and y.ndim < x.ndim:
        y = y.reshape(*y.shape, *(1 for _ in range(x.ndim - call.get("axis", 0) - y.ndim)))
    return x, y


@forward("Add", weights=_BOTH)
def add(call: Call, x: Tensor, y: Tensor) -> Tensor:
    x, y = _aligned(call, x, y)
    return x + y


@forward("Sub", weights=_BOTH)
def sub(call: Call, x: Tensor, y: Tensor) -> Tensor:
    x, y = _aligned(call, x, y)
    return x - y


@forward("Mul", weights=_BOTH)
def mul(call: Call, x: Tensor, y: Tensor) -> Tensor:
    x, y = _aligned(call, x, y)
    return x * y


@forward("Div", weights=_BOTH)
def div(call: Call, x: Tensor, y: Tensor) -> Tensor:
    x, y = _aligned(call, x, y)
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


@forward("Pow")
def power(call: Call, x: Tensor, exponent: Tensor) -> Tensor:
    # A number is faster than a tensor of one, and its square has a gradient at 0.
    if exponent.numel() == 1 and not exponent.requires_grad:
        return torch.pow(x, exponent.item()).to(x.dtype).expand(_common(x, exponent))
    return torch.pow(x, exponent).to(x.dtype)


def _common(x: Tensor, y: Tensor) -> Tensor:
    return torch.broadcast_shapes(x.shape, y.shape)


@forward("Mod")
def mod(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return torch.fmod(x, y) if call.get("fmod", 0) else torch.remainder(x, y)


@forward("Neg")
def neg(call: Call, x: Tensor) -> Tensor:
    return -x


@forward("Reciprocal")
def reciprocal(call: Call, x: Tensor) -> Tensor:
    return 1 / x


@forward("Sum", weights=_BOTH)
def total(call: Call, *tensors: Tensor) -> Tensor:
    return reduce(torch.add, tensors)


@forward("Mean", weights=_BOTH)
def mean(call: Call, *tensors: Tensor) -> Tensor:
    return reduce(torch.add, tensors) / len(tensors)


@forward("Max")
def maximum(call: Call, *tensors: Tensor) -> Tensor:
    return reduce(torch.maximum, tensors)


@forward("Min")
def minimum(call: Call, *tensors: Tensor) -> Tensor:
    return reduce(torch.minimum, tensors)


@forward("Clip")
def clip(call: Call, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    limits = [None if each is None else each.reshape(()) for each in (low, high)]
    if call.opset < 11:
        limits = [
            torch.tensor(call.get(name, 0.0), dtype=x.dtype) if call.has(name) else None for name in _LIMITS
        ]
    for limit, bound in zip(limits, (torch.maximum, torch.minimum), strict=True):
        if limit is not None:
            x = bound(x, limit) if limit.requires_grad else _limited(x, limit, bound is torch.maximum)
    return x


_LIMITS = ("min", "max")


def _limited(x: Tensor, limit: Tensor, is_low: bool) -> Tensor:
    """Gradients pass at the limit itself, as those of activations with limits are usually taken."""
    value = limit.item()
    return torch.clamp(x, min=value) if is_low else torch.clamp(x, max=value)


# ---------------------------------------------------------------------------------- functions of numbers


@forward("Abs")
def absolute(call: Call, x: Tensor) -> Tensor:
    return x.abs()


@forward("Exp", "Log", "Sqrt", "Erf", "Sin", "Cos", "Tan", "Sinh", "Cosh", "Tanh", "Asin", "Acos", "Atan")
@forward("Asinh", "Acosh", "Atanh", "Sigmoid")
def function(call: Call, x: Tensor) -> Tensor:
    return getattr(torch, call.node.op.lower())(x)


@forward("Ceil", "Floor", "Round", "Sign", flat=True)
def step(call: Call, x: Tensor) -> Tensor:
    return getattr(torch, call.node.op.lower())(x)


# ----------------------------------------------------------------------------------------- activations


@forward("Relu")
def relu(call: Call, x: Tensor) -> Tensor:
    return torch.relu(x)


@forward("LeakyRelu")
def leaky_relu(call: Call, x: Tensor) -> Tensor:
    return functional.leaky_relu(x, call.get("alpha", 0.01))


@forward("PRelu", weights=(1,))
def prelu(call: Call, x: Tensor, slope: Tensor) -> Tensor:
    if call.opset < 7 and slope.ndim == 1 and slope.numel() > 1:
        slope = slope.reshape(-1, *(1 for _ in range(x.ndim - 2)))
    return torch.relu(x) - slope * torch.relu(-x)


@forward("ThresholdedRelu")
def thresholded_relu(call: Call, x: Tensor) -> Tensor:
    return functional.threshold(x, call.get("alpha", 1.0), 0.0)


@forward("Elu")
def elu(call: Call, x: Tensor) -> Tensor:
    return functional.elu(x, call.get("alpha", 1.0))


@forward("Selu")
def selu(call: Call, x: Tensor) -> Tensor:
    alpha, gamma = call.get("alpha", 1.67326319217681884765625), call.get("gamma", 1.05070102214813232421875)
    return gamma * functional.elu(x, alpha)


@forward("Celu")
def celu(call: Call, x: Tensor) -> Tensor:
    return functional.celu(x, call.get("alpha", 1.0))


@forward("Gelu")
def gelu(call: Call, x: Tensor) -> Tensor:
    return functional.gelu(x, approximate=call.get("approximate", "none"))


@forward("HardSigmoid")
def hard_sigmoid(call: Call, x: Tensor) -> Tensor:
    return torch.clamp(call.get("alpha", 0.2) * x + call.get("beta", 0.5), 0.0, 1.0)


@forward("HardSwish")
def hard_swish(call: Call, x: Tensor) -> Tensor:
    return functional.hardswish(x)


@forward("Mish")
def mish(call: Call, x: Tensor) -> Tensor:
    return functional.mish(x)


@forward("Swish")
def swish(call: Call, x: Tensor) -> Tensor:
    return x * torch.sigmoid(call.get("alpha", 1.0) * x)


@forward("Softplus")
def softplus(call: Call, x: Tensor) -> Tensor:
    return functional.softplus(x)


@forward("Softsign")
def softsign(call: Call, x: Tensor) -> Tensor:
    return functional.softsign(x)


@forward("Shrink")
def shrink(call: Call, x: Tensor) -> Tensor:
    limit, bias = call.get("lambd", 0.5), call.get("bias", 0.0)
    return torch.where(x < -limit, x + bias, torch.where(x > limit, x - bias, torch.zeros_like(x)))


@forward("Dropout")
def dropout(
    call: Call, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None
) -> list[Tensor]:
    call.require(training is None or not bool(training) or not _drops(ratio), "Dropout that drops is random")
    kind = torch.bool if call.opset >= 10 else x.dtype
    return [x, *([torch.ones_like(x, dtype=kind)] if call.wants(1) else [])]


def _drops(ratio: Tensor | None) -> bool:
    return ratio is None or float(ratio) > 0


# ----------------------------------------------------------------------------- comparisons, logic, types


@forward("Equal", "Less", "Greater")
def compared(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return getattr(torch, {"Equal": "eq"}.get(call.node.op, call.node.op.lower()))(*_aligned(call, x, y))


@forward("LessOrEqual")
def less_or_equal(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return x <= y


@forward("GreaterOrEqual")
def greater_or_equal(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return x >= y


@forward("And", "Or", "Xor")
def logic(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return getattr(torch, f"logical_{call.node.op.lower()}")(*_aligned(call, x, y))


@forward("Not")
def inverted(call: Call, x: Tensor) -> Tensor:
    return torch.logical_not(x)


@forward("BitwiseAnd", "BitwiseOr", "BitwiseXor")
def bitwise(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return getattr(torch, f"bitwise_{call.node.op.removeprefix('Bitwise').lower()}")(x, y)


@forward("BitwiseNot")
def bitwise_not(call: Call, x: Tensor) -> Tensor:
    return torch.bitwise_not(x)


@forward("BitShift")
def bit_shift(call: Call, x: Tensor, y: Tensor) -> Tensor:
    left = call.get("direction", "LEFT") == "LEFT"
    return torch.bitwise_left_shift(x, y) if left else torch.bitwise_right_shift(x, y)


@forward("IsNaN")
def is_nan(call: Call, x: Tensor) -> Tensor:
    return torch.isnan(x)


@forward("IsInf")
def is_inf(call: Call, x: Tensor) -> Tensor:
    up, down = call.get("detect_positive", 1), call.get("detect_negative", 1)
    return (torch.isposinf(x) & bool(up)) | (torch.isneginf(x) & bool(down))


@forward("Where", weights=(1, 2))
def where(call: Call, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(condition, x, y)


@forward("Cast")
def cast(call: Call, x: Tensor) -> Tensor:
    return x.to(call.kind(call.get("to", 1)))


@forward("CastLike")
def cast_like(call: Call, x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)


# ------------------------------------------------------------------------------------------- integers


def _spread(x: Tensor, along: Tensor, axis: int) -> Tensor:
    """Scales or zero points, one for all or one per slice along an axis, in the rank of a tensor."""
    if along.ndim == 0 or along.numel() == 1:
        return along.reshape(())
    return along.reshape([-1 if each == axis % x.ndim else 1 for each in range(x.ndim)])


def in_blocks(x: Tensor, along: Tensor, call: Call) -> Tensor:
    """Scales or zero points of Q or DQ in the rank of a tensor; with `block_size`, one for each element."""
    axis, block = call.get("axis", 1), call.get("block_size", 0)
    if not block:
        return _spread(x, along, axis)
    return along.repeat_interleave(block, axis).narrow(axis % x.ndim, 0, x.shape[axis])


# Its scale is no weight: what rounds to it, and biases in units of it, would not follow.
@forward("DequantizeLinear")
def dequantize(call: Call, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    codes = x.to(scale.dtype)
    if zero is not None:
        codes = codes - in_blocks(x, zero, call).to(scale.dtype)
    return codes * in_blocks(x, scale, call)


@forward("QuantizeLinear")
def quantize(call: Call, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    kind = zero.dtype if zero is not None else torch.uint8
    if zero is None and call.get("output_dtype", 0):
        kind = call.kind(call.get("output_dtype", 2))
    codes = torch.round(x / in_blocks(x, scale, call))
    if zero is not None:
        codes = codes + in_blocks(x, zero, call)
    limits = torch.iinfo(kind)
    return torch.clamp(codes, limits.min, limits.max).to(kind)


@forward("DynamicQuantizeLinear")
def dynamic_quantize(call: Call, x: Tensor) -> list[Tensor]:
    low, high = torch.clamp(x.min(), max=0.0), torch.clamp(x.max(), min=0.0)
    scale = (high - low) / 255
    zero = torch.clamp(torch.round(-low / scale), 0, 255) if float(scale.detach()) else torch.zeros_like(low)
    codes = torch.clamp(torch.round(x / scale) + zero, 0, 255)
    return [codes.to(torch.uint8), scale, zero.to(torch.uint8)]


@forward("EyeLike")
def eye_like(call: Call, x: Tensor) -> Tensor:
    kind = call.kind(call.get("dtype", 1)) if call.has("dtype") else x.dtype
    rows, columns = np.indices(tuple(x.shape))
    return torch.as_tensor(columns == rows + call.get("k", 0)).to(kind)
