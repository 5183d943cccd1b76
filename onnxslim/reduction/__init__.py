"""The smallest model that still shows what is wrong with a larger one, so that it can be told to others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from onnxslim.engine.base import Progress
from onnxslim.engine.deadline import Deadline
from onnxslim.errors import OnnxSlimError, TimeUp, UsageError
from onnxslim.ir.model import Model, Source, is_literal, load, source_sha256
from onnxslim.reduction import steps
from onnxslim.reduction.steps import Shrinker


@dataclass(frozen=True)
class Reduction:
    """What a model was reduced to.

    Attributes:
        model: the smallest that was found.
        tried: how many models were tried.
        kept: names of what in it still holds values of the original: constants, nodes with long attributes,
            functions; empty if nothing of what that has learnt can be seen.
        complete: whether nothing was left to try when the time was over.
    """

    model: Model
    tried: int
    kept: tuple[str, ...]
    complete: bool


def reduce(
    model: Source,
    interesting: Callable[[Model], bool],
    *,
    time_limit: float | None = None,
    progress: Progress | None = None,
) -> Reduction:
    """The smallest model that is still interesting, by delta debugging (Zeller and Hildebrandt, 2002).

    Halves of outputs and nodes, then quarters and so on are left out as long as the rest is interesting: what
    they made is fed instead, and what only they read becomes an output. Nodes are bypassed, branches put in
    the place of their Ifs, functions in that of their calls. Weights become inputs, or one value everywhere,
    or random. The same every time, if `interesting` is.

    Args:
        model: what is wrong in some way; not modified.
        interesting: whether a model shows that. One that it raises an `OnnxSlimError` for does not. It gets
            models that are not valid, too.
        time_limit: seconds after which the smallest so far is taken.
        progress: called with (what is left, models tried, None).

    Raises:
        LoadError: `model` cannot be read.
        UsageError: it is not interesting itself.
    """
    original = load(model)
    deadline = None if time_limit is None else Deadline(time_limit)
    search = _Reducer(original, interesting, deadline, progress)
    if not search.offer(original.copy()):
        raise UsageError("the whole model does not show what it is to be reduced by")
    try:
        search.run()
    except TimeUp:
        search.complete = False
    kept = steps.kept(search.best, steps.values(original))
    return Reduction(search.best, search.tried, tuple(kept), search.complete)


class _Reducer:
    """Keeps the smallest model so far, and tries none twice."""

    def __init__(
        self,
        model: Model,
        interesting: Callable[[Model], bool],
        deadline: Deadline | None,
        progress: Progress | None,
    ) -> None:
        self.best, self.tried, self.complete = model, 0, True
        self._interesting, self._deadline, self._progress = interesting, deadline, progress
        self._nodes = _count(model)
        self._seen: set[str] = set()

    def run(self) -> None:
        """Make the model smaller until nothing makes it smaller."""
        whole, parts = steps.shrinkers(self.best)
        for each in whole:
            self._try(each, slice(None))
        before = None
        while self.best is not before:
            before = self.best
            for each in parts:
                self._sweep(each)

    def _sweep(self, shrinker: Shrinker) -> None:
        """Leave out all sites, halves, quarters and so on, from behind; as long as that can be."""
        size = len(shrinker.sites(self.best))
        while size:
            end = len(shrinker.sites(self.best))
            while end > 0:
                self._try(shrinker, slice(max(end - size, 0), end))
                end = min(end - size, len(shrinker.sites(self.best)))
            size //= 2

    def _try(self, shrinker: Shrinker, at: slice) -> None:
        try:
            found = shrinker.tried(self.best, at)
        except Exception:  # what edits the model may be what is wrong
            return
        if found is not None:
            self.offer(found)

    def offer(self, candidate: Model) -> bool:
        """Take a model if it is interesting; whether it is.

        Raises:
            TimeUp: the time is over.
        """
        candidate.source = None
        digest = source_sha256(candidate)
        if digest in self._seen:
            return False
        if self._deadline is not None and self._seen:
            self._deadline.require()
        self._seen.add(digest)
        if self._progress is not None:
            self._progress(f"{_count(self.best)} of {self._nodes} nodes left, model", self.tried, None)
        self.tried += 1
        try:
            shows = self._interesting(candidate)
        except OnnxSlimError:
            return False
        if shows:
            self.best = candidate
        return shows


def _count(model: Model) -> int:
    return sum(not is_literal(node) for node in model.nodes())
