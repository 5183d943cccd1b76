"""What all trials of a search have in common: the model, the data, and how a recipe is run on them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from onnxslim.calibration.samples import Samples, Subset
from onnxslim.engine.base import Effort
from onnxslim.errors import UsageError
from onnxslim.ir.model import Model, source_sha256
from onnxslim.recipes.data import Batches, Data
from onnxslim.recipes.recipe import Outcome, Recipe
from onnxslim.runtime.machine import fingerprint
from onnxslim.runtime.metric import Metric, measure
from onnxslim.runtime.targets import Target
from onnxslim.search.chains import Chain
from onnxslim.search.goals import Goals
from onnxslim.version import version

# Share of the data that trials are measured on: half of it to choose by, and half to judge what was chosen.
HOLD_OUT = 0.25


@dataclass(frozen=True)
class SearchProblem:
    """What a search is to solve, in whichever process.

    Attributes:
        model: the original.
        data: all of it, with labels if there are any.
        named: how users named it, for recipes; None if they cannot hold that.
        tested: whether other samples judge what was chosen, so that all that are held out choose.
        metric, target, seed, libraries, distill, effort: see `onnxslim.search.optimize`.
        goals: what is asked for.
        sizes: of the inputs, to count for.
        kept: whether trials are kept, with their plans in files.
    """

    model: Model
    data: Batches
    named: Data | None
    tested: bool
    metric: Metric | None
    target: Target
    seed: int
    libraries: tuple[str, ...]
    distill: bool
    effort: Effort
    goals: Goals
    sizes: Mapping[str, tuple[int, ...]]
    kept: bool

    @cached_property
    def samples(self) -> Samples:
        """The data in its parts."""
        given = self.data.data, self.model, self.target, self.seed, self.data.labels
        return Samples(*given, hold_out=HOLD_OUT, learning=self.distill)

    @cached_property
    def score(self) -> float | None:
        """The metric of the original, if users gave one.

        Raises:
            UsageError: it fails.
        """
        return None if self.metric is None else measure(self.metric, self.model, self.target)

    @property
    def chooses(self) -> Subset:
        """The samples to choose by: those that passes were fitted on, if there are too few."""
        if not self.tested and self.samples.halves is not None:
            return self.samples.halves[0]
        return self.samples.judged

    def recipe(self, passes: Chain) -> Recipe:
        """What runs passes as all trials are run."""
        return Recipe(
            passes=passes, data=self.named, target=self.target.name, seed=self.seed, hold_out=HOLD_OUT
        )

    def run(self, recipe: Recipe) -> Outcome:
        """Run one on the original.

        Raises:
            OnnxSlimError: see `Recipe.run`.
        """
        return recipe.run(
            self.model,
            data=self.data.data,
            labels=self.data.labels,
            libraries=self.libraries,
            metric=self.metric,
        )

    def about(self) -> Mapping[str, Any]:
        """All that figures of trials depend on, besides what is tried; of inputs, the sizes to count for.

        Raises:
            UsageError: the metric has no name that tells it from others.
        """
        data, labels = self.data.data, self.data.labels
        return {
            "version": version(),
            "model": source_sha256(self.model),
            "data": data.sha256(),
            "labels": None if labels is None else hashlib.sha256(np.asarray(labels).tobytes()).hexdigest(),
            "test": self.tested,
            "metric": None if self.metric is None else _name(self.metric),
            "target": [self.target.name, self.target.threads, dict(self.target.options)],
            "machine": fingerprint(),
            "seed": self.seed,
            "distill": self.distill,
            "sizes": self.sizes,
        }


def _name(metric: Metric) -> str:
    """What tells a metric from others, in other processes too."""
    name = getattr(metric, "__qualname__", "<unnamed>")
    if "<" in name:  # a lambda, a function within another, or an object: the next one may have this name too
        raise UsageError(f"trials are kept by the metric's name: give a function of a module, not {metric!r}")
    return f"{metric.__module__}:{name}"
