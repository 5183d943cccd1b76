"""Operators that read and write elements by their positions."""

from __future__ import annotations

import itertools
import math

from onnxslim.learn.door import Tensor, torch
from onnxslim.learn.rows import Call, forward, int_list


def _positive(indices: Tensor, size: int) -> Tensor:
    wide = indices.to(torch.int64)
    return torch.where(wide < 0, wide + size, wide)


@forward("Gather", weights=(0,))
def gather(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    axis = call.get("axis", 0) % x.ndim
    at = _positive(indices, x.shape[axis])
    found = x.index_select(axis, at.reshape(-1))
    return found.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


@forward("GatherElements", weights=(0,))
def gather_elements(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    axis = call.get("axis", 0) % x.ndim
    return torch.gather(x, axis, _positive(indices, x.shape[axis]))


@forward("GatherND", weights=(0,))
def gather_nd(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    shared, depth = call.get("batch_dims", 0), indices.shape[-1]
    lead = [torch.arange(size) for size in x.shape[:shared]]
    batch = [
        each.reshape([-1 if at == axis else 1 for at in range(indices.ndim - 1)])
        for axis, each in enumerate(lead)
    ]
    chosen = [_positive(indices[..., at], x.shape[shared + at]) for at in range(depth)]
    at = (*batch, *chosen)
    return x[at]


@forward("ScatterElements", "Scatter", weights=(0, 2))
def scatter_elements(call: Call, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    axis, how = call.get("axis", 0) % x.ndim, call.get("reduction", "none")
    at = _positive(indices, x.shape[axis])
    if how == "none":
        return x.scatter(axis, at, updates)
    return x.scatter_reduce(axis, at, updates, _REDUCTIONS[how], include_self=True)


_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@forward("ScatterND", weights=(0, 2))
def scatter_nd(call: Call, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """As one scatter along a single axis that all indexed ones are merged to."""
    depth, how = indices.shape[-1], call.get("reduction", "none")
    head, tail = x.shape[:depth], x.shape[depth:]
    strides = (
        list(itertools.accumulate(reversed(head[1:]), lambda a, b: a * b, initial=1))[::-1] if depth else []
    )
    number = sum(
        (_positive(indices[..., at], head[at]) * stride for at, stride in enumerate(strides)),
        torch.zeros(indices.shape[:-1], dtype=torch.int64),
    ).reshape(-1)
    width = math.prod(tail)
    rows, new = x.reshape(math.prod(head), width), updates.reshape(-1, width)
    at = number.unsqueeze(-1).expand(-1, width)
    if how == "none":
        return rows.scatter(0, at, new).reshape(x.shape)
    return rows.scatter_reduce(0, at, new, _REDUCTIONS[how], include_self=True).reshape(x.shape)


@forward("TensorScatter", weights=())
def tensor_scatter(call: Call, past: Tensor, update: Tensor, start: Tensor | None = None) -> Tensor:
    axis, (batch, length) = (
        call.get("axis", -2) % past.ndim,
        (past.shape[0], update.shape[call.get("axis", -2)]),
    )
    begins = [0] * batch if start is None else int_list(start)
    rows = []
    for at, begin in enumerate(begins):
        places = torch.arange(begin, begin + length)
        if call.get("mode", "linear") == "circular":
            places = places % past.shape[axis]
        rows.append(past[at].index_copy(axis - 1, places, update[at]))
    return torch.stack(rows)


@forward("OneHot")
def one_hot(call: Call, indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    count, axis = int_list(depth)[0], call.get("axis", -1)
    axis = axis + indices.ndim + 1 if axis < 0 else axis
    found = indices.to(torch.int64).unsqueeze(axis)
    inside = (found >= -count) & (found < count)
    shape = [-1 if at == axis else 1 for at in range(indices.ndim + 1)]
    hot = (found % count == torch.arange(count).reshape(shape)) & inside
    return torch.where(hot, values[1], values[0])


@forward("Compress")
def compress(call: Call, x: Tensor, condition: Tensor) -> Tensor:
    at = condition.nonzero().reshape(-1)
    return x.index_select(call.get("axis", 0), at) if call.has("axis") else x.reshape(-1).index_select(0, at)


@forward("NonZero")
def nonzero(call: Call, x: Tensor) -> Tensor:
    return x.nonzero().t()


@forward("Unique")
def unique(call: Call, x: Tensor) -> list[Tensor]:
    """Distinct slices, sorted or in the order in which they come first."""
    axis = call.get("axis", 0) % max(x.ndim, 1) if call.has("axis") else None
    flat = x.reshape(-1) if axis is None else x
    along = axis or 0
    _, inverse, counts = torch.unique(flat.detach(), return_inverse=True, return_counts=True, dim=along)
    inverse = inverse.reshape(-1)
    places = torch.arange(inverse.numel())
    first = torch.full((counts.numel(),), inverse.numel()).scatter_reduce(0, inverse, places, "amin")
    if not call.get("sorted", 1):
        order = first.argsort()
        first, counts, inverse = first[order], counts[order], order.argsort()[inverse]
    return [flat.index_select(along, first), first, inverse, counts]
