"""Every case of the ONNX node suite: reading and writing keeps every byte; slimming keeps outputs and
interface, is valid, and is stable.

Which cases ONNX Runtime has no kernels for is frozen for pairs of versions in `tests/conformance`, so that a
case that runs today cannot silently stop running. A file for another pair is written by

    python -m tests.test_conformance
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxslim.engine.base import Context
from onnxslim.engine.check import OPTIMIZER_FACTOR, difference, interface, wellformed
from onnxslim.engine.pipeline import Pipeline
from onnxslim.errors import LoadError, PassError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import DEFAULT_DOMAINS, Model, load
from onnxslim.passes.legalize import Legalize
from onnxslim.passes.slim import Slim
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target
from tests.helpers import ONNX_RUNTIME, RECENT, is_wellformed

pytestmark = pytest.mark.conformance

EQUAL, NOT_RUN = "equal", "not run"
# Of what may be fed and what is frozen, every other case stands for its neighbours.
EVERY = {"as it is": 1, "first input fed": 2, "nothing fed": 1}

# What ONNX Runtime has kernels for differs between its versions, but never is so little: 1.23 runs 1197 of
# the cases of onnx 1.23 as they are, 1.31 runs 1352, 1.32 runs 1526.
FEWEST = {"as it is": 1150, "first input fed": 400, "nothing fed": 1150}

# An older opset, and of how many of every eighth case there is a form in it; 1.23 runs fewer of them.
OLDER, LEAST_OLDER = 13, 80 if ONNX_RUNTIME >= RECENT else 70


@functools.cache
def cases() -> list[Any]:
    """The node suite, without the source of its cases; making it up warns of what it does on purpose."""
    from onnx.backend.test.case import base
    from onnx.backend.test.case.node import collect_testcases
    from onnx.reference.ops import op_pool_common

    import_module("onnx.reference")  # which keeps the true `pool`
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr(base, "process_snippet", lambda op, name, _: (name, ""))
        if find_spec("torch") is None:  # only what learns is compared with the results that the suite expects
            patch.setattr(op_pool_common, "pool", _unpooled)
        return list(collect_testcases(""))


def _unpooled(padded: Array, sizes: tuple[int, ...], *given: Any, **_: Any) -> Array:
    """What pooling makes, but for its values: onnx's loops in Python take most of the time of the suite."""
    spatial = given[2]
    return np.zeros((*sizes[:2], *spatial), padded.dtype)


def variants(variant: str) -> Iterator[tuple[str, onnx.ModelProto, dict[str, Array]]]:
    """Every case with its inputs; those that are not fed are made initializers."""
    for case in cases()[:: EVERY[variant]]:
        arrays = case.data_sets[0][0]
        feeds = {info.name: array for info, array in zip(case.model.graph.input, arrays, strict=False)}
        if variant == "as it is":
            yield case.name, case.model, feeds
            continue
        names = [info.name for info in case.model.graph.input][variant == "first input fed" :]
        frozen = _frozen(case.model, {name: feeds[name] for name in names if name in feeds})
        if frozen is not None:
            yield case.name, frozen, {name: array for name, array in feeds.items() if name not in names}


def _frozen(model: onnx.ModelProto, values: Mapping[str, Any]) -> onnx.ModelProto | None:
    """The model with inputs made initializers; None if that is not possible, or none is left to do."""
    declared = {info.name: info.type.tensor_type.elem_type for info in model.graph.input}
    if not values or not all(isinstance(array, (np.ndarray, np.generic)) for array in values.values()):
        return None
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in values.items()]
    if any(tensor.data_type != declared[tensor.name] for tensor in tensors):
        return None
    frozen = onnx.ModelProto()
    frozen.CopyFrom(model)
    del frozen.graph.input[:]
    frozen.graph.input.extend(info for info in model.graph.input if info.name not in values)
    frozen.graph.initializer.extend(tensors)
    # Before this version, initializers have to be inputs as well.
    frozen.ir_version = max(frozen.ir_version, 4)
    return frozen


