"""The function callers of PyPI's OnnxSlim know, with everything it can be asked for."""

from __future__ import annotations

import inspect as introspection
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx

from onnxslim import shapes, utils
from onnxslim.compat import precision
from onnxslim.engine.base import Pass
from onnxslim.engine.check import difference
from onnxslim.engine.pipeline import Pipeline, Result
from onnxslim.errors import UsageError, ValidationError, nearest
from onnxslim.ir import files, proto
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Array, Dim, Namer, Tensor, Variable
from onnxslim.ir.model import InputSpec, Model, Source, load
from onnxslim.passes import dead, eliminate, fuse
from onnxslim.passes.eliminate import control, noop
from onnxslim.passes.slim import Slim
from onnxslim.runtime.probe import Feeds, make_feeds, probes
from onnxslim.runtime.session import Session

logger = logging.getLogger("onnxslim")

Words: TypeAlias = "str | Iterable[str] | None"

_DTYPES: dict[str, np.dtype[Any]] = {
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
    "int32": np.dtype(np.int32),
    "bool": np.dtype(np.bool_),
}


def slim(
    model: Source | Sequence[Source],
    output_model: str | os.PathLike[str] | None = None,
    *,
    model_check: bool = False,
    input_shapes: Words = None,
    inputs: Words = None,
    outputs: Words = None,
    no_shape_infer: bool = False,
    skip_optimizations: Words = None,
    skip_fusion_patterns: Words = None,
    size_threshold: int | None = None,
    dtype: str | None = None,
    save_as_external_data: bool = False,
    model_check_inputs: Words = None,
    verbose: bool = False,
    inspect: bool = False,
    dump_to_disk: bool = False,
    **unknown: object,
) -> onnx.ModelProto:
    """Simplify a model without changing what it computes.

    Takes what OnnxSlim 0.1 takes, under the same names. It differs where that hides mistakes: the result is
    returned even if it is also saved, a failed check raises, and so does a keyword or a name of nothing.
    Inputs stay, whether they are used or not, and a default value of an input still may be overridden. Every
    rewrite is checked by running the model before and after it, whether `model_check` is given or not.

    Args:
        model: a file, a ModelProto or a Model; left as it is. A list of them is inspected.
        output_model: where to save the result, if anywhere; may be the file it was read from.
        model_check: compare the outputs of the result with those of the original once more, all
            optimizations of ONNX Runtime off, and raise if they differ or cannot be compared.
        input_shapes: sizes for inputs, as "name:1,3,224,224". Shapes that follow from them are inferred anew,
            those of the outputs too.
        inputs: tensors to cut the graph at, as "name" or "name:dtype"; they become its only inputs, in this
            order. Types are fp16, fp32, int32 and bool; needed only where the type is not known otherwise.
        outputs: likewise; they become its only outputs. Inputs they do not depend on are dropped.
        no_shape_infer: with `input_shapes`, leave the shapes of outputs open instead of inferring them.
            Inferred shapes of inner tensors are never written.
        skip_optimizations: of constant_folding, graph_fusion, dead_node_elimination,
            subexpression_elimination and weight_tying.
        skip_fusion_patterns: names of OnnxSlim's patterns, or of rules or parts of `onnxslim.passes.Slim`. A
            pattern's name leaves out every rule that does its work, and with it what else that rule does. One
            that has no counterpart here is logged as a warning.
        size_threshold: bytes by which constant folding may make the model larger; by default it may not. For
            OnnxSlim this is the size of a single result, and there is no limit by default.
        dtype: "fp16" converts the result to half precision, inputs and outputs too; "fp32" a model in half
            precision to single precision. This alone may change outputs beyond rounding; the check
            is that of the rewrites, before or after it.
        save_as_external_data: put the weights into a file beside `output_model`, however small they are.
        model_check_inputs: what to compare on, as "name:1,3,224,224" for random values of this shape or
            "name:file.npy". Other inputs and all by default are made up.
        verbose: write everything that was done to the standard error, through the logger "onnxslim".
        inspect: print what is in the model, or in several given as a list, and do nothing else.
        dump_to_disk: with `inspect`, write a table of the nodes to `<model>_model_info.csv`.

    Returns:
        The simplified model, with all data inside unless that is too much for one protobuf; then its tensors
        refer to the file it was saved to. When inspecting, the first model as it is.

    Raises:
        UsageError: an argument has no meaning, or does not fit the model.
        LoadError: the model is missing, broken, or not an ONNX model.
        ValidationError: `model_check` failed.
        SaveError: the result could not be written, or it is too large for one protobuf and was not saved.
    """
    _require_known(unknown)
    asked = Request(
        input_shapes=words(input_shapes),
        inputs=words(inputs),
        outputs=words(outputs),
        no_shape_infer=no_shape_infer,
        skip_optimizations=words(skip_optimizations),
        skip_fusion_patterns=words(skip_fusion_patterns),
        size_threshold=size_threshold,
        dtype=dtype,
        model_check=model_check,
        model_check_inputs=words(model_check_inputs),
    )
    if verbose:
        be_verbose()
    if not isinstance(model, str | os.PathLike | onnx.ModelProto | Model):
        return _inspected(model, dump_to_disk)
    if inspect:
        return _inspected([model], dump_to_disk)
    if dump_to_disk:
        raise UsageError("dump_to_disk works only together with inspect")
    result = asked.run(load(model))
    logger.info("%s", result.report)
    if output_model is None:
        return result.model.to_proto()
    result.save(output_model, external_data=save_as_external_data or None)
    return _returned(result.model, Path(output_model))


