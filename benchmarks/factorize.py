"""Factorize on the bundled nets and on real models: accuracy, fidelity, measured latency, and the gate.

    python benchmarks/factorize.py budgets [NET ...]     75, 50 and 35 % of the MACs: plain, fitted, repaired
    python benchmarks/factorize.py schemes [NET ...]     every scheme alone and all of them, at 50 %
    python benchmarks/factorize.py speed [NET ...]       ranks in blocks of 16, and a budget of time
    python benchmarks/factorize.py layers [NET ...]      share of MACs against share of time, layer by layer
    python benchmarks/factorize.py depthwise             k×k of single channels as k×1 and 1×k, by the gate
    python benchmarks/factorize.py real [NAME ...]       real models; see models/zoo.py

Everything is compared with the slimmed model, on one thread and one sample, interleaved. The nets are fitted
to their 512 calibration images and judged on 2000 others; real models to 64 samples, and judged on 64 others.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

FASHION = Path(__file__).resolve().parent.parent / "models" / "fashion"
NETS = ("vgg", "resnet", "mobilenet", "vit")
REAL = ("efficientnet_lite0.dynamo", "ppocr_det", "minilm.dynamo")
SHARES = (0.75, 0.5, 0.35)
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"fitted": False},
    "fitted": {"repair": False},
    "repaired": {},
}


def factorized(model: Any, data: Any, **options: Any) -> Any:
    """What `Slim` and then `Factorize` make of a model; of the latter, the step of the report."""
    from onnxslim import Pipeline, Target
    from onnxslim.passes import Factorize, Slim

    target = Target.cpu(threads=1)
    slimmed = Pipeline(Slim(), on_error="raise")(model, data=data, target=target).model
    result = Pipeline(Factorize(**options), on_error="raise")(slimmed, data=data, target=target)
    return slimmed, result.model, result.report.steps[0]


def ratio(before: Any, after: Any, feeds: dict[str, Any]) -> float:
    """Time of one run on one thread relative to the model before; that thread's own time."""
    from onnxslim import Target
    from onnxslim.runtime.timing import compare

    return compare((before, after), feeds, Target.cpu(threads=1), rounds=200, seconds=10)[1][1]


def fashion(net: str) -> tuple[Any, Any]:
    """A bundled net and its calibration data."""
    import onnxslim

    data = onnxslim.CalibrationData.from_npz(FASHION / "calibration.npz", batch_size=64)
    return onnxslim.load(FASHION / f"{net}.onnx"), data


def row(net: str, what: str, **options: Any) -> str:
    """One way to factorize one of the nets."""
    from onnxslim.calibration.noise import sqnr
    from onnxslim.runtime.session import Session

    model, data = fashion(net)
    start = time.process_time()
    slimmed, found, step = factorized(model, data, **options)
    seconds = time.process_time() - start
    test = np.load(FASHION / "test.npz")
    logits = [Session(each).run({"image": test["image"]})["logits"] for each in (slimmed, found)]
    before, after = (100 * float((each.argmax(1) == test["label"]).mean()) for each in logits)
    noise = sqnr(*logits)
    macs = step.macs_after / step.macs_before
    params = step.after.parameters / step.before.parameters
    faster = 1 / ratio(slimmed, found, {"image": test["image"][:1]})
    return (
        f"| {net} | {what} | {macs:.2f} | {params:.2f} | {after:.2f} ({after - before:+.2f}) | {noise:.1f} "
        f"| {faster:.2f} | {seconds:.0f} |"
    )


def budgets(names: tuple[str, ...]) -> Iterator[str]:
    """Accuracy and latency at several budgets, by how factors are fitted."""
    yield from _head(
        "net", "wanted", "MACs", "parameters", "accuracy, %", "SQNR dB", "times as fast", "CPU s"
    )
    for net in names or NETS:
        for share in SHARES:
            for way, options in WAYS.items():
                yield row(net, f"{share:.0%}, {way}", macs=share, **options)


def schemes(names: tuple[str, ...]) -> Iterator[str]:
    """Every scheme alone."""
    yield from _head(
        "net", "schemes", "MACs", "parameters", "accuracy, %", "SQNR dB", "times as fast", "CPU s"
    )
    for net in names or ("vgg", "resnet"):
        for kind in ("output", "input", "spatial", "tucker", "separable", "auto"):
            yield row(net, kind, macs=0.5, schemes=(kind,) if kind == "auto" else (kind, "svd"))


def speed(names: tuple[str, ...]) -> Iterator[str]:
    """Ranks in blocks of 16, and a budget of time instead of multiply-accumulates."""
    yield from _head(
        "net", "wanted", "MACs", "parameters", "accuracy, %", "SQNR dB", "times as fast", "CPU s"
    )
    for net in names or ("vgg", "resnet"):
        yield row(net, "50%, align=16", macs=0.5, align=16)
        yield row(net, "speedup=2, align=16", speedup=2.0, align=16)


