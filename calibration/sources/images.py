"""Images of a folder, decoded when they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from onnxslim.calibration.sources.arrays import UNREADABLE, Array, Feeds, listed, unreadable
from onnxslim.errors import CalibrationError

MAX_PIXELS = 64_000_000
IMAGES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP"}
MODES = {1: "L", 3: "RGB"}


def found(folder: Path) -> list[Path]:
    """The images of a folder, in natural order; CalibrationError if there are none."""
    files = listed(folder, tuple(IMAGES))
    if not files:
        raise CalibrationError(f"{folder}: no images ({', '.join(IMAGES)}) in this folder")
    return files


def reader(
    name: str,
    input: str,
    size: int | tuple[int, int],
    layout: str,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    scale: float,
    channels: int,
    dtype: DTypeLike,
) -> ImageReader:
    """What decodes images; for the arguments see `CalibrationData.from_images`, `name` is for messages.

    Raises:
        CalibrationError: they contradict each other, or Pillow is missing.
    """
    if layout not in ("NCHW", "NHWC"):
        raise CalibrationError(f"{name}: layout {layout!r} is neither NCHW nor NHWC")
    if channels not in MODES:
        raise CalibrationError(f"{name}: images have 3 channels or 1, not {channels}")
    height, width = (size, size) if isinstance(size, int) else size
    centre, spread = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    for what, values in (("mean", centre), ("std", spread)):
        if values.shape not in ((), (1,), (channels,)):
            raise CalibrationError(f"{name}: {what} has {values.size} values for {channels} channels")
    load = ImageReader(
        input, (height, width), layout, centre, spread, scale, MODES[channels], np.dtype(dtype)
    )
    load.check_pillow()
    return load


@dataclass(frozen=True)
class ImageReader:
    """Decodes images, see `CalibrationData.from_images`."""

    input: str
    size: tuple[int, int]
    layout: str
    mean: Array
    std: Array
    scale: float
    mode: str
    dtype: np.dtype[Any]

    def __call__(self, files: Sequence[Path]) -> Feeds:
        pixels = np.stack([self._decode(file) for file in files]).astype(np.float32)
        if pixels.ndim == 3:  # grey
            pixels = pixels[..., None]
        values = (pixels * np.float32(self.scale) - self.mean) / self.std
        if self.layout == "NCHW":
            values = values.transpose(0, 3, 1, 2)
        return {self.input: np.ascontiguousarray(values, dtype=self.dtype)}

    def check_pillow(self) -> None:
        try:
            import PIL.Image  # noqa: F401
        except ImportError:
            message = "reading images needs Pillow: install it, or onnx-slimkit[images]"
            raise CalibrationError(message) from None

    def _decode(self, file: Path) -> Array:
        from PIL import Image, ImageOps

        try:
            # Only these formats: Pillow hands some others to outside programs.
            with Image.open(file, formats=sorted(set(IMAGES.values()))) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels are too many")
                upright = ImageOps.exif_transpose(image).convert(self.mode)
            height, width = self.size
            return np.asarray(ImageOps.fit(upright, (width, height), Image.Resampling.BILINEAR))
        except (*UNREADABLE, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise unreadable(file, error) from error
