"""Copies of images that are a little different, so that more is learnt from few of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np

from onnxslim.errors import UsageError
from onnxslim.ir.graph import Array

Alteration: TypeAlias = Literal["mirror", "shift", "noise"]
# What axes of channels have, and what those of an image have at least.
CHANNELS, LEAST_PIXELS = (1, 3, 4), 8
# The most that an image is shifted, of its size; the noise, of the standard deviation of all values.
SHIFT, NOISE = 1 / 14, 0.05


class Augmentation:
    """Fixed copies of batches, a function of the seed.

    Args:
        alterations: what is different: `mirror` turns half of the images left to right, `shift` moves each by
            a few pixels, with those at the edge repeated, `noise` adds Gaussian noise.
        copies: how many there are besides what was given.
        seed: of all of it.
        feeds: a batch, by which is seen which inputs are images.

    Raises:
        UsageError: no input is an image; tells why of each.
    """

    def __init__(
        self, alterations: Sequence[Alteration], copies: int, seed: int, feeds: Mapping[str, Array]
    ) -> None:
        self.copies = copies
        self._alterations, self._seed = alterations, seed
        found = {name: _axes(array) for name, array in feeds.items()}
        self._images = {name: axes for name, axes in found.items() if not isinstance(axes, str)}
        if not self._images:
            told = "; ".join(f"'{name}' {why}" for name, why in found.items())
            raise UsageError(f"augment is for images, and there are none: {told}")

    def __call__(self, copy: int, batch: int, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """A copy of a batch; copy 0 is what was given.

        Args:
            copy, batch: their numbers.
            feeds: the batch.
        """
        if not copy:
            return feeds
        return {
            name: self._altered(array, self._images[name], np.random.default_rng((self._seed, copy, batch)))
            if name in self._images
            else array
            for name, array in feeds.items()
        }

    def _altered(self, images: Array, axes: tuple[int, int], random: np.random.Generator) -> Array:
        """Of several inputs with as many images all are turned, and moved by as much of their size, alike."""
        turned = random.random(len(images)) < 0.5
        moved = random.uniform(-SHIFT, SHIFT, (len(images), 2))
        wide = np.array(images, np.float32)
        if "mirror" in self._alterations:
            wide[turned] = np.flip(wide[turned], axes[1])
        if "shift" in self._alterations:
            for axis, by in zip(axes, moved.T, strict=True):
                size = wide.shape[axis]
                places = np.arange(size) - np.rint(by * size).astype(int)[:, None]
                shape = [len(images), 1, 1, 1]
                shape[axis] = size
                wide = np.take_along_axis(wide, places.clip(0, size - 1).reshape(shape), axis)
        if "noise" in self._alterations:
            wide += NOISE * wide.std() * random.standard_normal(wide.shape, np.float32)
        return wide.astype(images.dtype)


def _axes(array: Array) -> tuple[int, int] | str:
    """The axes of height and width of images; why they are none."""
    if array.ndim != 4:
        return f"has {array.ndim} axes, not 4"
    if array.dtype.kind != "f":
        return f"is {array.dtype.name}, not floating point"
    for channels, axes in ((1, (2, 3)), (3, (1, 2))):
        sizes = [array.shape[axis] for axis in axes]
        if array.shape[channels] in CHANNELS and min(sizes) >= LEAST_PIXELS:
            return axes
    wanted = f"no axis of 1, 3 or 4 channels beside two of at least {LEAST_PIXELS} pixels"
    return f"has shape {array.shape}: {wanted}"