def layers(names: tuple[str, ...]) -> Iterator[str]:
    """What the gate measured, and what was chosen."""
    from onnxslim.passes.factorize import FactorizeFigures

    yield from _head("net", "layer", "factors", "MACs", "time", "gate", "chosen")
    for net in names or ("vgg",):
        model, data = fashion(net)
        _, _, step = factorized(model, data, macs=0.5)
        figures = FactorizeFigures.of(step.changes)
        for each in figures.candidates:
            taken = (figures.layers or {}).get(each.layer, "").startswith(each.factors + ":")
            yield (
                f"| {net} | {each.layer} | {each.factors} | {each.macs:.2f} | {each.time:.2f} "
                f"| {'passed' if each.passed else 'refused'} | {'chosen' if taken else ''} |"
            )


def depthwise(_: tuple[str, ...]) -> Iterator[str]:
    """Time of depthwise convolutions along one axis each, of those along both."""
    import onnx.parser

    from onnxslim import Target
    from onnxslim.engine.base import Log
    from onnxslim.ir.model import Model
    from onnxslim.passes.factorize.gate import SpeedGate
    from onnxslim.passes.factorize.schemes import SCHEMES
    from onnxslim.passes.factorize.search import layers_of
    from onnxslim.runtime.timing import Bench

    yield from _head("channels", "pixels", "kernel", "MACs", "time")
    for channels, pixels in ((64, 56), (144, 56), (240, 28), (672, 14)):
        for kernel in (3, 5, 7):
            pads = ",".join([str(kernel // 2)] * 4)
            text = f"""<ir_version: 8, opset_import: ["" : 17]> g (float[1,{channels},{pixels},{pixels}] x)
            => (float[1,{channels},{pixels},{pixels}] y) <float[{channels},1,{kernel},{kernel}] w>
            {{ y = Conv<group={channels}, pads=[{pads}]>(x, w) }}"""
            proto = onnx.parser.parse_model(text)
            weight = np.zeros((channels, 1, kernel, kernel), np.float32)
            proto.graph.ClearField("initializer")
            proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
            model = Model.from_proto(proto)
            (layer,) = layers_of(model, {"x": (1, channels, pixels, pixels)}, (), Log())[0]
            gate, spatial = SpeedGate(model, Bench(Target.cpu(threads=1), None)), SCHEMES["spatial"]
            time = gate(layer, [(spatial, (1,))]).ratios["spatial 1"]
            macs = spatial.macs(layer, (1,)) / layer.macs
            yield f"| {channels} | {pixels} | {kernel} | {macs:.2f} | {time:.2f} |"


def real(names: tuple[str, ...]) -> Iterator[str]:
    """Fidelity and latency of real models."""
    yield from _head(
        "model", "wanted", "MACs", "parameters", "SQNR dB", "top-1 agreement", "times as fast", "CPU s"
    )
    for name in names or REAL:
        for way in WAYS:
            yield real_row(name, 0.8, way)


def real_row(name: str, share: float, way: str) -> str:
    """One way to factorize one real model."""
    import onnxslim
    from benchmarks.real import agreement
    from onnxslim.calibration.noise import sqnr
    from onnxslim.models import zoo
    from onnxslim.runtime.session import Session

    data = onnxslim.CalibrationData(zoo.inputs(name, 64, seed=0))
    start = time.process_time()
    slimmed, found, step = factorized(onnxslim.load(zoo.path(name)), data, macs=share, **WAYS[way])
    seconds = time.process_time() - start
    feeds = zoo.inputs(name, 64, seed=1)
    outputs = [[session.run(batch) for batch in feeds] for session in (Session(slimmed), Session(found))]
    macs = f"{step.macs_after / step.macs_before:.2f}" if step.macs_before and step.macs_after else "–"
    params = step.after.parameters / step.before.parameters
    noise = sqnr(*outputs)
    return (
        f"| {name} | {share:.0%}, {way} | {macs} | {params:.2f} | {noise:.1f} | {agreement(name, *outputs)} "
        f"| {1 / ratio(slimmed, found, feeds[0]):.2f} | {seconds:.0f} |"
    )


def _head(*names: str) -> Iterator[str]:
    yield "| " + " | ".join(names) + " |"
    yield "|" + "---|" * len(names)


PARTS = {
    "budgets": budgets,
    "schemes": schemes,
    "speed": speed,
    "layers": layers,
    "depthwise": depthwise,
    "real": real,
}


def main() -> None:
    """Print one table."""
    part = sys.argv[1] if len(sys.argv) > 1 else "budgets"
    for line in PARTS[part](tuple(sys.argv[2:])):
        print(line, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
