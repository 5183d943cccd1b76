"""Checker: what it must refuse, what it must let through, and on which inputs it looks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx.parser
import pytest

from onnxslim.engine.check import ROUNDINGS, Checker, difference, wellformed
from onnxslim.engine.pipeline import Pipeline
from onnxslim.errors import LoadError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model, load
from onnxslim.passes.slim import Slim
from onnxslim.runtime.limits import RunLimits
from onnxslim.runtime.probe import Feeds, probes
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target
from tests.helpers import normal, ops, parse, replaced


def _refuses(model: Model, name: str, values: Array) -> bool:
    """Whether the checker notices that a constant was replaced."""
    checker, other = Checker(model, Target.cpu()), model.copy()
    other.graph.initializers[name].values = values
    try:
        checker(other, lossless=True)
    except LoadError:
        return True
    return False


def test_a_mask_value_does_not_hide_an_error() -> None:
    model = parse(
        "g (float[N,8] x, float[8,8] w, float[1,8] k) => (float[N,8] y) { a = MatMul(x, w) y = Add(a, k) }",
        {"w": normal(8, 8), "k": np.array([[0.0] * 7 + [-3.4e38]], np.float32)},
    )
    assert _refuses(model, "w", normal(8, 8, seed=1))
    assert not _refuses(model, "w", model.graph.initializers["w"].values * np.float32(1 + 1e-6))


def test_words_beyond_the_first_two_are_looked_up() -> None:
    model = parse(
        "g (int64[B,S] ids, float[100,8] e) => (float[B,S,8] y) { y = Gather(e, ids) }",
        {"e": normal(100, 8)},
    )
    changed = model.graph.initializers["e"].values.copy()
    changed[10:] = 0
    assert _refuses(model, "e", changed)


def test_inputs_that_take_only_zeros_and_ones_get_those() -> None:
    model = parse(
        "g (int64[B,S] ids, float[2,8] e) => (float[B,S,8] y) { y = Gather(e, ids) }", {"e": normal(2, 8)}
    )
    feeds = Checker(model, Target.cpu()).feeds
    assert feeds
    assert all(each["ids"].max() == 1 for each in feeds)


def test_sizes_are_never_made_up_large() -> None:
    model = parse("g (int64[4] s) => (float[A,B,C,D] y) { y = ConstantOfShape(s) }")
    assert all(each["s"].max() <= 1 for each in Checker(model, Target.cpu()).feeds)


@pytest.mark.parametrize(
    ("reference", "actual", "problem"),
    [
        ([1.0, -3.4e38], [1.0, -3.4e38], ""),
        ([1.0, -3.4e38], [1.1, -3.4e38], "differs by 0.1"),
        ([1.0, -3.4e38], [1.0, -1.0e38], "differs by 2.4e+38"),
        ([1.0, -np.inf], [1.0, -np.inf], ""),
        ([1.0, np.nan], [1.0, 2.0], "NaN"),
    ],
)
def test_differences_are_measured_apart_from_masks(
    reference: list[float], actual: list[float], problem: str
) -> None:
    found = difference(np.array(reference, np.float32), np.array(actual, np.float32))
    assert problem in found if problem else not found


def test_a_model_that_cannot_run_is_still_slimmed_and_checked_by_structure() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "custom" : 1]>
        g (float[N] x) => (float[N] y) { a = custom.Foo(x) b = Identity(a) y = Relu(b) }"""
    )
    result = Pipeline(Slim())(load(proto))
    assert ops(result.model) == {"Foo": 1, "Relu": 1}
    assert any("does not run" in note for note in result.report.notes)


def test_structure_is_all_there_is_where_nothing_runs() -> None:
    """Which of two shapes of an output is wrong, only a run would tell; ONNX Runtime has no double Conv."""
    text = """g (float[N,4] x, double[1,1,4] v) => (float[N,2] y, double[1,1,4] z)
        { z = Conv(v, kernel) y = %s }"""
    columns = {"start": np.array([0]), "end": np.array([2]), "axis": np.array([1])}
    constants = {**columns, "kernel": np.ones((1, 1, 1))}
    checker = Checker(parse(text % "Slice(x, start, end, axis)", constants), Target.cpu())
    with pytest.raises(LoadError, match=r"onnx\.checker"):
        checker(parse(text % "Relu(x)", constants), lossless=True)


