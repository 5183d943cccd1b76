"""What tests of passes share: models from a few lines of ONNX text, and ONNX Runtime as the judge."""

from __future__ import annotations

import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import onnx.defs
import onnx.parser
import onnxruntime
import pytest
from onnx import numpy_helper

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.noise import sqnr
from onnxslim.calibration.samples import Samples
from onnxslim.engine.base import Changes, Context, Pass
from onnxslim.engine.check import difference, interface, wellformed
from onnxslim.errors import LoadError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model, load
from onnxslim.ops import REGISTRY, OpSpec
from onnxslim.passes.quantize import Quantize
from onnxslim.runtime.metric import Metric
from onnxslim.runtime.probe import make_feeds
from onnxslim.runtime.releases import release
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target

ROOT = Path(__file__).parent.parent
FASHION = ROOT / "models" / "fashion"
ONNX_RUNTIME = tuple(map(int, onnxruntime.__version__.split(".")[:2]))
# The first version with what tests of recent operators run.
RECENT = (1, 32)
# How ONNX Runtime says that it has no kernel for an operator, or does not know the opset.
LACKING = ("NOT_IMPLEMENTED", "is under development", "Unsupported model IR version")
NETS = ("resnet", "mobilenet", "vit")
"""Networks in `FASHION` that ship with the package."""


def parse(
    text: str, constants: Mapping[str, Array] | None = None, *, opset: int = 17, ir_version: int = 8
) -> Model:
    """The model in ONNX text.

    Args:
        text: a text that starts with the graph gets a header.
        constants: values of initializers; the text need not declare them.
        opset, ir_version: for the header.
    """
    if not text.lstrip().startswith("<"):
        text = f'<ir_version: {ir_version}, opset_import: ["" : {opset}]>\n{text}'
    model = onnx.parser.parse_model(text)
    for name, values in (constants or {}).items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
    inputs = [info for info in model.graph.input if info.name not in (constants or {})]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    return load(model)


def normal(*shape: int, seed: int = 0) -> Array:
    """Values of a normal distribution, float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def normals(**shapes: tuple[int, ...]) -> dict[str, Array]:
    """Such values for each of these names, all different."""
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def filled(model: Model, scale: float = 1.0) -> Model:
    """The model with normal values times `scale` in all its initializers but scalars."""
    for index, constant in enumerate(model.graph.initializers.values()):
        if constant.shape:
            constant.values = normal(*constant.shape, seed=index + 1) * np.float32(scale)
    return model


def replaced(model: Model, **values: Array) -> Model:
    """A copy with these values in its initializers of these names."""
    twin = model.copy()
    for name, array in values.items():
        twin.graph.initializers[name].values = array
    return twin


def run(model: Model, feeds: Mapping[str, Array] | None = None) -> dict[str, Any]:
    """Outputs of the model as it is written, without ONNX Runtime's own optimizations."""
    return Session(model, optimize="none").run(feeds_for(model) if feeds is None else feeds)


def feeds_for(model: Model, *, batch: int = 2, size: int = 3, seed: int = 0) -> dict[str, Array]:
    """Made-up inputs; axes without a size get `batch` (first axis) or `size`."""
    return make_feeds(model.inputs(), batch=batch, size=size, seed=seed)


def stored(model: Model, name: str) -> Array:
    """Values of an initializer."""
    return model.graph.initializers[name].values


def judge_of(model: Model, optimize: str = "none") -> Session:
    """ONNX Runtime, or where it lacks a kernel or the opset, the reference evaluator."""
    return Session(model, optimize=optimize) if is_run(model) else Session(model, Target.reference())


def skip_if_old(model: Model, feeds: Mapping[str, Array] | None = None) -> None:
    """Skip a test whose model an ONNX Runtime does not run that is older than the operators in it."""
    if ONNX_RUNTIME < RECENT and not runs(model, feeds_for(model) if feeds is None else feeds):
        pytest.skip(f"this ONNX Runtime is older than {'.'.join(map(str, RECENT))}")


def skip_if_opset_is_newer(opset: int) -> None:
    """Skip a test whose models are of a newer opset than this ONNX Runtime reads at all."""
    newest = release(onnxruntime.__version__).opset
    if opset > newest:
        pytest.skip(f"ONNX Runtime {onnxruntime.__version__} reads no opset after {newest}")


def skip_if_eight_bits_are_not_fused(weights: str) -> None:
    """Skip where this ONNX Runtime makes no product of blocks of eight bits."""
    if weights == "int8" and ONNX_RUNTIME < RECENT:
        pytest.skip(f"ONNX Runtime {onnxruntime.__version__} may fuse no int8 weights in blocks")


def is_run(model: Model) -> bool:
    """Whether ONNX Runtime has kernels for a model, and knows its opset."""
    try:
        Session(model, optimize="none")
    except LoadError as error:
        if any(why in str(error) for why in LACKING):
            return False
        raise
    return True


