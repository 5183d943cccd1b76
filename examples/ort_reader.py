"""Calibrate from a CalibrationDataReader written for ONNX Runtime's own quantizer.

python examples/ort_reader.py
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime.quantization import CalibrationDataReader

from onnxslim import CalibrationData, Pipeline, load
from onnxslim.passes import Quantize, Slim
from onnxslim.passes.quantize import QuantizeFigures


class Images(CalibrationDataReader):  # type: ignore[misc]
    """The first images of a file, eight at a time."""

    def __init__(self, path: Path, count: int) -> None:
        with np.load(path) as arrays:
            self._batches = iter(np.split(arrays["image"][:count], count // 8))

    def get_next(self) -> dict[str, Any] | None:
        """The next batch, or None at the end."""
        batch = next(self._batches, None)
        return None if batch is None else {"image": batch}


def main() -> None:
    """Quantize a model that comes along."""
    with resources.as_file(resources.files("onnxslim.models.fashion")) as folder:
        model = load(folder / "resnet.onnx")
        # A reader can be read once. Given something that makes readers, nothing is kept in memory.
        data = CalibrationData.from_reader(lambda: Images(folder / "calibration.npz", 64), name="images")
        result = Pipeline(Slim(), Quantize(), on_error="raise")(model, data=data)
    fused = QuantizeFigures.of(result.report.steps[-1].changes).fused or {}
    print("in integers:", ", ".join(f"{count} {op}" for op, count in fused.items()))


if __name__ == "__main__":
    main()
