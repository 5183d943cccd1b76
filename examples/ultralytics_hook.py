"""Slim what Ultralytics exports, right after it was exported.

    from ultralytics import YOLO
    from ultralytics_hook import slim_export

    model = YOLO("yolo11n.pt")
    model.add_callback("on_export_end", slim_export)
    model.export(format="onnx", simplify=False)

`simplify=False`, as Ultralytics would otherwise install PyPI's onnxslim, which owns the same import name.

Without Ultralytics, `python examples/ultralytics_hook.py` shows it on a model that comes along.
"""

from __future__ import annotations

import tempfile
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxslim
from onnxslim import Pipeline
from onnxslim.passes import Slim


def slim_export(exporter: Any) -> None:
    """Replace the exported ONNX file by a slimmer one that computes the same.

    Args:
        exporter: Ultralytics' Exporter; its `file` is that of the weights, beside which the export lies.
    """
    if exporter.args.format != "onnx":
        return
    path = Path(exporter.file).with_suffix(".onnx")
    model = onnxslim.load(path)
    result = Pipeline(Slim())(model)
    # In place and atomically; names, stride and all other metadata of the export stay.
    result.save(path)
    before, after = model.stats(), result.model.stats()
    print(f"{path.name}: {before.nodes} -> {after.nodes} nodes, metadata {result.model.metadata}")


def main() -> None:
    """Play the exporter's part."""
    with (
        tempfile.TemporaryDirectory() as folder,
        resources.as_file(resources.files("onnxslim.models.fashion") / "resnet.onnx") as bundled,
    ):
        exported = onnxslim.load(bundled).with_metadata({"stride": "32", "task": "classify"})
        exported.save(Path(folder) / "best.onnx")
        slim_export(SimpleNamespace(file=Path(folder) / "best.pt", args=SimpleNamespace(format="onnx")))


if __name__ == "__main__":
    main()
