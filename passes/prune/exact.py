"""Proof that a cut removes what it says and nothing else.

A model without a set of slices must compute what the original computes when the layers that read these
slices get zeros there. This holds up to rounding for every unit that does not lie under a normalization;
those change statistics, and are left out of the proof. A model without a branch, and with nothing in its
place, must compute what the original computes when what the branch makes is multiplied by zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnxslim.engine.check import relative_difference
from onnxslim.engine.editor import Editor
from onnxslim.errors import InvalidGraph
from onnxslim.families.branches import Branch
from onnxslim.families.removal import Removal
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Array, Variable
from onnxslim.ir.model import Model
from onnxslim.ops import Trait, has
from onnxslim.passes.predicates import FLOATS, spacing
from onnxslim.passes.prune.cut import cut, zero
from onnxslim.passes.prune.standin import NOTHING, drop, sum_of
from onnxslim.runtime.targets import Target

# Largest difference, relative to the largest magnitude of an output, that rounding explains: so many steps of
# the coarsest type that weights have, 1e-5 in single precision. Where an output is the small rest of large
# numbers, rounding explains more: as much as some times what it does to the zeroed model when ONNX Runtime's
# optimizations only change the order of its sums.
EXACT_STEPS = 84.0
ROUNDING_FACTOR = 4.0

MAKES = ("Mul",)
Samples = Sequence[Mapping[str, Array]]


def prove(model: Model, removal: Removal, target: Target, samples: Samples) -> float | None:
    """The largest relative difference between the cut and the zeroed model.

    Args:
        model: the analyzed model; not modified.
        removal: from it; families that cross a normalization or reach an output are left out.
        target: where to run.
        samples: real inputs, used besides made-up ones.

    Returns:
        None if there is nothing to prove, or nothing the model runs on.

    Raises:
        InvalidGraph: the cut is wrong; names the family to blame.
    """
    outputs = {tensor.name for tensor in model.graph.outputs}
    exact = removal.of(
        [
            family.name
            for family in removal.analysis.families
            if not family.crosses and not any(member.tensor in outputs for member in family.members)
        ]
    )
    found = _difference(model, exact, target, samples) if exact else None
    if found is not None and found > EXACT_STEPS * _step(model):
        zeroed = _zeroed(model, exact)
        _unsquash(zeroed)
        rounding = max(
            relative_difference(zeroed, zeroed, target, each, optimize="all") or 0.0
            for each in _inputs(samples)
        )
        if found <= ROUNDING_FACTOR * rounding:
            return found
        worst = {name: _difference(model, exact.of([name]), target, samples) for name in exact.counts}
        blamed = max(worst, key=lambda name: worst[name] or 0.0)
        raise InvalidGraph(
            f"cutting family '{blamed}' is not what setting its slices to zero is: outputs differ by "
            f"{found:.1e}; exclude it, and please report this",
            pass_name="prune",
            node=blamed,
        )
    return found


def prove_dropped(model: Model, branches: Sequence[Branch], target: Target, samples: Samples) -> float | None:
    """The largest relative difference between the model without branches and the one with zeros there.

    Args:
        model: not modified.
        branches: of it, none inside another.
        target, samples: see `prove`.

    Returns:
        None if there is nothing to prove, or nothing the model runs on.

    Raises:
        InvalidGraph: the cut is wrong; names the sum to blame.
    """
    found = _dropped(model, branches, target, samples) if branches else None
    if found is None or found <= EXACT_STEPS * _step(model):
        return found
    worst = {each: _dropped(model, [each], target, samples) or 0.0 for each in branches}
    blamed = max(worst, key=lambda each: worst[each])
    raise InvalidGraph(
        f"dropping the branch into '{blamed.label}' is not what setting it to zero is: outputs differ by "
        f"{found:.1e}; exclude it, and please report this",
        pass_name="prune",
        node=blamed.label,
    )


def _dropped(model: Model, branches: Sequence[Branch], target: Target, samples: Samples) -> float | None:
    small, zeroed = model.copy(), model.copy()
    drop(small, dict.fromkeys(branches, NOTHING))
    for branch in branches:
        _mute(zeroed, branch)
    for each in (small, zeroed):
        _unsquash(each)
    found = [relative_difference(zeroed, small, target, each) for each in _inputs(samples)]
    return max((each for each in found if each is not None), default=None)


def _mute(model: Model, branch: Branch) -> None:
    """Multiply by zero what a sum reads of a branch."""
    edit, node = Editor(model), sum_of(model, branch)
    at = next(index for index, each in enumerate(node.inputs) if each.name == branch.end)
    dtype = edit.dtype(node.inputs[at])
    zero_of = edit.constant(f"{branch.end}_zero", np.zeros((), dtype if dtype is not None else np.float32))
    muted = edit.variable(f"{branch.end}_muted", node.inputs[at])
    edit.add(node, "Mul", [node.inputs[at], zero_of], [muted])
    edit.set_input(node, at, muted)
    edit.commit()


def _step(model: Model) -> float:
    """The distance from 1 to the next number in the coarsest floating-point type that constants have."""
    dtypes = {tensor.dtype for tensor in model.constants()} & FLOATS
    return max(map(spacing, dtypes or {np.dtype(np.float32)}))


def _difference(model: Model, removal: Removal, target: Target, samples: Samples) -> float | None:
    small, zeroed = model.copy(), _zeroed(model, removal)
    cut(small, removal)
    _unround(small)
    for each in (small, zeroed):
        _unsquash(each)
    found = [relative_difference(zeroed, small, target, each) for each in _inputs(samples)]
    return max((each for each in found if each is not None), default=None)


def _inputs(samples: Samples) -> list[Samples]:
    """Real inputs, and made-up ones too: at the one size real ones have, a wrong cut may look right."""
    return [samples, ()] if samples else [()]


def _zeroed(model: Model, removal: Removal) -> Model:
    zeroed = model.copy()
    zero(zeroed, removal)
    _unround(zeroed)
    return zeroed


def _unround(model: Model) -> None:
    """Bypass pairs of QuantizeLinear and DequantizeLinear, which round a last bit up to a whole step."""
    for node in model.graph.nodes:
        maker = ir.producer(node.input(0))
        if maker is not None and has(node, Trait.DEQUANTIZES) and has(maker, Trait.QUANTIZES):
            ir.replace_uses(node.outputs[0], maker.inputs[0])


def _unsquash(model: Model) -> None:
    """Look at what a Sigmoid or Softmax before an output reads: near 0, only its rounding shows."""
    seen = {id(tensor) for tensor in model.graph.outputs}
    for index, tensor in enumerate(model.graph.outputs):
        maker = ir.producer(tensor)
        if maker is not None and has(maker, Trait.SQUASHES):
            read = maker.inputs[0]
            if isinstance(read, Variable) and ir.producer(read) is not None and id(read) not in seen:
                model.graph.outputs[index] = read
                seen.add(id(read))