def words(value: Words) -> tuple[str, ...]:
    """One word, several or none as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value or ())


def be_verbose() -> None:
    """Let everything that is logged through, to the standard error if nothing else listens."""
    logger.setLevel(logging.DEBUG)
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler(sys.stderr))


def _inspected(models: Sequence[Source], dump_to_disk: bool) -> onnx.ModelProto:
    if not models:
        raise UsageError("there is no model to inspect")
    utils.inspect(models, dump_to_disk=dump_to_disk)
    return load(models[0]).to_proto()


def _returned(model: Model, saved: Path) -> onnx.ModelProto:
    if model.nbytes() <= files.MAX_EMBEDDED_BYTES:
        return model.to_proto()
    return files.read_model(saved)


def _require_known(unknown: Mapping[str, object]) -> None:
    known = [name for name in introspection.signature(slim).parameters if name not in ("model", "unknown")]
    for name in unknown:
        raise UsageError(f"slim() has no argument '{name}'; {nearest(name, known)}")


# ------------------------------------------------------------------------------------------ what is asked


@dataclass(frozen=True)
class Request:
    """The arguments of `slim` that say what to do with a model; see there."""

    input_shapes: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    no_shape_infer: bool = False
    skip_optimizations: tuple[str, ...] = ()
    skip_fusion_patterns: tuple[str, ...] = ()
    size_threshold: int | None = None
    dtype: str | None = None
    model_check: bool = False
    model_check_inputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what can be refused without a model."""
        if self.dtype not in (None, "fp16", "fp32"):
            raise UsageError(f"there is no dtype '{self.dtype}'; known are: fp16, fp32")
        if self.size_threshold is not None and self.size_threshold < 0:
            raise UsageError(f"size_threshold {self.size_threshold}: a number of bytes is not negative")
        for name in self.skip_optimizations:
            if name not in OPTIMIZATIONS:
                raise UsageError(f"there is no optimization '{name}' to skip; {nearest(name, OPTIMIZATIONS)}")
        for name in self.skip_fusion_patterns:
            if not name.startswith(_THEIRS) and name not in _RULES:
                known = (*PATTERNS, *_RULES)
                raise UsageError(f"there is no pattern '{name}' to skip; {nearest(name, known)}")

    @property
    def notes(self) -> tuple[str, ...]:
        """What was asked for and is not done, or not done exactly."""
        missing = [name for name in self.skip_fusion_patterns if not _rules(name)]
        return tuple(f"fusion pattern '{name}' has no counterpart here, nothing to skip" for name in missing)

    def step(self, base: Pass | None = None) -> Pass:
        """The pass that does it.

        Args:
            base: a Slim with further options; what is asked for here is left out besides.
        """
        given = {} if base is None else {item.name: getattr(base, item.name) for item in fields(base)}  # type: ignore[arg-type]
        names = [
            *given.pop("skip", ()),
            *(rule for name in self.skip_optimizations for rule in OPTIMIZATIONS[name]),
            *(rule for name in self.skip_fusion_patterns for rule in _rules(name)),
        ]
        if self.size_threshold is not None:
            given["max_growth"] = self.size_threshold
        return Slim(skip=tuple(dict.fromkeys(names)), **given)

    def edit(self, model: Model) -> Model:
        """The model with the shapes, inputs and outputs that were asked for; the one given stays as it is."""
        if self.dtype == "fp32":
            model = precision.to_single(model)
        if not (self.inputs or self.outputs or self.input_shapes):
            return model
        twin = model.copy()
        if self.inputs or self.outputs:
            cut(twin, self.inputs, self.outputs)
        if self.input_shapes:
            fix_shapes(twin, self.input_shapes, infer=not self.no_shape_infer)
        return twin

    def feeds(self, model: Model) -> Feeds | None:
        """Inputs to compare on; None if nothing was said of them."""
        return check_inputs(model, self.model_check_inputs) if self.model_check_inputs else None

    def run(self, model: Model) -> Result:
        """Edit, simplify and check.

        Raises:
            UsageError: see `slim`.
            ValidationError: see `slim`.
        """
        for note in self.notes:
            logger.warning(note)
        original = self.edit(model)
        feeds = self.feeds(original)
        told = logger.isEnabledFor(logging.INFO)
        result = Pipeline(self.step(), count=told)(original, data=None if feeds is None else [feeds])
        return self.finish(original, result, feeds)

    def finish(self, original: Model, result: Result, feeds: Feeds | None) -> Result:
        """Check the result and add to its report what was asked for and not done.

        Raises:
            ValidationError: see `slim`.
        """
        if self.model_check:
            require_same_outputs(original, result.model, feeds)
        for change in (change for step in result.report.steps for change in step.changes.changed):
            logger.debug("%s: %s %s", change.node, change.action, change.reason)
        notes = [*result.report.notes, *self.notes]
        model = result.model
        if self.dtype == "fp16":
            model = precision.to_half(model)
            notes.append("converted to half precision; what that changes in the outputs was not measured")
        return replace(result, model=model, report=replace(result.report, notes=tuple(notes)))


