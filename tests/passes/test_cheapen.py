"""Cheapen: formulas of the same function, forms that come close to it, what is chosen and what is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.fidelity import Judge
from onnxslim.calibration.samples import Samples
from onnxslim.engine.base import Changes, Context, Log
from onnxslim.engine.editor import Editor
from onnxslim.errors import UsageError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.passes.cheapen import Cheapen, CheapenFigures, FormName, search, sites
from onnxslim.passes.cheapen.forms import APPROXIMATIONS, FORMULAS, NAMES, Approximation, write
from onnxslim.passes.cheapen.plan import CheapeningPlan
from onnxslim.passes.cheapen.search import FormOffer, SiteOffers
from onnxslim.passes.cheapen.sites import Site
from onnxslim.passes.sparsify.storing import pack
from onnxslim.runtime import timing
from onnxslim.runtime.targets import Target
from onnxslim.runtime.timing import Bench, Latency
from tests.helpers import normal, ops, parse, reasons, run

NET = """g (float[N,8,6,6] x) => (float[N,5] y)
{
    a = Conv(x, u)  m = Mish(a)
    c = Conv(m, v)  s = Sigmoid(c)  d = Mul(c, s)
    e = Conv(d, w)  r = Relu(e)
    p = GlobalAveragePool(r)  f = Flatten(p)  y = MatMul(f, q)
}"""
WEIGHTS = {
    "u": normal(12, 8, 3, 3) / 6,
    "v": normal(12, 12, 1, 1),
    "w": normal(12, 12, 1, 1),
    "q": normal(12, 5),
}


@pytest.fixture
def net() -> Model:
    return parse(NET, WEIGHTS, opset=20)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Time runs by operators: what each takes, and 1.0 for every one that is not named."""
    speed = {"Mish": 20.0, "Sigmoid": 5.0}

    def seconds(model: Model) -> float:
        return sum(speed.get(node.op, 1.0) for node in model.nodes())

    def compare(models: list[Model], *_: Any) -> tuple[list[Latency], list[float]]:
        times = [seconds(model) for model in models]
        return [Latency(time, time) for time in times], [time / times[0] for time in times]

    def bench(self: Bench, what: str, first: Any, others: Any, feeds: Mapping[str, Array]) -> timing.Timing:
        whole = seconds(first())
        return timing.Timing(whole, {name: seconds(make()) / whole for name, make in others.items()})

    def slowdown(first: Model, second: Model, *_: Any, telling: float) -> float | None:
        ratio = seconds(second) / seconds(first)
        return ratio if ratio > 1.05 else None

    monkeypatch.setattr(timing, "compare", compare)
    monkeypatch.setattr(timing, "slowdown", slowdown)
    monkeypatch.setattr(Bench, "__call__", bench)
    return speed


def _data(count: int = 6, size: int = 8) -> list[dict[str, Array]]:
    return [{"x": normal(size, 8, 6, 6, seed=seed)} for seed in range(count)]


def _cheapen(model: Model, data: Any = None, **options: Any) -> tuple[Model, Changes]:
    twin = model.copy()
    samples = None if data is None else Samples(CalibrationData(data), model)
    context = Context(target=Target.cpu(1), data=samples, sample={"x": normal(1, 8, 6, 6)})
    return twin, Cheapen(**options).run(twin, context)


def _written(form: Any, values: tuple[float, ...], op: str = "Relu", attrs: str = "") -> Model:
    model = parse(f"g (float[N] x) => (float[N] y) {{ y = {op}{attrs}(x) }}", {}, opset=20)
    edit, node = Editor(model), model.graph.nodes[0]
    spelled = form.spelled(*values) if isinstance(form, Approximation) else form.spelled(node)
    write(edit, node, spelled, node.inputs[0], np.dtype(np.float32))
    edit.commit()
    return model


# ------------------------------------------------------------------------------------------------- forms

EVERYWHERE = np.concatenate(
    (np.linspace(-30, 30, 4001), np.geomspace(30, 3e38, 50), -np.geomspace(30, 3e38, 50))
)
GIVEN = {"Elu": ("", "<alpha=0.3>"), "Celu": ("", "<alpha=2.5>"), "Selu": ("", "<alpha=1.2, gamma=0.8>")}