def rows(*, domain: str | None = None) -> list[OpSpec]:
    """Rows with an example in an opset that the installed onnx knows, and rows without one."""
    newest = onnx.defs.onnx_opset_version()
    return [
        spec
        for spec in REGISTRY.values()
        if domain in (None, spec.domain) and (not spec.example or _opset_of(spec.example) <= newest)
    ]


def _opset_of(text: str) -> int:
    return int(next(each.version for each in onnx.parser.parse_model(text).opset_import if not each.domain))


def runs(model: Model, feeds: Mapping[str, Array]) -> bool:
    """Whether ONNX Runtime takes the model as it is written, and these inputs."""
    return bool(taken(model, [feeds]))


def taken(model: Model, batches: Iterable[Mapping[str, Array]]) -> list[tuple[Mapping[str, Array], Any]]:
    """The inputs that ONNX Runtime takes with the model as it is written, each with its outputs."""
    found: list[tuple[Mapping[str, Array], Any]] = []
    try:
        session = Session(model, optimize="none")
    except LoadError:
        return found
    for feeds in batches:
        with suppress(LoadError):
            found.append((feeds, session.run(feeds)))
    return found


def apply(
    step: Pass, model: Model, data: Iterable[Mapping[str, Array]] | None = None, **known: Any
) -> tuple[Model, Changes]:
    """A rewritten copy of the model and what was done to it.

    Args:
        step: the pass.
        model: stays as it is.
        data: batches to calibrate with.
        known: what else the pass is told: fields of `Context`.
    """
    twin = model.copy()
    given = None if data is None else Samples(CalibrationData(list(data)), model)
    return twin, step.run(twin, Context(data=given, **known))


def settled(step: Pass, model: Model) -> tuple[Model, Changes]:
    """The same, of a pass that keeps every bit of the outputs and leaves alone what it has made."""
    result, changes = apply(step, model)
    same_outputs(model, result, exact=True)
    again, more = apply(step, result)
    assert not more
    assert again.to_proto() == result.to_proto()
    return result, changes


def quantize(
    model: Model,
    data: Iterable[Mapping[str, Array]] | None = None,
    *,
    target: Target | None = None,
    metric: Metric | None = None,
    **options: Any,
) -> tuple[Model, Changes]:
    """The same, of `Quantize` with these options."""
    return apply(Quantize(**options), model, data, target=target or Target.cpu(), metric=metric)


def reasons(changes: Changes) -> dict[str, str]:
    """Why nodes were left alone, by their labels."""
    return {skip.node: skip.reason for skip in changes.skipped}


def same_outputs(
    before: Model, after: Model, feeds: Mapping[str, Array] | None = None, *, exact: bool = False
) -> None:
    """Assert that two models have one interface and compute the same, and that a valid one stays valid.

    Args:
        before, after: what to compare.
        feeds: their inputs; made up if None.
        exact: whether every bit must be equal, instead of equal up to rounding.
    """
    if is_wellformed(before):
        wellformed(after)
    assert interface(after) == interface(before)
    fed = feeds_for(before) if feeds is None else feeds
    expected, actual = run(before, fed), run(after, fed)
    for name, value in expected.items():
        if exact:
            np.testing.assert_array_equal(actual[name], value, err_msg=name, strict=True)
        else:
            assert not difference(value, actual[name]), f"{name} {difference(value, actual[name])}"


def as_fused(model: Model, folder: Path) -> Model:
    """The model as ONNX Runtime saves it once it has put in operators of its own."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "fused.onnx")
    options.log_severity_level = 3  # it warns that such a file is for processors of this kind
    onnxruntime.InferenceSession(model.to_proto().SerializeToString(), options, ["CPUExecutionProvider"])
    return load(options.optimized_model_filepath)


def is_wellformed(model: Model) -> bool:
    """Whether the model is valid as the standard says."""
    try:
        wellformed(model)
    except LoadError:
        return False
    return True


def sqnr_of(before: Model, after: Model, feeds: Mapping[str, Array], optimize: str = "all") -> float:
    """SQNR of all outputs, in dB; the second model may run with fewer of ONNX Runtime's optimizations."""
    return sqnr(Session(before).run(feeds), Session(after, optimize=optimize).run(feeds))


def ops(model: Model) -> Counter[str]:
    """How many nodes of each operator there are, bodies included."""
    return Counter(node.op for node in model.nodes())


def heed_interrupts() -> None:
    """For a child as it starts: what runs in the background of a shell ignores them, and so would it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def products(count: int) -> Model:
    """So many matrix products of one width, the last of which makes the output."""
    names = ["x", *(f"t{at}" for at in range(1, count)), "y"]
    nodes = " ".join(f"{names[at + 1]} = MatMul({names[at]}, w)" for at in range(count))
    return parse(f"g (float[N,256] x) => (float[N,256] y) {{ {nodes} }}", {"w": normal(256, 256) / 16})


def calls_of(work: Callable[[], object]) -> int:
    """How many calls some work takes: what it costs, whatever else the machine does meanwhile."""
    count = 0

    def seen(frame: FrameType, event: str, arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count
