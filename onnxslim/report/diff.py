"""How two models differ, by their structure: what is gone, new and changed, by how much, and where."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from onnxslim.calibration.noise import sqnr
from onnxslim.errors import LoadError, one_line
from onnxslim.formats import arrow, decibels, percent
from onnxslim.ir.graph import Array, Constant, Node, Tensor, producer
from onnxslim.ir.model import Model, Source, Stats, load
from onnxslim.ops import Trait, has
from onnxslim.report.inspect import typed
from onnxslim.report.matching import NodeMatching, encoded, narrowed, operator, same_attribute, stored
from onnxslim.report.places import DrawnNode, DrawnPlace, places
from onnxslim.runtime.evaluate import evaluate
from onnxslim.validation.certificate import PREFIX

# Entries of each kind that are told as text.
SHOWN = 20
# Characters of an attribute that are told.
MOST_CHARACTERS = 40
# What a product is exact to in float32, in dB.
EXACT_DECIBELS = 100.0
# By which share of its elements a weight has to have more or fewer zeros for that to be told.
LEAST_ZEROS = 0.01


@dataclass(frozen=True)
class Difference:
    """What one model has and another has not, whatever nodes and tensors are called.

    Attributes:
        sizes: of both.
        same: how many nodes are the same in both.
        removed, added: `name (operator)` of nodes that only the first or the second model has.
        changed: what is different at nodes that both have, by name in the first.
        interface: what is different at inputs and outputs.
        passes: what made the second model, as far as it or a report tells.
        places: where the changes are, drawn; the first of each kind, at most `places.MOST_PLACES`.
        left_out: changes that are not drawn, as there are too many kinds.
    """

    sizes: tuple[Stats, Stats]
    same: int
    removed: tuple[str, ...]
    added: tuple[str, ...]
    changed: Mapping[str, tuple[str, ...]]
    interface: tuple[str, ...]
    passes: tuple[str, ...] = ()
    places: tuple[DrawnPlace, ...] = ()
    left_out: int = 0

    def __bool__(self) -> bool:
        return bool(self.removed or self.added or self.changed or self.interface)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> Iterator[str]:
        """What people are told: of each kind, the first few."""
        if not self:
            yield f"the same graph: {self.same} nodes, whatever they are called"
            return
        yield f"the same in both: {self.same} nodes"
        changed = [f"{name}: {'; '.join(told)}" for name, told in self.changed.items()]
        kinds = {"inputs and outputs": self.interface, "gone": self.removed, "new": self.added}
        for what, entries in {**kinds, "changed": changed}.items():
            if entries:
                yield f"{what}: {len(entries)}"
                yield from (f"  {entry}" for entry in entries[:SHOWN])
            if len(entries) > SHOWN:
                yield f"  and {len(entries) - SHOWN} more, see --json"


@dataclass(frozen=True)
class PassDeeds:
    """Which pass did something at which node.

    Attributes:
        by_node: pass and action, by name of the node.
        names: of the passes, in order.
    """

    by_node: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, steps: Iterable[tuple[str, Iterable[tuple[str, str]]]]) -> PassDeeds:
        """From passes, each with nodes and what was done at them."""
        found: dict[str, list[tuple[str, str]]] = {}
        names = []
        for name, changes in steps:
            for node, action in changes:
                # What went into another node is named there: "took in /bn1".
                for label in dict.fromkeys((node, *action.split())):
                    found.setdefault(label, []).append((name, action))
                names.append(name)
        return cls(found, tuple(dict.fromkeys(names)))

    @classmethod
    def read(cls, path: Path) -> PassDeeds:
        """From a report in JSON.

        Raises:
            LoadError: it is missing, or no report.
        """
        try:
            steps = json.loads(path.read_text(encoding="utf-8"))["report"]["steps"]
            told = [(s["name"], [(c["node"], c["action"]) for c in s["changes"]["changed"]]) for s in steps]
        except OSError as error:
            raise LoadError(f"cannot read '{path}': {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise LoadError(f"'{path}' is not a report in JSON: {one_line(error)}") from error
        return cls.of(told)

    @classmethod
    def certified(cls, model: Model) -> PassDeeds:
        """From what a model says of itself, which is the passes alone."""
        try:
            told = json.loads(model.metadata.get(PREFIX + "passes", "[]"))
            return cls(names=tuple(each if isinstance(each, str) else next(iter(each)) for each in told))
        except (ValueError, TypeError, StopIteration):
            return cls()

    def at(self, *labels: str) -> list[tuple[str, str]]:
        """What was done at a node that is called so before or after."""
        found = [deed for label in labels for deed in self.by_node.get(label, ())]
        if not self.by_node and len(self.names) == 1:
            return [(self.names[0], "")]
        return sorted(dict.fromkeys(found), key=lambda deed: self.names.index(deed[0]))


def diff(before: Source, after: Source, deeds: PassDeeds | None = None) -> Difference:
    """How two models differ: nodes are matched by what they are connected to (`onnxslim.report.matching`).

    Args:
        before, after: files, ModelProtos or Models; left as they are.
        deeds: which pass did what; by default what the second says of itself.

    Raises:
        LoadError: one of them is missing, broken, or not an ONNX model.
    """
    first, second = load(before), load(after)
    known = deeds or PassDeeds.certified(second)
    matching = NodeMatching(first, second)
    told = _changes(matching)
    drawn, left_out = places(matching, _nodes(matching, told, known), known.names)
    return Difference(
        (first.stats(), second.stats()),
        len(matching.pairs) - len(told),
        tuple(_named(node) for node in matching.removed),
        tuple(_named(node) for node in matching.added),
        _numbered((node.label, told[id(node)]) for node, _ in matching.pairs if id(node) in told),
        tuple(_interface(first, second)),
        known.names,
        drawn,
        left_out,
    )


def _named(node: Node) -> str:
    return f"{node.label} ({operator(node)})"


def _numbered(found: Iterable[tuple[str, tuple[str, ...]]]) -> dict[str, tuple[str, ...]]:
    """Changes by name; of several nodes with one name, the later ones get a number."""
    made: dict[str, tuple[str, ...]] = {}
    for label, told in found:
        name, count = label, 2
        while name in made:
            name, count = f"{label}#{count}", count + 1
        made[name] = told
    return made


def _nodes(
    matching: NodeMatching, told: Mapping[int, tuple[str, ...]], deeds: PassDeeds
) -> dict[int, DrawnNode]:
    """What is drawn of each node of both models, by its id."""
    drawn = {}
    for nodes, state in ((matching.removed, "gone"), (matching.added, "new")):
        for node in nodes:
            drawn[id(node)] = DrawnNode(node.label, operator(node), state, _deeds(deeds.at(node.label)))
    for first, second in matching.pairs:
        state, what = "changed" if id(first) in told else "same", told.get(id(first), ())
        done = _deeds(deeds.at(first.label, second.label)) if what else {}
        for node in (first, second):
            drawn[id(node)] = DrawnNode(node.label, operator(node), state, done, what)
    return drawn


def _deeds(found: Sequence[tuple[str, str]]) -> dict[str, str]:
    made: dict[str, str] = {}
    for name, action in found:
        made[name] = "; ".join(filter(None, (made.get(name), action)))
    return made


# -------------------------------------------------------------------------------------------- changes


def _changes(matching: NodeMatching) -> dict[int, tuple[str, ...]]:
    """What is different at nodes that both models have, by id of the first one's."""
    pairs = [pair for pair in matching.pairs if _values(matching, pair[0]) != _values(matching, pair[1])]
    numbers = _Numbers(matching.second.model, [node for _, node in pairs])
    found = {id(first): tuple(_change(matching, numbers, first, second)) for first, second in pairs}
    return {key: told for key, told in found.items() if told}


