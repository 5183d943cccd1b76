"""Windows: where they lie, and what pooling makes of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from onnxslim.learn.door import Tensor, functional, torch
from onnxslim.learn.rows import Call, forward


@dataclass(frozen=True)
class Windows:
    """Windows over the axes of space.

    Attributes:
        kernel, strides, dilations: one number per axis.
        before, after: what is padded there.
        beyond: what the last windows reach over the padding, where sizes are rounded up.
    """

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    before: list[int]
    after: list[int]
    beyond: list[int]

    @property
    def is_even(self) -> bool:
        """Whether padding is the same on both sides, so that PyTorch's operators do it themselves."""
        return self.before == self.after and not any(self.beyond)

    def padding(self, beyond: bool = True) -> list[int]:
        """Padding as PyTorch wants it: of the last axis first."""
        ends = [end + (more if beyond else 0) for end, more in zip(self.after, self.beyond, strict=True)]
        pairs = zip(reversed(self.before), reversed(ends), strict=True)
        return [each for pair in pairs for each in pair]


def windows(call: Call, sizes: Sequence[int], kernel: Sequence[int]) -> Windows:
    """Where the windows of a node lie.

    Args:
        call: its attributes.
        sizes: of the axes of space.
        kernel: of the window.
    """
    rank = len(kernel)
    strides, dilations = (call.ints(name) or [1] * rank for name in ("strides", "dilations"))
    spans = [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]
    before, after = _pads(call, sizes, spans, strides)
    beyond = [0] * rank
    if call.get("ceil_mode", 0):
        beyond = [_beyond(*each) for each in zip(sizes, before, after, spans, strides, strict=True)]
    return Windows(list(kernel), strides, dilations, before, after, beyond)


def _pads(
    call: Call, sizes: Sequence[int], spans: Sequence[int], strides: Sequence[int]
) -> tuple[list[int], list[int]]:
    rank, automatic = len(spans), call.get("auto_pad", "NOTSET")
    if automatic not in ("SAME_UPPER", "SAME_LOWER"):
        pads = (call.ints("pads") if automatic == "NOTSET" else None) or [0] * (2 * rank)
        return pads[:rank], pads[rank:]
    missing = [
        max((math.ceil(size / stride) - 1) * stride + span - size, 0)
        for size, span, stride in zip(sizes, spans, strides, strict=True)
    ]
    less, more = [each // 2 for each in missing], [each - each // 2 for each in missing]
    return (less, more) if automatic == "SAME_UPPER" else (more, less)


def _beyond(size: int, before: int, after: int, span: int, stride: int) -> int:
    """What the last window reaches over the padding; it begins within the input or before it."""
    count = math.ceil((size + before + after - span) / stride) + 1
    if (count - 1) * stride >= size + before:
        count -= 1
    return max((count - 1) * stride + span - (size + before + after), 0)


def _max_pool(rank: int) -> Tensor:
    return (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[rank - 1]


@forward("MaxPool")
def max_pool(call: Call, x: Tensor) -> list[Tensor]:
    place = windows(call, x.shape[2:], call.ints("kernel_shape") or [])
    rank = len(place.kernel)
    call.require(rank <= 3, f"MaxPool over {rank} axes")
    if call.wants(1):
        return _with_indices(call, x, place)
    lowest = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    fits = place.is_even and all(
        2 * pad <= size for pad, size in zip(place.before, place.kernel, strict=True)
    )
    padding = place.before if fits else 0
    padded = x if fits else functional.pad(x, place.padding(), value=lowest)
    if not x.is_floating_point():
        return [
            _max_pool(rank)(padded.double(), place.kernel, place.strides, padding, place.dilations).to(
                x.dtype
            )
        ]
    return [_max_pool(rank)(padded, place.kernel, place.strides, padding, place.dilations)]


def _with_indices(call: Call, x: Tensor, place: Windows) -> list[Tensor]:
    """Positions of the largest elements besides, in the tensor as a whole."""
    numbers = torch.arange(x[0, 0].numel()).reshape(x.shape[2:])
    if call.get("storage_order", 0):
        numbers = numbers.reshape(x.shape[2:][::-1]).permute(*reversed(range(x.ndim - 2)))
    value = functional.pad(x.double(), place.padding(), value=-math.inf)
    size = value.shape[2:]
    found, inside = _max_pool(x.ndim - 2)(
        value, place.kernel, place.strides, 0, place.dilations, return_indices=True
    )
    numbers = functional.pad(numbers, place.padding(), value=0).expand(size).reshape(-1)
    planes = torch.arange(x.shape[0] * x.shape[1]).reshape(*x.shape[:2], *(1 for _ in size))
    return [found.to(x.dtype), numbers[inside] + planes * x[0, 0].numel()]


@forward("AveragePool")
def average_pool(call: Call, x: Tensor) -> Tensor:
    place = windows(call, x.shape[2:], call.ints("kernel_shape") or [])
    rank, padded = len(place.kernel), bool(call.get("count_include_pad", 0))
    plain = place.is_even and all(each == 1 for each in place.dilations)
    if (
        plain
        and rank <= 3
        and all(2 * pad <= size for pad, size in zip(place.before, place.kernel, strict=True))
    ):
        pool = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[rank - 1]
        return pool(x, place.kernel, place.strides, place.before, count_include_pad=padded)
    ones = torch.ones_like(x[:1, :1])
    counted = functional.pad(ones, place.padding(beyond=False), value=1.0) if padded else ones
    margin = [0 if padded else each for each in place.padding()]
    counted = functional.pad(counted, _only_beyond(place) if padded else margin)
    return _summed(functional.pad(x, place.padding()), place) / _summed(counted, place)


def _only_beyond(place: Windows) -> list[int]:
    return [each for more in reversed(place.beyond) for each in (0, more)]


def _summed(padded: Tensor, place: Windows) -> Tensor:
    """Sums over windows."""
    for axis, (size, stride, step) in enumerate(
        zip(place.kernel, place.strides, place.dilations, strict=True), start=2
    ):
        count = (padded.shape[axis] - (size - 1) * step - 1) // stride + 1
        taps = (
            padded.narrow(axis, tap * step, (count - 1) * stride + 1).index_select(
                axis, torch.arange(0, (count - 1) * stride + 1, stride)
            )
            for tap in range(size)
        )
        padded = sum(taps)
    return padded


@forward("LpPool")
def lp_pool(call: Call, x: Tensor) -> Tensor:
    place = windows(call, x.shape[2:], call.ints("kernel_shape") or [])
    power = call.get("p", 2)
    return _summed(functional.pad(x.abs() ** power, place.padding()), place) ** (1 / power)


@forward("GlobalAveragePool")
def global_average_pool(call: Call, x: Tensor) -> Tensor:
    return torch.mean(x, list(range(2, x.ndim)), keepdim=True)


@forward("GlobalMaxPool")
def global_max_pool(call: Call, x: Tensor) -> Tensor:
    return torch.amax(x, list(range(2, x.ndim)), keepdim=True)


@forward("GlobalLpPool")
def global_lp_pool(call: Call, x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, call.get("p", 2), dim=list(range(2, x.ndim)), keepdim=True)
