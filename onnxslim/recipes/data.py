"""Calibration and test data as users name it: batches for a model, and the labels that lie beside them."""

from __future__ import annotations

import importlib
import os
import re
import sys
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import Field

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.feeds import batch_for
from onnxslim.calibration.sources import images
from onnxslim.calibration.sources.arrays import listed
from onnxslim.calibration.sources.images import IMAGES, ImageReader
from onnxslim.engine.base import options
from onnxslim.errors import CalibrationError, SaveError, UsageError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import InputSpec, Model
from onnxslim.runtime.metric import Metric

T = TypeVar("T")

LABEL_KEYS = ("label", "labels")
# Of the training set of ImageNet, which most image classifiers were trained with.
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@options
class Data:
    """Where data comes from, and how it is made into batches.

    Attributes:
        path: see the options of the command line: a file, a folder, or `module:function`.
        labels_from_folders: of images in one folder per class, the place of its name among all is the label.
        image_size, image_layout, image_mean, image_std, image_scale, image_fit, image_channels: of a folder
            of images; what is not given is guessed from the model's input.
    """

    path: str = Field(
        description="a file or folder: .npz (one array per model input), .npy (for a model with one input), "
        "a folder of .npy (one per input, or one per batch), of .npz batches, of images, or of "
        "test_data_set_N/input_M.pb"
    )
    batch_size: int | None = Field(
        None, ge=1, description="samples per batch, where a file does not set it [default: the model's, or 8]"
    )
    labels_key: str | None = Field(
        None, description="array of the .npz or .npy folder that holds the class of every sample"
    )
    labels_from_folders: bool = Field(
        False, description="classes of images are the folders they lie in, numbered in order of their names"
    )
    image_size: tuple[int, int] | None = Field(None, description="height and width images are resized to")
    image_layout: Literal["NCHW", "NHWC"] | None = Field(None, description="order of the axes")
    image_mean: tuple[float, ...] | None = Field(None, description="what is subtracted, per channel")
    image_std: tuple[float, ...] | None = Field(None, description="what is divided by then, per channel")
    image_scale: float | None = Field(None, description="factor of the pixels, before anything else")
    image_fit: images.Fit | None = Field(
        None, description="how images get the model's aspect ratio: crop, letterbox (grey borders) or stretch"
    )
    image_channels: Literal["RGB", "BGR"] | None = Field(None, description="order of the channels")

    @property
    def is_function(self) -> bool:
        """Whether it names code to run instead of files to read."""
        return FUNCTION.fullmatch(self.path) is not None and not os.path.exists(self.path)

    def read(self, model: Model) -> Batches:
        """Open it and compare its first batch with the model's inputs.

        Raises:
            CalibrationError: it cannot be read, or does not fit the model.
        """
        found = self._open(model.inputs())
        data = found.data.bind(model.inputs())
        data.check(model.inputs())
        return replace(found, data=data)

    def _open(self, specs: Sequence[InputSpec]) -> Batches:
        path = Path(self.path)
        if self.is_function:
            return Batches(called(self.path))
        if path.is_dir():
            return self._folder(path, specs)
        if path.suffix == ".npz":
            return self._npz(path, specs)
        return Batches(CalibrationData.from_path(path, self._batch_for(specs)))

    def _batch_for(self, specs: Sequence[InputSpec]) -> int:
        """The batch that was asked for, or else the model's."""
        return batch_for(specs) if self.batch_size is None else self.batch_size

    def _npz(self, path: Path, specs: Sequence[InputSpec]) -> Batches:
        others = _arrays_but(path, {spec.name for spec in specs})
        data = CalibrationData.from_npz(path, self._batch_for(specs), exclude=others)
        key = self._labels_among(others, path)
        return Batches(data, None if key is None else _npz(path, lambda archive: archive[key]))

    def _folder(self, path: Path, specs: Sequence[InputSpec]) -> Batches:
        arrays = {file.stem: file for file in listed(path, (".npy",))}
        inputs = {spec.name: arrays[spec.name] for spec in specs if spec.name in arrays}
        if inputs:
            key = self._labels_among(set(arrays) - set(inputs), path)
            labels = None if key is None else _npy(arrays[key])
            return Batches(CalibrationData.from_npy(inputs, self._batch_for(specs)), labels)
        if listed(path, tuple(IMAGES)) or images.class_folders(path):
            return self._images(path, specs)
        return Batches(CalibrationData.from_dir(path))

    def _labels_among(self, names: Collection[str], path: Path) -> str | None:
        wanted = [self.labels_key] if self.labels_key else LABEL_KEYS
        found = next((name for name in wanted if name in names), None)
        if found is None and self.labels_key:
            raise CalibrationError(f"{path}: there is no array '{self.labels_key}' beside the model's inputs")
        return found

    def _images(self, path: Path, specs: Sequence[InputSpec]) -> Batches:
        given = {
            item.name.removeprefix("image_"): getattr(self, item.name)
            for item in fields(self)
            if item.name.startswith("image_") and getattr(self, item.name) is not None
        }
        settings, guessed = _image_settings(path, specs, given)
        data = CalibrationData.from_images(path, batch_size=self._batch_for(specs), **settings)
        note = f"{path}: images are fed to '{settings['input']}' as {_told(settings)}"
        if guessed:
            imagenet = " of ImageNet" if settings["mean"] == IMAGENET[0] else ""
            note += f"; guessed: {', '.join(guessed)}{imagenet} (see --image-{guessed[0]}, --show-inputs)"
        reader = images.reader(str(path), **settings)
        if not self.labels_from_folders:
            return Batches(data, notes=(note,), reader=reader)
        classes = _classes(path)
        told = f"{path}: classes are {', '.join(f'{at} {name}' for at, name in enumerate(classes))}"
        labels = np.array([classes.index(file.parent.name) for file in images.found(path)], np.int64)
        return Batches(data, labels, (note, told), reader)


