"""What a candidate has to keep."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from onnxslim.engine.base import Context
from onnxslim.errors import UsageError
from onnxslim.ir.model import Model
from onnxslim.passes.quantize.trial import Trial
from onnxslim.runtime.metric import measure

# In dB: what is to be kept where nobody said what is.
SQNR = 25.0
# In dB: by how much noise goes down at a time where it is the metric that drops too much.
STEP = 1.0


class FidelityGoal:
    """Least fidelity of the outputs, and the most that the caller's metric may drop.

    Args:
        sqnr: in dB, on the samples judged on; by default `SQNR`, or nothing where a metric decides.
        max_drop: how much less than the model's the metric of a candidate may be; None for anything.
        model: as it is before it is quantized.
        ctx: with the metric.

    Raises:
        UsageError: there is no metric to hold candidates to, or it fails.
    """

    def __init__(self, sqnr: float | None, max_drop: float | None, model: Model, ctx: Context) -> None:
        self.sqnr = sqnr if sqnr is not None else 0.0 if max_drop is not None else SQNR
        self._max_drop = max_drop
        self._ctx = ctx
        self._values: WeakKeyDictionary[Model, float] = WeakKeyDictionary()
        if max_drop is not None and ctx.metric is None:
            raise UsageError(
                "pass 'quantize' with max_drop needs a metric: pass metric= to the pipeline, or --metric, or "
                "data with labels, on the command line"
            )
        self.before = self.value(model) if max_drop is not None else None

    def value(self, model: Model) -> float:
        """The metric of a model, measured once."""
        if model not in self._values:
            assert self._ctx.metric is not None
            self._values[model] = measure(self._ctx.metric, model, self._ctx.target)
        return self._values[model]

    def met(self, trial: Trial) -> bool:
        """Whether a candidate keeps enough."""
        return trial.score.sqnr >= self.sqnr and not self._drops_more(trial)

    def merit(self, trial: Trial) -> tuple[bool, int, float]:
        """What is better: to keep enough, and then more in integers, or else to keep as much as can be."""
        met = self.met(trial)
        return met, -trial.held if met else 0, trial.score.sqnr

    def missing(self, trial: Trial) -> float:
        """By how many dB a candidate that does not keep enough should get better."""
        return max(self.sqnr - trial.score.sqnr, 0.0 if self._max_drop is None else STEP)

    def shortfall(self, trial: Trial) -> str:
        """What a candidate that does not keep enough lacks."""
        if trial.score.sqnr < self.sqnr:
            return f"{trial.score.sqnr:.1f} dB are left, less than require_sqnr={self.sqnr:g}"
        after = self.value(trial.candidate.model)
        return f"the metric drops from {self.before:.6g} to {after:.6g}, more than {self._max_drop:g}"

    def _drops_more(self, trial: Trial) -> bool:
        if self._max_drop is None or self.before is None:
            return False
        return self.before - self.value(trial.candidate.model) > self._max_drop
