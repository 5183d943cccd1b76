"""What tests of passes share: models from a few lines of ONNX text, and ONNX Runtime as the judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx.parser
from onnx import numpy_helper

from onnxslim.calibration.noise import sqnr
from onnxslim.engine.base import Changes, Context, Pass
from onnxslim.engine.check import difference, interface, wellformed
from onnxslim.errors import LoadError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model, load
from onnxslim.runtime.probe import make_feeds
from onnxslim.runtime.session import Session


def parse(
    text: str, constants: Mapping[str, Array] | None = None, *, opset: int = 17, ir_version: int = 8
) -> Model:
    """The model in ONNX text.

    Args:
        text: a text that starts with the graph gets a header.
        constants: values of what the text declares as inputs, to make initializers of them.
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


def run(model: Model, feeds: Mapping[str, Array] | None = None) -> dict[str, Any]:
    """Outputs of the model as it is written, without ONNX Runtime's own optimizations."""
    return Session(model, optimize="none").run(feeds_for(model) if feeds is None else feeds)


def feeds_for(model: Model, *, batch: int = 2, size: int = 3, seed: int = 0) -> dict[str, Array]:
    """Made-up inputs; axes without a size get `batch` (first axis) or `size`."""
    return make_feeds(model.inputs(), batch=batch, size=size, seed=seed)


def apply(step: Pass, model: Model) -> tuple[Model, Changes]:
    """A rewritten copy of the model and what was done to it."""
    twin = model.copy()
    return twin, step.run(twin, Context())


def same_outputs(
    before: Model, after: Model, feeds: Mapping[str, Array] | None = None, *, exact: bool = False
) -> None:
    """Assert that two models have one interface and compute the same, and that a valid one stays valid.

    Args:
        before, after: what to compare.
        feeds: their inputs; made up if None.
        exact: whether every bit must be equal, instead of equal up to rounding.
    """
    if _is_wellformed(before):
        wellformed(after)
    assert interface(after) == interface(before)
    fed = feeds_for(before) if feeds is None else feeds
    expected, actual = run(before, fed), run(after, fed)
    for name, value in expected.items():
        if exact:
            np.testing.assert_array_equal(actual[name], value, err_msg=name, strict=True)
        else:
            assert not difference(value, actual[name]), f"{name} {difference(value, actual[name])}"


def _is_wellformed(model: Model) -> bool:
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