@pytest.mark.parametrize(("given", "made", "refused"), [(1.0, np.nan, True), (np.inf, np.nan, False)])
def test_lossy_passes_may_not_lose_everything(given: float, made: float, refused: bool) -> None:
    model = parse(
        "g (float[N,4] x) => (float[N,4] y) { y = Mul(x, k) }", {"k": np.full(4, given, np.float32)}
    )
    checker, other = Checker(model, Target.cpu()), replaced(model, k=np.full(4, made, np.float32))
    if refused:
        with pytest.raises(LoadError, match="became NaN or infinite"):
            checker(other, lossless=False)
    else:
        checker(other, lossless=False)


@pytest.mark.parametrize(
    ("off", "plain", "refused"), [(5.0, 0.0, False), (50.0, 0.0, True), (5.0, 2.0, True)]
)
def test_what_only_optimizations_change_may_differ_a_little_more(
    monkeypatch: pytest.MonkeyPatch, off: float, plain: float, refused: bool
) -> None:
    """An output off by so many times rounding, with and without ONNX Runtime's optimizations."""
    rounding = ROUNDINGS * float(np.finfo(np.float32).eps)
    model = parse("g (float[N,4] x) => (float[N,4] y) { y = Tanh(x) }")
    checker = Checker(model, Target.cpu())
    other = model.copy()
    run = Session.run

    def shifted(
        self: Session, feeds: Feeds, outputs: Sequence[str] | None = None, limits: RunLimits | None = None
    ) -> dict[str, Any]:
        found = run(self, feeds, outputs, limits)
        factor = (plain if self in plainly else off) if self in others else 0.0
        return {name: value + factor * rounding * np.abs(value).max() for name, value in found.items()}

    others: list[Session] = []
    plainly: list[Session] = []
    create = Session.__init__

    def noted(self: Session, source: Any, target: Any = None, **options: Any) -> None:
        create(self, source, target, **options)
        others.extend([self] if source is other else [])
        plainly.extend([self] if options.get("optimize") == "none" else [])

    monkeypatch.setattr(Session, "__init__", noted)
    monkeypatch.setattr(Session, "run", shifted)
    if refused:
        with pytest.raises(LoadError, match="differs"):
            checker(other, lossless=True)
    else:
        checker(other, lossless=True)


def test_outputs_of_saturated_gates_may_differ_by_their_rounding() -> None:
    """BatchNormalization folds into Conv, and all that shows is how ONNX Runtime rounds Sigmoid."""
    scale, mean = np.full(4, 0.37, np.float32), np.full(4, 0.11, np.float32)
    bias = np.full(4, -14.0, np.float32)
    model = parse(
        """g (float[N,3,6,6] x, float[4,3,3,3] w, float[4] s, float[4] b, float[4] m) => (float[N,4,4,4] y)
        { a = Conv(x, w) c = BatchNormalization(a, s, b, m, s) y = Sigmoid(c) }""",
        {"w": normal(4, 3, 3, 3), "s": scale, "b": bias, "m": mean},
    )
    step = Pipeline(Slim(), on_error="raise")(model).report.steps[0]
    assert step.after.nodes == 2


def test_rounding_of_gates_does_not_hide_an_error() -> None:
    model = parse(
        "g (float[N,8] x, float[8,8] w, float[8] b) => (float[N,8] y) { a = Gemm(x, w, b) y = Sigmoid(a) }",
        {"w": normal(8, 8), "b": np.full(8, -14.0, np.float32)},
    )
    assert _refuses(model, "b", np.full(8, -13.0, np.float32))
    assert not _refuses(model, "w", model.graph.initializers["w"].values * np.float32(1 + 1e-6))


def test_a_wrong_shape_declared_for_an_output_stays_and_does_no_harm() -> None:
    """onnx.checker sees it only once the shape is folded."""
    model = parse(
        """g (float[1,N,4] x, int64[1] i, int64[1] one, int64[1] f) => (float[N,1,5] y)
        { s = Shape(x) n = Gather(s, i) d = ReduceProd(n)
          t = Concat<axis=0>(d, one, f) y = Reshape(x, t) }""",
        {"i": np.array([1]), "one": np.array([1]), "f": np.array([4])},
    )
    result = Pipeline(Slim(), on_error="raise")(model)
    assert ops(result.model) == {"Reshape": 1}
    assert result.model.graph.outputs[0].shape == ("N", 1, 5)
    assert any("left as it is" in note for note in result.report.notes)