@pytest.mark.parametrize(
    ("form", "attrs"), [(form, attrs) for form in FORMULAS for attrs in GIVEN.get(form.op, ("",))]
)
def test_formulas_are_the_same_function(form: Any, attrs: str) -> None:
    x = EVERYWHERE.astype(np.float32)
    original = parse(f"g (float[N] x) => (float[N] y) {{ y = {form.op}{attrs}(x) }}", {}, opset=20)
    found = _written(form, (), form.op, attrs)
    assert form.op not in ops(found)
    wanted = run(original, {"x": x})["y"]
    np.testing.assert_allclose(run(found, {"x": x})["y"], wanted, rtol=3e-6, atol=3e-7)


@settings(max_examples=20)
@given(st.sampled_from(APPROXIMATIONS), st.floats(0.05, 3.0), st.floats(-0.9, 0.9))
def test_curves_are_what_the_operators_make(form: Approximation, first: float, second: float) -> None:
    values = tuple(float(np.float32(each)) for each in (first, second)[: len(form.start)])
    x = np.linspace(-8, 8, 101, dtype=np.float32)
    made = run(_written(form, values), {"x": x})["y"]
    np.testing.assert_allclose(made, form.curve(x.astype(np.float64), *values), rtol=1e-5, atol=1e-5)


def test_values_of_the_least_error_are_found() -> None:
    at = np.linspace(-6, 6, 500)
    for form in APPROXIMATIONS:
        values = tuple(1.3 * value for value in form.start)
        found, lost = form.fitted(at, form.curve(at, *values))
        np.testing.assert_allclose(found, values, rtol=2e-2, atol=1e-3)
        assert lost < 1e-4
    swish, hard = (
        next(each for each in APPROXIMATIONS if each.name == name) for name in ("swish", "hard_swish")
    )
    assert 1e-5 < swish.fitted(at, hard.curve(at))[1] < 1e-2


def test_all_names_are_options() -> None:
    assert get_args(FormName) == ("auto", *NAMES)


# ------------------------------------------------------------------------------------------------- places


def _sites(model: Model, exclude: tuple[str, ...] = ()) -> tuple[list[Site], dict[str, str]]:
    log = Log()
    shape = [size if isinstance(size, int) else 2 for size in model.graph.inputs[0].shape or ()]
    found = sites.find(model, exclude, {"x": normal(*shape)}, Target.cpu(1), log)
    return found, {skip.node: skip.reason for skip in log.done().skipped}


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("y = Relu(x)", []),
        ("y = Clip(x, c, k)", []),
        ("a = Mul(x, k) y = Add(a, c)", []),
        ("s = Sigmoid(x) y = Mul(s, x)", [("Sigmoid", "Mul")]),
        ("t = Softplus(x) h = Tanh(t) y = Mul(x, h)", [("Softplus", "Tanh", "Mul")]),
        ("a = Add(x, v) y = Sigmoid(a)", [("Sigmoid",)]),
        ("y = Softmax(x)", []),
        ("m = Mish(x) y = Add(m, x)", [("Mish", "Add")]),
        ("e = Elu(x) b = MatMul(x, w) y = Add(e, b)", [("Elu",)]),
        ("s = Sigmoid(x) b = MatMul(x, w) y = Add(s, b)", []),
    ],
)
def test_functions_are_found_by_what_they_compute(body: str, found: list[tuple[str, ...]]) -> None:
    constants = {"c": np.float32(0), "k": np.float32(3), "v": normal(4), "w": normal(4, 4)}
    model = parse(f"g (float[N,4] x) => (float[N,4] y) {{ {body} }}", constants, opset=20)
    assert [site.ops for site in _sites(model)[0]] == found


def test_what_makes_the_data_is_timed_with_it(net: Model) -> None:
    found, _ = _sites(net)
    assert [(site.lead, site.chain.start.name, site.output) for site in found] == [
        ("x", "a", "m"),
        ("m", "c", "d"),
    ]
    text = "g (float[N,4] x) => (float[N,4] y) { z = Neg(x) a = MatMul(z, w) b = Add(a, v) y = Sigmoid(b) }"
    (site,), _ = _sites(parse(text, {"w": normal(4, 4), "v": normal(4)}))
    assert site.lead == "z"


def test_what_makes_the_data_of_integers_is_not() -> None:
    body = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = Sigmoid(d)"
    model = parse(
        f"g (float[N,4] x) => (float[N,4] y) {{ {body} }}", {"s": np.float32(0.1), "z": np.uint8(3)}
    )
    (site,), _ = _sites(model)
    assert not site.before
    assert site.lead == "d"
    assert site.dtype == np.float32


