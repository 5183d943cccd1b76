"""Output sizes that ONNX Runtime computes in another way than onnx's shape inference.

What runs counts. Found by comparing both over random attributes: windows of pools in ceil mode that would
begin in the padding, pools that are padded and dilated, scales that are no whole numbers, an output shape
given to ConvTranspose, and slices backwards from "the end".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from onnxslim.ir.graph import Dim, Node, Shape
from onnxslim.ir.model import DEFAULT_DOMAINS, constant_of
from onnxslim.shapes.asking import answer

Rule = Callable[[Node, tuple[Dim, ...]], "tuple[Dim, ...] | None"]
# Ends of slices from here on stand for "as far as there is something".
OPEN_END = 2**31 - 1
# onnx's inference says 0 for sizes of their results that it does not know.
ZERO_IF_UNKNOWN = frozenset(("Attention",))


def output_shape(node: Node, shape: Shape) -> Shape:
    """Shape of the first output of a node in ONNX Runtime, where it may be another than inferred.

    Args:
        node: any node.
        shape: of its first input.

    Returns:
        A shape with None for what is not known; None if inference is right about this node.
    """
    rule = _RULES.get(node.op) if node.domain in DEFAULT_DOMAINS else None
    return answer(rule, node, shape) if rule is not None and shape is not None else None


def _pool(node: Node, shape: tuple[Dim, ...]) -> tuple[Dim, ...] | None:
    padded = node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "")
    dilations = node.attrs.get("dilations", ())
    ceil = bool(node.attrs.get("ceil_mode", 0))
    kernel = node.attrs.get("kernel_shape", ())
    if len(kernel) != len(shape) - 2:
        return None
    if padded and (ceil or any(step > 1 for step in dilations)):
        return (*shape[:2], *(None for _ in kernel))
    if not ceil:
        return None
    return (*shape[:2], *(_ceil(node, axis, size) for axis, size in enumerate(shape[2:])))


def _ceil(node: Node, axis: int, size: Dim) -> Dim:
    """Windows along a spatial axis; the last one is dropped if it begins in the padding at the end."""
    if not isinstance(size, int):
        return None
    kernel = node.attrs["kernel_shape"]
    count = len(kernel)
    pads = node.attrs.get("pads") or (0,) * (2 * count)
    stride = (node.attrs.get("strides") or (1,) * count)[axis]
    dilation = (node.attrs.get("dilations") or (1,) * count)[axis]
    room: int = size + pads[axis] + pads[axis + count] - dilation * (kernel[axis] - 1) - 1
    windows: int = -(-room // stride) + 1
    return windows - 1 if (windows - 1) * stride >= size + pads[axis] else windows


def _scaled(node: Node, shape: tuple[Dim, ...]) -> tuple[Dim, ...] | None:
    scales = _scales(node)
    axes = node.attrs.get("axes") or range(len(shape))
    if scales is None or len(scales) != len(axes) or all(scale == int(scale) for scale in scales):
        return None
    sizes = list(shape)
    for axis, scale in zip(axes, scales, strict=True):
        size = sizes[axis]
        # A product of 32-bit numbers: 10 · 3.1 is 31 there, and 30.99… with more digits.
        sizes[axis] = int(np.float32(scale) * np.float32(size)) if isinstance(size, int) else None
    return tuple(sizes)


def _scales(node: Node) -> Sequence[float] | None:
    if "scales" in node.attrs:
        return tuple(node.attrs["scales"])
    if node.input(3) is not None:
        return None
    values = constant_of(node.input(1 if len(node.inputs) == 2 else 2))
    if values is None or values.dtype != np.float32 or values.size == 0:
        return None
    return tuple(float(value) for value in values)


def _transposed(node: Node, shape: tuple[Dim, ...]) -> tuple[Dim, ...] | None:
    given = node.attrs.get("output_shape", ())
    padded = node.attrs.get("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER")
    if not given and not (padded and any(node.attrs.get("output_padding", ()))):
        return None
    weight = node.inputs[1].shape
    channels = weight[1] if weight is not None else None
    made = channels * node.attrs.get("group", 1) if isinstance(channels, int) else None
    return (shape[0], made, *(given if len(given) == len(shape) - 2 else (None,) * (len(shape) - 2)))


def _sliced(node: Node, shape: tuple[Dim, ...]) -> tuple[Dim, ...] | None:
    ends, axes, steps = (constant_of(node.input(index)) for index in (2, 3, 4))
    if ends is None or steps is None or not any((steps < 0) & (ends >= OPEN_END)):
        return None
    at = range(len(shape)) if axes is None else [int(axis) % len(shape) for axis in axes]
    return tuple(None if axis in at else size for axis, size in enumerate(shape))


_RULES: dict[str, Rule] = {
    "MaxPool": _pool,
    "AveragePool": _pool,
    "LpPool": _pool,
    "Resize": _scaled,
    "Upsample": _scaled,
    "ConvTranspose": _transposed,
    "Slice": _sliced,
}
MAY_DIFFER = frozenset(_RULES)
MATCHES = MAY_DIFFER | ZERO_IF_UNKNOWN


def agree(actual: Shape, inferred: Shape) -> bool:
    """Whether an inferred shape says no more than what is known of the actual one."""
    if actual is None or inferred is None:
        return True
    return len(actual) == len(inferred) and all(
        not isinstance(guess, int) or guess == size for size, guess in zip(actual, inferred, strict=True)
    )
