"""What a search is asked for: what the outputs have to keep, and what the result may take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Real

from onnxslim.errors import UsageError
from onnxslim.formats import percent

# Where nobody says what to keep: how many of the decisions may be others or, where outputs decide nothing or
# samples are too few to tell, how many dB are to be kept.
MOST_LOST, LEAST_SQNR = 0.01, 20.0
# A result that takes longer than the model by more than two times of the same model may differ.
NOT_SLOWER = 1.02


@dataclass(frozen=True)
class TrialFigures:
    """What was measured of a model that was made, against the one it was made of.

    Attributes:
        sqnr: signal to noise of the worst part of the outputs, in dB.
        agreement: share of samples whose largest output is where it was; None where no output decides.
        metric: of the original and of the result: the user's, or accuracy by labels; None without.
        latency: time of a call relative to the original's, interleaved; None where times say nothing.
        size, download: bytes of the file, and once it is deflated, relative to the original's.
        macs: multiply-accumulates of a sample, likewise; None where they are not known.
        seconds: that making it took.
    """

    sqnr: float
    agreement: float | None
    metric: tuple[float, float] | None
    latency: float | None
    size: float
    download: float
    macs: float | None
    seconds: float

    @property
    def drop(self) -> float | None:
        """How much is lost of what counts: of the metric, or else of the decisions."""
        if self.metric is not None:
            return self.metric[0] - self.metric[1]
        return None if self.agreement is None else 1.0 - self.agreement

    @property
    def worth(self) -> tuple[float, float]:
        """How good it is, more is better: first by what counts, then by noise."""
        return -(self.drop or 0.0), self.sqnr


@dataclass(frozen=True)
class Goals:
    """What a result has to be; None asks for nothing.

    Attributes:
        max_drop: how much less than the original's its metric may be; without one, the share of samples whose
            largest output may be another.
        require_sqnr: signal to noise that the worst part of the outputs has to keep, in dB.
        latency, size, download, macs: how much it may take, relative to the original, between 0 and 1.

    Raises:
        UsageError: a goal means nothing.
    """

    max_drop: float | None = None
    require_sqnr: float | None = None
    latency: float | None = None
    size: float | None = None
    download: float | None = None
    macs: float | None = None

    def __post_init__(self) -> None:
        for name, value in self.given.items():
            if isinstance(value, bool) or not isinstance(value, Real):
                raise UsageError(f"the goal {name}={value!r} is not a number")
        for name in BUDGETS:
            limit = getattr(self, name)
            if limit is not None and not 0 < limit <= 1:
                raise UsageError(f"the goal {name}={limit:g} is no share of the original's: give 0 to 1")
        if self.max_drop is not None and not 0 <= self.max_drop < math.inf:
            raise UsageError(f"the goal max_drop={self.max_drop:g} is no loss: give 0 or more")
        if self.require_sqnr is not None and not math.isfinite(self.require_sqnr):
            raise UsageError(f"the goal require_sqnr={self.require_sqnr:g} is no noise: give it in dB")

    @property
    def budgets(self) -> Mapping[str, float]:
        """What the result may take, by what."""
        return {name: limit for name, limit in self.given.items() if name in BUDGETS}

    @property
    def given(self) -> Mapping[str, float]:
        """All that was asked for, by name."""
        every = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in every.items() if value is not None}

    @property
    def only_bytes(self) -> bool:
        """Whether nothing but bytes was asked for, so that time is nobody's concern."""
        return bool(self.budgets) and self.budgets.keys() <= {"size", "download"}

    def completed(self, *, scored: bool, deciding: int) -> Goals:
        """With something to keep, where nothing at all was asked for.

        Args:
            scored: whether there is a metric.
            deciding: samples with decisions; so few that one of them is more than may be lost tell nothing.
        """
        if self.given:
            return self
        if scored or deciding * MOST_LOST >= 1.0:
            return replace(self, max_drop=MOST_LOST)
        return replace(self, require_sqnr=LEAST_SQNR)

    def shortfalls(self, figures: TrialFigures) -> list[str]:
        """All that a result does not meet; empty if it meets everything."""
        return [*self.losses(figures), *self.excesses(figures)]

    def losses(self, figures: TrialFigures) -> list[str]:
        """What a result does not keep of what it has to; empty if it keeps enough."""
        return list(self._losses(figures))

    def excesses(self, figures: TrialFigures) -> list[str]:
        """What a result takes more of than it may; empty if it takes no more."""
        return list(self._excesses(figures))

    def _losses(self, figures: TrialFigures) -> Iterator[str]:
        if self.require_sqnr is not None and not figures.sqnr >= self.require_sqnr:
            yield f"it keeps {figures.sqnr:.1f} dB, {self.require_sqnr:g} are required"
        drop = figures.drop
        if self.max_drop is not None and drop is not None and not drop <= self.max_drop + 1e-12:
            if figures.metric is not None:
                before, after = figures.metric
                yield f"the metric drops from {before:.6g} to {after:.6g}, by more than {self.max_drop:g}"
            else:
                yield f"{percent(drop)} of the decisions are others, more than {percent(self.max_drop)}"

    def _excesses(self, figures: TrialFigures) -> Iterator[str]:
        for name, limit in self.budgets.items():
            value = getattr(figures, name)
            if value is None:
                yield f"its {name} is not known"
            elif value > limit:
                yield f"its {name} is {value:.3f} of the original's, more than {limit:g}"
        slow = figures.latency is not None and figures.latency > NOT_SLOWER
        if slow and not self.only_bytes and "latency" not in self.budgets:
            yield f"it takes {figures.latency:.2f} times as long as the original"


BUDGETS = ("latency", "size", "download", "macs")
