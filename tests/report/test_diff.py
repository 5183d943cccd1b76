"""How graphs differ: by structure, whatever nodes, tensors and constants are called."""

from __future__ import annotations

import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim import cli
from onnxslim.calibration.data import CalibrationData
from onnxslim.engine.pipeline import Pipeline
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model, load
from onnxslim.passes.quantize import Quantize
from onnxslim.passes.slim import Slim
from onnxslim.report.diff import Difference, PassDeeds, diff
from onnxslim.report.html import deeds, difference_page
from onnxslim.report.places import MOST_NODES
from tests.helpers import FASHION, parse

COMPUTED = "'w' is computed now"
BASE = "g (float[N,2] x) => (float[N,2] y) <float[2] w = {1,2}> { %s }"


def told(first: str, second: str) -> tuple[list[str], list[str], dict[str, tuple[str, ...]]]:
    found = diff(parse(BASE % first), parse(BASE % second))
    return list(found.removed), list(found.added), dict(found.changed)


def renamed(model: Model) -> Model:
    """The same model under other names, of inputs and outputs too."""
    copy = model.copy()
    for at, node in enumerate(copy.nodes()):
        node.name = f"n{at}"
        for made in node.outputs:
            made.name = made.name and f"t{at}_{made.name}"
    for at, constant in enumerate(copy.constants()):
        constant.name = f"c{at}"
    return copy


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "vit"])
def test_names_are_no_difference(name: str) -> None:
    model = load(FASHION / f"{name}.onnx")
    found = diff(model, renamed(model))
    assert (found.removed, found.added, dict(found.changed), found.places) == ((), (), {}, ())
    assert found.same == model.stats().nodes
    assert str(diff(model, model)) == f"the same graph: {found.same} nodes, whatever they are called"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("[n] y = Relu(x)", "[m] y = Relu(x)", ([], [], {})),
        ("[n] y = Relu(x)", "[m] y = Neg(x)", ([], [], {"n": ("Relu → Neg",)})),
        ("[n] t = Relu(x) [m] y = Neg(t)", "[k] y = Neg(x)", (["n (Relu)"], [], {})),
        ("[k] y = Neg(x)", "[n] t = Relu(x) [m] y = Neg(t)", ([], ["n (Relu)"], {})),
        ("[a] y = LeakyRelu<alpha = 0.1>(x)", "y = LeakyRelu(x)", ([], [], {"a": ("alpha 0.1 → none",)})),
        ("[a] y = Add(x, w)", "[b] y = Add(x)", ([], [], {"a": ("no longer reads 'w'",)})),
        (
            "[a] y = Add(x, w)",
            "t = Neg(w) y = Add(x, t)",
            ([], ["Neg→t (Neg)"], {"a": ("'w' is computed now",)}),
        ),
        (
            "[a] t = Relu(x) [b] s = Neg(x) [c] y = Mul(t, s)",
            "[a] t = Relu(x) [b] s = Neg(x) [c] y = Mul(t, t)",
            ([], [], {"c": ("reads 't' instead of 's'",)}),
        ),
    ],
)
def test_what_is_gone_new_and_changed(
    first: str, second: str, expected: tuple[list[str], list[str], dict[str, tuple[str, ...]]]
) -> None:
    assert told(first, second) == expected


def test_a_node_in_the_middle_of_equal_ones_is_found_by_its_weights() -> None:
    weights = {f"w{at}": np.random.default_rng(at).normal(size=(8, 8)).astype(np.float32) for at in range(4)}
    body = "float[8,8] w0, float[8,8] w1, float[8,8] w2, float[8,8] w3"
    chain = f"g (float[N,8] x) => (float[N,8] y) <{body}> {{ %s }}"
    long = "[a] p = MatMul(x, w0) [b] q = MatMul(p, w1) [c] r = MatMul(q, w2) [d] y = MatMul(r, w3)"
    short = "[p] p = MatMul(x, w0) [q] r = MatMul(p, w2) [r] y = MatMul(r, w3)"
    found = diff(parse(chain % long, weights), parse(chain % short, weights))
    assert (found.removed, found.added, dict(found.changed)) == (("b (MatMul)",), (), {})


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        (np.float32(2.5), "'w': times 2.5"),
        (np.arange(1, 5, dtype=np.float32)[:, None], "'w': times 1 to 4, by"),
    ],
)
def test_weights_are_told_by_how_much(factor: Array, expected: str) -> None:
    text = "g (float[N,4] x) => (float[N,4] y) <float[4,4] w> { [n] y = MatMul(x, w) }"
    weight = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    (found,) = diff(
        parse(text, {"w": weight}), parse(text, {"w": (weight * factor).astype(np.float32)})
    ).changed["n"]
    assert found.startswith(expected)
    noisy = weight + np.float32(0.01) * np.eye(4, dtype=np.float32)
    (found,) = diff(parse(text, {"w": weight}), parse(text, {"w": noisy})).changed["n"]
    kept = 10 * np.log10(np.sum(weight.astype(np.float64) ** 2) / np.sum((noisy - weight) ** 2))
    assert found == f"'w': {kept:.1f} dB of signal to noise"
    sparse = np.where(np.eye(4) > 0, 0, weight).astype(np.float32)
    (found,) = diff(parse(text, {"w": weight}), parse(text, {"w": sparse})).changed["n"]
    assert found.endswith("zeros 0.00 % → 25.00 %")


