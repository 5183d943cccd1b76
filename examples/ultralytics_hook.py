"""Slim and quantize what Ultralytics exports, right after it was exported, on its own calibration images.

    from ultralytics import YOLO
    from ultralytics_hook import compare, hook

    model = YOLO("yolo11n.pt")
    model.add_callback("on_export_end", hook(int8=True))
    model.export(format="onnx", simplify=False, data="coco8.yaml")   # yolo11n.onnx, yolo11n.int8.onnx
    print(compare("yolo11n.onnx", "yolo11n.int8.onnx", data="coco8.yaml"))  # mAP of both

`simplify=False`, as Ultralytics would otherwise install PyPI's onnxslim, which owns the same import name.

Without Ultralytics, `python examples/ultralytics_hook.py [MODEL.onnx]` plays the exporter's part: on a YOLO
of random weights (`python benchmarks/untrained.py yolo` makes one), or on a small detector with boxes in
pixels and scores in one output.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

import onnxslim
from onnxslim import CalibrationData, Pipeline
from onnxslim.passes import Quantize, Slim

# Images of the export's data set to calibrate on.
IMAGES = 64


def hook(*, int8: bool = False, images: int = IMAGES) -> Callable[[Any], None]:
    """A callback for `on_export_end`: slims in place and, with `int8`, writes `NAME.int8.onnx` beside."""

    def slim_export(exporter: Any) -> None:
        if exporter.args.format != "onnx":
            return
        path = Path(exporter.file).with_suffix(".onnx")
        model = onnxslim.load(path)
        result = Pipeline(Slim())(model)
        # In place and atomically; names, stride and all other metadata of the export stay.
        result.save(path)
        before, after = model.stats(), result.model.stats()
        print(f"{path.name}: {before.nodes} -> {after.nodes} nodes, metadata {result.model.metadata}")
        if int8:
            _quantize(path, calibration_images(exporter, images))

    return slim_export


def calibration_images(exporter: Any, count: int) -> CalibrationData:
    """The images that Ultralytics itself would calibrate on: letterboxed, RGB, from 0 to 1."""
    name = onnxslim.load(Path(exporter.file).with_suffix(".onnx")).inputs()[0].name
    found: list[NDArray[np.float32]] = []
    for batch in exporter.get_int8_calibration_dataloader():
        found.extend(np.asarray(batch["img"], np.float32) / 255)
        if len(found) >= count:
            break
    return CalibrationData.from_arrays({name: np.stack(found[:count])}, batch_size=1)


def _quantize(path: Path, data: CalibrationData) -> None:
    """Boxes are in pixels, scores between 0 and 1: the worst part of the output has to keep something."""
    result = Pipeline(Quantize(effort="quick"))(path, data=data)
    (step,) = result.report.steps
    if not step.changes:
        print(f"no int8: {step.outcome}")
        return
    result.save(path.with_suffix(".int8.onnx"))
    bytes_before, bytes_after = step.before.bytes, step.after.bytes
    print(f"int8: {bytes_after / bytes_before:.2f} of the bytes, {step.kept}")


def compare(*files: str | Path, data: str) -> Mapping[str, float]:
    """mAP 50-95 of files by Ultralytics' own validator."""
    from ultralytics import YOLO

    return {str(file): float(YOLO(file, task="detect").val(data=data).box.map) for file in files}


DETECTOR = """<ir_version: 8, opset_import: ["" : 17]>
  g (float[1,3,32,32] images) => (float[1,8,64] output0) <int64[3] flat = {1,4,64}, float grid = {32}> {
    a = Conv<strides=[2,2], pads=[1,1,1,1]>(images, stem)  s = Sigmoid(a)  h = Mul(a, s)
    b = Conv<strides=[4,4], pads=[1,1,1,1]>(h, body)  t = Sigmoid(b)  k = Mul(b, t)
    c = Conv(k, boxes)  d = Conv(k, scores)  f = Reshape(c, flat)  j = Reshape(d, flat)
    p = Sigmoid(f)  x = Mul(p, grid)  q = Sigmoid(j)  i = Identity(x)  output0 = Concat<axis=1>(i, q) }"""
WEIGHTS = {"stem": (16, 3, 3, 3), "body": (16, 16, 3, 3), "boxes": (16, 16, 1, 1), "scores": (16, 16, 1, 1)}


def small_detector() -> onnxslim.Model:
    """Boxes and scores of 64 places, with random weights."""
    model, generator = onnx.parser.parse_model(DETECTOR), np.random.default_rng(0)
    for name, shape in WEIGHTS.items():
        values = generator.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
        model.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.float32), name))
    return onnxslim.load(model)


def main(words: list[str]) -> None:
    """Play the exporter's part."""
    with tempfile.TemporaryDirectory() as folder:
        exported = onnxslim.load(words[0]) if words else small_detector()
        exported.with_metadata({"stride": "32", "task": "detect"}).save(Path(folder) / "best.onnx")
        (spec,) = exported.inputs()
        shape = [size if isinstance(size, int) else 1 for size in spec.shape or ()][1:]
        pictures = np.random.default_rng(0).integers(0, 255, (4, 8, *shape), dtype=np.uint8)
        exporter = SimpleNamespace(
            file=Path(folder) / "best.pt",
            args=SimpleNamespace(format="onnx"),
            get_int8_calibration_dataloader=lambda: ({"img": batch} for batch in pictures),
        )
        hook(int8=True)(exporter)


if __name__ == "__main__":
    main(sys.argv[1:])