def test_an_interface_that_was_accepted_is_the_one_to_keep() -> None:
    checker = Checker(parse("g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }"), Target.cpu())
    narrower = parse(
        "g (float[N,4] x) => (float[N,2] y) <int64[2] k = {0,1}> { r = Relu(x) y = Gather<axis=1>(r, k) }"
    )
    with pytest.raises(LoadError, match="inputs or outputs changed"):
        checker(narrower, lossless=False)
    checker(narrower, lossless=False, changing={"shapes"})
    checker.accept(narrower)
    checker(narrower.copy(), lossless=True)


@pytest.mark.parametrize(("start", "found"), [(160, True), (10_000, False)])
def test_a_scan_is_never_run_over_nothing(start: int, found: bool) -> None:
    """ONNX Runtime divides by the number of steps, and the process dies."""
    model = parse(
        """g (float[1,N] x, float[1] z, int64[1] f, int64[1] e, int64[1] a) => (float[1] last, float[1,M] y) {
            tail = Slice(x, f, e, a)
            last, y = Scan<num_scan_inputs=1, scan_input_axes=[1], scan_output_axes=[1],
                body=b (float[1] s, float[1] t) => (float[1] u, float[1] v) { u = Add(s, t) v = Identity(u) }
            >(z, tail)
        }""",
        {
            "z": np.zeros(1, np.float32),
            "f": np.array([start]),
            "e": np.array([100_000]),
            "a": np.array([1]),
        },
    )
    assert bool(probes(model, Session(model))) == found


def test_probabilities_in_maps_may_differ_by_rounding() -> None:
    expected = [{0: 0.25, 1: 0.75}, {0: 1e-9, 1: 1.0}]
    assert not difference(expected, [{0: 0.25000003, 1: 0.75}, {0: 2e-9, 1: 1.0}])
    assert "differs by" in difference(expected, [{0: 0.25, 1: 0.75}, {0: 0.1, 1: 0.9}])
    assert "keys" in difference(expected, [{0: 0.25, 2: 0.75}, {0: 1e-9, 1: 1.0}])
    assert "elements" in difference(expected, [{0: 0.25, 1: 0.75}, {1: 1.0}])


def test_what_runs_by_optimizations_alone_need_not_be_kept() -> None:
    """ONNX Runtime makes [1, -1, 8] of this target, and takes any batch; as written it takes one."""
    text = """g (float[N,S,8] x) => (float[1,S,8] y)
    { s = Shape<start=1,end=2>(x) t = Concat<axis=0>(one, s, width) y = Reshape(x, t) }"""
    sizes = {"one": np.array([1], np.int64), "width": np.array([8], np.int64)}
    model = parse(text, sizes)
    assert Session(model).run({"x": normal(2, 3, 8)})["y"].shape == (1, 6, 8)
    other = parse(text.replace("y = Reshape(x, t)", "u = Max(t, one) y = Reshape(x, u)"), sizes)
    checker = Checker(model, Target.cpu())
    checker(other, lossless=True)
    assert {feeds["x"].shape[0] for feeds in checker.feeds} == {1}
    wrong = parse(text.replace("y = Reshape(x, t)", "z = Neg(x) u = Max(t, one) y = Reshape(z, u)"), sizes)
    with pytest.raises(LoadError, match="output 'y' differs"):
        Checker(model, Target.cpu())(wrong, lossless=True)


def test_reasons_of_other_packages_are_told_to_their_end() -> None:
    name = "long" * 200
    model = parse(f"g (float[N] x) => (float[N] y) {{ [{name}] y = NoSuchOperator(x) }}")
    for attempt in (wellformed, Session):
        with pytest.raises(LoadError, match=f"{name}") as caught:
            attempt(model)
        assert "[ONNXRuntimeError]" not in str(caught.value)
        assert "\n" not in str(caught.value)