def test_integers_are_told_by_what_they_stand_for() -> None:
    text = "g (float[N,2] x) => (float[N,2] y) <%s> { %s }"
    first = parse(text % ("float[2,2] w = {1, 2, 3, 4}", "[n] y = MatMul(x, w)"))
    pair = "i = QuantizeLinear(x, s, z) f = DequantizeLinear(i, s, z) "
    pair += "d = DequantizeLinear(w, s) [m] y = MatMul(f, d)"
    given = "int8[2,2] w = {2, 4, 6, 9}, float s = {0.5}, int8 z = {0}"
    found = diff(first, parse(text % (given, pair)))
    expected = 10 * np.log10(30 / 0.25)
    weight = f"'w': float32[2,2] → int8[2,2], {expected:.1f} dB of signal to noise"
    assert dict(found.changed) == {"n": (weight, "inputs from DQ 0 → 2")}
    assert {name.split("(")[1] for name in found.added} == {"QuantizeLinear)", "DequantizeLinear)"}


def test_few_bits_are_told_by_what_they_stand_for() -> None:
    """Weights that a Cast unpacks, and data of which a Clip leaves a few codes."""
    text = "g (float[N,2] x) => (float[N,2] y) <%s> { %s }"
    first = parse(text % ("float[2,2] w = {1, 2, 3, 4}", "[n] y = MatMul(x, w)"))
    pair = "i = QuantizeLinear(x, s, z) c = Clip(i, z, t) f = DequantizeLinear(c, s, z) "
    pair += "b = Cast<to=3>(w) d = DequantizeLinear(b, s, z) [m] y = MatMul(f, d)"
    given = "int4[2,2] w, float s = {0.5}, int8 z = {0}, int8 t = {7}"
    codes = {"w": np.array([[2, 4], [6, 7]], ml_dtypes.int4)}
    expected = 10 * np.log10(30 / 0.25)
    weight = f"'w': float32[2,2] → int4[2,2], {expected:.1f} dB of signal to noise"
    found = diff(first, parse(text % (given, pair), codes, opset=21, ir_version=10))
    assert dict(found.changed) == {"n": (weight, "inputs from DQ 0 → 2")}


def test_interfaces_are_compared() -> None:
    first, second = (f"g (float[{n},2] x) => (float[{n},2] y) {{ y = Relu(x) }}" for n in ("N", "1"))
    assert diff(parse(first), parse(second)).interface == (
        "input 'x': float32[N,2] → float32[1,2]",
        "output 'y': float32[N,2] → float32[1,2]",
    )


def test_nodes_of_bodies_are_compared() -> None:
    text = """g (float[2] x, bool c) => (float[2] y) {{
        [i] y = If (c) < then_branch = t () => (float[2] p) {{ [t] p = {}(x) }},
                         else_branch = e () => (float[2] q) {{ [e] q = Neg(x) }}> }}"""
    assert dict(diff(parse(text.format("Relu")), parse(text.format("Abs"))).changed) == {"t": ("Relu → Abs",)}


# ---------------------------------------------------------------------------------- what passes did


@pytest.fixture(scope="module")
def made() -> tuple[Model, Model, Difference]:
    model = load(FASHION / "resnet.onnx")
    data = CalibrationData.from_npz(FASHION / "calibration.npz", batch_size=16)
    result = Pipeline(Slim(), Quantize(effort="quick"), on_error="raise")(model, data=data)
    return model, result.model, diff(model, result.model, deeds(result.report))


def test_a_run_is_told_by_its_passes(made: tuple[Model, Model, Difference]) -> None:
    _, after, found = made
    assert found.passes == ("slim", "quantize")
    norms = [name for name in found.removed if "BatchNormalization" in name]
    assert len(norms) == 13
    assert all("Linear" in name for name in found.added)
    assert found.same + len(found.changed) + len(found.added) == after.stats().nodes
    nodes = [node for place in found.places for node in (*place.before.nodes, *place.after.nodes)]
    took = [node for node in nodes if node.op == "BatchNormalization" and node.state == "gone"]
    assert took
    assert {tuple(node.done) for node in took} == {("slim",)}
    assert {place.made_by for place in found.places} >= {"slim", "quantize"}
    for place in found.places:
        for side in (place.before, place.after):
            assert sum(node.state != "same" for node in side.nodes) <= MOST_NODES
            assert all(0 <= end < len(side.nodes) for edge in side.edges for end in edge)


