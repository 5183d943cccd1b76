"""What a quantized candidate has to keep."""

from __future__ import annotations

from onnxslim.engine.base import Context
from onnxslim.engine.demands import FidelityGoal
from onnxslim.ir.model import Model
from onnxslim.passes.quantize.trial import Trial

# In dB: what is to be kept where nobody said what is.
SQNR = 25.0


class TrialGoal:
    """A goal for candidates that were measured; by default `SQNR`, or nothing where `max_drop` decides.

    Args:
        sqnr, max_drop, model, ctx: see `FidelityGoal`.

    Raises:
        UsageError: the metric fails.
    """

    def __init__(self, sqnr: float | None, max_drop: float | None, model: Model, ctx: Context) -> None:
        least = sqnr if sqnr is not None else 0.0 if max_drop is not None else SQNR
        self._goal = FidelityGoal("quantize", least, max_drop, model, ctx)
        self.before, self.value = self._goal.before, self._goal.value

    def met(self, trial: Trial) -> bool:
        """Whether a candidate keeps enough."""
        return self._goal.met(trial.candidate.model, trial.score)

    def merit(self, trial: Trial) -> tuple[bool, int, float]:
        """What is better: to keep enough, and then more in integers, or else to keep as much as can be."""
        met = self.met(trial)
        return met, -trial.held if met else 0, trial.score.sqnr

    def missing(self, trial: Trial) -> float:
        """By how many dB a candidate that does not keep enough should get better."""
        return self._goal.missing(trial.score)

    def shortfall(self, trial: Trial) -> str:
        """What a candidate that does not keep enough lacks; empty if it lacks nothing."""
        return self._goal.shortfall(trial.candidate.model, trial.score)