def _values(matching: NodeMatching, node: Node) -> bytes:
    side = matching.first if id(node) in matching.first.by_id else matching.second
    return side.values[id(node)]


def _change(matching: NodeMatching, numbers: _Numbers, first: Node, second: Node) -> Iterator[str]:
    if operator(first) != operator(second):
        yield f"{operator(first)} → {operator(second)}"
    else:
        yield from _attributes(first, second)
    before, after = ([tensor for tensor in node.inputs if tensor.name] for node in (first, second))
    same_near = matching.near(matching.first, first, True) == matching.near(matching.second, second, True)
    for old, new in zip_longest(before, after):
        if old is None or new is None:
            yield f"reads '{new.name}' too" if old is None else f"no longer reads '{old.name}'"
        else:
            yield from _input(matching, numbers, old, new, same_near)
    decoded = [sum(_is_decoded(tensor) for tensor in node.inputs) for node in (first, second)]
    if decoded[0] != decoded[1]:
        yield f"inputs from DQ {decoded[0]} → {decoded[1]}"


def _attributes(first: Node, second: Node) -> Iterator[str]:
    for name in dict.fromkeys((*first.attrs, *second.attrs)):
        old, new = first.attrs.get(name), second.attrs.get(name)
        if not same_attribute(old, new):
            yield f"{name} {_shown(old)} → {_shown(new)}"


def _shown(value: Any) -> str:
    told = "none" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    text = " ".join(told.split())
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + "…"


def _is_decoded(tensor: Tensor) -> bool:
    maker = producer(tensor)
    return maker is not None and has(maker, Trait.DEQUANTIZES)


