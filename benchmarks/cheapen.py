"""Cheapen on the bundled nets and on real models: what is measured faster, what it costs, and why not more.

    python benchmarks/cheapen.py forms          every form beside what it stands for: time of one activation
    python benchmarks/cheapen.py nets [NET …]   the bundled nets, and the residual one with other activations
    python benchmarks/cheapen.py real [NAME …]  real models; see models/zoo.py

Latency is that of one sample on one thread, interleaved with the slimmed model's. The bundled nets are fitted
to their 512 calibration images and judged on 2000 others, real models to 32 samples and judged on 32 others.
The residual net with other activations was not trained with them: what it keeps is of its own outputs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

FASHION = Path(__file__).resolve().parent.parent / "models" / "fashion"
NETS = ("resnet", "mobilenet", "vit")
OTHERS = ("Mish", "Elu", "Softplus", "Gelu", "Swish")
REAL = (
    "ppocr_det",
    "ppocr_rec",
    "minilm.dynamo",
    "magika",
    "efficientnet_lite0.dynamo",
    "silero_vad_op18_ifless",
)
# Channels and size of the images that single activations are timed on, behind a convolution 1x1.
SIZES = ((64, 56), (256, 14))


def forms(_: tuple[str, ...]) -> Iterator[str]:
    """Formulas and approximations, with their first values, beside activations."""
    import onnx.parser

    from onnxslim import Target
    from onnxslim.ir.model import Model
    from onnxslim.runtime.timing import compare

    rivals = {
        "Relu": "y = Relu(c)",
        "HardSwish": "y = HardSwish(c)",
        "HardSigmoid": "y = HardSigmoid(c)",
        "x·HardSigmoid": "s = HardSigmoid(c) y = Mul(c, s)",
        "swish": "s = Sigmoid(c) y = Mul(c, s)",
        "Sigmoid": "y = Sigmoid(c)",
        "Gelu": "y = Gelu(c)",
        "Elu": "y = Elu(c)",
        "Softplus": "y = Softplus(c)",
        "Mish": "y = Mish(c)",
    }
    yield from _head("channels", "size", *rivals)
    for channels, size in SIZES:
        weight = np.random.default_rng(0).standard_normal((channels, channels, 1, 1), np.float32)
        models = []
        for body in rivals.values():
            shape = f"1,{channels},{size},{size}"
            text = f'<ir_version: 9, opset_import: ["" : 20]> g (float[{shape}] x) => (float[{shape}] y)'
            inits = f"<float[{channels},{channels},1,1] w>"
            proto = onnx.parser.parse_model(f"{text} {inits} {{ c = Conv(x, w) {body} }}")
            proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
            models.append(Model.from_proto(proto))
        feeds = {"x": np.random.default_rng(1).standard_normal((1, channels, size, size), np.float32)}
        times, ratios = compare(models, feeds, Target.cpu(threads=1), rounds=100)
        yield (
            f"| {channels} | {size} | {times[0].median:.3f} ms | "
            + " | ".join(f"{ratio:.2f}" for ratio in ratios[1:])
            + " |"
        )


def nets(names: tuple[str, ...]) -> Iterator[str]:
    """The bundled nets."""
    import onnxslim
    from onnxslim import CalibrationData

    yield from _head("net", "changed", "left", "SQNR dB", "accuracy, %", "latency", "CPU s")
    data = CalibrationData.from_npz(FASHION / "calibration.npz", batch_size=64)
    test = np.load(FASHION / "test.npz")
    for net in names or (*NETS, *OTHERS):
        model = onnxslim.load(FASHION / f"{net if net in NETS else 'resnet'}.onnx")
        if net not in NETS:
            model = with_activation(model, net)
        for given in (None, data):
            before, after, step, seconds = cheapened(model, given)
            feeds = [{"image": test["image"]}]
            row = told(before, after, step, feeds, {"image": test["image"][:1]})
            accuracy = "–"
            if net in NETS:
                logits = [_run(each, feeds)[0]["logits"] for each in (before, after)]
                first, second = (100 * float((each.argmax(1) == test["label"]).mean()) for each in logits)
                accuracy = f"{second:.2f} ({second - first:+.2f})"
            what = net if net in NETS else f"resnet with {net}"
            yield f"| {what}{'' if given else ', no data'} | {row.format(accuracy)} | {seconds:.0f} |"


def with_activation(model: Any, op: str) -> Any:
    """The model in opset 20 with another activation in place of every Relu."""
    import onnx
    from onnx import helper, version_converter

    from onnxslim.ir.model import Model

    proto = version_converter.convert_version(model.to_proto(), 20)
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    for node in nodes:
        if node.op_type != "Relu":
            proto.graph.node.append(node)
        elif op != "Swish":
            proto.graph.node.append(helper.make_node(op, node.input, node.output))
        else:
            gate = f"{node.output[0]}_gate"
            proto.graph.node.append(helper.make_node("Sigmoid", node.input, [gate]))
            proto.graph.node.append(helper.make_node("Mul", [node.input[0], gate], node.output))
    onnx.checker.check_model(proto)
    return Model.from_proto(proto)


def real(names: tuple[str, ...]) -> Iterator[str]:
    """Real models."""
    import onnxslim
    from benchmarks.real import agreement
    from onnxslim import CalibrationData
    from onnxslim.models import zoo

    yield from _head("model", "changed", "left", "SQNR dB", "same class", "latency", "CPU s")
    for name in names or REAL:
        data = CalibrationData(zoo.inputs(name, 32, seed=0))
        before, after, step, seconds = cheapened(onnxslim.load(zoo.path(name)), data)
        feeds = zoo.inputs(name, 32, seed=1)
        row = told(before, after, step, feeds, feeds[0])
        same = agreement(name, _run(before, feeds), _run(after, feeds))
        yield f"| {name} | {row.format(same)} | {seconds:.0f} |"


def cheapened(model: Any, data: Any) -> tuple[Any, Any, Any, float]:
    """The slimmed model, what `Cheapen` makes of it, the step of the report, and CPU seconds."""
    from onnxslim import Pipeline, Target
    from onnxslim.passes import Cheapen, Slim

    target = Target.cpu(threads=1)
    slimmed = Pipeline(Slim(), on_error="raise")(model, data=data, target=target).model
    start = time.process_time()
    result = Pipeline(Cheapen(), on_error="raise")(slimmed, data=data, target=target)
    return slimmed, result.model, result.report.steps[0], time.process_time() - start


def told(before: Any, after: Any, step: Any, feeds: Any, one: Any) -> str:
    """What was changed and left, fidelity, a place for one more value, and latency."""
    from onnxslim import Target
    from onnxslim.calibration.noise import sqnr
    from onnxslim.runtime.timing import compare

    changed = _counted(change.action.rsplit(" as ", 1)[-1].split(" ")[0] for change in step.changes.changed)
    left = len(
        {skip.node for skip in step.changes.skipped if "form" in skip.reason or "alone" in skip.reason}
    )
    noise = sqnr(_run(before, feeds), _run(after, feeds))
    ratio = compare((before, after), one, Target.cpu(threads=1), rounds=200, seconds=5)[1][1]
    return f"{changed or 'nothing'} | {left} | {noise:.1f} | {{}} | {ratio:.2f}"


def _counted(words: Iterator[str]) -> str:
    from collections import Counter

    return ", ".join(f"{count} {word}" for word, count in Counter(words).items())


def _run(model: Any, feeds: Any) -> Any:
    from onnxslim.runtime.session import Session

    session = Session(model)
    return [session.run(batch) for batch in feeds]


def _head(*names: str) -> Iterator[str]:
    yield "| " + " | ".join(names) + " |"
    yield "|" + "---|" * len(names)


PARTS = {"forms": forms, "nets": nets, "real": real}


def main() -> None:
    """Print one table."""
    part = sys.argv[1] if len(sys.argv) > 1 else "nets"
    for line in PARTS[part](tuple(sys.argv[2:])):
        print(line, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
