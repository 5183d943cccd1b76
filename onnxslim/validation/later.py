"""Checks for another machine, where the target is that a model was laid out for but never ran on.

Two small files beside the model: `MODEL.check.json` says what it has to be and to meet, `MODEL.check.npz`
holds samples, and what the original and the model itself make of them on processors. The original stays at
home.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from pydantic import ValidationError as Invalid

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.fidelity import OutputPart
from onnxslim.engine.base import Progress
from onnxslim.engine.check import difference
from onnxslim.engine.judging import LEAST_AGREEMENT, LEAST_SQNR
from onnxslim.engine.plans import strict
from onnxslim.errors import CalibrationError, SaveError, UsageError, ValidationError, one_line
from onnxslim.formats import plain
from onnxslim.ir import files
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model, load, source_sha256
from onnxslim.runtime.probe import Feeds
from onnxslim.runtime.profile import counted, left_over, may_stray, places, require_usable
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target
from onnxslim.shapes.given import InputShapes, one_sample, with_sizes
from onnxslim.validation.compare import OutputSums, footprint, inputs_for
from onnxslim.validation.verdict import Footprint, OutputRow, ProviderVerdict, Verdict, check_limits
from onnxslim.version import version

SUFFIX = ".check.json"
VERSION = 1
# Samples go into the file up to these, but those of one batch in any case.
MOST_SAMPLES = 64
MOST_BYTES = 4 << 20
# What takes the original itself, or more samples than are kept.
AT_HOME = ("latency", "max_accuracy_drop", "max_metric_drop")


def not_run(target: str) -> str:
    """What is said of a result that was made for a target which was not at hand."""
    return (
        f"{target} itself has not run: the model is laid out for it and was checked on the processor; what "
        f"is left to be checked where it is lies beside the saved model (validate --resume MODEL{SUFFIX})"
    )


@strict
class LaterCheck:
    """What a model is to be checked for where its target is.

    Attributes:
        version: of the format.
        made_by: of this package.
        target: the name of the target.
        model: name of the model's file, beside this one.
        sha256: of that file, followed by those of its data; see `source_sha256`.
        outputs: names of those that are compared.
        batches: how many there are in the file of samples.
        samples: how many they hold.
        made_up: whether they were made up, for want of data.
        before: size of the original.
        after: size of the model.
        limits: what has to be met; see `Verdict.require`.
    """

    version: int
    made_by: str
    target: str
    model: str
    sha256: str
    outputs: tuple[str, ...]
    batches: int
    samples: int
    made_up: bool
    before: Footprint
    after: Footprint
    limits: dict[str, float]


def leave(
    path: Path,
    original: Model,
    target: Target,
    data: CalibrationData | None,
    limits: Mapping[str, float],
    input_shapes: InputShapes,
) -> Path:
    """Write both files, for a model that lies at `path`.

    Args:
        path: the model.
        original: what it was made of.
        target: what it stands for here, see `Target.simulated`.
        data: samples that are shown, if there are any.
        limits: what has to be met there.
        input_shapes: sizes of free axes, for inputs that have to be made up.

    Returns:
        The file that `resume` reads.

    Raises:
        CalibrationError: there is nothing that the original runs on, or it cannot be kept.
        SaveError: they cannot be written.
    """
    model = load(path)
    sessions = Session(original, target), Session(model, target)
    specs = with_sizes(original.inputs(), input_shapes)
    batches, made_up = inputs_for(original, data, sessions[0], specs)
    kept = [*_few(batches)]
    ran = [[session.run(_known(feeds, session)) for feeds in kept] for session in sessions]
    names = [
        name for name in sessions[0].output_names if all(_plain(run[name]) for runs in ran for run in runs)
    ]
    shapes = one_sample(original.inputs(), specs, {name: array.shape for name, array in kept[0].items()})
    check = LaterCheck(
        version=VERSION,
        made_by=version(),
        target=target.stands_for,
        model=path.name,
        sha256=source_sha256(model),
        outputs=tuple(names),
        batches=len(kept),
        samples=sum(map(_samples_of, kept)),
        made_up=made_up,
        before=footprint(original, shapes),
        after=footprint(model, shapes),
        limits=dict(limits),
    )
    arrays = {
        f"{kind}.{index}.{name}": run[name]
        for kind, runs in (("input", kept), ("original", ran[0]), ("model", ran[1]))
        for index, run in enumerate(runs)
        for name in (run if kind == "input" else names)
    }
    _write(path, check, arrays)
    return path.with_suffix(SUFFIX)


def _few(batches: Iterator[Feeds]) -> Iterator[Feeds]:
    """The first batches, as many as are kept."""
    samples = nbytes = 0
    for feeds in batches:
        samples, nbytes = samples + _samples_of(feeds), nbytes + sum(each.nbytes for each in feeds.values())
        if samples > _samples_of(feeds) and (samples > MOST_SAMPLES or nbytes > MOST_BYTES):
            return
        odd = next((name for name, each in feeds.items() if not _plain(each)), None)
        if odd is not None:
            raise CalibrationError(
                f"no check can be left: input '{odd}' is of a type that .npz files do not hold"
            )
        yield feeds


def _samples_of(feeds: Feeds) -> int:
    return next((int(array.shape[0]) for array in feeds.values() if array.ndim), 1)


def _plain(value: Any) -> bool:
    """Whether it is an array of numbers that files hold without running code."""
    return isinstance(value, np.ndarray) and value.dtype.isbuiltin == 1 and value.dtype.kind in "fiubc"


def _known(feeds: Feeds, session: Session) -> Feeds:
    return {name: array for name, array in feeds.items() if name in session.input_names}


def _write(path: Path, check: LaterCheck, arrays: Mapping[str, Array]) -> None:
    text = json.dumps(plain(check), indent=2, ensure_ascii=False, allow_nan=False)
    with files.staging(path) as folder:
        for final in (path.with_suffix(".check.npz"), path.with_suffix(SUFFIX)):
            staged = folder / final.name
            if final.suffix == ".npz":
                np.savez_compressed(staged, **arrays)  # type: ignore[arg-type]
            else:
                staged.write_text(text + "\n", encoding="utf-8")
            try:
                files.commit(staged, final)
            except OSError as error:
                raise SaveError(f"cannot write '{final}': {error.strerror or error}") from error


def read(path: Path) -> LaterCheck:
    """A check that was left.

    Raises:
        UsageError: the file cannot be read, or is none; says why.
    """
    try:
        check = TypeAdapter(LaterCheck).validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read the check '{path}': {error.strerror or error}") from None
    except Invalid as error:
        found = error.errors(include_url=False)[0]
        where = "".join(f"{each}: " for each in (".".join(map(str, found["loc"])),) if each)
        raise UsageError(f"'{path}' is no check: {where}{one_line(Exception(found['msg']))}") from None
    if check.version != VERSION:
        raise UsageError(f"'{path}' is a check of version {check.version}, and this onnxslim reads {VERSION}")
    if Path(check.model).name != check.model:
        raise UsageError(f"'{path}' is no check: its model is not a file beside it, but '{check.model}'")
    check_limits(check.limits)
    return check


def resume(path: Path, target: Target | None = None, *, progress: Progress | None = None) -> Verdict:
    """Run a model where its target is, on the samples that were kept, and compare with what was expected.

    Args:
        path: what `leave` wrote.
        target: where to run it, if not on the target that the check names.
        progress: called with ("validating", batches done, batches in all).

    Returns:
        A verdict of two rows: of the model on processors, as it was before it came here, and of the model on
        the target, both against the original on processors.

    Raises:
        UsageError: a file is missing, or is none.
        TargetError: the target cannot be used here, or runs no operator of the model.
        LoadError: the model cannot be read or run.
        ValidationError: the model is not the one that the check is for.
    """
    check = read(path)
    where = target or Target.named(check.target)
    require_usable(where)
    model = _model(path, check)
    batches = _Samples(path, check)
    session = Session(model, where)
    notes = [f"{where.name}: {where.precision}"] if where.precision else []
    if may_stray(where):
        nodes = places(model, where, batches.inputs(0))
        told = ", ".join(f"{count} on {provider}" for provider, count in counted(nodes).items())
        notes += [f"{where.name}: operators of the second model run: {told}"]
        notes += left_over(where, "second", nodes)
    sums = {
        kind: [OutputSums.of(OutputPart(name, name)) for name in check.outputs] for kind in ("before", "here")
    }
    strays: dict[str, str] = {}
    for index in range(check.batches):
        kept = [
            [batches.array(kind, index, name) for kind in ("original", "model")] for name in check.outputs
        ]
        made = session.run(batches.inputs(index), check.outputs)
        for (wanted, expected), before, here, name in zip(kept, *sums.values(), check.outputs, strict=True):
            before.update(wanted, expected)
            here.update(wanted, made[name])
            if problem := difference(expected, made[name]):
                strays.setdefault(name, problem)
        if progress:
            progress("validating", index + 1, check.batches)
    notes += [
        f"{where.name}: output '{name}' of the second model is not what it is on cpu: it {problem}"
        for name, problem in strays.items()
    ]
    notes.append("the first model was not run here: its outputs are those on the processor it was checked on")
    rows = {kind: tuple(each.result() for each in found) for kind, found in sums.items()}
    return Verdict(
        before=check.before,
        after=check.after,
        providers=(ProviderVerdict("cpu", rows["before"]), ProviderVerdict(where.name, rows["here"])),
        samples=check.samples,
        batches=check.batches,
        batch=_samples_of(batches.inputs(0)),
        whose="made up" if check.made_up else None,
        notes=tuple(notes),
    )


def require(verdict: Verdict, limits: Mapping[str, float]) -> Verdict:
    """Insist that the target does with the model what processors do, within limits.

    Args:
        verdict: of `resume`.
        limits: see `Verdict.require`; those that need the original at hand were checked before.

    Raises:
        ValidationError: one is not met; or hardly anything is left of an output that processors keep.
    """
    before, here = verdict.providers
    for expected, found in zip(before.outputs, here.outputs, strict=True):
        if not _little(expected) and _little(found):
            told = found.problem or f"keeps {_told(found)} of the original, on processors {_told(expected)}"
            raise ValidationError(f"{here.target}: output '{found.name}' {told}", verdict)
    return verdict.require(**{name: limit for name, limit in limits.items() if name not in AT_HOME})


def _little(row: OutputRow) -> bool:
    """Whether an output is hardly that of the original any more; a NaN is."""
    if row.problem:
        return True
    return row.equal < LEAST_AGREEMENT if row.sqnr is None else not row.sqnr >= LEAST_SQNR


def _told(row: OutputRow) -> str:
    return f"{100 * row.equal:.1f} %" if row.sqnr is None else f"{row.sqnr:.1f} dB"


def _model(path: Path, check: LaterCheck) -> Model:
    file = path.parent / check.model
    model = load(file)
    if source_sha256(model) != check.sha256:
        raise ValidationError(f"'{file}' is not the model that '{path.name}' is for: its bytes are others")
    return model


class _Samples:
    """The arrays of a check."""

    def __init__(self, path: Path, check: LaterCheck) -> None:
        self._file = path.with_suffix("").with_suffix(".check.npz")
        try:
            with np.load(self._file, allow_pickle=False) as kept:
                self._arrays: dict[str, Array] = dict(kept)
        except (OSError, ValueError, EOFError) as error:
            raise UsageError(f"cannot read the samples '{self._file}': {one_line(error)}") from None
        if not check.batches:
            raise UsageError(f"'{path}' is no check: it has no samples")

    def inputs(self, index: int) -> Feeds:
        """What to feed in a batch."""
        start = f"input.{index}."
        return {
            key.removeprefix(start): array for key, array in self._arrays.items() if key.startswith(start)
        }

    def array(self, kind: str, index: int, name: str) -> Array:
        """What the original, or the model, made of a batch."""
        found = self._arrays.get(f"{kind}.{index}.{name}")
        if found is None:
            raise UsageError(f"'{self._file}' lacks output '{name}' of batch {index}")
        return found
