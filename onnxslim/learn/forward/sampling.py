"""Operators that read between elements."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from onnxslim.ir.graph import Array
from onnxslim.learn.door import Tensor, functional, torch
from onnxslim.learn.rows import Call, axes_of, forward, int_list

# ------------------------------------------------------------------------------------------- GridSample


@forward("GridSample")
def grid_sample(call: Call, x: Tensor, grid: Tensor) -> Tensor:
    mode = call.get("mode", "linear")
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    call.require(x.ndim == 4 or mode != "bicubic", "cubic GridSample in more than two axes")
    return functional.grid_sample(
        x, grid, mode, call.get("padding_mode", "zeros"), bool(call.get("align_corners", 0))
    )


@forward("AffineGrid")
def affine_grid(call: Call, theta: Tensor, size: Tensor) -> Tensor:
    return functional.affine_grid(theta, int_list(size), align_corners=bool(call.get("align_corners", 0)))


@forward("Col2Im")
def col2im(call: Call, x: Tensor, image: Tensor, block: Tensor) -> Tensor:
    sizes, kernel = int_list(image), int_list(block)
    rank = len(sizes)
    strides, dilations = (call.ints(name) or [1] * rank for name in ("strides", "dilations"))
    pads = call.ints("pads") or [0] * (2 * rank)
    padded = [size + pads[at] + pads[at + rank] for at, size in enumerate(sizes)]
    call.require(rank == 2, f"Col2Im over {rank} axes")
    found = functional.fold(x, padded, kernel, dilations, 0, strides)
    return found[:, :, pads[0] : pads[0] + sizes[0], pads[1] : pads[1] + sizes[1]]


# ----------------------------------------------------------------------------------------------- Resize


@dataclass(frozen=True)
class _Axis:
    """How one axis is resized.

    Attributes:
        before, after: its sizes.
        scale: of the two, as given.
        crop: where the region of interest begins and ends, of 1.
    """

    before: int
    after: int
    scale: float
    crop: tuple[float, float]


@forward("Upsample")
def upsample(call: Call, x: Tensor, scales: Tensor | None = None) -> Tensor:
    factors = [float(each) for each in scales.tolist()] if scales is not None else call.numbers("scales")
    axes = [
        _Axis(size, int(size * scale), scale, (0.0, 1.0))
        for size, scale in zip(x.shape, factors, strict=True)
    ]
    for at, axis in enumerate(axes):
        x = _resized(call, x, at, axis, "asymmetric", "floor")
    return x


@forward("Resize")
def resize(
    call: Call,
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Tensor:
    if call.opset < 11:  # input 1 are the scales
        return upsample(call, x, roi)
    where = call.get("coordinate_transformation_mode", "half_pixel")
    nearest = call.get("nearest_mode", "round_prefer_floor")
    for at, axis in _axes(call, x, roi, scales, sizes):
        x = _resized(call, x, at, axis, where, nearest)
    return x


def _axes(
    call: Call, x: Tensor, roi: Tensor | None, scales: Tensor | None, sizes: Tensor | None
) -> list[tuple[int, _Axis]]:
    chosen = axes_of(call, None, x.ndim) or list(range(x.ndim))
    before = [x.shape[axis] for axis in chosen]
    if sizes is not None and sizes.numel():
        after, factors = _goals(call, before, int_list(sizes))
    else:
        factors = [float(each) for each in scales.tolist()] if scales is not None else [1.0] * len(chosen)
        after = [math.floor(size * factor) for size, factor in zip(before, factors, strict=True)]
    crop = [(0.0, 1.0)] * len(chosen)
    if call.get("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize" and roi is not None:
        ends = [float(each) for each in roi.tolist()]
        crop = [(ends[at], ends[at + len(chosen)]) for at in range(len(chosen))]
    return [(axis, _Axis(*each)) for axis, *each in zip(chosen, before, after, factors, crop, strict=True)]


def _goals(call: Call, before: list[int], sizes: list[int]) -> tuple[list[int], list[float]]:
    """Sizes and scales; one scale for all axes where the aspect ratio is to stay."""
    factors = [to / size for to, size in zip(sizes, before, strict=True)]
    policy = call.get("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        return sizes, factors
    factor = min(factors) if policy == "not_larger" else max(factors)
    return [math.floor(size * factor + 0.5) for size in before], [factor] * len(before)


def _resized(call: Call, x: Tensor, at: int, axis: _Axis, where: str, nearest: str) -> Tensor:
    """Along one axis: every element is a sum of some, each with its weight."""
    if axis.before == axis.after and axis.scale == 1.0 and where != "tf_crop_and_resize":
        return x
    places = _places(axis, where)
    index, weight = _taps(call, axis, places, nearest)
    taps = [x.index_select(at, torch.as_tensor(column)) for column in np.ascontiguousarray(index.T)]
    if weight is None:
        found = taps[0]
    else:
        shape = [-1 if each == at else 1 for each in range(x.ndim)]
        factors = torch.as_tensor(np.ascontiguousarray(weight.T)).to(x.dtype)
        found = sum(tap * factor.reshape(shape) for tap, factor in zip(taps, factors, strict=True))
    if where == "tf_crop_and_resize":
        outside = torch.as_tensor((places < 0) | (places > axis.before - 1))
        shape = [-1 if each == at else 1 for each in range(x.ndim)]
        found = torch.where(outside.reshape(shape), call.get("extrapolation_value", 0.0), found).to(x.dtype)
    return found


def _places(axis: _Axis, where: str) -> Array:
    """Where each element of the result lies between those there are, float32 as runtimes compute it."""
    at, scale = np.arange(axis.after, dtype=np.float32), np.float32(axis.scale)
    last, (start, end), half = np.float32(axis.before - 1), axis.crop, np.float32(0.5)
    alone = np.zeros(1, np.float32)
    found: Array
    if where == "asymmetric":
        found = at / scale
    elif where == "align_corners":
        found = at * last / np.float32(axis.after - 1) if axis.after > 1 else alone
    elif where == "tf_crop_and_resize":
        found = np.float32(start) * last + at * np.float32(end - start) * last / np.float32(
            max(axis.after - 1, 1)
        )
        found = found if axis.after > 1 else np.full(1, 0.5 * (start + end) * last, np.float32)
    elif where == "tf_half_pixel_for_nn":
        found = (at + half) / scale
    elif where == "pytorch_half_pixel" and axis.after <= 1:
        found = alone
    elif where == "half_pixel_symmetric":
        shift = axis.before / 2 * (1 - axis.after / (axis.scale * axis.before))
        found = np.float32(shift) + (at + half) / scale - half
    else:
        found = (at + half) / scale - half
    return found


def _taps(call: Call, axis: _Axis, places: Array, nearest: str) -> tuple[Array, Array | None]:
    """Positions of the elements that make up each of the result, [after, taps], and their weights."""
    mode = call.get("mode", "nearest")
    if mode == "nearest":
        return _rounded(places, nearest).clip(0, axis.before - 1)[:, None], None
    reach = 1 if mode in ("linear", "bilinear") else 2
    shrink = min(axis.scale, 1.0) if call.get("antialias", 0) else 1.0
    wide = math.ceil(reach / shrink)
    index = np.floor(places).astype(np.int64)[:, None] + np.arange(1 - wide, wide + 1)
    distance = (index - places[:, None]).astype(np.float64) * shrink
    slope = call.get("cubic_coeff_a", -0.75)
    weight = np.clip(1 - np.abs(distance), 0, None) if reach == 1 else _cubic(distance, slope)
    if call.get("exclude_outside", 0):
        weight = weight * ((index >= 0) & (index < axis.before))
    if shrink < 1.0 or call.get("exclude_outside", 0):
        weight = weight / weight.sum(1, keepdims=True)
    return index.clip(0, axis.before - 1), weight


def _cubic(distance: Array, slope: float) -> Array:
    """Keys, Cubic convolution interpolation for digital image processing, 1981."""
    d = np.abs(distance)
    near = ((slope + 2) * d - (slope + 3)) * d * d + 1
    far = ((slope * d - 5 * slope) * d + 8 * slope) * d - 4 * slope
    found: Array = np.where(d <= 1, near, np.where(d < 2, far, 0.0))
    return found


def _rounded(places: Array, how: str) -> Array:
    found: Array
    if how == "round_prefer_floor":
        found = np.ceil(places - np.float32(0.5))
    elif how == "round_prefer_ceil":
        found = np.floor(places + np.float32(0.5))
    else:
        found = np.floor(places) if how == "floor" else np.ceil(places)
    return found.astype(np.int64)


# --------------------------------------------------------------------------------------------- MaxUnpool


@forward("MaxUnpool")
def max_unpool(call: Call, x: Tensor, indices: Tensor, shape: Tensor | None = None) -> Tensor:
    rank = x.ndim - 2
    kernel, strides = call.ints("kernel_shape") or [], call.ints("strides") or [1] * rank
    pads = call.ints("pads") or [0] * (2 * rank)
    sizes = [
        (size - 1) * strides[at] + kernel[at] - pads[at] - pads[at + rank]
        for at, size in enumerate(x.shape[2:])
    ]
    natural = [*x.shape[:2], *sizes]
    found = x.new_zeros(math.prod(natural)).scatter(0, indices.reshape(-1), x.reshape(-1)).reshape(natural)
    if shape is None:
        return found
    wanted = int_list(shape)
    missing = [to - size for to, size in zip(wanted, natural, strict=True)]
    return functional.pad(found, list(itertools.chain.from_iterable((0, each) for each in reversed(missing))))
