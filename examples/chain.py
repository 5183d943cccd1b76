"""Slim, quantize and validate a model that comes along, and save the result.

python examples/chain.py [OUT.onnx]
"""

from __future__ import annotations

import sys
from importlib import resources

import numpy as np

import onnxslim
from onnxslim import CalibrationData, Pipeline, Target
from onnxslim.passes import Quantize, Slim


def main(out: str | None = None) -> None:
    """Run the whole chain; the result is saved only if it is good enough."""
    with resources.as_file(resources.files("onnxslim.models.fashion")) as folder:
        model = onnxslim.load(folder / "mobilenet.onnx")
        data = CalibrationData.from_npz(folder / "calibration.npz")
        test = CalibrationData.from_npz(folder / "test.npz", batch_size=50, exclude=["label"])
        labels = np.load(folder / "test.npz")["label"]

    cpu = Target.cpu(threads=1)
    result = Pipeline(Slim(), Quantize())(model, data=data, target=cpu)
    print(result.report)

    verdict = onnxslim.validate(model, result.model, test, [cpu], labels=labels)
    print(verdict)
    verdict.require(sqnr=25, max_accuracy_drop=0.01)
    if out:
        result.save(out)


if __name__ == "__main__":
    main(*sys.argv[1:2])
