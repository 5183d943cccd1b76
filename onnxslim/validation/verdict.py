"""What validation finds out about two models, and the limits it can be held to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from onnxslim.calibration.samples import Whose
from onnxslim.engine.judging import TOLD
from onnxslim.errors import UsageError, ValidationError, nearest
from onnxslim.formats import plain
from onnxslim.runtime.timing import Latency


@dataclass(frozen=True)
class Footprint:
    """Size of a model; see `onnxslim.ir.model.Stats`. `macs` are those of one sample, None if unknown."""

    nodes: int
    parameters: int
    bytes: int
    macs: int | None


@dataclass(frozen=True)
class BeforeAfter:
    """One figure of both models."""

    before: float
    after: float


@dataclass(frozen=True)
class OutputRow:
    """How close one output is to that of the reference.

    Attributes:
        name: of the output.
        equal: fraction of elements that are exactly the same; of batches, where it is not a tensor.
        max_abs: largest absolute difference; None for outputs that are not floating-point tensors.
        sqnr: 10 log10(sum of reference² / sum of difference²) in dB; infinite where nothing differs.
        cosine: of the angle between both, all batches taken as one vector.
        top1: fraction of samples with the largest value at the same class, for (batch, classes) outputs.
        problem: why it could not be compared; empty if it could.
    """

    name: str
    equal: float
    max_abs: float | None = None
    sqnr: float | None = None
    cosine: float | None = None
    top1: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class ProviderVerdict:
    """What was measured on one execution provider.

    Attributes:
        target: short name of the provider.
        outputs: the second model against the first, both on this provider.
        original: the first model here against itself on the reference provider; empty on that one.
        accuracy: fraction of samples whose top class is the label.
        metric: the caller's own.
        latency: of one call on the first batch, first and second model.
        ratio: median over interleaved calls of the second model's time divided by the first one's.
        placed: operators each provider of ONNX Runtime really runs, first and second model; only for targets
            whose provider may leave some to another.
    """

    target: str
    outputs: tuple[OutputRow, ...]
    original: tuple[OutputRow, ...] = ()
    accuracy: BeforeAfter | None = None
    metric: BeforeAfter | None = None
    latency: tuple[Latency, Latency] | None = None
    ratio: float | None = None
    placed: tuple[Mapping[str, int], Mapping[str, int]] | None = None


@dataclass(frozen=True)
class Verdict:
    """What was found out about two models.

    Attributes:
        before, after: sizes of the first and the second model.
        providers: one entry per execution provider.
        samples, batches: how much data was run.
        batch: samples in the batch that latency was measured on.
        whose: what the samples are; None where that is for the caller to know.
        notes: what could not be measured, and why.
    """

    before: Footprint
    after: Footprint
    providers: tuple[ProviderVerdict, ...]
    samples: int
    batches: int
    batch: int
    whose: Whose | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        from onnxslim.report.text import verdict_text

        return verdict_text(self)

    @property
    def made_up(self) -> bool:
        """Whether the inputs were made up, for want of data."""
        return self.whose == "made up"

    @property
    def looked_at(self) -> str:
        """How many samples, and what they are."""
        return f"{self.samples} samples{'' if self.whose is None else f' {TOLD[self.whose]}'}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: NaN is None, infinities are the strings "inf" and "-inf"."""
        return dict(plain(self))

    def require(self, **limits: float | None) -> Verdict:
        """Insist on limits, on every provider and output they apply to; None means no limit.

        Args:
            sqnr: at least so many dB.
            top1: at least this fraction of samples with the same top class.
            cosine: at least this cosine similarity.
            max_abs: at most this absolute difference.
            max_accuracy_drop: at most this loss of accuracy, as a fraction; needs labels.
            max_metric_drop: the caller's own metric may be this much less at most.
            latency: at most this ratio of the second model's time to the first one's.

        Returns:
            The verdict itself.

        Raises:
            ValidationError: one is not met, or was not measured; names provider, output and both figures.
            UsageError: there is no such limit.
        """
        failures = [text for each in self.checked(**limits) for text in each.failures]
        if failures:
            more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
            raise ValidationError(failures[0] + more, self)
        return self

    def checked(self, **limits: float | None) -> tuple[Checked, ...]:
        """Which of these limits are met; see `require`.

        Raises:
            UsageError: there is no such limit.
        """
        check_limits(limits)
        wanted = {name: float(limit) for name, limit in limits.items() if limit is not None}
        return tuple(
            Checked(name, LIMITS[name].bound(limit), tuple(self._failures(name, limit)))
            for name, limit in wanted.items()
        )

    def _failures(self, name: str, limit: float) -> Iterator[str]:
        rule = LIMITS[name]
        for provider in self.providers:
            found = list(rule.measured(provider))
            if not found:
                yield f"{provider.target}: {rule.label} was not measured: {rule.needs}"
            for where, value in found:
                if isinstance(value, str):
                    yield f"{provider.target}: {where} {value}"
                elif not (value >= limit if rule.least else value <= limit):  # a NaN meets no limit
                    found_value = f"{rule.label} {value:.4g}{rule.unit}"
                    yield f"{provider.target}: {where} has {found_value}, required is {rule.bound(limit)}"


