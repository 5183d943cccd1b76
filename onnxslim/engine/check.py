"""Is a rewritten model still a model, and does it still compute the same?"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.checker
import onnx.shape_inference

from onnxslim.engine.base import InterfacePart
from onnxslim.errors import LoadError, OnnxSlimError, one_line
from onnxslim.ir import proto
from onnxslim.ir.graph import MASK_MAGNITUDE, Array, Constant, Node
from onnxslim.ir.model import InputSpec, Model
from onnxslim.ops import Trait, has, spec_of
from onnxslim.ops.spec import sizes as spec_sizes
from onnxslim.runtime.limits import RunLimits
from onnxslim.runtime.probe import Feeds, Run, probes
from onnxslim.runtime.profile import left_over, may_stray, places
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target
from onnxslim.shapes import cost
from onnxslim.shapes.hiding import hide_trusting

# Largest difference, relative to the largest magnitude of the reference, that merely re-associating
# floating-point sums explains: a few hundred roundings of the type's epsilon.
ROUNDINGS = 400.0
# ONNX Runtime's own optimizations round differently from one graph to another that computes the same. That
# may explain so many times as much, if without them nothing differs.
OPTIMIZER_FACTOR = 10.0
# Larger constants are not handed to onnx.checker, only their types and shapes.
MAX_CHECKED_BYTES = 1 << 16

# A model with a larger tensor is not run to check it.
MAX_TENSOR_BYTES = 2 << 30
# A rewritten model may take so many times what the original took to be opened and run, and that long anyway:
# what is far slower is for measurements to say, here it is about runs that do not end.
TIME_FACTOR = 20.0
LEAST_SECONDS = 60.0

Outputs = dict[str, Any]


class Checker:
    """Compares rewritten models with the one it was made from.

    What the original itself does not satisfy (a model the checker rejects, an operator ONNX Runtime has no
    kernel for, outputs that differ from run to run) is not asked of the result; `notes` says so.

    Args:
        model: the original.
        target: where it runs.
        samples: real inputs for the comparison, if there are any.
        notes: where to add to what others could not check.

    Attributes:
        feeds: the inputs models are compared on; none if there is nothing the original runs on.
        notes: what could not be checked, and why.

    Raises:
        TargetError: the target cannot be used, or runs no operator of the original.
    """

    def __init__(
        self,
        model: Model,
        target: Target,
        samples: Sequence[Mapping[str, Array]] = (),
        notes: list[str] | None = None,
        specs: Sequence[InputSpec] | None = None,
    ) -> None:
        self._target = target
        self._specs = specs
        self._model = model
        self.notes: list[str] = [] if notes is None else notes
        self._wellformed = self._noted("the input fails onnx.checker", lambda: wellformed(model))
        self._limits: RunLimits | None = None  # nothing says what the original may take
        start = time.perf_counter()
        session = self._noted("the input does not run", lambda: self._affordable(model))
        self._samples = samples
        self._runs = session is not None
        self._take(probes(model, session, samples, specs) if session else [])
        self._limits = limits_after(time.perf_counter() - start, model)
        if self.feeds and may_stray(target):
            # A session names its provider even where that takes no operator: whether it does is looked up.
            self.notes += left_over(target, "original", places(model, target, self.feeds[0], once=True))
        # Where no operator draws numbers or runs graphs, that is looked up only if a result differs.
        pure = all(spec_of(node).pure for node in model.nodes()) and not model.shell.functions
        self._random = None if pure else self._unstable(session) if session else set()

    def _affordable(self, model: Model) -> Session:
        require_affordable(model)
        return self._open(model)

    def _open(self, model: Model, optimize: str = "all") -> Session:
        return Session(model, self._target, optimize=optimize, once=True, limits=self._limits)

    def _take(self, runs: Sequence[Run]) -> None:
        """Compare on these inputs from here on."""
        self.feeds: list[Feeds] = [run.feeds for run in runs]
        self._expected = [run.outputs for run in runs]
        if self._runs and not runs:
            self.notes.append(
                "no inputs could be made up on which the model runs; pass data to compare outputs"
            )

    def _retreat(self) -> bool:
        """Compare on inputs that the original takes as it is written; False if it does already.

        ONNX Runtime's optimizations make some models run on more: of a Reshape to [1, Shape(x)[1], 8] they
        make one to [1, -1, 8], which takes any batch. No rewrite has to keep that.
        """
        try:
            session = self._open(self._model, "none")
        except LoadError:
            return False
        runs = probes(self._model, session, self._samples, self._specs)
        if not runs or [_shapes(run.feeds) for run in runs] == [_shapes(feeds) for feeds in self.feeds]:
            return False
        self._take(runs)
        self.accept(self._model)
        return True

    def accept(self, model: Model) -> None:
        """Take a model that lossily differs from the original for what later lossless steps have to keep."""
        self._model = model
        if self._runs:
            session = self._open(model)
            self._expected = [session.run(feeds) for feeds in self.feeds]

    def _noted(self, what: str, attempt: Any) -> Any:
        try:
            return attempt() or True
        except LoadError as error:
            self.notes.append(f"{what}: {error}")
            return None

    def _unstable(self, session: Session) -> set[str]:
        names = {
            name
            for feeds, expected in zip(self.feeds, self._expected, strict=True)
            for name, again in session.run(feeds).items()
            if difference(expected[name], again)
        }
        if names:
            self.notes.append(f"outputs {sorted(names)} differ from run to run and are not compared")
        return names

    def _is_random(self, name: str) -> bool:
        """Whether an output of the original is not the same in every run."""
        if self._random is None:
            self._random = self._unstable(self._open(self._model))
        return name in self._random

    def __call__(
        self, model: Model, *, lossless: bool, changing: Collection[InterfacePart] = frozenset()
    ) -> None:
        """Check a rewritten model.

        Args:
            model: the result of a pass.
            lossless: whether its outputs must be those of the original up to rounding.
            changing: what of the interface may be another one; then outputs are not compared.

        Raises:
            LoadError: says in one line what is wrong.
        """
        require_interface(self._model, model, changing)
        if self._wellformed:
            self._require_wellformed(model)
        if not self._runs:
            return
        try:
            self._compare(model, lossless, changing)
        except LoadError:
            if not self._retreat():
                raise
            self._compare(model, lossless, changing)

    def _compare(self, model: Model, lossless: bool, changing: Collection[InterfacePart]) -> None:
        session = self._open(model)
        for feeds, expected in zip(self.feeds, self._expected, strict=True):
            if {"inputs", "types"} & set(changing):
                continue  # there is nothing to feed
            actual = session.run(feeds)
            if changing:
                continue  # there is nothing to compare with
            problem = self._problem(expected, actual, lossless)
            if problem and lossless:
                problem = self._unexplained(model, feeds, expected, actual)
            if problem:
                raise LoadError(problem)

    def _require_wellformed(self, model: Model) -> None:
        """Hold a result to onnx.checker, but not to shapes declared for outputs that turn out to be wrong.

        They are the user's to change; folding may let the checker see what it could not see in the original.
        """
        try:
            wellformed(model)
        except LoadError as error:
            if not self._runs or not self.feeds:
                raise
            wellformed(model, declared=False)
            note = f"an output does not have the shape it is declared with, which is left as it is: {error}"
            if note not in self.notes:
                self.notes.append(note)

    def _unexplained(self, model: Model, feeds: Feeds, expected: Outputs, actual: Outputs) -> str:
        """What neither rounding explains, as it shows in this model, nor ONNX Runtime's own optimizations.

        An output that is nearly zero beside what it was computed from, as that of a saturated Sigmoid,
        carries the rounding of the larger numbers. How much that is, the original tells: by what its outputs
        do when its inputs move by as much as rounding may (a backward error; Higham, Accuracy and Stability
        of Numerical Algorithms, chapter 1).
        """
        moved = self._open(self._model).run(_nudged(feeds))
        problem = self._problem(expected, actual, True, OPTIMIZER_FACTOR, moved)
        if problem:
            return problem
        first, second = (self._open(each, "none") for each in (self._model, model))
        return self._problem(first.run(feeds), second.run(feeds), True, moved=first.run(_nudged(feeds)))

    def _problem(
        self,
        expected: Outputs,
        actual: Outputs,
        lossless: bool,
        factor: float = 1.0,
        moved: Outputs | None = None,
    ) -> str:
        for name, reference in expected.items():
            other = actual[name]
            near = moved[name] if moved is not None else reference
            problem = difference(reference, other, factor, near) if lossless else broken(reference, other)
            if problem and not self._is_random(name):
                return f"output '{name}' {problem}"
        return ""


def _shapes(feeds: Feeds) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in feeds.items()}


def limits_after(seconds: float, model: Model) -> RunLimits:
    """What opening a rewritten model, or a run of it, may take.

    Args:
        seconds: what the original took to be opened and run.
        model: the original.
    """
    most = max(LEAST_SECONDS, TIME_FACTOR * seconds)
    return RunLimits(most, 2 * (MAX_TENSOR_BYTES + model.nbytes()))


def _is_constant(node: Node) -> bool:
    """Whether a node computes with constants alone, which ONNX Runtime does as it loads a model."""
    if has(node, Trait.CODES):
        return False
    return bool(node.inputs) and all(isinstance(tensor, Constant) for tensor in node.inputs)


def require_affordable(model: Model) -> None:
    """Raise LoadError if a tensor is certain to take more than `MAX_TENSOR_BYTES`, whatever is fed.

    A file of a few bytes can ask for terabytes; ONNX Runtime would try to get them, sometimes as it loads it.
    """
    if not any(has(node, Trait.GROWS) or _is_constant(node) for node in model.nodes()):
        return
    for node in cost.sized(model).nodes():
        for tensor in node.outputs:
            sizes = spec_sizes(tensor.shape)
            if sizes is not None and tensor.dtype is not None:
                taken = math.prod(sizes) * tensor.dtype.itemsize
                if taken > MAX_TENSOR_BYTES:
                    raise LoadError(
                        f"tensor '{tensor.name}' of node '{node.label}' takes {taken} bytes for a single "
                        f"sample, more than the {MAX_TENSOR_BYTES} that are tried"
                    )


def interface(model: Model, changing: Collection[InterfacePart] = frozenset()) -> list[tuple[object, ...]]:
    """Names, types and shapes of inputs and outputs, in order, but for what may change."""
    return [
        (
            tensor.name,
            None if "types" in changing else tensor.dtype,
            None if "shapes" in changing else tensor.shape,
        )
        for part, tensors in (("inputs", model.graph.inputs), ("outputs", model.graph.outputs))
        for tensor in tensors
        if part not in changing
    ]


def require_interface(before: Model, after: Model, changing: Collection[InterfacePart] = frozenset()) -> None:
    """Raise LoadError if inputs or outputs are not what they were, but for what may change."""
    if interface(before, changing) != interface(after, changing):
        raise LoadError("the inputs or outputs changed")


def wellformed(model: Model, *, declared: bool = True) -> None:
    """Run onnx.checker with full shape inference; LoadError if it objects.

    Args:
        model: what to check.
        declared: whether the shapes declared for outputs have to be right.
    """
    bare = _without_weights(model)
    hide_trusting(bare)
    try:
        onnx.checker.check_model(bare, full_check=declared)
        if not declared:
            for output in bare.graph.output:
                if output.type.HasField("tensor_type"):
                    output.type.tensor_type.ClearField("shape")
            onnx.shape_inference.infer_shapes(bare, check_type=True, strict_mode=True)
    except OnnxSlimError:
        raise
    except Exception as error:  # the checker raises several unrelated types
        raise LoadError(f"onnx.checker: {one_line(error)}") from error


def _without_weights(model: Model) -> onnx.ModelProto:
    """The model with inputs in the place of its large constants, which would take long to hand over."""
    embedded = {
        id(c) for graph in model.graphs() if graph is not model.graph for c in graph.initializers.values()
    }
    embedded |= {id(constant) for constant in model.graph.defaults.values()}
    weights: dict[str, Constant] = {}

    def encode(constant: Constant) -> onnx.TensorProto:
        if id(constant) in embedded or constant.nbytes <= MAX_CHECKED_BYTES:
            return proto.encode_embedded(constant)
        weights[constant.name] = constant
        return onnx.TensorProto(name=constant.name)

    bare = model.to_proto_with(encode)
    graph = bare.graph
    kept = [tensor for tensor in graph.initializer if tensor.name not in weights]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    listed = {info.name for info in graph.input}
    graph.input.extend(
        onnx.helper.make_tensor_value_info(name, proto.elem_type_of(constant.dtype), constant.shape)
        for name, constant in weights.items()
        if name not in listed
    )
    return bare


def _nudged(feeds: Feeds) -> Feeds:
    """Inputs moved by as much as rounding may move the outputs, up or down at random."""
    generator = np.random.default_rng(0)

    def nudged(array: Array) -> Array:
        if array.dtype.kind != "f":
            return array
        step = ROUNDINGS * float(np.finfo(array.dtype).eps)
        return (array * (1 + step * generator.choice((-1, 1), array.shape))).astype(array.dtype)

    return {name: nudged(array) for name, array in feeds.items()}


def difference(reference: Any, actual: Any, factor: float = 1.0, moved: Any = None) -> str:
    """How two values of one output differ by more than rounding; empty if they do not.

    Args:
        reference, actual: the values.
        factor: how often the usual rounding is allowed.
        moved: what the reference becomes with inputs that differ by rounding; as much is allowed as well.
    """
    if not isinstance(reference, np.ndarray):
        return _nested(reference, actual, factor)
    problem = type_problem(reference, actual)
    if problem or reference.size == 0:
        return problem
    if reference.dtype.kind not in "fc":
        wrong = int(np.count_nonzero(reference != actual))
        return f"differs in {wrong} of {reference.size} elements" if wrong else ""
    return _float_difference(reference, actual, factor, moved)


def _nested(reference: Any, actual: Any, factor: float) -> str:
    """Sequences and maps, element by element; optionals that are empty."""
    if reference is None or not hasattr(reference, "__len__") or isinstance(reference, str):
        return "" if reference == actual else "differs"
    if len(reference) != len(actual):
        return f"has {len(actual)} elements instead of {len(reference)}"
    if isinstance(reference, Mapping) and reference.keys() != actual.keys():
        return "has other keys"
    if isinstance(reference, Mapping) and all(isinstance(value, float) for value in reference.values()):
        # What classifiers make of probabilities, in single precision.
        first, second = (
            np.array([each[key] for key in reference], np.float32) for each in (reference, actual)
        )
        return difference(first, second, factor)
    keys = reference if isinstance(reference, Mapping) else range(len(reference))
    problems = (difference(reference[key], actual[key], factor) for key in keys)
    return next((problem for problem in problems if problem), "")


def type_problem(reference: Array, actual: Any) -> str:
    """How an output changed its type or shape; empty if it did not."""
    if not isinstance(actual, np.ndarray) or reference.dtype != actual.dtype:
        return f"changed its type from {reference.dtype} to {getattr(actual, 'dtype', type(actual).__name__)}"
    if reference.shape != actual.shape:
        return f"changed its shape from {reference.shape} to {actual.shape}"
    return ""


def _float_difference(reference: Array, actual: Array, factor: float, moved: Any) -> str:
    finite = np.isfinite(reference)
    if not np.array_equal(reference[~finite], actual[~finite], equal_nan=True):
        return "differs where it is NaN or infinite"
    if not np.isfinite(actual[finite]).all():
        return "became NaN or infinite"
    if not finite.any():
        return ""
    comparable = isinstance(moved, np.ndarray) and moved.shape == reference.shape
    near = np.where(np.isfinite(moved), moved, reference) if comparable else reference
    wide = np.result_type(reference.dtype, np.float64)
    expected, got, close = (array[finite].astype(wide) for array in (reference, actual, near))
    # A mask value such as -3.4e38 must not lend its tolerance to the rest.
    masked = np.abs(expected) >= MASK_MAGNITUDE
    share = factor * ROUNDINGS * float(_finfo(reference.dtype).eps)
    parts = (
        _beyond_rounding(expected[part], got[part], close[part], share)
        for part in (~masked, masked)
        if part.any()
    )
    return next((problem for problem in parts if problem), "")


def _finfo(dtype: np.dtype[Any]) -> Any:
    """Limits of a type, be it NumPy's or one that it lacks."""
    return ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]