# -------------------------------------------------------------------------------- names of what to skip

# Eliminating rules that drop a node; the others make one node of two.
_DROPPING = frozenset(
    (*(rule.name for rule in (*control.RULES, *noop.RULES)), "same-shape", "transpose", "slice")
)
_ELIMINATING = tuple(rule.name for rule in eliminate.RULES)
_RULES = (
    *("inline", "fold", "eliminate", "fuse", "dedupe", "dead", "equal-constants", "equal-nodes"),
    *_ELIMINATING,
    *(rule.name for rule in fuse.RULES),
)
_THEIRS = ("Fusion", "Elimination")

OPTIMIZATIONS: dict[str, tuple[str, ...]] = {
    "constant_folding": ("fold",),
    "graph_fusion": ("fuse", *(name for name in _ELIMINATING if name not in _DROPPING)),
    "dead_node_elimination": ("dead", *(name for name in _ELIMINATING if name in _DROPPING)),
    "subexpression_elimination": ("equal-nodes",),
    "weight_tying": ("equal-constants",),
}
# The rules that do what OnnxSlim's patterns do; folding does the work of some without a rule of its own.
PATTERNS: dict[str, tuple[str, ...]] = {
    "EliminationConcat": ("concat-concat",),
    "EliminationReshape": ("view-chain", "there-and-back"),
    "EliminationReshapeAs": (),
    "EliminationSlice": ("slice-chain",),
    "EliminationTranspose": ("transpose-back", "transpose-chain"),
    "EliminationTransposeAsReshape": ("transpose-view",),
    "EliminationTransposeViewTranspose": (),
    "EliminationUnsqueeze": ("axes-chain",),
    "FusionConcatReshape": (),
    "FusionConvAdd": ("layer-arithmetic",),
    "FusionConvBN": ("layer-batchnorm",),
    "FusionConvMul": ("layer-arithmetic",),
    "FusionConvTransposeAdd": ("layer-arithmetic",),
    "FusionConvTransposeBN": ("layer-batchnorm",),
    "FusionConvTransposeMul": ("layer-arithmetic",),
    "FusionGemm": ("matmul-arithmetic",),
    "FusionGemmAdd": ("gemm-arithmetic",),
    "FusionGemmMul": ("gemm-arithmetic",),
    "FusionPadConv": ("pad-layer",),
    "FusionReduce": (),
}


def _rules(name: str) -> tuple[str, ...]:
    return (name,) if name in _RULES else PATTERNS.get(name, ())


# ------------------------------------------------------------------------------------------- input shapes


def fix_shapes(model: Model, asked: Sequence[str], *, infer: bool = True) -> None:
    """Fix shapes of inputs and forget or infer anew what followed from the old ones.

    Args:
        model: edited in place.
        asked: "name:1,3,224,224" each.
        infer: whether to infer the shapes of inner tensors and outputs.

    Raises:
        UsageError: there is no such input, or it has another number of axes.
    """
    specs = {spec.name: spec for spec in model.inputs()}
    wanted = {spec.name: _sizes(text, spec) for spec, text in _named(asked, specs)}
    for tensor in model.graph.inputs:
        tensor.shape = wanted.get(tensor.name, tensor.shape)
    ranks = {id(out): len(out.shape) for out in model.graph.outputs if out.shape is not None}
    _forget_shapes(model)
    if infer:
        _learn_shapes(model)
    for out in model.graph.outputs:
        if isinstance(out, Variable) and out.shape is None and id(out) in ranks:
            out.shape = (None,) * ranks[id(out)]


