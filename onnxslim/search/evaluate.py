"""Models measured against the original of a search."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property

from onnxslim.calibration.fidelity import Judge
from onnxslim.calibration.samples import Subset
from onnxslim.errors import UsageError
from onnxslim.ir.download import download
from onnxslim.ir.model import Model
from onnxslim.runtime.metric import measure
from onnxslim.search.goals import Goals, TrialFigures
from onnxslim.search.problem import SearchProblem
from onnxslim.shapes import cost

# Seconds to time one trial.
TIMED = 1.0


class Evaluator:
    """Measures models against the original, on some samples.

    Args:
        problem: the original, what it is measured by, and where.
        subset: samples to measure on, with their labels if there are any: accuracy is the metric then, if
            users gave none.

    Attributes:
        samples: how many it looks at.

    Raises:
        UsageError: the metric fails.
    """

    def __init__(self, problem: SearchProblem, subset: Subset) -> None:
        self._original, self._target, self._shapes = problem.model, problem.target, problem.sizes
        self._judge = Judge(self._original, subset.data, self._target, subset.data.samples())
        self._metric, self._of_user = problem.metric or subset.metric, problem.metric is not None
        self.samples = self._judge.seen
        # A metric that fails is told before any trial.
        self._before = problem.score
        if not self._of_user and subset.metric is not None:
            self._before = measure(subset.metric, self._original, self._target)
        if self._before is not None and math.isinf(self._before):
            raise UsageError(f"the metric of the original is {self._before}, which nothing compares with")

    def completed(self, goals: Goals) -> Goals:
        """Goals with something to keep, where nothing at all was asked for.

        Raises:
            UsageError: a goal cannot be measured here; names it, and why.
        """
        self._require_measurable(goals)
        deciding = self.samples if self._judge.decides else 0
        return goals.completed(scored=self._metric is not None, deciding=deciding)

    def _require_measurable(self, goals: Goals) -> None:
        if goals.latency is not None and self._judge.untimed:
            raise UsageError(f"the goal latency needs times: {self._judge.untimed}")
        if goals.macs is not None and not self._footprint[2]:
            raise UsageError("the goal macs needs multiply-accumulates, and none are known of this model")
        if goals.max_drop is None or self._of_user:
            return
        if self._metric is None and not self._judge.decides:
            raise UsageError(
                "the goal max_drop needs a metric or labels, as no output has shape (batch, classes)"
            )
        if goals.max_drop >= 1:
            raise UsageError(f"the goal max_drop={goals.max_drop:g} may be all: 0.01 is one in a hundred")

    @cached_property
    def _footprint(self) -> tuple[int, int, int | None]:
        return _footprint(self._original, self._shapes)

    def __call__(self, model: Model, seconds: float) -> TrialFigures:
        """What is measured of a model.

        Raises:
            LoadError: it does not run.
            UsageError: the metric fails.
        """
        score = self._judge(model)
        size, sent, macs = (
            None if now is None or not before else now / before
            for now, before in zip(_footprint(model, self._shapes), self._footprint, strict=True)
        )
        assert size is not None
        assert sent is not None
        metric, latency = None, None
        if self._metric is not None and self._before is not None:
            metric = self._before, measure(self._metric, model, self._target)
        if not self._judge.untimed:
            (latency,) = self._judge.latencies([model], TIMED)
        return TrialFigures(score.sqnr, score.agreement, metric, latency, size, sent, macs, seconds)


def _footprint(model: Model, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int | None]:
    """Bytes, bytes once deflated, and multiply-accumulates."""
    return model.stats().bytes, download(model).deflate, cost.macs(model, dict(shapes))
