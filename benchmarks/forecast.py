"""How well the time of passes is told beforehand: seconds that were forecast and that it took.

    python models/zoo.py fetch                                                                    # once
    python benchmarks/forecast.py [--samples N ...] [MODEL ...]

Nothing else should run meanwhile: a forecast times the model itself. Columns: milliseconds of one sample; the
seconds forecast and taken, and their quotient; how many runs of all samples would have taken as long.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from onnxslim import CalibrationData, Pipeline, load
from onnxslim.engine.forecast import Forecast
from onnxslim.ir.model import Model
from onnxslim.models import zoo
from onnxslim.passes import Slim, parse
from onnxslim.runtime.targets import Target

FASHION = Path(__file__).resolve().parent.parent / "models" / "fashion"
MODELS = ("mobilenet", "resnet", "vit", "vgg", "magika", "ppocr_cls")
PASSES = (
    "quantize:effort=quick",
    "quantize",
    "quantize:effort=thorough",
    "prune:macs=0.7,effort=quick",
    "prune:macs=0.7",
    "factorize:macs=0.7,effort=quick",
    "factorize:macs=0.7",
    "half",
)


def model_and_data(name: str, samples: int) -> tuple[Model, CalibrationData]:
    """A slimmed model and so many realistic samples."""
    if (path := FASHION / f"{name}.onnx").is_file():
        model = load(path)
        images = np.load(FASHION / "calibration.npz")["image"][:samples]
        data = CalibrationData.of(images, model.inputs())
    else:
        model = load(zoo.path(name))
        data = CalibrationData(zoo.inputs(name, samples, seed=0))
    return Pipeline(Slim())(model).model, data


def row(name: str, samples: int, text: str) -> str:
    """A line of the table."""
    model, data = model_and_data(name, samples)
    step = parse(text)
    forecast = Forecast.of([step], model, data, Target.cpu())
    assert forecast is not None
    start = time.perf_counter()
    Pipeline(step)(model, data=data)
    took = time.perf_counter() - start
    runs = took / max(samples * forecast.per_sample, 1e-9)
    cells = 1e3 * forecast.per_sample, forecast.total, took, took / forecast.total
    return f"| {name} | {samples} | {text} | {' | '.join(f'{cell:.1f}' for cell in cells)} | {runs:.0f} |"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--samples", type=int, nargs="*", default=[64, 256])
    given = parser.parse_args()
    print("| model | samples | pass | ms a sample | forecast, s | took, s | quotient | runs |")
    print("|---|---|---|---|---|---|---|---|")
    for name in given.models:
        for samples in given.samples:
            for text in PASSES:
                print(row(name, samples, text), flush=True)


if __name__ == "__main__":
    main()
