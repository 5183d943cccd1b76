"""Integers as they are learnt: rounded on the way to the outputs, as if they were not on the way back."""

from __future__ import annotations

from collections.abc import Mapping

from onnxslim.learn.door import Tensor, torch
from onnxslim.learn.forward.elementwise import in_blocks
from onnxslim.learn.rows import Call, ForwardRow

Limits = tuple[int, int]


def straight_through(limits: Mapping[int, Limits]) -> ForwardRow:
    """QuantizeLinear with the straight-through estimator; its codes stay in floating point.

    With the multiplication by the scale in DequantizeLinear, gradients are those of LSQ (Esser et al.,
    "Learned Step Size Quantization", ICLR 2020): data gets that of its rounded value inside of the limits
    and none outside; the scale gets it times round(v) - v inside, where v is data by scale, and times the
    limit outside.

    Args:
        limits: least and largest codes, by id of the node; elsewhere those of the zero point's type.
    """

    def quantize(call: Call, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        if id(call.node) in limits:
            low, high = limits[id(call.node)]
        else:
            info = torch.iinfo(torch.uint8 if zero is None else zero.dtype)
            low, high = info.min, info.max
        middle = 0.0 if zero is None else in_blocks(x, zero, call).to(x.dtype)
        inside = torch.clamp(x / in_blocks(x, scale, call), low - middle, high - middle)
        return inside + (torch.round(inside) - inside).detach() + middle

    return ForwardRow(quantize)
