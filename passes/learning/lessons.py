"""What a pass learns from, and what it has to tell of what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from onnxslim.calibration.fidelity import OutputPart, parts_of
from onnxslim.calibration.noise import sqnr
from onnxslim.calibration.stream import Taps
from onnxslim.engine.base import Context, Log
from onnxslim.errors import CalibrationError, UsageError, nearest
from onnxslim.ir.graph import Array, Constant
from onnxslim.ir.model import Model
from onnxslim.learn.augment import Augmentation
from onnxslim.learn.door import UnknownError
from onnxslim.learn.examples import Examples
from onnxslim.learn.fit import Learnt
from onnxslim.learn.losses import Aim, LossName
from onnxslim.learn.net import Net
from onnxslim.learn.teaching import computed, goals, taught

# What a step costs for one sample, forwards and backwards, in runs of ONNX Runtime.
RUNS = 7.0
# In dB, how close PyTorch has to come to ONNX Runtime: integers of a quantized model round in other places.
SAME = 25.0
TOO_FEW = "too few samples to set some aside: the best state is chosen on samples that other passes chose by"


@dataclass(frozen=True)
class Lessons:
    """What is learnt, and what from.

    Attributes:
        aims: what is to come close to what.
        examples: to learn from.
        unseen: to judge by.
    """

    aims: Sequence[Aim]
    examples: Examples
    unseen: Examples

    @property
    def told(self) -> str:
        """The same in words."""
        return f"{len(self.examples)} samples, judged by {len(self.unseen)}"


def lessons(
    net: Net,
    model: Model,
    teacher: Model,
    ctx: Context,
    log: Log,
    *,
    features: Sequence[str] = (),
    loss: LossName = "relative",
    labels: str | None = None,
    augment: Augmentation | None = None,
) -> Lessons:
    """What a teacher makes of the data.

    Args:
        net: computes the model, and hands out its features.
        model: whose weights are learnt.
        teacher: computes the same outputs and features.
        ctx: with the data.
        log: what nothing is learnt from goes here.
        features: names of tensors inside both models.
        loss: what is to become less.
        labels: the output that scores classes which the data names, if any.
        augment: makes copies of what is learnt from, not of what that is judged by.

    Raises:
        UnknownError: there is nothing to learn, or PyTorch computes something else.
        CalibrationError: the model or the teacher does not run on the data.
    """
    samples, judges = ctx.given, ctx.given.fresh
    examples = samples.seen
    if judges is None:
        if not samples.tuned:
            raise UnknownError("there are too few samples to judge what is learnt by others")
        log.skip("learning", TOO_FEW)
        examples, judges = samples.fit, samples.tune
    outputs = [each.name for each in teacher.graph.outputs]
    run = Taps(teacher, [*outputs, *features], ctx.target)
    feeds = next(iter(judges))
    mine = _seen(net, model, feeds, ctx)
    try:
        theirs = run(0, feeds)
    except CalibrationError as error:
        raise CalibrationError(f"asking the teacher: {error}") from error
    parts = list(_comparable(teacher, features, mine, theirs, log))
    known = samples.labelled if labels is not None else (None, None)
    if known[1] is None and labels is not None:
        raise UnknownError("too few samples with labels to set some aside")
    learnt_from, sums = taught(
        examples,
        run,
        parts,
        labels=known[0],
        apart=samples.by_sample,
        progress=ctx.progress,
        augment=augment,
    )
    unseen, _ = taught(judges, run, parts, labels=known[1], apart=samples.by_sample)
    return Lessons(goals(parts, sums, loss, outputs), learnt_from, unseen)


def require_features(whose: str, features: Sequence[str], model: Model, teacher: Model) -> None:
    """Raise UsageError for a tensor that is not inside both models.

    Args:
        whose: name of the pass.
        features: names of tensors.
        model, teacher: see `lessons`.
    """
    for name in features:
        for which, each in (("model", model), ("teacher", teacher)):
            made = [tensor.name for node in each.graph.nodes for tensor in node.outputs]
            if name not in made:
                raise UsageError(f"pass '{whose}': the {which} has no tensor '{name}'; {nearest(name, made)}")


def note(learnt: Learnt, chosen: Sequence[Constant], log: Log) -> None:
    """Note what went wrong.

    Args:
        learnt: what came of it.
        chosen: constants of the model, in the order of the parameters.
        log: notes go here.
    """
    for at, node in learnt.idle.items():
        way = "it is always zero" if node is None else f"{node.op} '{node.label}' is in the way"
        log.skip(chosen[at].outputs[0].label, f"no gradient comes to '{chosen[at].name}': {way}")
    for each in learnt.notes:
        log.skip("learning", each)
    if not learnt.improved and len(learnt.looks) > 1:
        log.skip("learning", "the start stays, as no state was better on unseen samples")


def distance(learnt: Learnt) -> str:
    """How far from the teacher the model was, and is now, on unseen samples."""
    start, best = learnt.looks[0], learnt.best
    told = f"{start.unseen:.3g} → {best.unseen:.3g}, after {best.step} steps at a rate of {best.rate:.2g}"
    return told if learnt.improved else f"{start.unseen:.3g}"


def _seen(net: Net, model: Model, feeds: Mapping[str, Array], ctx: Context) -> dict[str, Array]:
    """What the net makes of a batch, once that is what ONNX Runtime makes of it.

    Raises:
        UnknownError: it is something else.
    """
    names = [each.name for each in model.graph.outputs]
    expected = Taps(model, names, ctx.target)(0, feeds)  # first: what it refuses is no matter of PyTorch
    found = computed(net, feeds)
    for name in names:
        if expected[name].shape != found[name].shape or sqnr(expected[name], found[name]) < SAME:
            raise UnknownError(f"PyTorch computes something else for output '{name}' than ONNX Runtime")
    return found


def _comparable(
    teacher: Model, features: Sequence[str], mine: Mapping[str, Array], theirs: Mapping[str, Array], log: Log
) -> Iterator[OutputPart]:
    """Outputs, parts of them and features that can come close to the teacher's.

    Raises:
        UnknownError: there are none.
    """
    outputs = [part for parts in parts_of(teacher).values() for part in parts]
    any_left = False
    for part in (*outputs, *(OutputPart(name, name) for name in features)):
        found, wanted = part.of(mine), part.of(theirs)
        if found.dtype.kind != "f" or wanted.dtype.kind != "f":
            log.skip(part.name, "nothing is learnt from it, as it is not in floating point")
        elif found.shape != wanted.shape:
            log.skip(
                part.name, f"nothing is learnt from it: {found.shape} here, {wanted.shape} in the teacher"
            )
        else:
            any_left = True
            yield part
    if not any_left:
        raise UnknownError("no output can come close to the teacher's")
