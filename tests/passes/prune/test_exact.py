"""The proof that a cut removes what it says: what it finds, what it lets pass, and what it leaves out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from onnxslim.errors import InvalidGraph
from onnxslim.families.analysis import analyze
from onnxslim.families.removal import Removal
from onnxslim.ir.model import Model
from onnxslim.passes.prune import exact
from onnxslim.passes.prune.cut import cut
from onnxslim.runtime.targets import Target
from tests.helpers import normal, normals, parse

ROWS = """g (float[N,3,H,W] x) => (float[N,2,h,W] y)
<int64[1] zero = {0}, int64[1] end = {1000}, int64[1] axis = {2}>
{ a = Conv(x, w) r = Relu(a) s = Slice(r, zero, end, axis) y = Conv(s, v) }"""


def rows() -> Model:
    """Two layers, and all rows between them."""
    return parse(ROWS, normals(w=(8, 3, 1, 1), v=(2, 8, 1, 1)))


def proved(model: Model, *shape: int) -> float | None:
    """What the proof says of removing the first unit of every family, with data of this shape."""
    analysis = analyze(model)
    removal = Removal(analysis, {family.name: [0] for family in analysis.families})
    assert removal
    return exact.prove(model, removal, Target.cpu(), [{"x": normal(*shape)}])


def mistaken(monkeypatch: pytest.MonkeyPatch, mistake: Callable[[Model], None]) -> None:
    """Let every cut make a mistake."""

    def wrong(model: Model, removal: Removal) -> None:
        cut(model, removal)
        mistake(model)

    monkeypatch.setattr(exact, "cut", wrong)


def test_a_right_cut_differs_by_rounding_alone() -> None:
    found = proved(rows(), 1, 3, 4, 4)
    assert found is not None
    assert found < 1e-5


def test_a_difference_that_rounding_does_not_explain_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def scale(model: Model) -> None:
        weight = model.graph.initializers["w"]
        weight.values = weight.values * np.float32(1 + 2e-4)

    mistaken(monkeypatch, scale)
    with pytest.raises(InvalidGraph, match=r"outputs differ by 2\..e-04"):
        proved(rows(), 1, 3, 4, 4)


def test_what_is_right_at_the_size_of_the_data_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(model: Model) -> None:
        model.graph.initializers["end"].values = np.array([4])

    mistaken(monkeypatch, stop)
    with pytest.raises(InvalidGraph, match="outputs differ by inf"):
        proved(rows(), 1, 3, 4, 4)


def test_units_under_a_normalization_are_left_out() -> None:
    """Its statistics change when one goes: neither is the cut wrong, nor can it be proved."""
    model = parse(
        """g (float[N,6] x) => (float[N,3] y)
        { a = MatMul(x, w) b = LayerNormalization(a, s, t) y = MatMul(b, u) }""",
        normals(w=(6, 8), s=(8,), t=(8,), u=(8, 3)),
    )
    assert proved(model, 4, 6) is None
