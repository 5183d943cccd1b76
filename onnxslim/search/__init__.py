"""The best small model within goals: width, depth, rank, bits and codebooks chosen by what is measured."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from onnxslim.engine.base import Effort, Progress
from onnxslim.errors import CalibrationError, UsageError, nearest
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Source, load
from onnxslim.recipes.data import Data
from onnxslim.runtime.metric import Metric
from onnxslim.runtime.targets import Target
from onnxslim.search.backends import open_backend, require_backend
from onnxslim.search.explore import WIDTH
from onnxslim.search.goals import Goals, TrialFigures
from onnxslim.search.outcome import SearchResult, SearchRun, opened
from onnxslim.search.problem import SearchProblem
from onnxslim.search.trials import SearchTrial, front, trials_in
from onnxslim.shapes.given import InputShapes, one_sample, with_sizes

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
    jobs: int = 1,
    backend: str = "processes",
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
        jobs: processes of this machine that make trials at the same time; what is found is the same.
        backend: where: "processes", or workers of a cluster: "dask=tcp://HOST:8786" or "ray" (the extras
            `dask` and `ray`).

    Raises:
        CalibrationError: there is no data, or it does not fit the model.
        UsageError: the goals, the time limit or the metric mean nothing, or trials are to be kept and the
            metric has no name; PyTorch or a backend is wanted, and not installed.
        SaveError: the folder to work in cannot be used.
        TargetError: the target, or the cluster, is not there.
        LoadError: the model is none, or does not run.
    """
    _require_valid(data, goals, effort, time_limit, seed)
    require_backend(backend, jobs)
    original = load(model)
    samples = opened(original, data, labels)
    specs, fed = original.inputs(), next(iter(samples.data))
    shapes = {name: array.shape for name, array in fed.items()}
    problem = SearchProblem(
        model=original,
        data=samples,
        # A recipe cannot hold data that is code: it is run with --data then.
        named=data if isinstance(data, Data) and not data.is_function else None,
        tested=test is not None,
        metric=metric,
        target=Target.of(target).with_libraries(tuple(libraries)),
        seed=seed,
        libraries=tuple(libraries),
        distill=distill,
        effort=effort,
        goals=goals or Goals(),
        sizes=one_sample(specs, with_sizes(specs, input_shapes or {}), shapes),
        kept=work is not None,
    )
    search = SearchRun(problem, None if test is None else opened(original, test, test_labels))
    with open_backend(backend, jobs) as workers:
        explorer = search.explorer(work, workers)
        explorer.progress, explorer.on_trial = progress, on_trial
        if time_limit is not None:
            explorer.until = time.monotonic() + time_limit
        explorer.explore()
        return search.result(explorer)


def _require_valid(data: Any, goals: Any, effort: Any, time_limit: Any, seed: Any) -> None:
    """Raise CalibrationError or UsageError, see `optimize`, for what needs no look at the model."""
    if data is None:
        raise CalibrationError("a search measures what is lost, and needs data: pass data=, or --data")
    if time_limit is not None and not (isinstance(time_limit, (int, float)) and time_limit >= 0):
        raise UsageError(f"the time limit {time_limit} is no time: give 0 seconds or more")
    if not isinstance(seed, int):
        raise UsageError(f"the seed {seed!r} is no whole number")
    if goals is not None and not isinstance(goals, Goals):
        raise UsageError(
            f"goals are onnxslim.Goals, such as Goals(latency=0.5), not a {type(goals).__name__}"
        )
    if effort not in WIDTH:
        raise UsageError(f"unknown effort '{effort}': {nearest(str(effort), WIDTH)}")
