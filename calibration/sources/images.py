"""Images of a folder, decoded when they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import DTypeLike

from onnxslim.calibration.sources.arrays import UNREADABLE, Array, Feeds, listed, unreadable
from onnxslim.errors import CalibrationError

MAX_PIXELS = 64_000_000
IMAGES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP"}
MODES = {1: "L", 3: "RGB"}
# What fills the rest of a picture that keeps its aspect ratio: the grey of YOLO and its descendants.
FILL = 114
SHOWN = 8
SHEET_COLUMNS = 4

Fit: TypeAlias = Literal["crop", "letterbox", "stretch"]
FITS: tuple[Fit, ...] = ("crop", "letterbox", "stretch")
ORDERS = ("RGB", "BGR")


def found(folder: Path) -> list[Path]:
    """The images of a folder, or else of the folders in it, in natural order.

    Raises:
        CalibrationError: there are none.
    """
    files = listed(folder, tuple(IMAGES))
    files = files or [file for inner in class_folders(folder) for file in listed(inner, tuple(IMAGES))]
    if not files:
        raise CalibrationError(f"{folder}: no images ({', '.join(IMAGES)}) in this folder or those in it")
    return files


def class_folders(folder: Path) -> list[Path]:
    """The folders in a folder of images by class; none if none of them holds an image.

    Their order is that of their names as texts, which numbers the classes for torchvision and Keras.
    """
    inner = sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    return inner if any(listed(each, tuple(IMAGES)) for each in inner) else []


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
    fit: str = "crop",
    order: str = "RGB",
) -> ImageReader:
    """What decodes images; for the arguments see `CalibrationData.from_images`, `name` is for messages.

    Raises:
        CalibrationError: they contradict each other, or Pillow is missing.
    """
    if layout not in ("NCHW", "NHWC"):
        raise CalibrationError(f"{name}: layout {layout!r} is neither NCHW nor NHWC")
    if channels not in MODES:
        raise CalibrationError(f"{name}: images have 3 channels or 1, not {channels}")
    if fit not in FITS:
        raise CalibrationError(f"{name}: images are made to fit by {', '.join(FITS)}, not by {fit!r}")
    if order not in ORDERS or (order, channels) == ("BGR", 1):
        raise CalibrationError(f"{name}: the order of {channels} channels is not {order!r}")
    height, width = (size, size) if isinstance(size, int) else size
    centre, spread = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    for what, values in (("mean", centre), ("std", spread)):
        if values.shape not in ((), (1,), (channels,)):
            raise CalibrationError(f"{name}: {what} has {values.size} values for {channels} channels")
    load = ImageReader(
        input, (height, width), layout, centre, spread, scale, MODES[channels], np.dtype(dtype), fit, order
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
    fit: str = "crop"
    order: str = "RGB"

    def __call__(self, files: Sequence[Path]) -> Feeds:
        pixels = np.stack([self._decode(file) for file in files]).astype(np.float32)
        if pixels.ndim == 3:  # grey
            pixels = pixels[..., None]
        values = (pixels * np.float32(self.scale) - self.mean) / self.std
        values = values[..., ::-1] if self.order == "BGR" else values
        if self.layout == "NCHW":
            values = values.transpose(0, 3, 1, 2)
        return {self.input: np.ascontiguousarray(values, dtype=self.dtype)}

    def pixels(self, values: Array) -> Array:
        """What a network is given, as pixels again: [n, height, width, channels], uint8.

        Mean and deviation are taken out, but the channels stay as they lie, first one shown as red.
        """
        values = values.transpose(0, 2, 3, 1) if self.layout == "NCHW" else values
        mean, std = (np.broadcast_to(each, self.mode_size) for each in (self.mean, self.std))
        turned = -1 if self.order == "BGR" else 1
        scaled = (values.astype(np.float32) * std[::turned] + mean[::turned]) / np.float32(self.scale)
        return np.asarray(np.clip(np.rint(scaled), 0, 255), np.uint8)

    @property
    def mode_size(self) -> int:
        """How many channels images have."""
        return len(self.mode)

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
            return np.asarray(self._fitted(upright))
        except (*UNREADABLE, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise unreadable(file, error) from error

    def _fitted(self, image: Any) -> Any:
        from PIL import Image, ImageOps

        size, filtered = self.size[::-1], Image.Resampling.BILINEAR
        if self.fit == "stretch":
            return image.resize(size, filtered)
        if self.fit == "letterbox":
            return ImageOps.pad(image, size, filtered, color=(FILL,) * self.mode_size)
        return ImageOps.fit(image, size, filtered)


def save_sheet(reader: ImageReader, batches: Iterable[Feeds], file: Path) -> str:
    """Write a picture of the first inputs as the network gets them, side by side.

    Args:
        reader: what made the batches.
        batches: only the first of them are read.
        file: a PNG.

    Returns:
        In words, what is in it, and between which values the inputs lie.

    Raises:
        OSError: it cannot be written.
    """
    from PIL import Image

    values: list[Array] = []
    for feeds in batches:
        values += list(feeds[reader.input])[: SHOWN - len(values)]
        if len(values) == SHOWN:
            break
    inputs = np.stack(values)
    pixels = reader.pixels(inputs)
    count, height, width, _ = pixels.shape
    columns = min(count, SHEET_COLUMNS)
    sheet = np.full((-(-count // columns) * height, columns * width, reader.mode_size), 255, np.uint8)
    for index, picture in enumerate(pixels):
        top, left = index // columns * height, index % columns * width
        sheet[top : top + height, left : left + width] = picture
    Image.fromarray(sheet.squeeze(2) if reader.mode_size == 1 else sheet).save(file, format="PNG")
    return f"{count} inputs as the model gets them, values from {inputs.min():.4g} to {inputs.max():.4g}"