@dataclass(frozen=True)
class Checked:
    """A limit, and whether it is met.

    Attributes:
        name: of the limit.
        bound: what was asked for, in words.
        failures: where it is not met and by how much, or why that is not known; none if it is met.
    """

    name: str
    bound: str
    failures: tuple[str, ...]


@dataclass(frozen=True)
class Requirement:
    """Something a verdict can be required to meet."""

    label: str
    measured: Callable[[ProviderVerdict], Iterable[tuple[str, float | str]]]
    least: bool
    needs: str
    unit: str = ""

    def bound(self, limit: float) -> str:
        """A limit in words."""
        return f"{'at least' if self.least else 'at most'} {limit:g}{self.unit}"


def _each_output(figure: str) -> Callable[[ProviderVerdict], Iterable[tuple[str, float | str]]]:
    def measured(provider: ProviderVerdict) -> Iterator[tuple[str, float | str]]:
        for row in provider.outputs:
            value = row.problem or getattr(row, figure)
            if value is not None:
                yield f"output '{row.name}'", value

    return measured


def _accuracy_drop(provider: ProviderVerdict) -> Iterator[tuple[str, float]]:
    if provider.accuracy is not None:
        yield "the result", provider.accuracy.before - provider.accuracy.after


def _metric_drop(provider: ProviderVerdict) -> Iterator[tuple[str, float]]:
    if provider.metric is not None:
        yield "the result", provider.metric.before - provider.metric.after


def _latency_ratio(provider: ProviderVerdict) -> Iterator[tuple[str, float]]:
    if provider.ratio is not None:
        yield "the result", provider.ratio


_NO_FLOATS = "no output is a floating-point tensor"
LIMITS: Mapping[str, Requirement] = {
    "sqnr": Requirement("SQNR", _each_output("sqnr"), True, _NO_FLOATS, " dB"),
    "top1": Requirement(
        "top-1 agreement", _each_output("top1"), True, "no output has shape (batch, classes)"
    ),
    "cosine": Requirement("cosine similarity", _each_output("cosine"), True, _NO_FLOATS),
    "max_abs": Requirement("max abs difference", _each_output("max_abs"), False, _NO_FLOATS),
    "max_accuracy_drop": Requirement("accuracy drop", _accuracy_drop, False, "no labels were given"),
    "max_metric_drop": Requirement("metric drop", _metric_drop, False, "no metric was given"),
    "latency": Requirement(
        "latency ratio", _latency_ratio, False, "it was switched off, or says nothing there (see the notes)"
    ),
}


def check_limits(names: Iterable[str]) -> None:
    """Raise UsageError for a limit there is none of, with the nearest one there is."""
    for name in names:
        if name not in LIMITS:
            raise UsageError(f"unknown requirement '{name}'; {nearest(name, LIMITS)}")