@dataclass(frozen=True)
class Batches:
    """Data that was opened.

    Attributes:
        labels: the class of every sample, where there is one.
        notes: how the data was understood, where that was a guess.
        reader: what decodes images, if the data are a folder of images.
    """

    data: CalibrationData
    labels: Array | None = None
    notes: tuple[str, ...] = ()
    reader: ImageReader | None = None

    def show(self, file: Path) -> str:
        """Write a picture of the first inputs; see `images.save_sheet`.

        Raises:
            UsageError: the data are no images.
            SaveError: it cannot be written.
        """
        if self.reader is None:
            raise UsageError(f"{self.data.name}: inputs can be shown if they come from a folder of images")
        try:
            return images.save_sheet(self.reader, self.data, file)
        except OSError as error:
            raise SaveError(f"cannot write '{file}': {error.strerror or error}") from error


def called(name: str) -> CalibrationData:
    """Batches from what `module:function` returns or is.

    Raises:
        CalibrationError: there is no such function, or it fails.
    """
    try:
        with _working_folder():
            return CalibrationData.of(_imported(name), name=name)
    except CalibrationError:
        raise
    except Exception as error:
        raise CalibrationError(f"{name}: {type(error).__name__}: {error}") from error


def metric(name: str) -> Metric:
    """The metric that `module:function` is.

    Raises:
        UsageError: there is no such function.
    """
    if FUNCTION.fullmatch(name) is None:
        raise UsageError(f"metric '{name}' is not of the form module:function")
    try:
        with _working_folder():
            found = _imported(name)
    except Exception as error:
        raise UsageError(f"metric '{name}': {type(error).__name__}: {error}") from error
    if not callable(found):
        raise UsageError(f"metric '{name}' is no function, but a {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def _imported(name: str) -> Any:
    """What `module:name` names. This runs code, so the name must come from the caller, never from a file."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


@contextmanager
def _working_folder() -> Iterator[None]:
    """Modules in the working folder are found too."""
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path.remove(os.getcwd())


def _classes(path: Path) -> list[str]:
    classes = [folder.name for folder in images.class_folders(path)]
    if not classes or listed(path, tuple(IMAGES)):
        raise CalibrationError(f"{path}: labels come from folders if all images lie in one folder per class")
    return classes


def _image_settings(
    path: Path, specs: Sequence[InputSpec], given: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """How to feed images, and which parts of that were guessed and not said by the model or the user."""
    spec = _image_input(path, specs)
    shape = spec.shape or ()
    layout = given.get("layout") or ("NHWC" if shape[3] in (1, 3) and shape[1] not in (1, 3) else "NCHW")
    axis = 1 if layout == "NCHW" else 3
    size = given.get("size") or tuple(shape[each] for each in (1, 2, 3) if each != axis)
    if not all(isinstance(dim, int) for dim in size):
        raise CalibrationError(
            f"{path}: input '{spec.name}' does not say how large images are; give --image-size"
        )
    channels = shape[axis] if isinstance(shape[axis], int) else 3
    rest = {name: value for name, value in given.items() if name != "channels"}
    chosen = {"fit": given.get("fit", "crop"), "order": given.get("channels", "RGB")}
    known = {"input": spec.name, "dtype": spec.dtype, "layout": layout, "size": size, "channels": channels}
    mean, std = IMAGENET if channels == 3 and spec.dtype != np.uint8 else ((0.0,), (1.0,))
    guesses = {"mean": mean, "std": std, "scale": 1.0 if spec.dtype == np.uint8 else 1 / 255}
    guessed = [name for name in guesses if name not in given] if spec.dtype != np.uint8 else []
    return {**guesses, **rest, **chosen, **known}, guessed


def _image_input(path: Path, specs: Sequence[InputSpec]) -> InputSpec:
    required = [spec for spec in specs if spec.required]
    if len(required) != 1 or len(required[0].shape or ()) != 4 or required[0].dtype is None:
        raise CalibrationError(
            f"{path}: images can only be fed to a model whose one input has four axes; give arrays instead"
        )
    return required[0]


def _told(settings: Mapping[str, Any]) -> str:
    height, width = settings["size"]
    mean, std = (", ".join(f"{value:g}" for value in settings[key]) for key in ("mean", "std"))
    fitted = {"crop": "cropped around the centre", "letterbox": "letterboxed", "stretch": "stretched"}
    order = settings["order"] if settings["channels"] == len(settings["order"]) else "grey"
    return (
        f"{height} x {width} x {settings['channels']} in {settings['layout']}, "
        f"{order}, {fitted[settings['fit']]}, "
        f"(pixel * {settings['scale']:.6g} - ({mean})) / ({std})"
    )


def _arrays_but(path: Path, inputs: Collection[str]) -> list[str]:
    """Names of the arrays that are not model inputs."""
    names = _npz(path, lambda archive: list(archive.files))
    others = [name for name in names if name not in inputs]
    if len(others) == len(names):
        raise CalibrationError(
            f"{path}: its arrays are {', '.join(names) or 'none'}; the model's inputs are {', '.join(inputs)}"
        )
    return others


def _npy(path: Path) -> Array:
    return next(iter(CalibrationData.from_npy(path, sys.maxsize)))["#0"]


def _npz(path: Path, read: Callable[[Any], T]) -> T:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return read(archive)
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise CalibrationError(f"{path}: not an .npz file of plain arrays: {error}") from error