def test_excluded_places_and_those_in_bodies_are_named(net: Model) -> None:
    found, told = _sites(net, ("Mish",))
    assert [site.output for site in found] == ["d"]
    assert told == {"Mish→m": "excluded by 'Mish'"}
    branch = "g () => (float[2,4] y) { [inner] y = Mish(x) }"
    other = branch.replace("inner", "other")
    body = f"y = If(c) <then_branch = {branch}, else_branch = {other}>"
    model = parse(f"g (float[2,4] x, bool c) => (float[2,4] y) {{ {body} }}", {}, opset=20)
    log = Log()
    assert not sites.find(model, (), {"x": normal(2, 4), "c": np.array(True)}, Target.cpu(1), log)
    assert {skip.reason for skip in log.done().skipped} == {"it is inside a branch or a loop"}


# ------------------------------------------------------------------------------------------------- the pass


def test_without_data_only_the_same_function_is_written_anew(net: Model, clock: dict[str, float]) -> None:
    found, changes = _cheapen(net)
    assert [change.node for change in changes.changed] == ["Mish→m"]
    assert "without data, other functions are not tried" in reasons(changes)["Mul→d"]
    np.testing.assert_allclose(run(found, _data(1)[0])["y"], run(net, _data(1)[0])["y"], rtol=1e-4, atol=1e-5)
    assert "without data" in (CheapenFigures.of(changes).without or "")


def test_with_data_what_comes_close_is_fitted_and_layers_behind_it_again(
    net: Model, clock: dict[str, float]
) -> None:
    judge = Judge(net, CalibrationData(_data(2, 32)), Target.cpu(1))
    plain, _ = _cheapen(net, _data(12), repair=False)
    found, changes = _cheapen(net, _data(12))
    assert "Mish" not in ops(found)
    figures = CheapenFigures.of(changes)
    assert figures.repaired
    assert figures.latency is not None
    assert figures.latency < 0.7
    assert 10 < judge(plain).sqnr < judge(found).sqnr < 80


def test_layers_whose_zeros_are_not_stored_are_fitted_again(net: Model, clock: dict[str, float]) -> None:
    net.graph.initializers["w"].values = normal(64, 12, 3, 3) * (normal(64, 12, 3, 3, seed=1) > 1)
    net.graph.initializers["q"].values = normal(64, 5)
    assert pack(net, [net.graph.initializers["w"]]) is None
    assert "CumSum" in ops(net)
    found, changes = _cheapen(net, _data(12))
    assert "its weight is not a constant" not in [skip.reason for skip in changes.skipped]
    assert CheapenFigures.of(changes).repaired == 3
    assert np.count_nonzero(found.graph.initializers["w"].values) < 0.3 * 64 * 12 * 9


def test_more_is_kept_where_more_is_required(net: Model, clock: dict[str, float]) -> None:
    loose, _ = _cheapen(net, _data(12), require_sqnr=5)
    tight, changes = _cheapen(net, _data(12), require_sqnr=60)
    assert "Sigmoid" not in ops(loose)
    assert "Sigmoid" in ops(tight)
    assert "Mish" not in ops(tight), "the formula loses nothing"
    assert "too much" in reasons(changes)["Mul→d"]
    judge = Judge(net, CalibrationData(_data(2, 32)), Target.cpu(1))
    assert judge(loose).sqnr < 40
    assert judge(tight).sqnr > 60


def test_what_is_not_faster_is_left_with_the_time_it_takes(net: Model, clock: dict[str, float]) -> None:
    clock.update(dict.fromkeys(("Mish", "Sigmoid"), 1.0))
    found, changes = _cheapen(net, _data(), forms=("hard_gate", "mish"))
    assert not changes
    assert "more than 0.91" in reasons(changes)["Mish→m"]
    assert "on CPUExecutionProvider" in reasons(changes)["Mish→m"]
    assert ops(found) == ops(net)


def test_a_whole_that_is_not_faster_stays(
    net: Model, clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "slowdown", lambda *_, telling: None)
    found, changes = _cheapen(net, _data())
    assert not changes
    assert any("not certainly less" in reason for reason in reasons(changes).values())
    assert ops(found) == ops(net)


def test_a_model_without_activations_is_told() -> None:
    model = parse("g (float[N,8,6,6] x) => (float[N,8,6,6] y) { y = Relu(x) }", {})
    _, changes = _cheapen(model)
    assert not changes
    assert "no activations" in next(iter(reasons(changes).values()))


