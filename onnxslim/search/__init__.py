"""The best small model within goals: width, depth, rank, bits and codebooks chosen by what is measured."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from onnxslim.engine.base import Effort, Progress
from onnxslim.errors import CalibrationError, UsageError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Source, load
from onnxslim.runtime.metric import Metric
from onnxslim.runtime.targets import Target
from onnxslim.search.fronts import front
from onnxslim.search.goals import Goals, TrialFigures
from onnxslim.search.outcome import SearchResult, SearchSetup
from onnxslim.search.trials import SearchTrial, trials_in
from onnxslim.shapes.given import InputShapes

__all__ = ["Goals", "SearchResult", "SearchTrial", "TrialFigures", "front", "optimize", "trials_in"]


def optimize(
    model: Source,
    data: Any,
    goals: Goals | None = None,
    *,
    labels: Array | None = None,
    test: Any = None,
    test_labels: Array | None = None,
    metric: Metric | None = None,
    target: Target | str | None = None,
    effort: Effort = "normal",
    time_limit: float | None = None,
    work: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    on_trial: Callable[[SearchTrial], None] | None = None,
    libraries: Sequence[str] = (),
    input_shapes: InputShapes | None = None,
    distill: bool = False,
) -> SearchResult:
    """Search for what makes a model smallest and fastest and still keeps what it has to.

    Without goals: as fast as can be with 99 % of the decisions kept, or 20 dB where no output decides, or
    less than 100 samples choose; of what is as fast, the smallest. With budgets (`latency`, `size`,
    `download`, `macs`): what loses least within them. Nothing that is slower than the model is taken, unless
    only bytes were asked for.

    Args:
        model: left as it is.
        data: samples, as `CalibrationData.of` takes them, or `onnxslim.recipes.data.Data`. A quarter is held
            out of all passes: half of that to choose by, half to judge what was chosen.
        goals: see `Goals`.
        labels: the class of every sample of the data; accuracy is the metric then.
        test, test_labels: other samples, to judge what was chosen; those held out are all to choose by then.
        metric: runs a model on data of its own and says how good it is, more is better.
        target: where the result is to run; processors by default.
        effort: how much to try.
        time_limit: seconds, 0 or more, after which no trial is begun any more.
        work: a folder that trials are kept in: a later search with the same model, data, target, machine and
            effort goes on from there, whatever its goals.
        seed: of everything random.
        progress: called with (what, done, total).
        on_trial: called with each trial as it is made.
        libraries: files of custom operators that the model needs to run.
        input_shapes: sizes of inputs with free axes, to count for.
        distill: learn weights again, from what the original makes of the data, wherever something was left
            away; takes PyTorch (the extra `train`), and pays with thousands of samples.

    Raises:
        CalibrationError: there is no data, or it does not fit the model.
        UsageError: the goals, the time limit or the metric mean nothing, or trials are to be kept and the
            metric has no name; PyTorch is wanted, and not installed.
        SaveError: the folder to work in cannot be used.
        TargetError: the target is not there.
        LoadError: the model is none, or does not run.
    """
    if data is None:
        raise CalibrationError("a search measures what is lost, and needs data: pass data=, or --data")
    if time_limit is not None and not time_limit >= 0:
        raise UsageError(f"the time limit {time_limit:g} is no time: give 0 seconds or more")
    samples = (data, labels), (test, test_labels)
    search = SearchSetup(load(model), *samples, metric, Target.of(target), seed, tuple(libraries), distill)
    explorer = search.explorer(goals or Goals(), effort, work, input_shapes or {})
    explorer.progress, explorer.on_trial = progress, on_trial
    if time_limit is not None:
        explorer.until = time.monotonic() + time_limit
    explorer.explore()
    return search.result(explorer)
