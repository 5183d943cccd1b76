"""How operators carry slices along: every row is cut on its example, and compared with sliced outputs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from onnxslim.engine.check import wellformed
from onnxslim.families.analysis import Analysis, analyze
from onnxslim.families.costs import Costs
from onnxslim.families.removal import Removal
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.ops import REGISTRY, OpSpec
from onnxslim.ops.channels.cut import Masks
from onnxslim.passes.fold import Fold
from onnxslim.passes.prune.cut import cut
from onnxslim.runtime.probe import make_feeds
from onnxslim.shapes.cost import macs
from tests.helpers import apply, judge_of, parse, rows

ROWS = [
    pytest.param(spec, id=f"{spec.domain}.{spec.op}" if spec.domain else spec.op)
    for spec in rows()
    if spec.channels is not None and spec.example
]


def test_every_row_that_carries_slices_has_an_example() -> None:
    assert [spec.op for spec in REGISTRY.values() if spec.channels is not None and not spec.example] == []


@pytest.mark.parametrize("spec", ROWS)
def test_a_cut_example_computes_what_is_left_of_its_outputs(spec: OpSpec) -> None:
    model, _ = apply(Fold(), parse(spec.example))
    analysis = analyze(model, allow_inputs=True, allow_outputs=True)
    assert analysis.families
    feeds = make_feeds(model.inputs(), batch=5, size=8)
    for family in analysis.families:
        units = [family.size - 1, *range(family.size // 2)]
        removal = Removal(analysis, {family.name: sorted(units[: family.size - 1])})
        small = model.copy()
        cut(small, removal)
        compare(model, small, feeds, removal.masks, exact=not family.crosses)
        expected = macs(small, {name: _left(name, analysis, removal.masks) for name in feeds})
        assert Costs(model, analysis).macs(removal.counts) == (expected or 0)


def _left(name: str, analysis: Analysis, masks: Masks) -> tuple[int, ...]:
    """The shape of an input, of which a cut leaves so much."""
    sizes = enumerate(analysis.sizes[name])
    return tuple(int(masks[name, axis].sum()) if (name, axis) in masks else size for axis, size in sizes)


def compare(model: Model, small: Model, feeds: Mapping[str, Array], masks: Masks, *, exact: bool) -> None:
    """The small model on what is left of the inputs, against what is left of the outputs when the rest of the
    inputs is zero."""
    wellformed(small)
    expected = judge_of(model).run({name: zeroed(name, x, masks) for name, x in feeds.items()})
    actual = judge_of(small).run({name: kept(name, x, masks) for name, x in feeds.items()})
    for name, value in expected.items():
        assert actual[name].shape == kept(name, value, masks).shape
        if exact:
            np.testing.assert_allclose(
                actual[name], kept(name, value, masks), rtol=1e-5, atol=1e-6, err_msg=name
            )


def kept(name: str, array: Array, masks: Masks) -> Array:
    for axis in range(array.ndim):
        if (name, axis) in masks:
            array = np.compress(masks[name, axis], array, axis)
    return array


def zeroed(name: str, array: Array, masks: Masks) -> Array:
    array = array.copy()
    for axis in range(array.ndim):
        if (name, axis) in masks:
            np.moveaxis(array, axis, 0)[~masks[name, axis]] = 0
    return array
