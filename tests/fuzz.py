"""Breaks models at random and sees that the product only ever fails on purpose.

    python -m tests.fuzz models FIRST COUNT FOLDER
    python -m tests.fuzz nodes FIRST COUNT FOLDER
    python -m tests.fuzz pipelines FIRST COUNT FOLDER
    python -m tests.fuzz chains FIRST COUNT FOLDER

Every case follows from its number, which is printed before it is tried: when the process dies, look at that
one. `tests/test_fuzz.py` starts it with limits on memory and time.
"""

from __future__ import annotations

import functools
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import Message
from onnx import TensorProto

from onnxslim import passes
from onnxslim.calibration.data import CalibrationData
from onnxslim.engine.base import Pass
from onnxslim.engine.check import interface, wellformed
from onnxslim.engine.pipeline import UNFORESEEN, Pipeline, Result
from onnxslim.errors import OnnxSlimError
from onnxslim.ir.model import Model, load
from onnxslim.models import zoo
from onnxslim.report.inspect import inspect
from onnxslim.runtime.probe import Feeds
from onnxslim.runtime.session import Session
from tests.helpers import feeds_for, parse, same_outputs
from tests.traps.chains import Drawn, random_chain

FASHION = Path(__file__).parent.parent / "models" / "fashion"
NETS = ("resnet", "mobilenet", "vit")
# What a pass cannot do without.
REQUIRED = {"prune": {"ratio": "0.3"}}
# Seconds for one case; what takes longer has hung.
PATIENCE = 900

SMALL = (
    "g (float[N,4] x) => (float[N,4] y) <float[4,4] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}> "
    "{ a = Identity(x) b = MatMul(a, w) c = Relu(b) y = Add(c, a) }",
    "g (float[N,2,4,4] x) => (float[N,8] y) <float[2,2,1,1] w = {1,2,3,4}, int64[2] s = {0,-1}> "
    "{ a = Conv(x, w) b = Relu(a) c = MaxPool<kernel_shape=[2,2], strides=[2,2]>(b) y = Reshape(c, s) }",
    "g (float[N,4] x, bool c) => (float[N,4] y) <float[4] w = {1,2,3,4}> { a = Mul(x, w) "
    "y = If (c) < then_branch = t () => (float[N,4] u) { u = Neg(a) }, "
    "else_branch = e () => (float[N,4] v) { v = Identity(a) }> }",
    "g (float[N,3,H,W] x) => (float[N,3,I,J] y) <int64[1] z = {0}, float[4] r = {1,1,2,2}> "
    "{ s = Shape(x) a = Gather(s, z) b = Cast<to=1>(a) d = Resize(x, , r) y = Add(d, b) }",
    "g (float[N,4] x) => (float[N,4] y) <float s = {0.1}, uint8 z = {7}> "
    "{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = Softmax(d) }",
)


