"""Where the bytes of a model and of its result are, and at which layer the result begins to differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxslim.calibration.noise import noise_of
from onnxslim.calibration.stream import tapped
from onnxslim.errors import LoadError
from onnxslim.ir.graph import Array, Node, Tensor, producer
from onnxslim.ir.model import Model, constant_of
from onnxslim.ops import Trait, has
from onnxslim.runtime.session import Session
from onnxslim.validation.compare import compare

MATCHES = ("Clip",)
REST = "names, nodes and all else"
# Layers shown by size, tensors compared in all and at a time, layers explained, bars of a histogram.
MAX_LAYERS = 30
MAX_TENSORS = 400
GROUP = 32
EXPLAINED = 4
BINS = 60
# Where bars of layers end: more than that is nearly exact in float32.
FULL_DECIBELS = 80.0
# Noise that is not worth explaining, in dB below the signal.
AUDIBLE = 60.0


@dataclass(frozen=True)
class ByteShare:
    """Bytes of the constants of a layer, or of all layers of an operator, before and after."""

    name: str
    before: int
    after: int


@dataclass(frozen=True)
class LayerFidelity:
    """How close a tensor of the result is to that of the original.

    Attributes:
        tensor: its name, the same in both models.
        node, op: what makes it in the original.
        sqnr: in dB, of one batch; infinite where nothing differs. Errors of earlier layers are in it.
        added: noise power divided by signal power, minus that of the worst tensor it is made from.
    """

    tensor: str
    node: str
    op: str
    sqnr: float
    added: float


@dataclass(frozen=True)
class ValueSpread:
    """Values of a tensor in the original.

    Attributes:
        what: "weight" or "output" of the layer.
        layer: the node.
        lowest, highest: ends of the histogram.
        counts: of equally wide bins between them.
        range: smallest and largest value that the integers of the result stand for; None if it has none.
        beyond: fraction of the values outside of this range.
    """

    what: str
    layer: str
    lowest: float
    highest: float
    counts: tuple[int, ...]
    range: tuple[float, float] | None = None
    beyond: float = 0.0


@dataclass(frozen=True)
class LayerComparison:
    """What `analyse` finds out.

    Attributes:
        operators: bytes by operator that reads them, largest first.
        layers: bytes by layer, the `MAX_LAYERS` largest ones and one row for all others.
        fidelity: layers that both models have, in the order of the original.
        distributions: of the layers that add most noise.
        notes: what could not be found out.
    """

    operators: tuple[ByteShare, ...]
    layers: tuple[ByteShare, ...]
    fidelity: tuple[LayerFidelity, ...] = ()
    distributions: tuple[ValueSpread, ...] = ()
    notes: tuple[str, ...] = ()


def analyse(before: Model, after: Model, feeds: Mapping[str, Array] | None) -> LayerComparison:
    """Compare two models layer by layer.

    Args:
        before: the original.
        after: what was made of it; tensors are matched by their names.
        feeds: one batch of inputs; without it only sizes are compared.
    """
    operators, layers = _shares(before, after, by_op=True), _shares(before, after, by_op=False)
    if feeds is None:
        return LayerComparison(operators, _largest(layers), notes=("no inputs to compare the layers on",))
    try:
        fidelity, notes = _fidelity(before, after, feeds)
        explained = _most_added(fidelity)
        values = _run(before, [layer.tensor for layer in explained], feeds)
    except LoadError as error:
        return LayerComparison(operators, _largest(layers), notes=(f"layers were not compared: {error}",))
    shown = [each for layer in explained for each in _distributions(before, after, layer, values)]
    return LayerComparison(operators, _largest(layers), tuple(fidelity), tuple(shown), tuple(notes))


# ---------------------------------------------------------------------------------------------- sizes


def _shares(before: Model, after: Model, *, by_op: bool) -> tuple[ByteShare, ...]:
    first, second = _bytes(before, by_op=by_op), _bytes(after, by_op=by_op)
    names = dict.fromkeys((*first, *second))
    shares = [ByteShare(name, first.get(name, 0), second.get(name, 0)) for name in names]
    return tuple(sorted(shares, key=lambda share: -max(share.before, share.after)))


def _bytes(model: Model, *, by_op: bool) -> Counter[str]:
    found: Counter[str] = Counter()
    for constant in model.constants():
        node = _owner(constant)
        found[REST if node is None else node.op if by_op else node.label] += constant.nbytes
    found[REST] += max(model.stats().bytes - found.total(), 0)
    return found


def _owner(tensor: Tensor) -> Node | None:
    """The operator that a constant is there for: its reader, past whatever only decodes it."""
    node: Node | None = None
    for _ in range(4):  # a chain of Q and DQ is at most that long
        readers = tensor.outputs
        if not readers:
            return node
        node = readers[0]
        if not has(node, Trait.CODES) or not node.outputs:
            return node
        tensor = node.outputs[0]
    return node


def _largest(shares: Sequence[ByteShare]) -> tuple[ByteShare, ...]:
    rest = [share for share in shares if share.name == REST]
    layers = [share for share in shares if share.name != REST]
    shown, others = layers[:MAX_LAYERS], layers[MAX_LAYERS:]
    if others:
        sums = (sum(share.before for share in others), sum(share.after for share in others))
        shown.append(ByteShare(f"{len(others)} smaller layers", *sums))
    return (*shown, *rest)


# ------------------------------------------------------------------------------------------- fidelity


def _fidelity(
    before: Model, after: Model, feeds: Mapping[str, Array]
) -> tuple[list[LayerFidelity], list[str]]:
    seen, notes = _seen(after), []
    names = [tensor.name for node in before.graph.nodes for tensor in node.outputs if tensor.name in seen]
    if len(names) > MAX_TENSORS:
        notes.append(f"{MAX_TENSORS} of the {len(names)} tensors that both models have were compared")
        names = names[:: -(-len(names) // MAX_TENSORS)]
    found: dict[str, float] = {}
    changed = 0
    for start in range(0, len(names), GROUP):
        part = names[start : start + GROUP]
        first, second = _run(before, part, feeds), _run(after, [seen[name] for name in part], feeds)
        for name in part:
            row = compare(name, first[name], second[seen[name]])
            changed += bool(row.problem)
            if row.sqnr is not None:
                found[name] = row.sqnr
    if changed:
        notes.append(f"{changed} tensors changed their shape and are not compared")
    return list(_layers(before, found)), notes


def _seen(model: Model) -> dict[str, str]:
    """By tensor that an operator makes, what the operators behind it read: of a Q and DQ pair, its end.

    A Relu may be left to the range of a pair, which then takes its place and its name.
    """
    found = {}
    for tensor in (made for node in model.graph.nodes if not has(node, Trait.CODES) for made in node.outputs):
        ends = (
            end.outputs[0].name
            for pair in tensor.outputs
            if has(pair, Trait.QUANTIZES) and pair.inputs[0] is tensor
            for end in pair.outputs[0].outputs
            if has(end, Trait.DEQUANTIZES)
        )
        if tensor.name:
            found[tensor.name] = next(ends, tensor.name)
    return found


def _run(model: Model, names: Sequence[str], feeds: Mapping[str, Array]) -> dict[str, Any]:
    # As it is written: fusions would skip the tensors that are asked for.
    session = Session(tapped(model, names), optimize="none")
    return session.run({name: feeds[name] for name in session.input_names if name in feeds}, names)


def _layers(model: Model, sqnr: Mapping[str, float]) -> Iterator[LayerFidelity]:
    for node in model.graph.nodes:
        for tensor in node.outputs:
            if tensor.name in sqnr:
                inherited = max((noise_of(sqnr[name]) for name in _made_from(node, sqnr)), default=0.0)
                added = noise_of(sqnr[tensor.name]) - inherited
                yield LayerFidelity(tensor.name, node.label, node.op, sqnr[tensor.name], added)


def _made_from(node: Node, known: Mapping[str, float]) -> set[str]:
    """The nearest compared tensors that a node depends on."""
    found: set[str] = set()
    seen: set[int] = set()
    stack = list(node.inputs)
    while stack:
        tensor = stack.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        maker = producer(tensor)
        if tensor.name in known:
            found.add(tensor.name)
        elif maker is not None:
            stack.extend(maker.inputs)
    return found


def _most_added(layers: Iterable[LayerFidelity]) -> list[LayerFidelity]:
    worth = [layer for layer in layers if layer.added > noise_of(AUDIBLE)]
    return sorted(worth, key=lambda layer: -layer.added)[:EXPLAINED]


# ---------------------------------------------------------------------------------------- histograms


def _distributions(
    before: Model, after: Model, layer: LayerFidelity, values: Mapping[str, Any]
) -> Iterator[ValueSpread]:
    node = next(n for n in before.graph.nodes for t in n.outputs if t.name == layer.tensor)
    weight = next((w for w in map(constant_of, node.inputs) if w is not None and w.ndim > 1), None)
    if weight is not None and weight.dtype.kind == "f":
        yield _distribution("weight", layer.node, weight, None)
    yield _distribution("output", layer.node, values[layer.tensor], _integer_range(after, layer.tensor))


def _distribution(what: str, layer: str, values: Array, limits: tuple[float, float] | None) -> ValueSpread:
    finite = np.asarray(values, np.float64)[np.isfinite(values)]
    if not finite.size:
        return ValueSpread(what, layer, 0.0, 0.0, ())
    counts, edges = np.histogram(finite, BINS)
    beyond = 0.0 if limits is None else float(np.mean((finite < limits[0]) | (finite > limits[1])))
    ends = float(edges[0]), float(edges[-1])
    return ValueSpread(what, layer, *ends, tuple(int(count) for count in counts), limits, beyond)


def _limits(node: Node) -> tuple[int, int] | None:
    """Least and largest code behind a Q, where a Clip leaves fewer than its type has."""
    for reader in node.outputs[0].outputs:
        low, high = (reader.constant(1), reader.constant(2)) if reader.op == "Clip" else (None, None)
        if low is not None and high is not None:
            return int(low), int(high)
    return None


def _integer_range(model: Model, name: str) -> tuple[float, float] | None:
    """What the integers that a tensor is turned into can stand for."""
    for node in model.graph.nodes:
        if has(node, Trait.QUANTIZES) and node.inputs[0].name == name:
            scale, zero = node.constant(1), node.constant(2)
            if scale is not None and zero is not None and scale.size == 1 and zero.dtype.kind in "iu":
                info = np.iinfo(zero.dtype)
                low, high = (
                    (edge - int(zero)) * float(scale) for edge in _limits(node) or (info.min, info.max)
                )
                return low, high
    return None
