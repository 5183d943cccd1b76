"""What stands in for a branch that goes: nothing, a shift or a scale per channel, or one linear map.

With x the skip and b the branch, the sum x + b becomes x, x + c, s x + c or M x + c: the best of its kind by
regression on data. What is left then is one node or two that a runtime hardly notices, but for a matrix M.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.gram import Doubles, Gram, TensorPair, joint
from onnxslim.calibration.samples import Samples
from onnxslim.engine.base import Context
from onnxslim.engine.editor import Editor
from onnxslim.families.branches import Branch
from onnxslim.ir.graph import Array, Node, Tensor
from onnxslim.ir.model import Model
from onnxslim.passes.predicates import rounded
from onnxslim.passes.repair.solve import fit
from onnxslim.shapes.dims import dims_of

MAKES = ("Conv", "Identity", "MatMul", "Mul")
Kind: TypeAlias = Literal["nothing", "mean", "affine", "linear"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# Types that stand-ins are made in, and the most channels of which covariances are taken.
_FLOATS = (np.float16, np.float32)
MAX_CHANNELS = 4096
# A scale per channel costs a node: it has to explain that much more of the branch than a shift does.
_WORTH_A_SCALE = 0.98


@dataclass(frozen=True, eq=False)
class StandIn:
    """What the sum becomes, of a skip x.

    Attributes:
        kind: of it.
        matrix: M, shape (channels, channels), of a linear one.
        scale: s, shape (channels,), of an affine one.
        shift: c, shape (channels,), of all but nothing.
    """

    kind: Kind
    matrix: Doubles | None = None
    scale: Doubles | None = None
    shift: Doubles | None = None


NOTHING = StandIn("nothing")


def fitted(
    model: Model, wanted: Iterable[Branch], data: Samples | None, ctx: Context
) -> dict[Branch, dict[Kind, StandIn]]:
    """Stand-ins of branches, each fitted to the branch as it is; how strongly, is chosen on other samples.

    Args:
        model: with the branches; not modified.
        wanted: the branches.
        data: to fit on and to choose by; without, or of one sample, nothing stands in for any.
        ctx: of the pass.
    """
    found: dict[Branch, dict[Kind, StandIn]] = {each: {"nothing": NOTHING} for each in wanted}
    pairs = {each: pair for each in found if (pair := _pair(model, each)) is not None}
    parts = None if data is None else data.split
    if parts is None or not pairs:
        return found
    train, tune = (_moments(model, part, pairs.values(), ctx) for part in parts)
    for branch, pair in pairs.items():
        if pair in train and pair in tune:
            found[branch] |= {each.kind: each for each in _of(train[pair], tune[pair])}
    return found


def _pair(model: Model, branch: Branch) -> TensorPair | None:
    """What to regress; None where nothing stands in for the branch."""
    node = sum_of(model, branch)
    shape, dtype = dims_of(model).shape(node.outputs[0]), dims_of(model).dtype(node.outputs[0])
    if branch.axis is None or shape is None or dtype is None or dtype not in _FLOATS:
        return None
    channels = shape[branch.axis]
    if not isinstance(channels, int) or not 1 < channels <= MAX_CHANNELS:
        return None
    return TensorPair(branch.skip, branch.end, branch.axis)


def _moments(
    model: Model, data: CalibrationData, pairs: Collection[TensorPair], ctx: Context
) -> dict[TensorPair, Gram]:
    return joint(model, data, list(pairs), target=ctx.target, progress=ctx.progress)


def _of(train: Gram, tune: Gram) -> list[StandIn]:
    """A stand-in of each kind that is better than the simpler ones."""
    mean = fit(train, tune, method="bias")
    scaled = fit(_diagonal(train), _diagonal(tune))
    whole = fit(train, tune)
    found = []
    if mean.after < mean.before:
        found.append(StandIn("mean", shift=mean.bias[0]))
    if scaled.weight is not None and scaled.after < _WORTH_A_SCALE * mean.after:
        found.append(StandIn("affine", scale=1.0 + scaled.weight[:, 0, 0], shift=scaled.bias[:, 0]))
    if whole.weight is not None and whole.after < scaled.after:
        matrix = np.eye(whole.weight.shape[1]) + whole.weight[0]
        found.append(StandIn("linear", matrix=matrix, shift=whole.bias[0]))
    return found


def _diagonal(moments: Gram) -> Gram:
    """Of every channel with itself alone: as many groups of one."""
    gram, cross = (np.einsum("gkk->k", each)[:, None, None] for each in (moments.gram, moments.cross))
    power, x, y = moments.power.T, moments.x_mean.T, moments.y_mean.T
    return Gram(gram, cross, power, x, y, moments.count)


def blank(model: Model, branch: Branch, kind: Kind) -> StandIn:
    """A stand-in of the size it has at a branch of a model, with nothing in it."""
    shape = dims_of(model).shape(sum_of(model, branch).outputs[0])
    channels = shape[branch.axis] if shape is not None and branch.axis is not None else 0
    if kind == "nothing" or not isinstance(channels, int):
        return NOTHING
    return StandIn(
        kind,
        matrix=np.zeros((channels, channels)) if kind == "linear" else None,
        scale=np.zeros(channels) if kind == "affine" else None,
        shift=np.zeros(channels),
    )


def sum_of(model: Model, branch: Branch) -> Node:
    """The node that adds a branch to its skip."""
    return next(node for node in model.graph.nodes if node.outputs and node.outputs[0].name == branch.sum)


def drop(model: Model, branches: Mapping[Branch, StandIn]) -> None:
    """Take branches out of a model, and put in what stands for them.

    Args:
        model: edited in place; tensors have the names they had when the branches were found.
        branches: of which none lies inside another.
    """
    edit = Editor(model)
    for branch, stand_in in branches.items():
        node = sum_of(model, branch)
        at = next(index for index, each in enumerate(node.inputs) if each.name == branch.end)
        _Place(edit, node, at, branch.axis).put(stand_in)
    edit.commit()


class _Place:
    """A sum, and which of its operands the branch is."""

    def __init__(self, edit: Editor, node: Node, at: int, axis: int | None) -> None:
        self._edit, self._node, self._at, self._axis = edit, node, at, axis
        shape, dtype = edit.shape(node.outputs[0]), edit.dtype(node.outputs[0])
        self._rank = len(shape) if shape is not None else 0
        self._dtype = np.dtype(dtype if dtype is not None else np.float32)

    @property
    def _skip(self) -> Tensor:
        return self._node.inputs[1 - self._at]

    def put(self, stand_in: StandIn) -> None:
        """Let the skip, changed as it may be, be the sum."""
        edit, node, made = self._edit, self._node, self._node.outputs[0]
        if stand_in.shift is None:
            if edit.can_bypass(made, self._skip) and not edit.is_output(made):
                edit.bypass(node, self._skip)
            else:
                edit.replace_node(node, "Identity", [self._skip])
            return
        shift = self._vector(stand_in.shift)
        if stand_in.matrix is not None and self._axis != -1:
            shape = (*stand_in.matrix.shape, *([1] * (self._rank - 2)))
            weight = self._constant("map", stand_in.matrix.reshape(shape))
            edit.replace_node(node, "Conv", [self._skip, weight, self._constant("shift", stand_in.shift)])
            return
        changed = edit.variable(f"{made.name}_skip", self._skip)
        if stand_in.matrix is not None:
            weight = self._constant("map", stand_in.matrix.T)
            edit.add(node, "MatMul", [self._skip, weight], [changed])
        elif stand_in.scale is not None:
            scale = self._constant("scale", self._vector(stand_in.scale))
            edit.add(node, "Mul", [self._skip, scale], [changed])
        if changed.inputs:
            edit.set_input(node, 1 - self._at, changed)
        edit.set_input(node, self._at, self._constant("shift", shift))

    def _constant(self, what: str, values: Array) -> Tensor:
        stored = rounded(values, self._dtype)
        assert stored is not None
        return self._edit.constant(f"{self._node.outputs[0].name}_{what}", stored)

    def _vector(self, values: Doubles) -> Doubles:
        """One value per channel, to be broadcast against the sum."""
        assert self._axis is not None
        return values.reshape(-1, *([1] * (-self._axis - 1)))
