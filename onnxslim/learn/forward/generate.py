"""Operators that make tensors of sizes and numbers."""

from __future__ import annotations

import numpy as np

from onnxslim.learn.door import Tensor, to_torch, torch
from onnxslim.learn.rows import Call, forward, int_list


@forward("Shape")
def shape(call: Call, x: Tensor) -> Tensor:
    sizes = list(x.shape)[call.get("start", 0) :]
    if call.has("end"):
        sizes = list(x.shape)[call.get("start", 0) : call.get("end", 0)]
    return torch.tensor(sizes, dtype=torch.int64)


@forward("Size")
def size(call: Call, x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), dtype=torch.int64)


@forward("ConstantOfShape")
def constant_of_shape(call: Call, sizes: Tensor) -> Tensor:
    value = call.array("value")
    filled = to_torch(np.zeros(1, np.float32) if value is None else value, call.real)
    return filled.reshape(()).expand(int_list(sizes)).clone()


@forward("Range")
def span(call: Call, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    first, last, step = (each.reshape(()).item() for each in (start, limit, delta))
    count = max(int(np.ceil((last - first) / step)), 0)
    return (first + torch.arange(count, dtype=torch.float64) * step).to(start.dtype)
