"""What a lossy pass left of the outputs, on samples that no pass had to do with where there are such."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.fidelity import Judge
from onnxslim.calibration.samples import SAMPLES, Samples, Whose
from onnxslim.errors import LoadError
from onnxslim.formats import percent
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.runtime.metric import measure
from onnxslim.runtime.targets import Target

# Less is hardly the same model any more: noise a third as large as what the outputs say, in dB, or another
# decision every other time. Below, people are told in the first line.
LEAST_SQNR = 10.0
LEAST_AGREEMENT = 0.5
# What samples are, in a sentence behind how many.
TOLD: Mapping[Whose, str] = {
    "held out": "held out",
    "fitted on": "that passes were fitted on, too few to hold some out",
    "made up": "that are made up: give data to learn anything about real ones",
}


@dataclass(frozen=True)
class Kept:
    """What outputs keep of the original's.

    Attributes:
        sqnr: signal to noise of the part of the outputs that lost most, in dB; infinite if nothing changed.
        parts: the same by output, or by part of an output that a Concat puts together.
        agreement: share of samples whose largest element is where it was, of outputs (batch, classes); None
            if there are none.
        samples: how many were looked at.
        whose: what they are.
        accuracy: of the original and of the result, by labels of samples held out; None without.
    """

    sqnr: float
    parts: Mapping[str, float]
    agreement: float | None
    samples: int
    whose: Whose
    accuracy: tuple[float, float] | None = None

    @property
    def little(self) -> bool:
        """Whether hardly anything is left."""
        return self.sqnr < LEAST_SQNR or (self.agreement is not None and self.agreement < LEAST_AGREEMENT)

    def __str__(self) -> str:
        if self.sqnr == math.inf and -math.inf in self.parts.values():
            told = "nothing but noise, where all that the original computes is zero"
        elif self.sqnr == math.inf:
            told = "the outputs to the last bit"
        else:
            worst = min(self.parts, key=lambda name: self.parts[name], default="")
            told = f"{self.sqnr:.1f} dB" + (f" of '{worst}', its worst part" if len(self.parts) > 1 else "")
        if self.agreement is not None:
            told += f", and the same largest output in {percent(self.agreement)}"
        if self.accuracy is not None:
            told += f", with accuracy {percent(self.accuracy[0])} → {percent(self.accuracy[1])}"
        return f"keeps {told}, on {self.samples} samples {TOLD[self.whose]}"


class OutputJudge:
    """Compares what passes made with the model they started from.

    Args:
        model: that one.
        target: where to run both.
        samples: the data, if there is any.
        feeds: made-up inputs, for models without.
    """

    def __init__(
        self, model: Model, target: Target, samples: Samples | None, feeds: Sequence[Mapping[str, Array]]
    ) -> None:
        self._model, self._target, self._samples, self._feeds = model, target, samples, feeds
        self._judge: Judge | None = None
        self._before: float | None = None

    def __call__(self, model: Model) -> Kept | None:
        """What another model keeps of its outputs; None where one of the two does not run."""
        data, whose = self._data()
        try:
            if self._judge is None:
                self._judge = Judge(self._model, data, self._target, SAMPLES, opened=True)
            score = self._judge(model)
        except LoadError:
            return None
        if not self._judge.seen:
            return None
        # What a classifier decides on noise says nothing.
        agreement = None if whose == "made up" else score.agreement
        return Kept(score.sqnr, score.parts, agreement, self._judge.seen, whose, self._accuracy(model))

    def _accuracy(self, model: Model) -> tuple[float, float] | None:
        metric = self._samples.held_metric if self._samples is not None else None
        if metric is None:
            return None
        if self._before is None:
            self._before = measure(metric, self._model, self._target)
        return self._before, measure(metric, model, self._target)

    def _data(self) -> tuple[CalibrationData, Whose]:
        if self._samples is None:
            return CalibrationData(list(self._feeds)), "made up"
        return self._samples.judged.data, self._samples.whose
