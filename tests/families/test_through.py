"""Families around operators between layers: found, and cut so that the rest computes as before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx.defs
import pytest
from onnx import helper

from onnxslim.families.analysis import analyze
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.passes.prune import Prune, PruneFigures
from onnxslim.passes.unfuse import Unfuse
from onnxslim.runtime.session import Session
from tests.helpers import apply, feeds_for, normals, parse, skip_if_old

_FEW = 1e-5


@dataclass(frozen=True)
class Case:
    """What stands between two layers.

    Attributes:
        nodes: from `a` and `b` to `z`.
        opset: that they take.
        inputs: more of the model, as text.
        constants: that they read.
        units: of the families that there are.
        crosses: whether statistics change when units go.
    """

    nodes: str
    opset: int = 17
    inputs: str = ""
    constants: Mapping[str, Array] = field(default_factory=dict)
    units: tuple[int, ...] = (16,)
    crosses: bool = False


_OFFSETS = ", float[N,18,5,5] o"
_REGIONS = np.tile(np.array([0, 0, 3, 3], np.float32), (4, 1))
# Between convolutions, [batch, 16, 5, 5].
IMAGES = {
    "LpNormalization": Case("z = LpNormalization<axis=1>(a)", crosses=True),
    "LpNormalization of rows": Case("z = LpNormalization<axis=2, p=1>(a)"),
    "MeanVarianceNormalization": Case("z = MeanVarianceNormalization<axes=[2,3]>(a)"),
    "MeanVarianceNormalization of all": Case("z = MeanVarianceNormalization<axes=[1,2,3]>(a)", crosses=True),
    "GridSample": Case("z = GridSample(a, p)", inputs=", float[N,3,3,2] p"),
    "DeformConv": Case(
        "z = DeformConv<pads=[1,1,1,1]>(a, k, o, c)",
        19,
        _OFFSETS,
        normals(k=(16, 16, 3, 3), c=(16,)),
        units=(16, 16),
    ),
    "DeformConv, offsets for halves": Case(
        "q = Concat<axis=1>(o, o) z = DeformConv<pads=[1,1,1,1], offset_group=2>(a, k, q, c)",
        19,
        _OFFSETS,
        normals(k=(16, 16, 3, 3), c=(16,)),
        units=(8, 16),
    ),
    "DeformConv of channels": Case(
        "z = DeformConv<pads=[1,1,1,1], group=16>(a, k, o, c, m)",
        19,
        f"{_OFFSETS}, float[N,9,5,5] m",
        normals(k=(16, 1, 3, 3), c=(16,)),
    ),
    "RoiAlign": Case(
        "z = RoiAlign<output_height=2, output_width=3>(a, r, i)",
        constants={"r": _REGIONS, "i": np.zeros(4, np.int64)},
    ),
    "CenterCropPad": Case("z = CenterCropPad<axes=[2,3]>(a, t)", 18, constants={"t": np.array([3, 7])}),
    "Trilu": Case("z = Trilu(a)"),
    "CastLike": Case("z = CastLike(a, l)", constants=normals(l=(3,))),
    "MaxUnpool": Case(
        "p, i = MaxPool<kernel_shape=[5,5], strides=[5,5]>(a) "
        "z = MaxUnpool<kernel_shape=[5,5], strides=[5,5]>(p, i)",
        units=(),
    ),
}
_KEYS = "k = MatMul(x, l) e = MatMul(x, m)"
_ATTENTION: dict[str, Any] = {"constants": normals(l=(12, 8), m=(12, 8)), "units": (2,)}
# Between matrix products, [batch, 6, 16].
ROWS = {
    "SwiGLU": Case("z = SwiGLU<alpha=1.5>(a, b)", 28),
    "CumProd": Case("z = CumProd(a, d)", 26, constants={"d": np.array(1)}),
    "CausalConvWithState": Case(
        't = Transpose<perm=[0,2,1]>(a) u, s = CausalConvWithState<activation="silu">(t, k, c) '
        "z = Transpose<perm=[0,2,1]>(u)",
        27,
        constants=normals(k=(16, 1, 3), c=(16,)),
    ),
    "GatherND": Case("z = GatherND<batch_dims=1>(a, i)", inputs=", int64[N,4,1] i"),
    "ScatterND": Case('z = ScatterND<reduction="add">(a, i, b)', inputs=", int64[N,6,2] i"),
    "TensorScatter": Case("z = TensorScatter<axis=1>(a, b)", 24),
    **{
        name: Case(
            f"{_KEYS} z = Attention<q_num_heads=4, kv_num_heads=2{attrs}>(a, k, e)", opset, **_ATTENTION
        )
        for name, attrs, opset in (
            ("Attention", "", 23),
            ("Attention, causal", ", is_causal=1, softcap=2.0", 24),
            ("Attention in a window", ", left_window_size=2, right_window_size=1", 25),
            ("Attention to the left", ", is_causal=1, left_window_size=1", 25),
        )
    },
    "Attention of some": Case(
        f"{_KEYS} z = Attention<q_num_heads=4, kv_num_heads=2>(a, k, e, , , , n)",
        24,
        ", int64[N] n",
        **_ATTENTION,
    ),
    "Attention with a bias for each head": Case(
        f"{_KEYS} z = Attention<q_num_heads=4, kv_num_heads=2>(a, k, e, p)",
        23,
        constants={**_ATTENTION["constants"], **normals(p=(1, 4, 6, 6))},
        units=(2,),
    ),
    "LinearAttention": Case(
        "k = MatMul(x, l) e = MatMul(x, m) z, s = LinearAttention<q_num_heads=4, kv_num_heads=2, "
        'update_rule="linear">(a, k, e)',
        27,
        constants=normals(l=(12, 8), m=(12, 8)),
        units=(2,),
    ),
}


def _ir_version(case: Case) -> int:
    """The oldest with its opset, as ONNX Runtime may be old, too."""
    return int(helper.find_min_ir_version_for([helper.make_opsetid("", case.opset)]))


def _images(case: Case) -> Model:
    weights = normals(w=(16, 3, 1, 1), h=(16,), v=(4, 16, 1, 1))
    nodes = f"a = Conv(x, w, h) {case.nodes} y = Conv(z, v)"
    text = f"g (float[N,3,5,5] x{case.inputs}) => (float[] y) {{ {nodes} }}"
    return parse(text, {**weights, **case.constants}, opset=case.opset, ir_version=_ir_version(case))


def _rows(case: Case) -> Model:
    weights = normals(w=(12, 16), h=(12, 16), v=(16, 5))
    second = "b = MatMul(x, h)" if "b)" in case.nodes else ""
    nodes = f"a = MatMul(x, w) {second} {case.nodes} y = MatMul(z, v)"
    text = f"g (float[N,6,12] x{case.inputs}) => (float[] y) {{ {nodes} }}"
    return parse(text, {**weights, **case.constants}, opset=case.opset, ir_version=_ir_version(case))


CASES = [
    pytest.param(
        make,
        case,
        id=name,
        marks=pytest.mark.skipif(
            case.opset > onnx.defs.onnx_opset_version(), reason="this onnx is older than the operator"
        ),
    )
    for cases, make in ((IMAGES, _images), (ROWS, _rows))
    for name, case in cases.items()
]


@pytest.mark.parametrize(("make", "case"), CASES)
def test_units_go_through(make: Callable[[Case], Model], case: Case) -> None:
    model = make(case)
    families = analyze(model).families
    assert tuple(family.size for family in families) == case.units
    assert any(family.crosses for family in families) is case.crosses
    written, _ = apply(Unfuse(which="free"), model)
    skip_if_old(written)
    if not families:
        return
    small, changes = apply(Prune(ratio=0.5, align=1), model)
    figures = PruneFigures.of(changes)
    assert figures.families == len(case.units)
    assert figures.macs[1] < figures.macs[0]
    assert case.crosses or (figures.oracle is not None and figures.oracle < _FEW)
    (found,) = Session(small).run(feeds_for(small)).values()
    assert np.isfinite(found).all()


@pytest.mark.parametrize("past", ["", ", , k0, v0"])
def test_heads_of_caches_that_are_given_stay_and_say_why(past: str) -> None:
    """Where the interface may change, they go with them."""
    caches = ", float[N,2,P,4] k0, float[N,2,P,4] v0" if past else ""
    text = f"""g (float[N,6,12] x{caches}) => (float[N,6,5] y, float[] p, float[] q)
{{ a = MatMul(x, w) k = MatMul(x, l) e = MatMul(x, m)
   z, p, q = Attention<q_num_heads=4, kv_num_heads=2>(a, k, e{past}) y = MatMul(z, v) }}"""
    weights = normals(w=(12, 16), l=(12, 8), m=(12, 8), v=(16, 5))
    model = parse(text, weights, opset=23, ir_version=10)
    fixed = analyze(model)
    assert fixed.families == ()
    assert "'p' is an output of the model" in fixed.explain("l")[1]
    free = analyze(model, allow_inputs=True, allow_outputs=True)
    heads = next(family for family in free.families if any(each.tensor == "p" for each in family.members))
    assert heads.size == 2
    assert {each.tensor for each in heads.members} >= {
        "w",
        "l",
        "m",
        "v",
        "q",
        *(("k0", "v0") if past else ()),
    }