def main(kind: str, first: int, count: int, folder: Path) -> None:
    """Try cases one by one."""
    warnings.simplefilter("ignore")
    for name in ("in", "out"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    case = KINDS[kind]
    for number in range(first, first + count):
        print(f"case {number}", flush=True)
        signal.alarm(PATIENCE)
        print(f"  {case(np.random.default_rng(number), folder)}", flush=True)
    signal.alarm(0)


# -------------------------------------------------------------------------------------- broken models


def broken_model(random: np.random.Generator, folder: Path) -> str:
    """A real or small model with a few mistakes in its structure, in its bytes, or in both."""
    return handled(damaged(random), folder)


def broken_node(random: np.random.Generator, folder: Path) -> str:
    """A case of the ONNX node suite with a few mistakes in its structure."""
    model = onnx.ModelProto()
    model.CopyFrom(suite()[random.integers(len(suite()))])
    for _ in range(random.integers(1, 4)):
        mutate(model, random)
    return handled(model.SerializeToString(), folder)


@functools.cache
def suite() -> list[onnx.ModelProto]:
    """Every operator at work, with inputs that are fed, and with some that are constants."""
    from tests.test_conformance import variants

    return [model for variant in ("as it is", "first input fed") for _, model, _ in variants(variant)]


def handled(content: bytes, folder: Path) -> str:
    """Read, inspect, slim and write a model that was damaged; returns how that ended."""
    path, out = folder / "in" / "case.onnx", folder / "out" / "case.onnx"
    path.write_bytes(content)
    before = {each for each in folder.rglob("*") if each.parent != out.parent}
    try:
        inspect(path)
        Pipeline(passes.create("slim", {}))(load(path)).save(out)
        found = "saved"
    except OnnxSlimError as error:
        found = ending(error)
    assert {each for each in folder.rglob("*") if each.parent != out.parent} == before, "files elsewhere"
    return found


def ending(error: OnnxSlimError) -> str:
    """Name and beginning of an error; it must be one line."""
    assert "\n" not in str(error), f"not one line: {error}"
    return f"{type(error).__name__}: {str(error)[:100]}"


def damaged(random: np.random.Generator) -> bytes:
    """Such a model, written."""
    model = onnx.ModelProto()
    if random.random() < 0.3:
        model.ParseFromString((FASHION / f"{random.choice(NETS)}.onnx").read_bytes())
    else:
        model = parse(str(random.choice(SMALL))).to_proto()
    if random.random() < 0.7:
        for _ in range(random.integers(1, 4)):
            mutate(model, random)
    content = bytearray(model.SerializeToString())
    if random.random() < 0.5:
        for _ in range(random.integers(1, 6)):
            at = int(random.integers(len(content) + 1))
            action = random.integers(3)
            if action == 0:
                content[at : at + 1] = random.bytes(1)
            elif action == 1:
                del content[at : at + int(random.integers(1, 40))]
            else:
                content[at:at] = random.bytes(int(random.integers(1, 8)))
    return bytes(content)


def mutate(message: Message, random: np.random.Generator) -> None:
    """Change one field of one message, somewhere inside."""
    while True:
        fields = [
            (field, value)
            for field, value in message.ListFields()
            if not (isinstance(message, TensorProto) and field.name == "raw_data" and len(value) > 256)
        ]
        if not fields:
            return
        field, value = fields[random.integers(len(fields))]
        items = value if hasattr(value, "append") or hasattr(value, "add") else None
        if field.message_type is not None and random.random() < 0.85:
            message = value if items is None else items[random.integers(len(items))]
            continue
        if items is not None:
            change_list(items, random, plain=field.message_type is None)
        elif field.enum_type is not None:
            numbers = [each.number for each in field.enum_type.values]
            setattr(message, field.name, int(random.choice(numbers)))
        elif field.message_type is None and not isinstance(value, bytes):
            setattr(message, field.name, other(value, random))
        else:
            message.ClearField(field.name)
        return


def change_list(items: Sequence[object], random: np.random.Generator, *, plain: bool) -> None:
    at = int(random.integers(len(items)))
    action = random.integers(3)
    if action == 0:
        del items[at]  # type: ignore[attr-defined]
    elif action == 1 and plain:
        items[at] = other(items[at], random)  # type: ignore[index]
    elif action == 1:
        items.add().CopyFrom(items[at])  # type: ignore[attr-defined]
    else:
        kept = list(items)
        random.shuffle(kept)
        del items[:]  # type: ignore[attr-defined]
        items.extend(kept)  # type: ignore[attr-defined]


def other(value: object, random: np.random.Generator) -> object:
    """Another value of the same type, often one at an edge."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return int(random.choice([0, 1, -1, 2, 7, 99, 2**31 - 1, 2**20, value + 1]))
    if isinstance(value, float):
        return float(random.choice([0.0, -1.0, np.inf, np.nan, 1e38]))
    names = ("", "x", "y", "a", "w", "Relu", "Add", "Concat", "Loop", "\x1b[2J", "é" * 5, "../../x")
    chosen = str(random.choice(names))
    return chosen.encode() if isinstance(value, bytes) else chosen


# ------------------------------------------------------------------------------------ random pipelines


def pipeline(random: np.random.Generator, folder: Path) -> str:
    """Any passes in any order on a real network end in a valid model or in a clean error."""
    name, model, data = network(random)
    chain = [chosen(random) for _ in range(random.integers(1, 4))]
    told = f"{name}: {', '.join(each.describe() for each in chain)}"
    print(f"  {told}", flush=True)
    try:
        result = Pipeline(*chain)(model, data=data, seed=int(random.integers(9)))
    except OnnxSlimError as error:
        return ending(error)
    if not any(getattr(each, "allow_outputs", False) for each in chain):
        assert interface(result.model) == interface(model)
    if result.model is not model:
        wellformed(result.model)
    feeds = next(iter(data))
    outputs = Session(result.model).run(feeds)
    assert all(np.isfinite(values).all() for values in outputs.values() if values.dtype.kind == "f")
    result.save(folder / "out" / "case.onnx")
    assert load(folder / "out" / "case.onnx").stats().nodes == result.model.stats().nodes
    return "; ".join(step.error[:80] for step in result.report.steps if step.error) or "done"


def network(random: np.random.Generator) -> tuple[str, Model, CalibrationData]:
    """One of the bundled networks, or of the zoo where it was fetched, with a little data."""
    present = [name for name in zoo.usual() if zoo.available(name)] if random.random() < 0.3 else []
    if present:
        name = str(random.choice(present))
        model = load(zoo.path(name))
        return name, model, CalibrationData(zoo.inputs(name, 8, seed=0)).bind(model.inputs())
    name = str(random.choice(NETS))
    data = CalibrationData.from_npz(FASHION / "calibration.npz", batch_size=8)
    return name, load(FASHION / f"{name}.onnx"), data.shard(0, 16)


def chosen(random: np.random.Generator) -> Pass:
    """A pass, now and then with options set to something."""
    cls = passes.get(str(random.choice(passes.names())))
    words = dict(REQUIRED.get(cls.name, {}))
    options = [option for option in passes.options_of(cls) if option.type != "file"]
    for _ in range(random.integers(3) if options else 0):
        option = options[int(random.integers(len(options)))]
        values = option.type.split("|") if "|" in option.type else ["0.5", "2", "none", option.default]
        words[option.name] = str(random.choice(values))
    try:
        return passes.create(cls.name, words)
    except OnnxSlimError:
        return passes.create(cls.name, REQUIRED.get(cls.name, {}))  # not a value of this option


# ------------------------------------------------------------------------------- random models and passes


def small_pipeline(random: np.random.Generator, folder: Path) -> str:
    """Any passes in any order on a random small graph end in a valid model or in a clean error."""
    model = random_chain(Drawn(random), random).model()
    chain = [chosen(random) for _ in range(random.integers(1, 5))]
    batches = [feeds_for(model, batch=2, seed=seed) for seed in range(8)] if random.random() < 0.6 else None
    path = folder / "in" / "case.onnx"
    model.save(path)
    print(f"  {', '.join(each.describe() for each in chain)}{' on data' * bool(batches)}", flush=True)
    try:
        result = Pipeline(*chain)(load(path), data=batches, seed=int(random.integers(9)))
    except OnnxSlimError as error:
        return ending(error)
    for step in result.report.steps:
        assert UNFORESEEN not in step.error, f"{step.description}: {step.error}"
        reasons = (skip.reason for skip in step.changes.skipped)
        assert not any(UNFORESEEN in each for each in reasons), step.description
    result.save(folder / "out" / "case.onnx")
    if not any(each.prepares or each.interface for each in chain):
        compare(model, result, feeds_for(model, seed=99), exact=all(each.lossless for each in chain))
    return "; ".join(step.error[:80] for step in result.report.steps if step.error) or "done"


def compare(model: Model, result: Result, feeds: Feeds, *, exact: bool) -> None:
    """A result runs; what passes without loss made of a model computes the same."""
    wanted, found = (Session(each).run(feeds) for each in (model, result.model))
    assert found.keys() == wanted.keys()
    if exact:
        same_outputs(model, result.model, feeds)


KINDS: dict[str, Callable[[np.random.Generator, Path], str]] = {
    "models": broken_model,
    "nodes": broken_node,
    "pipelines": pipeline,
    "chains": small_pipeline,
}

if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
