"""Operators that multiply by weights."""

from __future__ import annotations

import re

from onnxslim.learn.door import Tensor, functional, torch
from onnxslim.learn.forward.pooling import windows
from onnxslim.learn.rows import Call, forward


@forward("MatMul", weights=(0, 1))
def matmul(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return torch.matmul(x, y)


@forward("Gemm", weights=(0, 1, 2))
def gemm(call: Call, x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    x = x.t() if call.get("transA", 0) else x
    y = y.t() if call.get("transB", 0) else y
    alpha, beta = call.get("alpha", 1.0), call.get("beta", 1.0)
    if bias is None:
        found = torch.mm(x, y)
        return found if alpha == 1.0 else alpha * found
    return torch.addmm(bias, x, y, alpha=alpha, beta=beta)


@forward("Einsum", weights=(0, 1))
def einsum(call: Call, *tensors: Tensor) -> Tensor:
    return torch.einsum(re.sub(r"\s", "", call.get("equation", "")), *tensors)


@forward("Conv", weights=(1, 2))
def conv(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rank = weight.ndim - 2
    call.require(1 <= rank <= 3, f"Conv over {rank} axes")
    place = windows(call, x.shape[2:], weight.shape[2:])
    padding = place.before if place.is_even else 0
    if not place.is_even:
        x = functional.pad(x, place.padding())
    run = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
    return run(x, weight, bias, place.strides, padding, place.dilations, call.get("group", 1))


@forward("ConvTranspose", weights=(1, 2))
def conv_transpose(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rank = weight.ndim - 2
    call.require(1 <= rank <= 3, f"ConvTranspose over {rank} axes")
    strides, dilations = (call.ints(name) or [1] * rank for name in ("strides", "dilations"))
    more = call.ints("output_padding") or [0] * rank
    spans = [(size - 1) * step + 1 for size, step in zip(weight.shape[2:], dilations, strict=True)]
    full = [(size - 1) * step + span for size, step, span in zip(x.shape[2:], strides, spans, strict=True)]
    before, after = _cropped(call, list(x.shape[2:]), full, strides, more)
    run = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[rank - 1]
    groups = call.get("group", 1)
    if (
        before == after
        and min(before) >= 0
        and all(out < step for out, step in zip(more, strides, strict=True))
    ):
        return run(x, weight, bias, strides, before, more, groups, dilations)
    found = run(x, weight, None, strides, 0, 0, groups, dilations)
    ends = zip(reversed(before), reversed(after), reversed(more), strict=True)
    found = functional.pad(found, [each for first, last, out in ends for each in (-first, out - last)])
    return found if bias is None else found + bias.reshape(-1, *(1 for _ in range(rank)))


def _cropped(
    call: Call, sizes: list[int], full: list[int], strides: list[int], more: list[int]
) -> tuple[list[int], list[int]]:
    """What is cut off at both ends of each axis."""
    rank, automatic, wanted = len(full), call.get("auto_pad", "NOTSET"), call.ints("output_shape")
    if wanted is None and automatic not in ("SAME_UPPER", "SAME_LOWER"):
        pads = (call.ints("pads") if automatic == "NOTSET" else None) or [0] * (2 * rank)
        return pads[:rank], pads[rank:]
    goal = (
        [size * step for size, step in zip(sizes, strides, strict=True)] if wanted is None else wanted[-rank:]
    )
    missing = [size + out - to for size, out, to in zip(full, more, goal, strict=True)]
    half, rest = [each // 2 for each in missing], [each - each // 2 for each in missing]
    return (half, rest) if automatic == "SAME_UPPER" else (rest, half)


@forward("MatMulInteger")
def matmul_integer(
    call: Call, x: Tensor, y: Tensor, x_zero: Tensor | None = None, y_zero: Tensor | None = None
) -> Tensor:
    left, right = _moved(x, x_zero, 1), _moved(y, y_zero, 0)
    return torch.matmul(left, right).to(torch.int32)


@forward("ConvInteger")
def conv_integer(
    call: Call, x: Tensor, weight: Tensor, x_zero: Tensor | None = None, weight_zero: Tensor | None = None
) -> Tensor:
    codes = _moved(weight, weight_zero, weight.ndim - 1)
    found = conv(call, _moved(x, x_zero, 0), codes)
    return torch.round(found).to(torch.int32)


def _moved(codes: Tensor, zero: Tensor | None, behind: int) -> Tensor:
    """Codes less their zero point, in a type that products are exact in.

    Args:
        codes: integers.
        zero: one for all, or one for each slice along an axis.
        behind: axes behind that one.
    """
    if zero is None:
        return codes.double()
    return codes.double() - zero.reshape([*zero.shape, *([1] * behind * zero.ndim)]).double()