def _beyond_rounding(expected: Array, got: Array, moved: Array, share: float) -> str:
    allowed = max(share * float(np.abs(expected).max()), 2 * float(np.abs(moved - expected).max()))
    worst = float(np.abs(expected - got).max())
    return f"differs by {worst:.3g}, more than rounding explains ({allowed:.3g})" if worst > allowed else ""


def broken(reference: Any, actual: Any) -> str:
    """What no pass may do to an output, however lossy: another type, another shape, NaN."""
    if not isinstance(reference, np.ndarray):
        return ""
    problem = type_problem(reference, actual)
    if problem or reference.dtype.kind not in "fc":
        return problem
    if np.isfinite(reference).all() and not np.isfinite(actual).all():
        return "became NaN or infinite"
    return ""


def relative_difference(
    first: Model,
    second: Model,
    target: Target,
    samples: Sequence[Mapping[str, Array]] = (),
    *,
    optimize: str = "none",
) -> float | None:
    """Largest difference of an output, relative to its largest magnitude, over probe inputs.

    Args:
        first, second: models with one interface.
        target: where they run.
        samples: real inputs, preferred to made-up ones.
        optimize: ONNX Runtime's own optimizations of the second; the first runs as it is written.

    Returns:
        None if the first does not run at all, or no inputs are found on which it does.

    Raises:
        LoadError: ONNX Runtime refuses the second.
    """
    try:
        session = Session(first, target, optimize="none", once=True)
    except LoadError:
        return None
    other = Session(second, target, optimize=optimize, once=True)
    worst: float | None = None
    for run in probes(first, session, samples):
        actual = other.run(run.feeds)
        found = [_relative(value, actual[name]) for name, value in run.outputs.items()]
        worst = max([worst or 0.0, *found])
    return worst


def _relative(expected: Array, actual: Array) -> float:
    if not isinstance(expected, np.ndarray) or expected.dtype.kind not in "fV" or not expected.size:
        return 0.0
    if expected.shape != actual.shape:
        return float("inf")
    expected, actual = expected.astype(np.float64), actual.astype(np.float64)
    usable = np.isfinite(expected) & (np.abs(expected) < MASK_MAGNITUDE)
    if not np.isfinite(actual[usable]).all():
        return float("inf")
    difference = np.abs(expected[usable] - actual[usable])
    scale = np.abs(expected[usable]).max(initial=0.0)
    return float(difference.max(initial=0.0) / (scale or 1.0))
