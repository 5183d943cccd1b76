"""Distillation: weights learnt from what another model makes of unlabelled inputs, mostly the original."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from onnxslim.engine.base import (
    Changes,
    Context,
    Effort,
    Figures,
    Log,
    Pass,
    PassWork,
    captioned,
    options,
    several,
)
from onnxslim.engine.matching import GLOBS, excluded, tell_idle
from onnxslim.errors import UsageError, nearest
from onnxslim.formats import count
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Array, Constant
from onnxslim.ir.model import InputSpec, Model, load
from onnxslim.learn import door
from onnxslim.learn.augment import Alteration, Augmentation
from onnxslim.learn.door import Device, UnknownError
from onnxslim.learn.fit import Course, Learnt, Look, Precision, fit
from onnxslim.learn.losses import LossName
from onnxslim.learn.net import Net, unknown
from onnxslim.learn.weights import is_vector, weights
from onnxslim.passes.fold.edits import Edits
from onnxslim.passes.fold.literals import lower_constants
from onnxslim.passes.fold.weights import store_weights
from onnxslim.passes.learning.apart import taken_apart
from onnxslim.passes.learning.lessons import RUNS, Lessons, distance, lessons, note, require_features
from onnxslim.passes.repair.support import support

MATCHES = ("Gather",)
STEPS: dict[Effort, int] = {"quick": 100, "normal": 300, "thorough": 1000}


@dataclass(frozen=True)
class DistillFigures(Figures):
    """What distilling has to tell of a model.

    Attributes:
        distance: how far it was from its teacher and is now, on samples that nothing was fitted to.
        weights: what was learnt.
        examples: what from, and by what it was judged.
        threads: of PyTorch; the same number gives the same weights.
        looks: at all states that were judged; the first is the start.
    """

    distance: str | None = captioned("distance from the teacher")
    weights: str | None = captioned("learnt")
    examples: str | None = captioned("from")
    threads: int | None = captioned("threads")
    looks: tuple[Look, ...] = ()


@options
class Distill(Pass):
    """Learn weights from what the original makes of the calibration data, without labels.

    The model as it came into the pipeline is the teacher, so that this belongs behind the passes that changed
    it; `teacher` names another one with the same inputs and outputs. All weights that something multiplies by
    or adds are learnt, by Adam with steps relative to the size of each. Of the states on the way the best is
    kept on samples that no pass has seen, which are set aside for that, and the start if none is better.
    Needs PyTorch, which comes with the extra `train`.

    Processes that torchrun starts learn together: `torchrun --nproc-per-node 2 -m onnxslim distill …`. On
    graphics cards nothing of it has been run so far.
    """

    name: ClassVar[str] = "distill"

    steps: int | None = Field(None, ge=1, description="how many [default: by effort: 100, 300 or 1000]")
    epochs: float | None = Field(
        None, gt=0, description="instead of steps: how often every sample is learnt from"
    )
    teacher: Path | None = Field(
        None, description="file of another model to learn from, instead of the original"
    )
    train: Literal["all", "vectors"] = Field(
        "all", description="which weights: all, or only those along one axis, such as biases"
    )
    loss: LossName = Field(
        "relative",
        description="what is to become less: relative, the squared error by the variance of the teacher's "
        "output; kl, of the classes that logits along the last axis are of; cosine, of directions along it",
    )
    features: tuple[str, ...] = Field(
        (), description="names of tensors inside both models that are to come close to the teacher's, too"
    )
    labels: str | None = Field(
        None, description="an output that scores the classes which labels of the data name: half of the loss"
    )
    augment: Annotated[tuple[Alteration, ...], BeforeValidator(several)] = Field(
        (),
        description="what is different in copies of images that are learnt from too: mirror, left to right; "
        "shift, by a few pixels; noise",
    )
    copies: int = Field(4, ge=1, description="how many copies, with `augment`")
    lr: float = Field(3e-3, gt=0, lt=1, description="largest step, relative to the size of each weight")
    batch: int = Field(64, ge=1, description="samples of a step")
    checkpoint: str | None = Field(
        None, description="file to keep the state in, once a minute; goes on from it, if it is there"
    )
    device: Device = Field("cpu", description="where PyTorch computes")
    precision: Precision = Field(
        "single",
        description="of products in steps; states are judged in single precision whatever it is",
    )
    memory: float | None = Field(
        None,
        gt=0,
        description="MB that a step may keep of its samples; a step that keeps more is computed in parts "
        "[default: 2048, and half of the memory of a graphics card]",
    )
    exclude: tuple[str, ...] = Field((), description=f"{GLOBS} whose weights stay as they are")
    effort: Effort = Field("normal", description="how many steps, if nothing else says so")

    def __post_init__(self) -> None:
        """Refuse two lengths."""
        if self.steps is not None and self.epochs is not None:
            raise UsageError("pass 'distill' takes steps or epochs, not both")

    @property
    def learns(self) -> bool:
        """See `Pass.learns`."""
        return True

    @property
    def needs_data(self) -> bool:
        """To learn from."""
        return True

    @property
    def work(self) -> PassWork:
        """See `Pass.work`."""
        if self.epochs is not None:
            return PassWork(2.0, 5e-3, 2.0 + RUNS * self.epochs)
        return PassWork(2.0, 5e-3, 2.0, samples=RUNS * (self.steps or STEPS[self.effort]) * self.batch)

    def require_installed(self) -> None:
        """See `Pass.require_installed`."""
        whose = f"pass '{self.name}'"
        door.require(whose)
        door.require_device(self.device, whose)

    def run(self, model: Model, ctx: Context) -> Changes:
        """Learn weights in place.

        Raises:
            CalibrationError: there is no data, or it does not fit the model.
            UsageError: PyTorch is not installed; the teacher has other inputs or outputs; there is no such
                feature or output, or there are no labels, or no images.
        """
        self.require_installed()
        self.require_data(ctx.data)
        log = Log()
        tell_idle(self.exclude, model, log)
        teacher = self._teacher(model, ctx)
        self._require_known(model, teacher, ctx)
        _make_weights(model)
        with _named_apart(model):
            return self._learn(model, teacher, ctx, log)

    def _learn(self, model: Model, teacher: Model, ctx: Context, log: Log) -> Changes:
        """Learn weights in place, whose names are their own."""
        twin = taken_apart(model, ctx)
        chosen = self._chosen(model, twin, log)
        try:
            for node, why in unknown(twin):
                raise UnknownError(f"node '{node.label}': {why}")
            if not chosen:
                raise UnknownError("it has no weights to learn")
            with door.on(self.device):
                net = Net(twin, [constant for _, constant in chosen], door.torch.float32, self.features)
                taught = lessons(
                    net,
                    model,
                    teacher,
                    ctx,
                    log,
                    features=self.features,
                    loss=self.loss,
                    labels=self.labels,
                    augment=self._augmentation(ctx),
                )
                learnt = fit(
                    net,
                    taught.aims,
                    taught.examples,
                    taught.unseen,
                    self._course(taught, ctx),
                    ctx.progress,
                    [_mask(own) for own, _ in chosen],
                    None if self.checkpoint is None else Path(self.checkpoint),
                )
        except UnknownError as why_not:
            log.skip(model.graph.name or "model", str(why_not))
            return log.done()
        return _written([own for own, _ in chosen], learnt, taught, log)

    # What is given

    def _teacher(self, model: Model, ctx: Context) -> Model:
        """The model to learn from.

        Raises:
            UsageError: it has other inputs or outputs.
        """
        if self.teacher is None:
            return (ctx.teacher or model).copy()
        teacher = load(self.teacher)
        whose = f"pass 'distill': the teacher '{self.teacher}'"
        for what, mine, theirs in (
            ("inputs", model.graph.inputs, teacher.graph.inputs),
            ("outputs", model.graph.outputs, teacher.graph.outputs),
        ):
            names, others = ([each.name for each in tensors] for tensors in (mine, theirs))
            if sorted(names) != sorted(others):
                raise UsageError(f"{whose} has {what} {', '.join(others)}, the model {', '.join(names)}")
        own = {spec.name: spec for spec in model.inputs()}
        for spec in teacher.inputs():
            told = [f"{each.dtype} {list(each.shape or ())}" for each in (spec, own[spec.name])]
            if not _fits(spec, own[spec.name]):
                raise UsageError(f"{whose} takes {told[0]} for '{spec.name}', the model {told[1]}")
        return teacher

    def _require_known(self, model: Model, teacher: Model, ctx: Context) -> None:
        """Raise UsageError for names that are not there, and labels that nobody gave."""
        require_features(self.name, self.features, model, teacher)
        outputs = [tensor.name for tensor in model.graph.outputs]
        if self.labels is not None and self.labels not in outputs:
            raise UsageError(
                f"pass 'distill': there is no output '{self.labels}'; {nearest(self.labels, outputs)}"
            )
        if self.labels is not None and ctx.given.labels is None:
            raise UsageError("pass 'distill' is to learn from labels, and the data has none")

    def _chosen(self, model: Model, twin: Model, log: Log) -> list[tuple[Constant, Constant]]:
        """Weights to learn, in the model and in its copy."""
        mine, found = {each.name: each for each in model.constants()}, []
        for constant in weights(twin):
            own = mine.get(constant.name)
            if own is None or (own.shape, own.dtype) != (constant.shape, constant.dtype):
                continue
            if self.train == "vectors" and not is_vector(constant):
                continue
            why_not = next(filter(None, (excluded(self.exclude, node) for node in own.outputs)), None)
            if why_not is None:
                found.append((own, constant))
            else:
                log.skip(own.outputs[0].label, why_not)
        return found

    def _augmentation(self, ctx: Context) -> Augmentation | None:
        """What makes copies, if any are asked for.

        Raises:
            UsageError: there are no images.
        """
        if not self.augment:
            return None
        try:
            return Augmentation(self.augment, self.copies, ctx.seed, next(iter(ctx.given.seen)))
        except UsageError as error:
            raise UsageError(f"pass '{self.name}': {error}") from error

    def _course(self, taught: Lessons, ctx: Context) -> Course:
        steps = self.steps or STEPS[self.effort]
        if self.epochs is not None:
            steps = math.ceil(self.epochs * len(taught.examples) / self.batch)
        how = (self.labels, self.device, self.precision, self.memory)
        return Course(steps, self.lr, self.batch, ctx.seed, ctx.target.threads, *how)


# ---------------------------------------------------------------------------------- weights of the model


def _fits(one: InputSpec, other: InputSpec) -> bool:
    """Whether some tensor may be an input of both, as far as they say."""
    if one.dtype != other.dtype:
        return False
    if one.shape is None or other.shape is None:
        return True
    sizes = zip(one.shape, other.shape, strict=False)
    clash = any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in sizes)
    return len(one.shape) == len(other.shape) and not clash


def _make_weights(model: Model) -> None:
    """Have weights as constants, in bodies too."""
    edits = Edits(model, Log())
    lower_constants(edits, 0)
    edits.clean_up()
    store_weights(model, plain=False)


@contextmanager
def _named_apart(model: Model) -> Iterator[None]:
    """Names of their own, for the time being, for constants that several bodies have under one name."""
    fresh, taken, shared = ir.Namer(model.graph), set[str](), dict[str, str]()

    def new(name: str) -> str:
        own = fresh(name) if name in taken else name
        shared[own] = name
        taken.add(own)
        return own

    _rename(model, new)
    try:
        yield
    finally:
        _rename(model, shared.__getitem__)


def _rename(model: Model, name: Callable[[str], str]) -> None:
    """Give all initializers names, by those that they have."""
    for graph in model.graphs():
        for constant in graph.initializers.values():
            constant.name = name(constant.name)
        graph.initializers = {each.name: each for each in graph.initializers.values()}


def _mask(weight: Constant) -> Array | None:
    """Where a sparse matrix, or a table that stands for one, may change; None for everywhere."""
    if _is_table(weight):
        return np.asarray(weight.values != 0)
    found = support(weight.values) if len(weight.shape) > 1 else None
    return found if found is not None and found.any() else None


def _is_table(weight: Constant) -> bool:
    """Whether weights are looked up in it: an entry that is zero stands for all their zeros."""
    return len(weight.shape) == 1 and all(
        node.op == "Gather" and node.inputs[0] is weight for node in weight.outputs
    )


def _written(chosen: Sequence[Constant], learnt: Learnt, taught: Lessons, log: Log) -> Changes:
    """Write what was learnt into the model, if that is better than what was there."""
    note(learnt, chosen, log)
    if learnt.improved:
        for at, (constant, values) in enumerate(zip(chosen, learnt.values, strict=True)):
            if at not in learnt.idle:
                constant.values = values.astype(constant.dtype)
                log.change(constant.outputs[0].label, "learnt a weight", constant.name)
    numbers = sum(each.size for each in chosen)
    told = f"{len(chosen)} weights of {count(numbers)} numbers"
    return log.done(DistillFigures(distance(learnt), told, taught.told, learnt.threads, tuple(learnt.looks)))
