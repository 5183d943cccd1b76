"""Slim and Quantize with their defaults on real models: size, latency, fidelity, fused operators.

    python models/zoo.py fetch && python models/export.py     # once; the export needs PyTorch
    python benchmarks/real.py [NAME ...]

32 calibration samples and 64 others to measure on, made from photographs, sentences and files (see
models/inputs.py). Latency is that of one sample on one thread, interleaved with the float model's. SQNR is
given as ONNX Runtime runs the file and with its optimizations off, where Q and DQ are computed one by one.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

DEFAULT = (
    "efficientnet_lite0.dynamo",
    "efficientnet_lite0.torchscript",
    "ppocr_det",
    "minilm.dynamo",
    "magika",
)

CLASSIFIERS = ("efficientnet_lite0.dynamo", "efficientnet_lite0.torchscript", "magika")


def measure(name: str) -> str:
    """One row of the table, and below it what stayed in floating point."""
    import onnxslim
    from onnxslim import CalibrationData, Pipeline, Target
    from onnxslim.calibration.noise import sqnr
    from onnxslim.models import zoo
    from onnxslim.passes import Quantize, Slim
    from onnxslim.passes.quantize.figures import QuantizeFigures
    from onnxslim.runtime.session import Session
    from onnxslim.runtime.timing import latencies

    model = onnxslim.load(zoo.path(name))
    data = CalibrationData(zoo.inputs(name, 32, seed=0))
    start = time.process_time()
    result = Pipeline(Slim(), Quantize(), on_error="raise")(model, data=data)
    seconds = time.process_time() - start
    changes = result.report.steps[-1].changes
    target = Target.cpu(threads=1)
    original, fused = Session(model, target), Session(result.model, target)
    plain = Session(result.model, target, optimize="none")
    feeds = zoo.inputs(name, 64, seed=1)
    expected = [original.run(batch) for batch in feeds]
    found = {kind: [s.run(batch) for batch in feeds] for kind, s in (("fused", fused), ("plain", plain))}
    _, ratios = latencies([original, fused], feeds[0], rounds=40, seconds=20)
    size = len(result.model.to_proto().SerializeToString()) / Path(zoo.path(name)).stat().st_size
    figures = QuantizeFigures.of(changes)
    fused_ops = figures.fused or {}
    counts = ", ".join(f"{fused_ops.get(op, 0)}/{n} {op}" for op, n in (figures.total or {}).items())
    slimmed, quantized = result.report.steps
    row = (
        f"| {name} | {slimmed.before.nodes} → {slimmed.after.nodes} → {quantized.after.nodes} "
        f"| {slimmed.before.parameters / 1e6:.2f} → {quantized.after.parameters / 1e6:.2f} "
        f"| {millions(slimmed.macs_before)} → {millions(quantized.macs_after)} "
        f"| {size:.2f} | {ratios[1]:.2f} "
        f"| {sqnr(expected, found['fused']):.1f} / {sqnr(expected, found['plain']):.1f} "
        f"| {agreement(name, expected, found['fused'])} | {counts} | {seconds:.1f} |"
    )
    return row + "".join(f"\n  float: {skip.node}: {skip.reason}" for skip in changes.skipped)


def millions(macs: int | None) -> str:
    """A number of multiply-accumulates; a dash where shapes do not tell."""
    return "–" if macs is None else f"{macs / 1e6:.0f}"


def agreement(name: str, expected: list[dict[str, Any]], actual: list[dict[str, Any]]) -> str:
    """Share of samples with the same top class; a dash where the output is no classification."""
    if name not in CLASSIFIERS:
        return "–"
    pairs = [
        (next(iter(a.values())).argmax(1), next(iter(b.values())).argmax(1))
        for a, b in zip(expected, actual, strict=True)
    ]
    return f"{np.mean([x == y for x, y in pairs]):.3f}"


def main() -> None:
    """Print a table, then what stayed in floating point and why."""
    print(
        "| model | nodes: slimmed, quantized | parameters, M | MACs, M | file | latency "
        "| SQNR dB fused / plain | top-1 | in integers | CPU s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in sys.argv[1:] or DEFAULT:
        print(measure(name), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
