"""What was seen of the tensors of one model, and the ranges that are chosen by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

from onnxslim.calibration import observers
from onnxslim.calibration.collect import Statistics, collect, merge
from onnxslim.calibration.data import CalibrationData
from onnxslim.calibration.observers import Distribution, Histogram, Range
from onnxslim.calibration.stream import Channels
from onnxslim.engine.base import Context
from onnxslim.ir.graph import Array, Constant, Tensor
from onnxslim.ir.model import Model
from onnxslim.ops import view_of
from onnxslim.passes.quantize.choices import ObserverChoice, Variant
from onnxslim.passes.quantize.plan import Plan, exceeds
from onnxslim.passes.quantize.trained import KnownGrid, Trained

Group: TypeAlias = tuple[str, ...]


class Calibration:
    """Statistics of tensors by name, gathered as plans ask for them: few passes over the data.

    Args:
        ctx: with the data.
        means: whether those of the channels that weighted nodes read are wanted, to correct biases by.
        seen: what is known already; shared with whoever has it.
    """

    def __init__(self, ctx: Context, *, means: bool, seen: Statistics | None = None) -> None:
        self._ctx = ctx
        self._rules = ctx.target.layout
        self._means = means
        self.seen = seen or Statistics({}, {})
        # Candidates have most of their ranges in common.
        self._chosen: dict[tuple[Group, ObserverChoice], Range] = {}

    def irregular(self) -> dict[str, str]:
        """Of tensors whose values no integer range should cover, by name, what they hold."""
        seen = self.seen.histograms.items()
        found = {name: "" if histogram.count else "no element" for name, histogram in seen}
        found.update({name: histogram.irregular for name, histogram in seen if histogram.irregular})
        return {name: reason for name, reason in found.items() if reason}

    def cover(self, model: Model, *plans: Plan) -> bool:
        """See to it that all tensors of plans were observed, in one pass; returns whether any had to be.

        Raises:
            CalibrationError: the data does not fit the model.
        """
        sources = dict.fromkeys(name for plan in plans for name in plan.sources())
        missing = [name for name in sources if name not in self.seen.histograms]
        found = dict.fromkeys(key for plan in plans for key in self._channels(plan).values())
        channels = [key for key in found if key not in self.seen.means]
        if not missing:
            return False
        seen = collect(
            model,
            self._ctx.given.fit,
            missing,
            channels=channels,
            target=self._ctx.target,
            jobs=self._ctx.jobs,
            progress=self._ctx.progress,
            empty=True,
        )
        self.seen.histograms.update(seen.histograms)
        self.seen.means.update(seen.means)
        return True

    def absorb(self, model: Model, data: CalibrationData) -> None:
        """Take more data into the statistics: what candidates were chosen by."""
        names, channels = list(self.seen.histograms), list(self.seen.means)
        target, jobs = self._ctx.target, self._ctx.jobs
        self.seen.merge(collect(model, data, names, channels=channels, target=target, jobs=jobs, empty=True))
        self._chosen.clear()

    def means(self, plan: Plan) -> dict[int, Array]:
        """Of each channel of the data of a weighted node whose bias can be corrected, by the node's id."""
        channels = self._channels(plan).items()
        return {node: self.seen.means[key].result() for node, key in channels if key in self.seen.means}

    def _channels(self, plan: Plan) -> dict[int, Channels]:
        """For each node whose bias can be corrected, by id, the data whose channel means that takes."""
        found: dict[int, Channels] = {}
        for node in plan.linear if self._means else ():
            layer = view_of(node)
            if layer is not None and layer.rank and node.constant(2) is not None:
                found[id(node)] = (node.inputs[0].name, layer.rank + layer.data_axis)
        return found

    def ranges(self, plan: Plan, variant: Variant) -> dict[int, Range]:
        """The range of each tensor of the plan; tensors on one scale get the same.

        A Relu that the common range of tensors does not imply would stand in the way of the integer kernel:
        such tensors leave their group in the plan.
        """
        known: dict[Group, Range] = {}

        def of(sources: tuple[Tensor, ...]) -> Range:
            group = names(sources)
            if group not in known:
                known[group] = self._range(sources, variant.observer_of(group))
            return known[group]

        for key in list(plan.tensors):
            if any(exceeds(source, of(plan.scales[key])) for source in plan.own[key]):
                plan.scales[key] = plan.own[key]
        return {key: of(plan.scales[key]) for key in plan.tensors}

    def grids(self, plan: Plan, trained: Trained) -> dict[int, KnownGrid]:
        """Scales and zero points that are known already: of a tensor, or of one that shares its scale."""
        seen = self.seen.histograms
        own = {
            key: grid
            for key, tensor in plan.tensors.items()
            if (grid := trained.known(tensor, self._rules, seen.get(tensor.name))) is not None
        }
        groups = {names(plan.scales[key]): grid for key, grid in reversed(own.items())}
        shared = {key: groups[group] for key in plan.tensors if (group := names(plan.scales[key])) in groups}
        return {**shared, **own}

    def _range(self, sources: tuple[Tensor, ...], observer: ObserverChoice) -> Range:
        """The range of tensors on one scale; that of constants anew, as fitting changes their values."""
        key = names(sources), observer
        if key in self._chosen:
            return self._chosen[key]
        chosen = self._choose(merge([_statistics(each, self.seen.histograms) for each in sources]), observer)
        if not any(isinstance(each, Constant) for each in sources):
            self._chosen[key] = chosen
        return chosen

    def _choose(self, values: Distribution, observer: ObserverChoice) -> Range:
        name, percent = observer
        symmetric = self._rules.symmetric
        if name == "minmax":
            return observers.min_max(values, symmetric=symmetric)
        if name == "percentile":
            return observers.percentile(values, percent, symmetric=symmetric)
        levels = 1 << (self._rules.bits or 8 * self._rules.activation.itemsize)
        if name == "kl":
            return observers.kl_divergence(values, min(levels, 256), symmetric=symmetric)
        return observers.mse(values, levels, symmetric=symmetric)


def names(group: Sequence[Tensor]) -> Group:
    """Of tensors on one scale."""
    return tuple(tensor.name for tensor in group)


def _statistics(source: Tensor, seen: Mapping[str, Histogram]) -> Histogram:
    """Of a calibrated tensor, or of a constant's own values."""
    if isinstance(source, Constant):
        histogram = Histogram()
        histogram.update(np.asarray(source.values))
        return histogram
    return seen[source.name]