def test_only_one_pass_in_a_certificate_is_told_of_nodes() -> None:
    first = parse(BASE % "t = Identity(x) y = Relu(t)")
    second = parse(BASE % "y = Relu(x)")
    alone = diff(first, second.with_metadata({"onnxslim.passes": '["slim"]'}))
    assert [place.made_by for place in alone.places] == ["slim"]
    both = diff(first, second.with_metadata({"onnxslim.passes": '["slim", {"quantize": {}}]'}))
    assert (both.passes, [place.made_by for place in both.places]) == (("slim", "quantize"), [""])
    assert PassDeeds.certified(second.with_metadata({"onnxslim.passes": "{"})).names == ()


def test_a_place_is_drawn_with_what_is_beside_it_on_each_side() -> None:
    first = BASE % "[a] t = Relu(x) [b] s = Exp(t) [c] y = Neg(s)"
    second = BASE % "[a] t = Relu(x) [c] y = Neg(t)"
    (place,) = diff(parse(first), parse(second)).places
    states = [[(node.op, node.state) for node in side.nodes] for side in (place.before, place.after)]
    assert states[0] == [("Relu", "same"), ("Exp", "gone"), ("Neg", "same")]
    assert states[1] == [("Relu", "same"), ("Neg", "same")]
    assert (place.before.edges, place.after.edges) == (((0, 1), (1, 2)), ((0, 1),))


def test_places_of_one_kind_are_drawn_once() -> None:
    body = " ".join(f"a{i} = Identity(x{i}) x{i + 1} = Relu(a{i})" for i in range(6))
    short = " ".join(f"x{i + 1} = Relu(x{i})" for i in range(6))
    text = "g (float[2] x0) => (float[2] x6) { %s }"
    found = diff(parse(text % body), parse(text % short))
    assert sorted((place.count, len(place.others)) for place in found.places) == [(1, 0), (5, 4)]


@given(st.lists(st.sampled_from(["Relu", "Neg", "Abs", "Exp"]), min_size=1, max_size=8), st.data())
@settings(max_examples=20)
def test_nothing_is_lost_or_counted_twice(ops: list[str], data: st.DataObject) -> None:
    kept = [op for op in ops if data.draw(st.booleans())]
    models = []
    for chosen in (ops, kept):
        nodes = "".join(f"t{i + 1} = {op}(t{i}) " for i, op in enumerate(chosen))
        models.append(parse(f"g (float[2] t0) => (float[2] y) {{ {nodes} y = Sqrt(t{len(chosen)}) }}"))
    found = diff(models[0], models[1])
    assert found.same + len(found.changed) + len(found.removed) == len(ops) + 1
    assert found.same + len(found.changed) + len(found.added) == len(kept) + 1


def test_large_graphs_take_seconds_and_small_pages(tmp_path: Path) -> None:
    count = 1250  # 5,000 nodes
    start = time.process_time()
    long = " ".join(
        f"a{i} = Identity(x{i}) b{i} = Relu(a{i}) c{i} = Neg(b{i}) x{i + 1} = Abs(c{i})" for i in range(count)
    )
    short = " ".join(f"b{i} = Relu(x{i}) c{i} = Exp(b{i}) x{i + 1} = Abs(c{i})" for i in range(count))
    text = f"g (float[2] x0) => (float[2] x{count}) {{ %s }}"
    page = difference_page(parse(text % long), parse(text % short))
    assert page.difference is not None
    assert len(page.difference.removed) >= count
    assert len(page.to_html()) < 1_000_000
    assert time.process_time() - start < 60, "quadratic"


# ----------------------------------------------------------------------------------- the command line


def test_the_command_line_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(tmp_path / "a.onnx"), str(tmp_path / "b.onnx")]
    parse(BASE % "t = Identity(x) [n] y = Relu(t)").save(words[0])
    report, page = tmp_path / "r.json", tmp_path / "d.html"
    assert cli.main(["slim", *words, "--report", str(report), "--quiet"]) == 0
    assert cli.main(["diff", *words, "--report", str(report), "--html", str(page)]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["the same in both: 1 nodes", "gone: 1"]
    html = page.read_text("utf-8")
    assert "What changed in the graph" in html
    assert "Identity" in html
    assert cli.main(["diff", *words, "--html", str(tmp_path / "d.txt")]) == 2
    assert cli.main(["diff", *words, "--html", words[0]]) == 2
    assert cli.main(["diff", *words, "--report", words[0]]) == 3
    assert "is not a report in JSON" in capsys.readouterr().err
    assert cli.main(["diff", words[0], words[0], "--json"]) == 0
