"""What a search tries: ways to store weights and data, and what is left of channels and ranks before that."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

from onnxslim.engine.base import Context, Effort, Pass
from onnxslim.engine.joint import planned
from onnxslim.engine.moves import Move
from onnxslim.engine.plans import PassPlan
from onnxslim.families.branches import branches
from onnxslim.formats import plain
from onnxslim.ir.model import Model, without_data
from onnxslim.ops import layer_of
from onnxslim.passes.cluster import Cluster
from onnxslim.passes.factorize import FactorizationPlan, Factorize
from onnxslim.passes.half import Half
from onnxslim.passes.prune import Prune, PruneFigures, PruningPlan
from onnxslim.passes.quantize import Quantize
from onnxslim.runtime.native import CPU
from onnxslim.runtime.targets import Target
from onnxslim.search.goals import Goals
from onnxslim.search.trials import Cut

Chain: TypeAlias = tuple[Pass, ...]
# By pass, what it could do.
Moves: TypeAlias = Sequence[Sequence[Move]]
FLOAT = "float"
# Of the passes that leave something away, in their order.
PLANS: tuple[type[PassPlan], ...] = (PruningPlan, FactorizationPlan)
# In dB: what integers keep beyond a goal, so that other samples confirm it; and where they and what was left
# away have half of the noise each; and where codes have a sixth of it, and integers the most.
SURE, MOST, HALF, LITTLE = 0.5, 1.0, 3.0, 8.0
# Of the bytes asked for, those that codes get where nodes of integers come besides.
ROOM = 0.9
# Shares of the multiply-accumulates that are tried, from the mildest on.
SHARES = (0.85, 0.72, 0.6, 0.5, 0.42, 0.35, 0.29, 0.24, 0.2, 0.165, 0.135)


class Encoding(NamedTuple):
    """A way to store weights and data.

    Attributes:
        passes: that do it.
        behind_cut: likewise, where something of the network was left away.
        spares: name of the one that it keeps more than, by layers in float; empty if there is none.
        narrows: names of those that take as long as it, and more bytes.
    """

    passes: Chain
    behind_cut: Chain
    spares: str = ""
    narrows: tuple[str, ...] = ()


def encodings(goals: Goals, target: Target, effort: Effort) -> Mapping[str, Encoding]:
    """Ways to store weights and data that can help to reach goals on a target, by name."""
    plain = {name: Encoding(chain, chain) for name, chain in _chains(goals, target, effort).items()}
    every = plain | dict(_sparing(plain, goals))
    return every if effort == "quick" or goals.budgets else every | dict(_narrow(every, goals, effort))


def _sparing(plain: Mapping[str, Encoding], goals: Goals) -> Iterator[tuple[str, Encoding]]:
    """The same in integers with the fewest layers in float that goals need, as passes know to find them."""
    least, most = goals.require_sqnr, goals.max_drop
    kept = [] if least is None else [f"{least:.6g} dB"]
    kept += [] if most is None else [f"all but {100 * most:.6g} %"]
    for name, (chain, *_) in plain.items() if kept else ():
        for step in chain:
            if isinstance(step, Quantize) and step.activations != "none":
                given, behind_cut = (
                    replace(step, **_kept(goals, margin, parts)) for margin, parts in ((SURE, 1), (HALF, 2))
                )
                yield f"{name} that keeps {' and '.join(kept)}", Encoding((given,), (behind_cut,), name)


def _narrow(every: Mapping[str, Encoding], goals: Goals, effort: Effort) -> Iterator[tuple[str, Encoding]]:
    """Integers with few different values, in codes: where bytes are what decides in the end.

    They are computed with as all integers are, and take as long.
    """
    codes = Cluster(scaled=True, **_kept(goals, LITTLE, 6))
    if _kept(goals, 0.0, 1) != _kept(Goals(), 0.0, 1):
        given, behind_cut = (
            (codes, Quantize(effort=effort, **_kept(goals, margin, parts)))
            for margin, parts in ((MOST, 1.25), (HALF, 2))
        )
        wide = (name for name, encoding in every.items() if "int8" in (name, encoding.spares))
        yield "codes in int8", Encoding(given, behind_cut, narrows=tuple(wide))


def _kept(goals: Goals, margin: float, parts: float) -> Mapping[str, Any]:
    """What a pass has to keep, so many dB more than goals ask for and a part of what may be lost."""
    least, most = goals.require_sqnr, goals.max_drop
    return {
        "require_sqnr": None if least is None else least + margin,
        "max_drop": None if most is None else most / parts,
    }


def _chains(goals: Goals, target: Target, effort: Effort) -> Mapping[str, Chain]:
    found: dict[str, Chain] = {FLOAT: (), "int8": (Quantize(effort=effort),)}
    if not goals.only_bytes:
        found["dynamic int8"] = (Quantize(activations="dynamic", effort=effort),)
    if target.provider != CPU:
        found["half"] = (Half(),)
    if {"size", "download"} & goals.budgets.keys():
        found["int8 weights"] = (Quantize(activations="none", effort=effort),)
        found["int4 weights"] = (Quantize(activations="none", weights="int4", effort=effort),)
        found |= {f"codes of {bits} bits": (Cluster(bits=bits),) for bits in (6, 4, 3, 2)}
        if effort != "quick":  # which costs a run for every weight
            share = min(goals.size or 0.125, 0.5)
            found[f"codes of {32 * share:.3g} bits on average"] = (Cluster(size=share),)
            less = ROOM * share
            integers = Quantize(effort=effort, require_sqnr=0)
            found[f"codes of {32 * less:.3g} bits on average, int8"] = (
                Cluster(size=less, scaled=True),
                integers,
            )
    return found


def moves_to_json(moves: Moves) -> str:
    """What could go, as text that `moves_from_json` reads."""
    return json.dumps([[{**plain(move), "plan": move.plan.to_json()} for move in each] for each in moves])


def moves_from_json(text: str) -> Moves:
    """What could go, of each of the passes of `Structures`.

    Raises:
        ValueError, TypeError, KeyError, UsageError: it is nothing that `moves_to_json` writes.
    """

    def read(told: dict[str, Any], plan: type[PassPlan]) -> Move:
        made = {"damage": float(told["damage"]), "gone": frozenset(told["gone"])}
        return Move(**{**told, **made, "plan": plan.from_json(told["plan"])})

    every = zip(json.loads(text), PLANS, strict=True)
    return [[read(told, plan) for told in each] for each, plan in every]


class Structures:
    """Channels and ranks that go, chosen together, by how much of the work is to be left.

    What could go is asked for once; see `onnxslim.engine.joint`.

    Args:
        model: slimmed.
        ctx: with data.
        effort: see the passes.
        learning: passes that learn weights again behind a cut; none by default.
        moves: what could go, where somebody has asked for it before.
    """

    def __init__(
        self,
        model: Model,
        ctx: Context,
        effort: Effort,
        learning: Chain = (),
        moves: Moves | None = None,
    ) -> None:
        self._model, self._ctx, self._effort, self._learning = model, ctx, effort, learning
        self._passes = (Prune(effort=effort), Factorize(effort=effort))
        self._given = moves
        self._made: dict[tuple[float, Cut], Chain] = {}

    @cached_property
    def moves(self) -> Moves:
        """What could go."""
        if self._given is not None:
            return self._given
        return [self.proposed(step) for step in range(len(self._passes))]

    def proposed(self, step: int) -> Sequence[Move]:
        """What could go by the pass of this number."""
        return self._passes[step].propose(self._model, self._ctx)

    def bare_layers(self) -> list[bytes]:
        """What no trial gets below: layers without any weights, but for those in branches, which may go."""
        going = {name for branch in branches(self._model).found for name in branch.nodes}
        layers = {node.outputs[0].name for node in self._model.nodes() if layer_of(node) is not None}
        written = self._model.to_proto_with(without_data).graph.node
        return [node.SerializeToString() for node in written if node.output[0] in layers - going]

    def __call__(self, share: float, cut: Cut = "work") -> Chain:
        """The passes, with plans, that leave so much of the work or the time, or come nearest to it.

        Raises:
            OnnxSlimError: a pass fails.
        """
        if share >= 1:
            return ()
        if (share, cut) not in self._made:
            left = self._timed(share) if cut == "time" else self._counted(share)
            self._made[share, cut] = (*left, *self._learning) if left else ()
        return self._made[share, cut]

    def _counted(self, share: float) -> Chain:
        steps = planned(self._passes, self._model.copy(), self._ctx, "macs", share, self.moves)
        return tuple(step.acting for step in steps)

    def _timed(self, share: float) -> Chain:
        """Channels and branches, chosen by the time that they are measured to take."""
        found = Prune(latency=share, effort=self._effort).run(self._model.copy(), self._ctx).figures
        return (Prune(plan=found.plan, effort=self._effort),) if isinstance(found, PruneFigures) else ()
