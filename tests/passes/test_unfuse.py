"""Unfuse: files that ONNX Runtime has optimized are what they were before, to every pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.seen import NOTE
from onnxslim.engine.base import Pass
from onnxslim.engine.pipeline import Pipeline
from onnxslim.errors import LoadError
from onnxslim.families.analysis import analyze
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model, load
from onnxslim.ops.spec import WHICH
from onnxslim.passes.factorize import Factorize
from onnxslim.passes.half import Half
from onnxslim.passes.prune import Prune
from onnxslim.passes.prune.cut import prepare
from onnxslim.passes.quantize import Quantize, QuantizeFigures
from onnxslim.passes.slim import Slim
from onnxslim.passes.unfuse import Unfuse
from onnxslim.runtime.session import Session
from tests.helpers import FASHION, apply, as_fused, normal, normals, ops, parse, reasons, same_outputs

NETWORKS = ("resnet", "mobilenet", "vgg", "vit")
HEAD = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>'


def families(model: Model) -> list[tuple[int, int]]:
    """Units, and channels of each, of what may be removed."""
    twin = model.copy()
    prepare(twin)
    return sorted((family.size, family.width) for family in analyze(twin).families)


@pytest.mark.parametrize("name", NETWORKS)
def test_fused_networks_have_the_families_of_their_originals(name: str, tmp_path: Path) -> None:
    original = load(FASHION / f"{name}.onnx")
    fused = as_fused(original, tmp_path)
    assert any(node.domain for node in fused.nodes())
    result = Pipeline(Unfuse(), on_error="raise")(fused).model
    assert not any(node.domain for node in result.nodes())
    assert families(result) == families(original)
    assert families(original)


def _covered(model: Model, data: CalibrationData) -> tuple[object, float]:
    """How much runs in integers, and how many of the test images are told right."""
    quickly = Quantize(algorithm="rtn", equalization=False, sequential=False, require_sqnr=0)
    result = Pipeline(Slim(), quickly, on_error="raise")(model, data=data)
    figures = QuantizeFigures.of(result.report.steps[1].changes)
    with np.load(FASHION / "test.npz") as test:
        images, labels = test["image"][:500], test["label"][:500]
    (logits,) = Session(result.model).run({"image": images}).values()
    return (figures.fused, figures.total), float((logits.argmax(-1) == labels).mean())


@pytest.mark.parametrize("name", ["mobilenet", "vit"])
def test_fused_networks_are_quantized_like_their_originals(name: str, tmp_path: Path) -> None:
    data = CalibrationData.from_npz(FASHION / "calibration.npz").shard(0, 8)
    original = load(FASHION / f"{name}.onnx")
    expected, accuracy = _covered(original, data)
    found, also = _covered(as_fused(original, tmp_path), data)
    assert found == expected
    assert abs(also - accuracy) <= 0.005


@pytest.mark.parametrize("name", ["resnet", "vgg", "vit"])
def test_quantized_networks_are_seen_through(name: str, tmp_path: Path) -> None:
    """ONNX Runtime has put in its integer operators, and has codes moved about instead of numbers."""
    data = CalibrationData.from_npz(FASHION / "calibration.npz").shard(0, 8)
    quickly = Quantize(algorithm="rtn", equalization=False, sequential=False, require_sqnr=0)
    original = Pipeline(Slim(), quickly)(load(FASHION / f"{name}.onnx"), data=data).model
    fused = as_fused(original, tmp_path)
    assert {"QLinearConv", "MatMulIntegerToFloat"} & ops(fused).keys()
    assert families(Pipeline(Unfuse(), on_error="raise")(fused).model) == families(original)
    found = [
        QuantizeFigures.of(Pipeline(quickly, on_error="raise")(model, data=data).report.steps[0].changes)
        for model in (original, fused)
    ]
    assert found[0].fused == found[1].fused
    assert found[0].fused


CODES = """g (uint8[N,4,8] x, float[N,4,8] z) => ({results})
<float s = {{0.1}}, uint8 o = {{128}}, float t = {{0.2}}> {{ q = QuantizeLinear(z, s, o) {nodes} }}"""


@pytest.mark.parametrize(
    ("nodes", "moves"),
    [
        ("[m] a = Transpose<perm=[0,2,1]>(q) d = DequantizeLinear(a, s, o) y = Relu(d)", True),
        ("[m] a = MaxPool<kernel_shape=[2], pads=[1,0]>(q) y = DequantizeLinear(a, s, o)", True),
        ("[m] a, b = Split<axis=1>(q) y = DequantizeLinear(a, s, o) r = DequantizeLinear(b, s, o)", True),
        ("[m] a = Transpose<perm=[0,2,1]>(q) d = DequantizeLinear(a, t, o) y = Relu(d)", True),
        ("[m] a, b = Split<axis=1>(q) y = DequantizeLinear(a, s, o) r = DequantizeLinear(b, t, o)", False),
        ("[m] a = Transpose<perm=[0,2,1]>(q) y = DequantizeLinear(a, s, o) r = Cast<to=1>(a)", False),
        ("[m] shown = Transpose<perm=[0,2,1]>(q) y = DequantizeLinear(shown, s, o)", False),
        (
            "[m] a = Transpose(x) c = Identity(a) y = DequantizeLinear(c, s, o) r = Cast<to=1>(c)",
            False,
        ),
    ],
)
def test_codes_are_moved_as_numbers(nodes: str, moves: bool) -> None:
    others = {" r = ": "float[N,C,D] r", "] shown ": "uint8[N,C,D] shown"}
    results = ", ".join(("float[N,A,B] y", *(other for name, other in others.items() if name in nodes)))
    model = parse(CODES.format(results=results, nodes=nodes))
    result, _ = apply(Unfuse(), model)
    same_outputs(model, result, exact=True)
    mover = next(node for node in result.graph.nodes if node.name in ("m", "m_1"))
    assert (mover.inputs[0].inputs[0].op == "DequantizeLinear" if mover.inputs[0].inputs else False) is moves


def test_codes_of_weights_stay_what_is_stored() -> None:
    text = """g (float[N,8] x) => (float[N,4] y) <float s = {0.1}>
    { t = Transpose<perm=[1,0]>(w) d = DequantizeLinear(t, s) y = MatMul(x, d) }"""
    _, changes = apply(Unfuse(), parse(text, {"w": np.ones((4, 8), np.int8)}))
    assert not changes


LAYER = f"""{HEAD} g (float[N,32] x) => (float[N,4] y)
{{ [first] a = com.microsoft.FusedGemm<activation="Relu">(x, w, b)
   [second] y = com.microsoft.FusedMatMul(a, v) }}"""


@pytest.fixture
def layers() -> Model:
    low = normal(32, 4) @ normal(4, 64, seed=1)
    return parse(LAYER, {"w": low, **normals(b=(64,), v=(64, 4))})


@pytest.fixture
def data() -> list[dict[str, Array]]:
    return [{"x": normal(1, 32, seed=seed)} for seed in range(40)]


@pytest.mark.parametrize(
    "step",
    [Prune(ratio=0.5), Factorize(params=0.7), Quantize(classifier=True), Half()],
    ids=lambda step: str(step.name),
)
def test_passes_over_layers_see_those_inside(step: Pass, layers: Model, data: list[dict[str, Array]]) -> None:
    result, changes = apply(step, layers, data)
    assert changes, reasons(changes)
    assert not any(node.domain for node in result.nodes())


def test_layers_keep_their_names(layers: Model) -> None:
    result, _ = apply(Unfuse(), layers)
    same_outputs(layers, result)
    assert [(node.name, node.op) for node in result.graph.nodes if node.name in ("first", "second")] == [
        ("first", "Gemm"),
        ("second", "MatMul"),
    ]


def test_nodes_in_bodies_are_written_out() -> None:
    model = parse(f"""{HEAD} g (bool c, float[2,4] x) => (float[2,4] y) {{ y = If(c)
    <then_branch = t () => (float[2,4] z) {{ z = com.microsoft.QuickGelu(x) }},
     else_branch = e () => (float[2,4] z) {{ u = com.microsoft.Gelu(x) z = com.microsoft.Gelu(u) }}> }}""")
    result, changes = apply(Unfuse(), model)
    same_outputs(model, result, {"c": np.array(False), "x": np.ones((2, 4), np.float32)})
    assert len(changes.changed) == 3
    assert not any(node.domain for node in result.nodes())


def test_functions_of_the_model_by_such_a_name_are_its_own() -> None:
    model = parse(f"""{HEAD} g (float[2,4] x) => (float[2,4] y) {{ y = com.microsoft.Gelu(x) }}
    <domain: "com.microsoft", opset_import: ["" : 17]> Gelu (a) => (b) {{ b = Neg(a) }}""")
    result, changes = apply(Unfuse(), model)
    assert not changes
    assert ops(result) == ops(model)


def test_slim_writes_them_out_unless_the_model_grows_by_it() -> None:
    text = f"{HEAD} g (float[2,4] x) => (float[2,4] y) {{ y = com.microsoft.QuickGelu(x) }}"
    model = parse(text)
    result, changes = apply(Slim(), model)
    assert ops(result) == ops(model)
    assert reasons(changes)["unfuse"] == "left out: the model would be larger for it"
    result, _ = apply(Slim(max_growth=1000), model)
    assert ops(result)["Sigmoid"] == 1
    kept, _ = apply(Slim(max_growth=1000, skip=("unfuse",)), model)
    assert ops(kept) == ops(model)


@pytest.mark.parametrize(
    ("domain", "op", "cure"),
    [
        ("com.microsoft.nchwc", "Conv", "ORT_ENABLE_EXTENDED"),
        ("com.ms.internal.nhwc", "Conv", "ORT_ENABLE_EXTENDED"),
        ("com.microsoft", "NhwcFusedConv", "ORT_ENABLE_EXTENDED"),
        ("com.microsoft", "EPContext", "start from the model that was compiled"),
    ],
)
def test_files_that_are_tied_to_a_machine_are_refused(domain: str, op: str, cure: str) -> None:
    head = HEAD.replace("com.microsoft", domain)
    model = parse(f"{head} g (float[2,4] x) => (float[2,4] y) {{ [n] a = {domain}.{op}(x) y = Relu(a) }}")
    with pytest.raises(LoadError, match=rf"^node 'n' \({domain}\.{op}\) .*{cure}") as refused:
        Pipeline(Slim())(model)
    assert "\n" not in str(refused.value)
    own = f"{HEAD} g (float[4] x) => (float[4] y) {{ y = com.microsoft.EPContext(x) }}"
    Pipeline(Slim())(
        parse(f"""{own} <domain: "com.microsoft", opset_import: ["" : 17]>
    EPContext (a) => (b) {{ b = Neg(a) }}""")
    )


def test_old_opsets_are_left_alone() -> None:
    head = HEAD.replace("17", "8")
    model = parse(f"{head} g (float[2,4] x) => (float[2,4] y) {{ y = com.microsoft.Gelu(x) }}")
    _, changes = apply(Unfuse(), model)
    assert not changes
    assert reasons(changes) == {"Gelu→y": "stays Gelu: that takes opset 9"}


ATTENTION = f"""{HEAD} g (float[N,6,16] x) => (float[N,6,4] y)
{{ [packed] a = com.microsoft.Attention<num_heads=4>(x, w, b)
   q = MatMul(a, m) k = MatMul(a, n) v = MatMul(a, o)
   [apart] h = com.microsoft.MultiHeadAttention<num_heads=4>(q, k, v) r = com.microsoft.QuickGelu(h)
   y = MatMul(r, z) }}"""


@pytest.fixture
def attention() -> Model:
    shapes = {"w": (16, 48), "b": (48,), "m": (16, 16), "n": (16, 16), "o": (16, 16), "z": (16, 4)}
    return parse(ATTENTION, {name: values * np.float32(0.2) for name, values in normals(**shapes).items()})


def test_attention_is_written_out_by_what_needs_it(attention: Model) -> None:
    left = {which: apply(Unfuse(which=which), attention)[0] for which in WHICH}
    found = {which: {node.op for node in each.nodes() if node.domain} for which, each in left.items()}
    assert found == {
        "free": {"Attention", "MultiHeadAttention"},
        "layers": {"MultiHeadAttention"},
        "units": set(),
        "all": set(),
    }
    for each in left.values():
        same_outputs(attention, each)
    assert ops(apply(Slim(max_growth=1000), attention)[0])["QuickGelu"] == 0


def test_heads_can_be_pruned(attention: Model) -> None:
    result, _ = apply(Prune(ratio=0.5, align=1, repair="none"), attention)
    assert result.graph.initializers["w"].shape == (16, 24)
    assert result.graph.initializers["m"].shape == (8, 8)


def test_types_and_shapes_are_known_behind_what_stays(attention: Model) -> None:
    data = [{"x": normal(2, 6, 16, seed=seed)} for seed in range(8)]
    result, changes = apply(Quantize(classifier=True), attention, data)
    assert ops(result)["MultiHeadAttention"] == 1
    assert ops(result)["DequantizeLinear"] > 4
    assert NOTE not in reasons(changes).values()
