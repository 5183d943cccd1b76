"""Calibration beside ONNX Runtime's: CPU seconds and peak memory, one process per case, on one core.

    python benchmarks/calibration.py [--images 64]

A ResNet-50-shaped model and random images, one per batch, U8S8 per channel. `quantize_static` cannot be
stopped after calibration, so whole runs are compared: calibration, choice of ranges, rewriting of the graph
and, for ours, the count of fused operators. Every process is pinned to one core, as neither side's threads
can be set from outside.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx

CASES = (
    "ort-minmax",
    "ort-percentile",
    "ort-entropy",
    "onnxslim-minmax",
    "onnxslim-percentile",
    "onnxslim-mse",
)


def images(count: int) -> Iterator[dict[str, np.ndarray]]:
    """One image per batch, the same on every call."""
    random = np.random.default_rng(0)
    for _ in range(count):
        yield {"x": random.standard_normal((1, 3, 224, 224), dtype=np.float32)}


def run_onnxslim(model: Path, out: Path, count: int, method: str) -> None:
    """The whole `Quantize` pass."""
    import onnxslim
    from onnxslim.passes.quantize import Quantize

    loaded = onnxslim.load(model)
    data = onnxslim.CalibrationData.from_callable(lambda: images(count))
    onnxslim.Pipeline(Quantize(observer=method))(loaded, data=data).save(out)  # type: ignore[arg-type]


def run_ort(model: Path, out: Path, count: int, method: str) -> None:
    """`onnxruntime.quantization.quantize_static`."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches = images(count)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._batches, None)

    logging.disable(logging.WARNING)
    quantize_static(
        model,
        out,
        Reader(),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method={
            "minmax": CalibrationMethod.MinMax,
            "percentile": CalibrationMethod.Percentile,
            "entropy": CalibrationMethod.Entropy,
        }[method],
    )


def measure(case: str, model: Path, count: int) -> tuple[float, float]:
    """CPU seconds and peak megabytes of one case in a process of its own."""
    command = [sys.executable, __file__, "--case", case, "--model", str(model), "--images", str(count)]
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{case} failed")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def run_case(case: str, model: Path, count: int) -> None:
    """What the child process does."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    tool, method = case.split("-")
    runners: dict[str, Callable[[Path, Path, int, str], None]] = {"ort": run_ort, "onnxslim": run_onnxslim}
    with tempfile.TemporaryDirectory() as folder:
        runners[tool](model, Path(folder) / "out.onnx", count, method)


def main() -> None:
    """Run all cases, ours for three numbers of images, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--model", type=Path)
    options = parser.parse_args()
    if options.case:
        run_case(options.case, options.model, options.images)
        return
    from benchmarks.shapes import resnet50

    print(f"onnx {onnx.__version__}, Python {platform.python_version()}, {platform.machine()}")
    print("| case | images | CPU s | peak MB |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "resnet50.onnx"
        onnx.save(resnet50(), model)
        rows = [(case, options.images) for case in CASES]
        rows += [("onnxslim-mse", count) for count in (16, 256)]
        for case, count in rows:
            seconds, peak = measure(case, model, count)
            print(f"| {case} | {count} | {seconds:.1f} | {peak:.0f} |", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
