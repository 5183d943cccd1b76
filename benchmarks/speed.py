"""How long quantization takes, beside ONNX Runtime's own on the same samples, in one run.

    pip install sympy                                                # for quant_pre_process
    python models/zoo.py fetch && python models/export.py && python benchmarks/untrained.py yolo   # once
    python benchmarks/speed.py [--effort EFFORT ...] [--rounds N] [MODEL ...]

Theirs is `quant_pre_process` and `quantize_static`, U8S8, per channel, MinMax; ours is Slim and Quantize with
default options, or with others of `--ways`. Every run is a process of its own, and runs take turns. Columns:
CPU seconds of the whole process, imports and its own children included (median); the same relative to
theirs; peak memory in MB; SQNR in dB of the worst part of the outputs on samples that neither has seen, as
ONNX Runtime runs the file.
"""

from __future__ import annotations

import argparse
import math
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Calibration samples of each model, 64 others are judged on.
MODELS = {
    "efficientnet_lite0.dynamo": 64,
    "ppocr_det": 32,
    "ppocr_rec": 64,
    "minilm.dynamo": 64,
    "yolo.dynamo": 64,
}
THEIRS = "ONNX Runtime"
HEAD = """
import pickle, sys
source, target, samples = sys.argv[1:]
with open(samples, "rb") as file:
    feeds = pickle.load(file)
"""
OURS = """
import onnxslim
from onnxslim import CalibrationData, Pipeline
from onnxslim.passes import Quantize, Slim
Pipeline(Slim(), Quantize(OPTIONS))(onnxslim.load(source), data=CalibrationData(feeds)).save(target)
"""
PROGRAMS = {
    THEIRS: """
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
class Reader(CalibrationDataReader):
    def __init__(self):
        self.left = iter(feeds)
    def get_next(self):
        return next(self.left, None)
prepared = target + ".prepared.onnx"
try:
    quant_pre_process(source, prepared)
except Exception:
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
quantize_static(prepared, target, Reader(), per_channel=True, activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8)
""",
    "onnxslim": OURS.replace("OPTIONS", ""),
}


@dataclass(frozen=True)
class Run:
    """One process: its CPU seconds and peak memory."""

    seconds: float
    megabytes: float


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


def run(program: str, source: Path, target: Path, samples: Path) -> Run:
    """Run a program in a process of its own.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    script, log = target.with_suffix(".py"), target.with_suffix(".log")
    script.write_text(HEAD + program, encoding="utf-8")
    command = [sys.executable, str(script), str(source), str(target), str(samples)]
    with log.open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, cwd=target.parent)
        _, status, usage = os.wait4(process.pid, 0)
    if status or not target.is_file():
        raise RuntimeError(log.read_text(errors="replace")[-500:])
    return Run(usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def fidelity(name: str, source: Path, made: Path) -> float:
    """SQNR in dB of the worst part on samples that were not seen; NaN of a file that does not load."""
    from onnxslim import CalibrationData, load
    from onnxslim.calibration.fidelity import Judge
    from onnxslim.errors import LoadError
    from onnxslim.runtime.targets import Target

    data = CalibrationData(inputs_of(name, 64, seed=1))
    try:
        return Judge(load(source), data, Target.cpu(), samples=64)(load(made)).sqnr
    except LoadError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return math.nan


def rows(name: str, ways: Sequence[str], rounds: int) -> list[str]:
    """A line of the table for each way to quantize one model."""
    runs: dict[str, list[Run]] = {way: [] for way in ways}
    kept = dict.fromkeys(ways, math.nan)
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder) / "samples.pickle"
        samples.write_bytes(pickle.dumps(inputs_of(name, MODELS[name], seed=0)))
        source = source_of(name)
        for turn in range(rounds):
            for index, way in enumerate(ways):
                made = Path(folder) / f"{index}.onnx"
                runs[way].append(run(PROGRAMS[way], source, made, samples))
                if not turn:
                    kept[way] = fidelity(name, source, made)
    seconds = {way: statistics.median(each.seconds for each in found) for way, found in runs.items()}
    base = seconds.get(THEIRS, math.nan)
    return [
        f"| {name} | {way} | {seconds[way]:.1f} | {seconds[way] / base:.1f} | "
        f"{max(each.megabytes for each in found):.0f} | {kept[way]:.1f} |"
        for way, found in runs.items()
    ]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--ways", nargs="*", default=list(PROGRAMS), choices=list(PROGRAMS))
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print("| model | tool | CPU s | relative | peak MB | SQNR dB |")
    print("|---|---|---|---|---|---|")
    for name in given.models:
        for line in rows(name, given.ways, given.rounds):
            print(line, flush=True)


if __name__ == "__main__":
    main()
