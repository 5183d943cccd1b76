"""What rewriting rules ask of nodes, constants and shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from onnx import numpy_helper

from onnxslim.engine.editor import Editor
from onnxslim.engine.rewrite import Rule
from onnxslim.errors import UsageError
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Array, Node, Shape, Tensor
from onnxslim.ir.model import DEFAULT_DOMAINS, constant_of
from onnxslim.ops import Trait, has

# A node, and the tensor that can stand for its first output.
Detour: TypeAlias = tuple[Node, Tensor]

MATCHES = frozenset(("Add", "ConstantOfShape", "Div", "Erf", "Mul", "Sqrt", "Tanh", "Where"))
MAKES = frozenset(("Reshape",))
# Types whose arithmetic rules may redo in double precision.
FLOATS = frozenset(map(np.dtype, (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)))
# A constant that several nodes read is copied for one of them up to this size.
MAX_COPY_BYTES = 4096
# Ends of slices from here on mean "to the end".
OPEN_END = 2**31 - 1


class Bypass(Rule[Detour]):
    """A rule whose rewrite lets an earlier tensor stand for a node's output."""

    def check(self, match: Detour, edit: Editor) -> str | None:
        """The output's name, if it has to stay, must be one the earlier tensor can take."""
        return stuck(match, edit)

    def rewrite(self, match: Detour, edit: Editor) -> str:
        """Remove the node."""
        node, source = match
        action = f"removed {node.op}"
        edit.bypass(node, source)
        return action


def stuck(match: Detour, edit: Editor) -> str | None:
    """Why a node cannot be bypassed, if it cannot."""
    node, source = match
    if edit.can_bypass(node.outputs[0], source):
        return None
    return f"the names of '{source.name}' and '{node.outputs[0].name}' both have to stay"


# ----------------------------------------------------------------------------------------- constants


def constant(node: Node, index: int) -> Array | None:
    """Values of an input, if the model has them."""
    tensor = node.input(index)
    return None if tensor is None else constant_of(tensor)


def given(node: Node, attr: str, index: int) -> bool:
    """Whether an option that is an attribute in early opsets and an input in later ones is there."""
    return attr in node.attrs or node.input(index) is not None


def ints(node: Node, attr: str, index: int) -> tuple[int, ...] | None:
    """The integers of such an option; None if it is not there or is computed."""
    if attr in node.attrs:
        value = node.attrs[attr]
        return tuple(value) if isinstance(value, tuple) else None
    values = constant(node, index)
    return None if values is None else tuple(int(value) for value in values.reshape(-1))


def is_all(values: Array, wanted: float) -> bool:
    """Whether there are values, and each is the one wanted; cheap where they are not."""
    return bool(values.size) and bool(values.flat[0] == wanted) and bool((values == wanted).all())


def rounded(values: Array, dtype: np.dtype[Any]) -> Array | None:
    """Double-precision values in the type of a model; None where they do not fit.

    They do not if one overflows, is not a number, or loses more than rounding to underflow.
    """
    with np.errstate(all="ignore"):
        cast = values.astype(dtype)
        back = cast.astype(np.float64)
    if not np.isfinite(back).all():
        return None
    allowed = spacing(dtype) * float(np.abs(values).max(initial=0.0))
    return cast if float(np.abs(back - values).max(initial=0.0)) <= allowed else None


def largest(dtype: np.dtype[Any]) -> float:
    """The largest finite number of a floating-point type."""
    return float(_limits(dtype).max)


def spacing(dtype: np.dtype[Any]) -> float:
    """The distance from 1 to the next number of a floating-point type."""
    return float(_limits(dtype).eps)


def _limits(dtype: np.dtype[Any]) -> Any:
    return ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]


_MAX_STEPS = 6


def origin(tensor: Tensor) -> Tensor:
    """The tensor whose elements those of a tensor are, wherever they were moved."""
    for _ in range(_MAX_STEPS):
        maker = ir.producer(tensor)
        if maker is None or not has(maker, Trait.MOVES):
            break
        tensor = maker.inputs[0]
    return tensor


def filling(tensor: Tensor) -> Array | None:
    """The number that a ConstantOfShape fills a tensor with, as an array without axes."""
    maker = made_by(tensor, "ConstantOfShape")
    if maker is None:
        return None
    told = maker.attrs.get("value")
    return np.zeros((), np.float32) if told is None else numpy_helper.to_array(told.t).reshape(())


def is_uniform(tensor: Tensor, wanted: float, steps: int = _MAX_STEPS) -> bool:
    """Whether every element of a tensor is known to be this number, from a constant or copies of one."""
    source = origin(tensor)
    values = constant_of(source)
    values = filling(source) if values is None else values
    if values is not None:
        return (values.dtype.kind in "iub" or values.dtype in FLOATS) and is_all(values, wanted)
    node = made_by(source, "Where") if steps else None
    if node is None:
        return False
    taken = (index for index, flag in ((1, 1), (2, 0)) if is_uniform(node.inputs[0], flag, steps - 1))
    return any(is_uniform(node.inputs[index], wanted, steps - 1) for index in taken)


def plain_number(values: Array | None) -> float | None:
    """The number in a scalar, or in a vector of one, which gives no tensor that has axes another shape."""
    return number(values) if values is not None and values.ndim <= 1 else None


def number(values: Array | None) -> float | None:
    """The number in a tensor of one element."""
    return None if values is None or values.size != 1 else values.reshape(-1)[0].item()


