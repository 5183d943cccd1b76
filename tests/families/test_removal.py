"""What goes of a model, in every form: units, counts, masks, indices."""

from __future__ import annotations

import numpy as np

from onnxslim.families.analysis import analyze
from onnxslim.families.removal import Removal
from onnxslim.ir.model import Model
from onnxslim.passes.prune.cut import cut
from tests.helpers import parse


def net() -> Model:
    weights = {"w": (4, 6), "v": (6, 3), "u": (3, 2)}
    text = "g (float[N,4] x) => (float[N,2] y) { a = MatMul(x, w) b = MatMul(a, v) y = MatMul(b, u) }"
    return parse(text, {name: np.ones(shape, np.float32) for name, shape in weights.items()})


def test_all_forms_say_the_same() -> None:
    analysis = analyze(net())
    first, second = (family.name for family in analysis.families)
    removal = Removal(analysis, {first: [1, 4], second: []})
    assert removal
    assert removal.counts == {first: 2}
    assert removal.masks["w", 1].tolist() == [True, False, True, True, False, True]
    assert removal.kept["v", 0].tolist() == [0, 2, 3, 5]
    assert {key for key in removal.masks if key[0] in "wvu"} == {("w", 1), ("v", 0)}
    assert not removal.of([second])


def test_what_goes_in_turn_adds_up() -> None:
    """Of what the first removal leaves (0, 2, 3, 5), the second takes the unit that was 3."""
    model = net()
    first = analyze(model)
    name = first.families[0].name
    earlier = Removal(first, {name: [1, 4]})
    cut(model, earlier)
    later = Removal(analyze(model), {name: [2]})
    kept = later.after(earlier.after({}))
    assert kept["w", 1].tolist() == [0, 2, 5]
    assert Removal.leaving(first, kept).units[name] == [1, 3, 4]