def _input(
    matching: NodeMatching, numbers: _Numbers, first: Tensor, second: Tensor, same_near: bool
) -> Iterator[str]:
    old, new = stored(encoded(first)), stored(encoded(second))
    if old is not None and new is not None:
        yield from _weight(encoded(first).name, old, new, numbers.of(second))
    elif old is None and new is not None:
        yield f"'{encoded(first).name}' is a constant now"
    elif old is not None:
        yield f"'{encoded(first).name}' is computed now"
    elif (
        first.name != second.name
        and not same_near
        and not matching.same_origin(encoded(first), encoded(second))
    ):
        yield f"reads '{encoded(second).name}' instead of '{encoded(first).name}'"


def _rewired(matching: NodeMatching, old: Tensor, new: Tensor) -> Iterator[str]:
    if old.name != new.name and not matching.same_origin(old, new):
        yield f"reads '{new.name}' instead of '{old.name}'"


def _weight(name: str, old: Array, new: Array, decoded: Array | None) -> Iterator[str]:
    """By how much a constant differs; nothing if it does not."""
    types = [f"{values.dtype}{list(values.shape)}".replace(" ", "") for values in (old, new)]
    parts = [arrow(*types)] if types[0] != types[1] else []
    new = new if decoded is None else decoded
    if old.shape == new.shape and old.dtype.kind == "f" and new.dtype.kind in "fV":
        kept, zeros = sqnr(old, new.astype(np.float64)), [float(np.mean(v == 0)) for v in (old, new)]
        if kept != np.inf:
            parts.append(_scaled(old, new) or f"{decibels(kept)} dB of signal to noise")
        if abs(zeros[0] - zeros[1]) >= LEAST_ZEROS:
            parts.append(f"zeros {arrow(*map(percent, zeros))}")
    elif types[0] == types[1] and not np.array_equal(old, new):
        parts.append("other values" if old.size > 8 else f"{_shown(old.tolist())} → {_shown(new.tolist())}")
    if parts:
        yield f"'{name}': {', '.join(parts)}"


def _scaled(old: Array, new: Array) -> str:
    """By what all values, or those of each output channel, were multiplied; empty if that is not all."""
    first, second = (values.astype(np.float64).reshape(len(values), -1) for values in (old, new))
    power = np.sum(first * first, axis=1)
    factors = np.sum(first * second, axis=1) / np.where(power > 0, power, 1.0)
    if first.shape[1] < 2 or sqnr(second, factors[:, None] * first) < EXACT_DECIBELS:
        return ""
    low, high = float(factors.min()), float(factors.max())
    same = np.isclose(low, high, rtol=1e-4)
    return f"times {low:.4g}" if same else f"times {low:.4g} to {high:.4g}, by output channel"


class _Numbers:
    """What integers that constants are stored as stand for, as nodes of a model read them."""

    def __init__(self, model: Model, nodes: Sequence[Node]) -> None:
        found = [_decoders(tensor) for node in nodes for tensor in node.inputs]
        makers = {id(maker): maker for chain in found for maker in chain}
        last = {id(chain[-1]): chain[-1] for chain in found if chain}
        wanted = [(maker.outputs[0], np.dtype(maker.inputs[1].dtype)) for maker in last.values()]
        try:
            self._known = evaluate(model, list(makers.values()), wanted, {}) if wanted else {}
        except LoadError:  # types that ONNX Runtime does not decode: only they are told then
            self._known = {}

    def of(self, tensor: Tensor) -> Array | None:
        """The numbers that a tensor is decoded to, if it is."""
        return self._known.get(id(tensor))


def _decoders(tensor: Tensor) -> list[Node]:
    """The DQ of a constant that a tensor comes from, behind what unpacks its codes; none if there is none."""
    maker = producer(tensor)
    if maker is None or not has(maker, Trait.DEQUANTIZES) or maker.domain:
        return []
    codes, *others = maker.inputs
    unpack = narrowed(codes)
    chain = [maker] if unpack is None else [unpack, maker]
    read = (*others, *chain[0].inputs)
    return chain if all(isinstance(each, Constant) for each in read if each.name) else []


# ------------------------------------------------------------------------------------------ interface


def _interface(first: Model, second: Model) -> Iterator[str]:
    for kind, sides in (
        ("input", (first.graph.inputs, second.graph.inputs)),
        ("output", (first.graph.outputs, second.graph.outputs)),
    ):
        before, after = ({tensor.name: typed(tensor) for tensor in side} for side in sides)
        for name in dict.fromkeys((*before, *after)):
            old, new = before.get(name), after.get(name)
            if old != new:
                told = "is gone" if new is None else f"{new} is new" if old is None else arrow(old, new)
                yield f"{kind} '{name}': {told}"
