"""Operators that sum up along axes, or look for the largest."""

from __future__ import annotations

from onnxslim.learn.door import Tensor, torch
from onnxslim.learn.rows import Call, axes_of, forward, int_list


def _axes(call: Call, x: Tensor, given: Tensor | None) -> list[int]:
    """Axes to reduce: all where none are given, unless an attribute says otherwise."""
    axes = axes_of(call, given, x.ndim)
    if axes:
        return axes
    return [] if call.get("noop_with_empty_axes", 0) else list(range(x.ndim))


def _kept(call: Call) -> bool:
    return bool(call.get("keepdims", 1))


def _sum(call: Call, x: Tensor, axes: list[int]) -> Tensor:
    """The sum, in the type of what is summed."""
    return torch.sum(x, axes, keepdim=_kept(call), dtype=x.dtype) if axes else x


@forward("ReduceSum")
def reduce_sum(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    return _sum(call, x, _axes(call, x, axes))


@forward("ReduceMean")
def reduce_mean(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = _axes(call, x, axes)
    if not x.is_floating_point():
        return torch.mean(x.double(), chosen, keepdim=_kept(call)).to(x.dtype) if chosen else x
    return torch.mean(x, chosen, keepdim=_kept(call)) if chosen else x


@forward("ReduceSumSquare")
def reduce_sum_square(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    return _sum(call, x * x, _axes(call, x, axes))


@forward("ReduceL1")
def reduce_l1(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    return _sum(call, x.abs(), _axes(call, x, axes))


@forward("ReduceL2")
def reduce_l2(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = _axes(call, x, axes)
    return torch.linalg.vector_norm(x, dim=chosen, keepdim=_kept(call)) if chosen else x.abs()


@forward("ReduceLogSum")
def reduce_log_sum(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    return torch.log(_sum(call, x, _axes(call, x, axes)))


@forward("ReduceLogSumExp")
def reduce_log_sum_exp(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = _axes(call, x, axes)
    return torch.logsumexp(x, chosen, keepdim=_kept(call)) if chosen else x


@forward("ReduceMax", "ReduceMin")
def reduce_extreme(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = _axes(call, x, axes)
    if not chosen:
        return x
    found = torch.amax if call.node.op == "ReduceMax" else torch.amin
    numbers = x.to(torch.uint8) if x.dtype == torch.bool else x
    if not numbers.numel():
        return _of_nothing(call, x, chosen)
    return found(numbers, chosen, keepdim=_kept(call)).to(x.dtype)


def _of_nothing(call: Call, x: Tensor, axes: list[int]) -> Tensor:
    """The largest of no elements is the smallest number there is, and the other way round."""
    smallest = call.node.op == "ReduceMax"
    sizes = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
    kept = sizes if _kept(call) else [size for axis, size in enumerate(x.shape) if axis not in axes]
    if x.dtype == torch.bool:
        return torch.full(kept, not smallest)
    value = float("inf") if x.is_floating_point() else torch.iinfo(x.dtype).max
    if smallest:
        value = -value if x.is_floating_point() else torch.iinfo(x.dtype).min
    return torch.full(kept, value, dtype=x.dtype)


@forward("ReduceProd")
def reduce_prod(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    for axis in sorted(_axes(call, x, axes), reverse=True):
        x = torch.prod(x, axis, keepdim=_kept(call), dtype=x.dtype)
    return x


@forward("ArgMax", "ArgMin")
def arg_extreme(call: Call, x: Tensor) -> Tensor:
    axis, last = call.get("axis", 0) % x.ndim, call.get("select_last_index", 0)
    found = torch.argmax if call.node.op == "ArgMax" else torch.argmin
    index = found(x.flip(axis) if last else x, axis, keepdim=_kept(call))
    return x.shape[axis] - 1 - index if last else index


@forward("TopK")
def top_k(call: Call, x: Tensor, count: Tensor | None = None) -> list[Tensor]:
    axis = call.get("axis", -1)
    wanted = int_list(count)[0] if count is not None else call.get("k", 1)
    # Of equal elements, the first comes first.
    order = torch.sort(x, dim=axis, descending=bool(call.get("largest", 1)), stable=True)
    return [each.narrow(axis, 0, wanted) for each in order]


@forward("CumSum", "CumProd")
def accumulated(call: Call, x: Tensor, axis: Tensor) -> Tensor:
    along = int_list(axis)[0] % x.ndim
    is_sum = call.node.op == "CumSum"
    turned = x.flip(along) if call.get("reverse", 0) else x
    if call.get("exclusive", 0):
        first = torch.full_like(turned.narrow(along, 0, 1), 0 if is_sum else 1)
        turned = torch.cat([first, turned.narrow(along, 0, x.shape[along] - 1)], along)
    found = (torch.cumsum if is_sum else torch.cumprod)(turned, along, dtype=x.dtype)
    return found.flip(along) if call.get("reverse", 0) else found


@forward("Det")
def determinant(call: Call, x: Tensor) -> Tensor:
    return torch.linalg.det(x)