def test_round_trips_are_byte_identical() -> None:
    def written(model: Model) -> bytes:
        return model.to_proto().SerializeToString(deterministic=True)

    changed = []
    for case in cases():
        model = load(case.model)
        if {written(model), written(model.copy())} != {case.model.SerializeToString(deterministic=True)}:
            changed.append(case.name)
    assert len(cases()) > 1000
    assert changed == []


@pytest.mark.parametrize("variant", FEWEST)
def test_slimming_changes_no_result(variant: str) -> None:
    found = outcomes(variant)
    problems = [f"{name}: {problem}" for name, problem in found.items() if problem not in (EQUAL, NOT_RUN)]
    assert not problems, "\n".join(problems)
    assert list(found.values()).count(EQUAL) >= FEWEST[variant]
    if frozen().is_file():
        expected = json.loads(frozen().read_text(encoding="utf-8"))[variant]
        assert not_run(found) == [name for name in expected if name in found]


def test_older_opsets_compute_the_same_or_are_refused() -> None:
    problems, equal = [], 0
    for name, proto, feeds in islice(variants("as it is"), 0, None, 8):
        model = load(proto)
        if set(model.opsets) - set(DEFAULT_DOMAINS) or model.opset <= OLDER:
            continue
        try:
            expected = Session(model, Target.cpu(threads=1)).run(feeds)
            result = Pipeline(Legalize(opset=OLDER), on_error="raise", count=False)(model).model
        except (LoadError, PassError):
            continue
        actual = Session(result, Target.cpu(threads=1)).run(feeds)
        wrong = [
            each for each, value in expected.items() if difference(value, actual[each], OPTIMIZER_FACTOR)
        ]
        # What is drawn at random is another one in every run.
        problems += [f"{name}: {each}" for each in wrong if "bernoulli" not in name]
        equal += not wrong
    assert not problems
    assert equal >= LEAST_OLDER


def frozen() -> Path:
    """The file of cases that these versions do not run."""
    pair = f"onnx-{version('onnx')}-onnxruntime-{version('onnxruntime')}"
    return Path(__file__).parent / "conformance" / f"{pair}.json"


def outcomes(variant: str) -> dict[str, str]:
    """What comes of slimming each case."""
    return {name: outcome(load(proto), feeds) for name, proto, feeds in variants(variant)}


def not_run(found: Mapping[str, str]) -> list[str]:
    """Cases that do not run as they are."""
    return sorted(name for name, result in found.items() if result == NOT_RUN)


def outcome(model: Model, feeds: Mapping[str, Array]) -> str:
    """What comes of slimming a model."""
    try:
        return EQUAL if slimmed_is_equal(model, feeds) else NOT_RUN
    except (AssertionError, LoadError) as error:
        return str(error)


def slimmed_is_equal(model: Model, feeds: Mapping[str, Array]) -> bool:
    """Slim a model and compare; False if ONNX Runtime does not run it as it is."""
    result = model.copy()
    changed, written = Slim().run(result, Context()), result.to_proto()
    if changed:
        assert interface(result) == interface(model), "the interface changed"
        if is_wellformed(model):
            wellformed(result)
        assert not Slim().run(result, Context()), "slimming again changes it again"
        assert result.to_proto() == written, "slimming again writes another file"
    else:
        assert model.to_proto() == written, "it has become another file without a word"
    try:
        session = Session(model, Target.cpu(threads=1), optimize="none")
        expected = session.run(feeds)
    except LoadError:
        return False
    if not changed:  # the same file computes the same
        return True
    actual = Session(written, Target.cpu(threads=1), optimize="none").run(feeds)
    for name, value in expected.items():
        problem = difference(value, actual[name])
        random = problem and difference(value, session.run(feeds)[name])
        assert not problem or random, f"{name} {problem}"
    return True


if __name__ == "__main__":
    lists = {variant: not_run(outcomes(variant)) for variant in FEWEST}
    frozen().parent.mkdir(exist_ok=True)
    frozen().write_text(json.dumps(lists, indent=1) + "\n", encoding="utf-8")
