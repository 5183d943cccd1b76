"""The whole chain on models that come along, on real images, with their true labels."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from rich.console import Console

from onnxslim.calibration.data import CalibrationData
from onnxslim.cli.running import require_writable
from onnxslim.engine.base import Progress
from onnxslim.engine.pipeline import Pipeline, Report
from onnxslim.errors import SaveError
from onnxslim.formats import count, decibels, percent, quotient, size
from onnxslim.ir.model import load
from onnxslim.passes.quantize import Quantize
from onnxslim.passes.quantize.figures import QuantizeFigures
from onnxslim.passes.slim import Slim
from onnxslim.report.text import lines, table
from onnxslim.runtime.profile import available
from onnxslim.validation.compare import validate
from onnxslim.validation.verdict import ProviderVerdict, Verdict

MODELS = ("resnet", "mobilenet", "vit")
# A median time this much above the fastest one is told as unsteady.
UNSTEADY = 0.2
BATCH = 8


@dataclass(frozen=True)
class DemoOutcome:
    """What became of one model.

    Attributes:
        bytes_before, bytes_after: sizes of the files.
        fused: operators ONNX Runtime runs in integers, by type.
        total: operators of these types.
        seconds: for everything, validation included.
    """

    name: str
    report: Report
    verdict: Verdict
    bytes_before: int
    bytes_after: int
    fused: Mapping[str, int]
    total: Mapping[str, int]
    seconds: float


def run(
    names: Sequence[str] = MODELS, *, keep: Path | None = None, progress: Progress | None = None
) -> list[DemoOutcome]:
    """Slim, quantize, save and validate models.

    Args:
        names: some of `MODELS`.
        keep: folder to save the results in, made if it is not there; a temporary one by default.
        progress: called with (what, done, total).

    Raises:
        SaveError: the results cannot be saved.
    """
    with _bundled() as folder, _results(keep) as results:
        return [_run(name, folder, results, progress) for name in names]


def _run(name: str, folder: Path, results: Path, progress: Progress | None) -> DemoOutcome:
    start = time.perf_counter()
    source, saved = folder / f"{name}.onnx", results / f"{name}.int8.onnx"
    calibration = CalibrationData.from_npz(folder / "calibration.npz", batch_size=BATCH)
    result = Pipeline(Slim(), Quantize(), on_error="raise")(load(source), data=calibration, progress=progress)
    result.save(saved)
    test = CalibrationData.from_npz(folder / "test.npz", batch_size=BATCH, exclude=("label",))
    with np.load(folder / "test.npz", allow_pickle=False) as arrays:
        labels = arrays["label"]
    # One thread: threads that wait for each other on a busy machine would drown so small a model.
    targets = [target.with_threads(1) for target in available()]
    verdict = validate(source, saved, test, targets, labels=labels, progress=progress)
    figures = QuantizeFigures.of(result.report.steps[-1].changes)
    return DemoOutcome(
        name=name,
        report=result.report,
        verdict=verdict,
        bytes_before=source.stat().st_size,
        bytes_after=saved.stat().st_size,
        fused=figures.fused or {},
        total=figures.total or {},
        seconds=time.perf_counter() - start,
    )


@contextmanager
def _bundled() -> Iterator[Path]:
    """The folder of the models and images."""
    with resources.as_file(resources.files("onnxslim.models.fashion")) as folder:
        yield folder


@contextmanager
def _results(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    try:
        keep.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"cannot make the folder '{keep}': {error.strerror or error}") from error
    require_writable(keep / f"{MODELS[0]}.onnx")
    yield keep


def show(console: Console, outcomes: Sequence[DemoOutcome]) -> None:
    """Print one table per model."""
    for outcome in outcomes:
        console.print(f"{outcome.name}: slim, quantize, {outcome.seconds:.1f} s in all", style="bold")
        grid = table("", "before", "after", "after / before")
        for row in _rows(outcome):
            grid.add_row(*row)
        console.print(grid)
        lines(console, (*_unsteady(outcome), *_fidelity(outcome)))


def _rows(outcome: DemoOutcome) -> Iterator[tuple[str, str, str, str]]:
    before, after = outcome.verdict.before, outcome.verdict.after
    files = outcome.bytes_before, outcome.bytes_after
    yield "file", size(files[0]), size(files[1]), quotient(files[1], files[0])
    for name, first, second in (
        ("parameters", before.parameters, after.parameters),
        ("MACs of one image", before.macs, after.macs),
        ("nodes", before.nodes, after.nodes),
    ):
        yield name, count(first), count(second), quotient(second, first)
    for provider in outcome.verdict.providers:
        yield from _measured(provider, outcome.verdict.batch)


def _measured(provider: ProviderVerdict, batch: int) -> Iterator[tuple[str, str, str, str]]:
    if provider.latency is not None and provider.ratio is not None:
        first, second = (f"{latency.median:.3f} ms" for latency in provider.latency)
        yield (
            f"latency of {batch} images, {provider.target}, one thread",
            first,
            second,
            f"{provider.ratio:.3f}",
        )
    if provider.accuracy is not None:
        accuracy = provider.accuracy
        yield f"accuracy, {provider.target}", percent(accuracy.before), percent(accuracy.after), ""


def _unsteady(outcome: DemoOutcome) -> Iterator[str]:
    for provider in outcome.verdict.providers:
        spread = max((each.spread for each in provider.latency or ()), default=0.0)
        if spread > UNSTEADY:
            yield (
                f"  {provider.target}: the times are unsteady, medians lie up to {percent(spread)} above the "
                "fastest calls: something else keeps this machine busy; run this again when it is idle"
            )


def _fidelity(outcome: DemoOutcome) -> Iterator[str]:
    for provider in outcome.verdict.providers:
        for row in provider.outputs:
            yield (
                f"  {provider.target}, '{row.name}' on {outcome.verdict.samples} test images: "
                f"SQNR {decibels(row.sqnr)} dB, cosine {row.cosine:.5f}, same top class {percent(row.top1)}"
            )
    done = ", ".join(f"{outcome.fused.get(op, 0)} of {total} {op}" for op, total in outcome.total.items())
    yield f"  ONNX Runtime runs in integers: {done or 'nothing'}"
