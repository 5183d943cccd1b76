"""The function callers of PyPI's OnnxSlim know, with everything it can be asked for."""

from __future__ import annotations

import inspect as introspection
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx

from onnxslim import utils
from onnxslim.compat import names
from onnxslim.engine.base import Pass
from onnxslim.engine.check import difference
from onnxslim.engine.pipeline import Pipeline, Report, Result
from onnxslim.errors import UsageError, ValidationError, nearest
from onnxslim.ir import files
from onnxslim.ir.graph import Array
from onnxslim.ir.model import InputSpec, Model, Source, load
from onnxslim.passes import create
from onnxslim.passes.extract import Extract
from onnxslim.passes.shapes import FixShapes
from onnxslim.passes.single import Single
from onnxslim.passes.slim import Slim
from onnxslim.runtime.probe import Feeds, make_feeds, probes
from onnxslim.runtime.session import Session
from onnxslim.shapes.given import by_name, sizes_of, with_sizes

logger = logging.getLogger("onnxslim")

Words: TypeAlias = "str | Iterable[str] | None"
# The pass, by its name: with statistics of data behind it, it takes long to import, and few ask for it.
HALF = "half"


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
    if not isinstance(model, str | os.PathLike | bytes | onnx.ModelProto | Model):
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
        names.require_known(self.skip_optimizations, self.skip_fusion_patterns)
        self.passes()

    @property
    def notes(self) -> tuple[str, ...]:
        """What was asked for and is not done."""
        missing = names.without_counterpart(self.skip_fusion_patterns)
        return tuple(f"fusion pattern '{name}' has no counterpart here, nothing to skip" for name in missing)

    def passes(self, given: Mapping[str, Any] | None = None) -> tuple[Pass, ...]:
        """The passes that do it, in order.

        Args:
            given: options of Slim; what is asked for here wins, or is left out besides.
        """
        made = create(Slim.name, given or {})
        assert isinstance(made, Slim)
        skip = (*made.skip, *names.skipped(self.skip_optimizations, self.skip_fusion_patterns))
        most = made.max_growth if self.size_threshold is None else self.size_threshold
        sizes = by_name(self.input_shapes)
        return (
            *((Single(),) if self.dtype == "fp32" else ()),
            *((Extract(inputs=self.inputs, outputs=self.outputs),) if self.inputs or self.outputs else ()),
            *((FixShapes(inputs=sizes, infer=not self.no_shape_infer),) if sizes else ()),
            Slim(skip=tuple(dict.fromkeys(skip)), max_growth=most),
            *((create(HALF, {"everywhere": True}),) if self.dtype == "fp16" else ()),
        )

    def feeds(self, model: Model) -> Feeds | None:
        """Inputs to compare on; None if nothing was said of them."""
        return check_inputs(model, self.model_check_inputs) if self.model_check_inputs else None

    def run(self, model: Model) -> Result:
        """Simplify and check.

        Raises:
            UsageError: see `slim`.
            ValidationError: see `slim`.
        """
        for note in self.notes:
            logger.warning(note)
        start, rest = Pipeline(*self.passes(), count=logger.isEnabledFor(logging.INFO)).prepared(model)
        feeds = self.feeds(start.model)
        result = rest(start.model, data=None if feeds is None else [feeds])
        report = self.checked(start.model, result.model, start.report + result.report, feeds)
        return replace(result, report=report)

    def checked(self, original: Model, model: Model, report: Report, feeds: Feeds | None) -> Report:
        """The report with what was asked for and not done.

        Args:
            original: the model as the first passes prepared it.
            model, report: the result.
            feeds: what to compare on.

        Raises:
            UsageError: the model does not work in the type asked for.
            ValidationError: `model_check` was asked for, and the result computes something else.
        """
        failed = [step.error for step in report.steps if step.name == HALF and step.error]
        if failed:
            raise UsageError(f"dtype 'fp16' does not work for this model: {failed[0]}")
        if self.model_check:
            # Half precision comes last, and is not what is to be checked.
            lossless = (each for each in self.passes() if isinstance(each, Slim))
            wide = Pipeline(*lossless)(original).model if self.dtype == "fp16" else model
            require_same_outputs(original, wide, feeds)
        for change in (change for step in report.steps for change in step.changes.changed):
            logger.debug("%s: %s %s", change.node, change.action, change.reason)
        return report + Report(notes=self.notes)


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
    sizes: dict[str, tuple[int, ...]] = {}
    for spec, text in _named(asked, specs):
        if text.endswith(".npy"):
            given[spec.name] = _read(text)
        sizes[spec.name] = given[spec.name].shape if spec.name in given else sizes_of(text, spec.name)
    return {**make_feeds(with_sizes(list(specs.values()), sizes), batch=1, size=1), **given}


def _named(asked: Sequence[str], specs: Mapping[str, InputSpec]) -> Iterator[tuple[InputSpec, str]]:
    """Inputs with what is said of them; names and paths may contain colons themselves."""
    for word in asked:
        name = max((name for name in specs if word.startswith(f"{name}:")), key=len, default=None)
        if name is None:
            wrong = word.rpartition(":")[0] or word
            raise UsageError(f"'{word}': there is no input '{wrong}'; {nearest(wrong, specs)}")
        yield specs[name], word[len(name) + 1 :]


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
