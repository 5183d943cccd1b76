"""How long quantization takes, beside ONNX Runtime's own on the same samples, in one run.

    pip install sympy                                                # for quant_pre_process
    python models/zoo.py fetch && python models/export.py && python benchmarks/untrained.py yolo   # once
    python benchmarks/speed.py [--tools TOOL ...] [--rounds N] [MODEL ...]

Theirs is `quant_pre_process` and `quantize_static`, U8S8, per channel, MinMax; ours is Slim and Quantize
with default options, and with `effort="quick"`; `--tools` takes others of benchmarks/quantize.py that this
environment has. Every run is a process of its own, and runs take turns. Columns: CPU seconds of the whole
process, imports and its own children included (median); the same relative to theirs; peak memory in MB;
SQNR in dB of the worst part of the outputs on samples that neither has seen, as ONNX Runtime runs the file.
"""

from __future__ import annotations

import argparse
import math
import pickle
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.quantize import TOOLS, Cell, quantize

# Samples to judge on, and to calibrate on where nothing else is said.
SAMPLES = 64
MODELS = {
    "efficientnet_lite0.dynamo": SAMPLES,
    "ppocr_det": 32,
    "ppocr_rec": SAMPLES,
    "minilm.dynamo": SAMPLES,
    "yolo.dynamo": SAMPLES,
}
THEIRS = "ONNX Runtime, best practice"
WAYS = (THEIRS, "onnxslim", "onnxslim, quick")


def source_of(name: str) -> Path:
    """The file of a model."""
    from onnxslim.models import zoo

    return zoo.cache() / "untrained" / f"{name}.onnx" if name.startswith("yolo") else Path(zoo.path(name))


def inputs_of(name: str, samples: int, seed: int) -> list[dict[str, Any]]:
    """Realistic inputs: those of the zoo; for the detector, photographs of its size."""
    from onnxslim.models import zoo

    if not name.startswith("yolo"):
        return zoo.inputs(name, samples, seed=seed)
    import numpy as np

    large = zoo.inputs("efficientnet_lite0.dynamo", samples, seed=seed)
    tiled = [np.pad(feed["image"], ((0, 0), (0, 0), (48, 48), (48, 48)), mode="reflect") for feed in large]
    return [{"image": image} for image in tiled]


def fidelity(name: str, source: Path, made: Path) -> float:
    """SQNR in dB of the worst part on samples that were not seen; NaN of a file that does not load."""
    from onnxslim import CalibrationData, load
    from onnxslim.calibration.fidelity import Judge
    from onnxslim.errors import LoadError
    from onnxslim.runtime.targets import Target

    data = CalibrationData(inputs_of(name, SAMPLES, seed=1))
    try:
        return Judge(load(source), data, Target.cpu(), samples=SAMPLES)(load(made)).sqnr
    except LoadError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return math.nan


def rows(name: str, tools: Sequence[str], rounds: int) -> list[str]:
    """A line of the table for each tool on one model; says so where one fails."""
    runs: dict[str, list[Cell]] = {tool: [] for tool in tools}
    kept = dict.fromkeys(tools, math.nan)
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder) / "samples.pickle"
        samples.write_bytes(pickle.dumps(inputs_of(name, MODELS.get(name, SAMPLES), seed=0)))
        source = source_of(name)
        for turn in range(rounds):
            for index, tool in enumerate(tools):
                made = Path(folder) / f"{index}.onnx"
                cell = quantize(Path(sys.executable), TOOLS[tool], source, made, samples)
                runs[tool].append(cell)
                if cell.problem:
                    print(f"{name}: {tool} {cell.problem}", file=sys.stderr)
                elif not turn:
                    kept[tool] = fidelity(name, source, made)
    seconds = {tool: statistics.median(each.seconds for each in found) for tool, found in runs.items()}
    base = seconds.get(THEIRS, math.nan)
    return [
        f"| {name} | {tool} | {seconds[tool]:.1f} | {seconds[tool] / base:.1f} | "
        f"{max(each.megabytes for each in found):.0f} | {kept[tool]:.1f} |"
        for tool, found in runs.items()
    ]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--tools", nargs="*", default=list(WAYS), choices=list(TOOLS))
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print("| model | tool | CPU s | relative | peak MB | SQNR dB |")
    print("|---|---|---|---|---|---|")
    for name in given.models:
        for line in rows(name, given.tools, given.rounds):
            print(line, flush=True)


if __name__ == "__main__":
    main()