def _forget_shapes(model: Model) -> None:
    for tensor in _made(model):
        tensor.shape = None


def _learn_shapes(model: Model) -> None:
    """Fill in types, and shapes in numbers and symbols of the inputs, where they are certain."""
    symbols = {dim for tensor in model.graph.inputs for dim in tensor.shape or ()}
    facts = shapes.deduce(model)
    for tensor in _made(model):
        fact = facts.get(id(tensor))
        if fact is None or fact.dtype is None:
            continue
        tensor.dtype = fact.dtype
        if fact.shape is not None:
            # Sizes that are only declared may be wrong, as exporters write 0 for some.
            tensor.shape = tuple(
                dim if isinstance(dim, int) or dim in symbols else None for dim in fact.shape
            )


def _made(model: Model) -> Iterator[Variable]:
    """The tensors that are not inputs of the model."""
    for graph in model.graphs():
        for tensor in ir.tensors(graph):
            if isinstance(tensor, Variable) and (tensor.inputs or graph is not model.graph):
                yield tensor


def _named(asked: Sequence[str], specs: Mapping[str, InputSpec]) -> Iterator[tuple[InputSpec, str]]:
    """Inputs with what is said of them; names may contain colons themselves."""
    for word in asked:
        name = max((name for name in specs if word.startswith(f"{name}:")), key=len, default=None)
        if name is None:
            wrong = word.rpartition(":")[0] or word
            raise UsageError(f"'{word}': there is no input '{wrong}'; {nearest(wrong, specs)}")
        yield specs[name], word[len(name) + 1 :]


def _sizes(text: str, spec: InputSpec) -> tuple[int, ...]:
    try:
        sizes = tuple(int(word) for word in text.split(",")) if text else ()
    except ValueError:
        raise UsageError(f"'{spec.name}:{text}' is not of the form name:1,3,224,224") from None
    if any(size < 0 for size in sizes):
        raise UsageError(f"'{spec.name}:{text}': sizes are not negative")
    if spec.shape is not None and len(spec.shape) != len(sizes):
        raise UsageError(f"'{spec.name}:{text}': the input has {len(spec.shape)} axes, not {len(sizes)}")
    return sizes


# ---------------------------------------------------------------------------------------------- cutting


