"""Operators that normalize, or make shares of a whole."""

from __future__ import annotations

import math

from onnxslim.learn.door import Tensor, functional, torch
from onnxslim.learn.rows import Call, forward, full_precision


def _per_channel(tensor: Tensor, rank: int) -> Tensor:
    return tensor.reshape(-1, *(1 for _ in range(rank - 2)))


@forward("BatchNormalization", weights=(1, 2))
def batch_normalization(
    call: Call, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor
) -> list[Tensor]:
    call.require(not call.get("training_mode", 0), "BatchNormalization by the statistics of a batch")
    call.require(call.opset >= 7 or bool(call.get("is_test", 0)), "BatchNormalization before opset 7")
    epsilon = call.get("epsilon", 1e-5)
    if mean.requires_grad or var.requires_grad:  # PyTorch's own has no gradients for these
        factor = scale * torch.rsqrt(var + epsilon)
        return [x * _per_channel(factor, x.ndim) + _per_channel(bias - mean * factor, x.ndim)]
    return [functional.batch_norm(x, mean, var, scale, bias, training=False, eps=epsilon)]


@forward("InstanceNormalization", weights=(1, 2))
def instance_normalization(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    axes = list(range(2, x.ndim))
    var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    normal = (x - mean) * torch.rsqrt(var + call.get("epsilon", 1e-5))
    return normal * _per_channel(scale, x.ndim) + _per_channel(bias, x.ndim)


@forward("GroupNormalization", weights=(1, 2))
def group_normalization(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups, epsilon = call.get("num_groups", 1), call.get("epsilon", 1e-5)
    if call.opset < 21:  # one of each for all channels of a group
        each = x.shape[1] // groups
        scale, bias = scale.repeat_interleave(each), bias.repeat_interleave(each)
    return functional.group_norm(full_precision(x), groups, scale, bias, epsilon).to(x.dtype)


@forward("LayerNormalization", weights=(1, 2))
def layer_normalization(call: Call, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    axis, epsilon = call.get("axis", -1) % x.ndim, call.get("epsilon", 1e-5)
    wide, sizes = full_precision(x), list(x.shape[axis:])
    if not call.wants(1) and not call.wants(2) and list(scale.shape) == sizes and x.dtype == wide.dtype:
        return [functional.layer_norm(x, sizes, scale, bias, epsilon)]
    var, mean = torch.var_mean(wide, list(range(axis, x.ndim)), correction=0, keepdim=True)
    inverse = torch.rsqrt(var + epsilon)
    found = ((wide - mean) * inverse).to(x.dtype) * scale
    return [found if bias is None else found + bias, mean, inverse]


@forward("RMSNormalization", weights=(1,))
def rms_normalization(call: Call, x: Tensor, scale: Tensor) -> Tensor:
    axis, epsilon = call.get("axis", -1) % x.ndim, call.get("epsilon", 1e-5)
    wide = full_precision(x)
    square = torch.mean(wide * wide, list(range(axis, x.ndim)), keepdim=True)
    return (wide * torch.rsqrt(square + epsilon)).to(scale.dtype) * scale


@forward("MeanVarianceNormalization")
def mean_variance_normalization(call: Call, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, call.ints("axes") or [0, 2, 3], correction=0, keepdim=True)
    return (x - mean) / (torch.sqrt(var) + 1e-9)


@forward("LpNormalization")
def lp_normalization(call: Call, x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, call.get("p", 2), dim=call.get("axis", -1), keepdim=True)
    return torch.where(
        norm == 0, torch.zeros_like(x), x / torch.where(norm == 0, torch.ones_like(norm), norm)
    )


@forward("LRN")
def local_response_normalization(call: Call, x: Tensor) -> Tensor:
    size = call.get("size", 1)
    before = (size - 1) // 2
    squares = functional.pad((x * x).flatten(2).transpose(1, 2), (before, size - 1 - before))
    window = squares.unfold(-1, size, 1).sum(-1).transpose(1, 2).reshape(x.shape)
    return x / (call.get("bias", 1.0) + call.get("alpha", 1e-4) / size * window) ** call.get("beta", 0.75)


@forward("Softmax", "LogSoftmax")
def softmax(call: Call, x: Tensor) -> Tensor:
    found = torch.softmax if call.node.op == "Softmax" else torch.log_softmax
    return _along(call, x, lambda rows, axis: found(rows, axis))


@forward("Hardmax", flat=True)
def hardmax(call: Call, x: Tensor) -> Tensor:
    def one_hot(rows: Tensor, axis: int) -> Tensor:
        return torch.zeros_like(rows).scatter(axis, rows.argmax(axis, keepdim=True), 1.0)

    return _along(call, x, one_hot)


def _along(call: Call, x: Tensor, compute: object) -> Tensor:
    """Along an axis, or before opset 13 along all from it on."""
    assert callable(compute)
    if call.opset >= 13:
        return compute(x, call.get("axis", -1))
    axis = call.get("axis", 1) % max(x.ndim, 1)
    return compute(x.reshape(math.prod(x.shape[:axis]), -1), 1).reshape(x.shape)
