"""Which constants of a model are weights that can be learnt: those that some operator multiplies or adds."""

from __future__ import annotations

import math

from onnxslim.ir.graph import Array, Constant, Node, Tensor
from onnxslim.ir.model import Model
from onnxslim.learn.door import FLOATS
from onnxslim.learn.rows import row_of
from onnxslim.ops import Trait, has

# What only moves elements hands weights on to who multiplies by them.
_PASSES = Trait.MOVES | Trait.COPIES | Trait.JOINS
MATCHES = ("Cast",)
# What hides a position from attention: nothing that is learnt is 0 here and so far below there.
MASK = -10.0


def weights(model: Model) -> list[Constant]:
    """Constants that can be learnt, those in bodies of If, Loop and Scan included, in the model's order.

    Numbers that stand alone are none: they are divisors, limits and what keeps a root from zero.
    """
    known: dict[int, bool] = {}
    found = (each for each in model.constants() if each.dtype in FLOATS and _has_several(each))
    return [each for each in found if _is_learnt(each, known) and not _is_mask(each.values)]


def is_vector(constant: Constant) -> bool:
    """Whether it runs along one axis alone, as biases and scales of channels do."""
    return math.prod(constant.shape) == max(constant.shape)


def _has_several(constant: Constant) -> bool:
    """Whether it has more than one element; layers of one channel have weights of one, with several axes."""
    return constant.size > 1 or (constant.size == 1 and len(constant.shape) > 0)


def _is_learnt(tensor: Tensor, known: dict[int, bool]) -> bool:
    """Whether somebody multiplies by it or adds it, as it is or once its elements were moved."""
    if id(tensor) not in known:
        known[id(tensor)] = False  # a tensor does not depend on itself
        known[id(tensor)] = any(_learns(node, tensor, known) for node in tensor.outputs)
    return known[id(tensor)]


def _learns(node: Node, tensor: Tensor, known: dict[int, bool]) -> bool:
    positions = [at for at, each in enumerate(node.inputs) if each is tensor]
    row = row_of(node)
    if row is not None and any(at in _weights_of(node, row.weights) for at in positions):
        return True
    if not has(node, _PASSES) and node.op != "Cast":
        return False
    data = range(len(node.inputs)) if has(node, Trait.JOINS) else (0,)
    return any(at in data for at in positions) and any(_is_learnt(each, known) for each in node.outputs)


def _weights_of(node: Node, stated: tuple[int, ...]) -> tuple[int, ...] | range:
    """Of operators that take any number of operands, all of them."""
    return range(len(node.inputs)) if stated == (0, 1) and len(node.inputs) > 2 else stated


def _is_mask(values: Array) -> bool:
    """Whether it has numbers that hide positions, and zeros where it does not."""
    wide = values.astype("float32")
    hidden = wide <= MASK
    return bool(hidden.any() and ((wide == 0) | hidden).all() and not hidden.all()) or not bool(
        (abs(wide) < float("inf")).all()
    )