# -------------------------------------------------------------------------------------------- shapes


def rank(shape: Shape) -> int | None:
    """Number of axes."""
    return None if shape is None else len(shape)


def positive_axis(axis: int, axes: int | None) -> int | None:
    """An axis counted from the front; None if that takes a rank that is not known."""
    if axis >= 0:
        return axis
    return None if axes is None else axis + axes


def positive_axes(axes: tuple[int, ...], count: int | None) -> tuple[int, ...] | None:
    """Distinct axes counted from the front, in order; None if that takes a rank that is not known."""
    found = {positive_axis(axis, count) for axis in axes}
    return (
        None if None in found or len(found) != len(axes) else tuple(sorted(a for a in found if a is not None))
    )


def is_known(shape: Shape) -> bool:
    """Whether each axis has a size or a symbol."""
    return shape is not None and None not in shape


def same_shape(one: Shape, other: Shape) -> bool:
    """Whether two shapes are known to be equal."""
    return is_known(one) and one == other


def broadcasts_into(small: Shape, big: Shape) -> bool:
    """Whether a tensor is known to take the shape `big` when the other one is broadcast against it."""
    if small == ():
        return True
    if small is None or big is None or len(small) > len(big):
        return False
    return all(
        dim == 1 or (dim is not None and dim == into)
        for dim, into in zip(small, big[len(big) - len(small) :], strict=True)
    )


def reshape_target(source: Shape, wanted: Shape) -> tuple[int, ...] | None:
    """What to tell Reshape in order to get from one shape to another, for every size of the free axes.

    Returns:
        Sizes, 0 for an axis that keeps its place, -1 for at most one other; None if there is no such list.
    """
    if wanted is None or any(dim == 0 for dim in wanted):
        return None
    free = [axis for axis, dim in enumerate(wanted) if not isinstance(dim, int)]
    sizes = [dim if isinstance(dim, int) else -1 for dim in wanted]
    if len(free) > 1:
        # No -1 beside a 0: Reshape cannot tell the size of one axis if another turns out to be empty.
        for axis in free:
            if source is None or axis >= len(source) or wanted[axis] is None or source[axis] != wanted[axis]:
                return None
            sizes[axis] = 0
    return tuple(sizes)


def reshape(edit: Editor, node: Node, source: Tensor, target: tuple[int, ...]) -> Node:
    """Turn a node into a Reshape of another tensor."""
    if edit.opset < 5:
        return edit.replace_node(node, "Reshape", [source], {"shape": target})
    sizes = edit.constant(f"{node.outputs[0].name}_shape", np.array(target, np.int64))
    return edit.replace_node(node, "Reshape", [source, sizes])


def product(dims: Shape) -> int | None:
    """Number of elements, if every size is known."""
    if dims is None or not all(isinstance(dim, int) for dim in dims):
        return None
    return math.prod(dim for dim in dims if isinstance(dim, int))


# --------------------------------------------------------------------------------------------- graph


def made_by(tensor: Tensor | None, *ops: str) -> Node | None:
    """The standard operator that makes a tensor, if it is one of these."""
    node = ir.producer(tensor)
    return node if node is not None and node.op in ops and node.domain in DEFAULT_DOMAINS else None


def is_gelu(tensor: Tensor) -> bool:
    """Whether a tensor is x times one plus the error function, or the hyperbolic tangent, of something.

    Halved, that is a GELU. ONNX Runtime recognises it, but not with another factor in place of the half.
    """
    product = made_by(tensor, "Mul")
    sums = [made_by(factor, "Add") for factor in product.inputs] if product else []
    return any(made_by(part, "Erf", "Tanh") for each in sums if each for part in each.inputs)


def is_normalized(tensor: Tensor) -> bool:
    """Whether a tensor is something divided by a square root, scaled or not.

    Scaled and shifted, that is a layer normalization. ONNX Runtime recognises it, but not without both.
    """
    product = made_by(tensor, "Mul")
    quotients = [made_by(each, "Div") for each in (*(product.inputs if product else ()), tensor)]
    return any(made_by(each.inputs[1], "Sqrt") for each in quotients if each)


def sign_of_zero_counts(tensor: Tensor, edit: Editor) -> bool:
    """Whether anything after a tensor could turn -0 and +0 in it into different numbers.

    Dividing by it can; so can powers, functions and operators of other domains, and what takes a body's
    output, as far as one knows.
    """
    results = {id(result) for result in edit.model.graph.outputs}
    seen: set[int] = set()
    pending: list[Tensor] = [tensor]
    while pending:
        current = pending.pop()
        if edit.is_output(current) and id(current) not in results:
            return True
        for node in current.outputs:
            if node.domain not in DEFAULT_DOMAINS or node.bodies or has(node, Trait.TELLS_ZEROS):
                return True
            if has(node, Trait.DIVIDES) and node.input(1) is current:
                return True
            if id(node) not in seen and not has(node, Trait.MERGES_ZEROS):
                pending.extend(node.outputs)
            seen.add(id(node))
    return False


def selected(rules: Sequence[Rule[Any]], skip: Sequence[str]) -> list[Rule[Any]]:
    """The rules but for some.

    Raises:
        UsageError: there is no rule of a name to skip.
    """
    names = [rule.name for rule in rules]
    for name in skip:
        if name not in names:
            raise UsageError(f"there is no rule '{name}' to skip; known are: {', '.join(names)}")
    return [rule for rule in rules if rule.name not in skip]