def cut(model: Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Make tensors the inputs or outputs of the model and remove what is not needed between them.

    Args:
        model: edited in place.
        inputs, outputs: "name" or "name:dtype" each; where there are none, they stay what they are.

    Raises:
        UsageError: there is no such tensor, its type is unknown or another one, or the outputs depend on
            inputs that are not among those named.
    """
    _learn_shapes(model)
    # What the graph was read from lists other inputs and outputs, in another order.
    if model.graph.proto is not None:
        model.graph.proto = proto.fields_but(
            model.graph.proto, "node", "initializer", "sparse_initializer", "input", "output", "value_info"
        )
    cutter = _Cutter(model)
    if inputs:
        model.graph.inputs = [cutter.input(word) for word in dict.fromkeys(inputs)]
        _prune(model)
        cutter.require_no_other()
    if outputs:
        idle = {id(tensor) for tensor in model.graph.inputs if not tensor.outputs}
        model.graph.outputs = [cutter.output(word) for word in dict.fromkeys(outputs)]
        _prune(model)
        used = idle | {id(tensor) for tensor in model.graph.outputs}
        model.graph.inputs = [each for each in model.graph.inputs if each.outputs or id(each) in used]
    kept = {tensor.name for tensor in model.graph.inputs}
    model.graph.defaults = {name: value for name, value in model.graph.defaults.items() if name in kept}


def _prune(model: Model) -> None:
    dead.remove_nodes(model, list(model.nodes()))
    dead.remove_constants(model)


class _Cutter:
    """Finds the tensors of the main graph by what is said of them."""

    def __init__(self, model: Model) -> None:
        self._model, self._graph = model, model.graph
        self._inputs = list(model.graph.inputs)

    @cached_property
    def _name(self) -> Namer:
        return Namer(self._graph)

    def input(self, word: str) -> Variable:
        """A tensor as an input; what made it makes another one, which nobody reads."""
        tensor, dtype = self._find(word)
        if any(tensor is each for each in self._inputs):
            assert isinstance(tensor, Variable)
            return tensor
        made = Variable(tensor.name, dtype, tensor.shape)
        ir.replace_uses(tensor, made)
        for graph in self._model.graphs():
            graph.outputs = [made if out is tensor else out for out in graph.outputs]
        tensor.name = self._name(f"{tensor.name}_cut")
        return made

    def output(self, word: str) -> Tensor:
        """A tensor as an output."""
        tensor, dtype = self._find(word)
        if isinstance(tensor, Variable):
            tensor.dtype = dtype
        return tensor

    def require_no_other(self) -> None:
        """Raise UsageError if the model still needs an input it no longer has."""
        kept = {id(tensor) for tensor in self._graph.inputs}
        for tensor in self._inputs:
            is_output = any(out is tensor for out in self._graph.outputs)
            if id(tensor) not in kept and (tensor.outputs or is_output):
                raise UsageError(
                    f"the outputs also depend on input '{tensor.name}'; name it among the inputs"
                )

    def _find(self, word: str) -> tuple[Tensor, np.dtype[Any] | None]:
        """A tensor and its type, which is None where there is none."""
        found = {tensor.name: tensor for tensor in ir.tensors(self._graph)}
        name, colon, kind = (word, "", "") if word in found or ":" not in word else word.rpartition(":")
        if name not in found:
            raise UsageError(f"'{word}': there is no tensor '{name}'; {nearest(name, found)}")
        if colon and kind not in _DTYPES:
            raise UsageError(f"'{word}': there is no type '{kind}'; known are: {', '.join(_DTYPES)}")
        return found[name], _dtype(found[name], _DTYPES[kind] if colon else None)


def _dtype(tensor: Tensor, asked: np.dtype[Any] | None) -> np.dtype[Any] | None:
    """The type of a tensor, as known or as asked for."""
    known = tensor.dtype
    if asked is not None and known is not None and asked != known:
        raise UsageError(f"tensor '{tensor.name}' is of type {known}, not {asked}")
    is_unknown = known is None and not (isinstance(tensor, Variable) and tensor.proto is not None)
    if asked is None and is_unknown:
        raise UsageError(f"the type of tensor '{tensor.name}' is not known; add it, as in {tensor.name}:fp32")
    return known if known is not None else asked


# -------------------------------------------------------------------------------------------- checking


def check_inputs(model: Model, asked: Sequence[str]) -> Feeds:
    """Inputs of the shapes or with the values asked for; the others are made up to go with them.

    Args:
        model: what to feed.
        asked: "name:1,3,224,224" or "name:file.npy" each.

    Raises:
        UsageError: there is no such input or file, or the shape does not fit.
    """
    specs = {spec.name: spec for spec in model.inputs()}
    given: Feeds = {}
    known: dict[Dim, int] = {}
    for spec, text in _named(asked, specs):
        if text.endswith(".npy"):
            given[spec.name] = _read(text)
        sizes = given[spec.name].shape if spec.name in given else _sizes(text, spec)
        known.update(
            (dim, size) for dim, size in zip(spec.shape or (), sizes, strict=False) if isinstance(dim, str)
        )
        specs[spec.name] = replace(spec, shape=sizes)
    bound = [
        replace(spec, shape=None if spec.shape is None else tuple(known.get(dim, dim) for dim in spec.shape))
        for spec in specs.values()
    ]
    return {**make_feeds(bound, batch=1, size=1), **given}


def _read(path: str) -> Array:
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(
            f"'{path}' is not an .npy file of a plain array: {' '.join(str(error).split())}"
        ) from error
    return np.asarray(values)


def require_same_outputs(original: Model, result: Model, feeds: Feeds | None = None) -> None:
    """Run both models, optimizations of ONNX Runtime off.

    Args:
        original, result: models of one interface.
        feeds: what on; made up if None.

    Raises:
        ValidationError: an output differs by more than rounding, or there are no inputs to compare on.
        LoadError: ONNX Runtime fails on one of them.
    """
    before, after = Session(original, optimize="none"), Session(result, optimize="none")
    batches = [run.feeds for run in probes(original, before)] if feeds is None else [feeds]
    if not batches:
        raise ValidationError(
            "model_check: no inputs could be made up on which the model runs; give model_check_inputs"
        )
    for batch in batches:
        expected, again, actual = before.run(batch), before.run(batch), after.run(batch)
        for name, reference in expected.items():
            # What is random differs from itself.
            problem = difference(reference, actual[name])
            if problem and not difference(reference, again[name]):
                raise ValidationError(f"model_check: output '{name}' {problem}")