def test_plans_replay(net: Model, clock: dict[str, float], tmp_path: Path) -> None:
    found, changes = _cheapen(net, _data(), repair=False)
    plan = CheapenFigures.of(changes).plan
    assert plan is not None
    assert CheapeningPlan.from_json(plan.to_json()) == plan
    (tmp_path / "plan.json").write_text(plan.to_json())
    again, _ = _cheapen(net, plan=tmp_path / "plan.json")
    feeds = _data(1)[0]
    np.testing.assert_array_equal(run(again, feeds)["y"], run(found, feeds)["y"])
    with pytest.raises(UsageError, match="is made by"):
        _cheapen(found, plan=replace(plan, forms=plan.forms[-1:]))
    for change, why in (
        ({"form": "mush", "values": ()}, "there is no form 'mush'"),
        ({"form": "mish", "values": ()}, "'mish' is a form of Mish"),
        ({"form": "leaky_relu", "values": ()}, "'leaky_relu' takes 1 values"),
        ({"output": "nowhere"}, "nothing makes 'nowhere'"),
    ):
        with pytest.raises(UsageError, match=why):
            _cheapen(net, plan=replace(plan, forms=(replace(plan.forms[-1], **change),)))
    with pytest.raises(UsageError, match="has nothing to say"):
        Cheapen(plan=plan, forms=("relu",))


def test_time_is_given_up_for_errors_that_would_be_too_large() -> None:
    model = parse(
        "g (float[N,4] x) => (float[N,4] y) { a = Mish(x) b = MatMul(a, w) y = Mish(b) }",
        {"w": normal(4, 4)},
        opset=20,
    )
    one, two = _sites(model)[0]
    fast, near = (
        FormOffer(APPROXIMATIONS[at], lost=0.1, time=time, error=error)
        for at, time, error in ((0, 0.2, 0.5), (1, 0.4, 0.01))
    )
    entries = [SiteOffers(one, (fast, near), 1.0), SiteOffers(two, (fast, near), 3.0)]
    assert [offer for _, offer in search.chosen(entries, 1.0)] == [fast, fast]
    assert [offer for _, offer in search.chosen(entries, 0.51)] == [near, fast]
    assert [offer for _, offer in search.chosen(entries, 0.02)] == [near, near]
    assert [site.output for site, _ in search.chosen(entries, 0.015)] == [two.output]
    assert search.chosen(entries, 0.0) == []


def test_the_gate_times_on_the_target(net: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For real: ONNX Runtime computes one value of Mish at a time, everywhere."""
    monkeypatch.setenv("ONNXSLIM_CACHE", str(tmp_path))
    model = parse("g (float[N,32,64,64] x) => (float[N,32,64,64] y) { y = Mish(x) }", {}, opset=20)
    twin = model.copy()
    changes = Cheapen().run(twin, Context(target=Target.cpu(1), sample={"x": normal(1, 32, 64, 64)}))
    assert changes
    assert list((tmp_path / "latency").iterdir())
    latency = CheapenFigures.of(changes).latency
    assert latency is not None
    assert latency < 0.8


def test_operators_that_a_model_defines_itself_are_what_it_says() -> None:
    text = """<ir_version: 9, opset_import: ["" : 20]>
    g (float[N,4] x) => (float[N,4] y) { a = Mish(x) y = Sigmoid(a) }
    <domain: "", opset_import: ["" : 20]> Mish (x) => (y) { y = Relu(x) }"""
    model = Model.from_proto(onnx.parser.parse_model(text))
    assert [site.ops for site in _sites(model)[0]] == [("Sigmoid",)]


def test_no_form_ends_where_the_data_happened_to() -> None:
    model = parse("g (float[N,4] x) => (float[N,4] y) { y = Elu(x) }", {})
    found, _ = _sites(model)
    data = np.linspace(-3, 3, 400, dtype=np.float32).reshape(-1, 4)
    (site,) = sites.seen(found, model, CalibrationData([{"x": data}]), Target.cpu(1))
    assert site.at is not None
    clip = next(form for form in APPROXIMATIONS if form.name == "clip")
    wanted = run(model, {"x": np.stack([site.at] * 4, axis=1)})["y"][:, 0]
    (low, high), _ = clip.fitted(site.at, wanted)
    assert -1.0 < low < 0.0
    assert high > 4.5
