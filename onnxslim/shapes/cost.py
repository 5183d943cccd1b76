"""What a model costs to run, from the facts of its operators."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from onnxslim.ir.graph import Node, Shape
from onnxslim.ir.model import InputSpec, Model
from onnxslim.ops import spec_of
from onnxslim.shapes.asking import answer
from onnxslim.shapes.dims import dims_of

ASSUMED = "assumed: give input shapes to count for others"
SEEN = "as in the data"
GIVEN = "as asked for"


def sized(model: Model, inputs: Mapping[str, tuple[int, ...]] | None = None) -> Model:
    """A copy of which every tensor has the type and shape that follow from the operators.

    Args:
        model: not modified.
        inputs: shapes of the inputs; where there are none, a free axis is taken as 1.
    """
    copy = model.copy()
    for tensor in copy.graph.inputs:
        given = (inputs or {}).get(tensor.name, tensor.shape)
        if given is not None:
            tensor.shape = _counted(given)
    facts = dims_of(copy).facts
    for made in (tensor for node in copy.nodes() for tensor in node.outputs):
        fact = facts.get(id(made))
        made.shape, made.dtype = (fact.shape, fact.dtype) if fact else (None, None)
    return copy


@dataclass(frozen=True)
class CountedSizes:
    """Sizes that costs of an input with free axes are counted for.

    Attributes:
        axes: names of the free axes, without the batch.
    """

    input: str
    sizes: tuple[int, ...]
    axes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.input} {'x'.join(map(str, self.sizes))}"


def counted_sizes(
    specs: Sequence[InputSpec], inputs: Mapping[str, tuple[int, ...]] | None = None
) -> list[CountedSizes]:
    """For which sizes of free axes, other than the batch, costs are counted.

    Args:
        specs: the inputs of the model.
        inputs: as `macs` takes them.
    """
    batch = {spec.shape[0] for spec in specs if spec.shape}
    found = []
    for spec in specs:
        sizes = _counted((inputs or {}).get(spec.name, spec.shape))
        axes = (
            str(dim or f"axis {axis}")
            for axis, dim in enumerate(spec.shape or ())
            if axis and not isinstance(dim, int) and (dim is None or dim not in batch)
        )
        free = tuple(dict.fromkeys(axes))
        if spec.required and sizes is not None and free:
            found.append(CountedSizes(spec.name, sizes, free))
    return found


def _counted(shape: Shape) -> tuple[int, ...] | None:
    return None if shape is None else tuple(dim if isinstance(dim, int) else 1 for dim in shape)


def uncounted(model: Model) -> int:
    """How many operators that multiply stand in bodies and functions, where none are counted."""
    inside = [node for graph in model.graphs() if graph is not model.graph for node in graph.nodes]
    inside += [Node(node.op_type, domain=node.domain) for each in model.shell.functions for node in each.node]
    return sum(spec_of(node).macs is not None for node in inside)


def caveats(
    model: Model, inputs: Mapping[str, tuple[int, ...]] | None, origin: str, given: Collection[str] = ()
) -> Iterator[str]:
    """What there is to know beside multiply-accumulates of a model.

    Args:
        model, inputs: as `macs` takes them.
        origin: of sizes that nobody gave: `ASSUMED` or `SEEN`.
        given: inputs whose sizes somebody gave.
    """
    for counted in counted_sizes(model.inputs(), inputs):
        why = GIVEN if counted.input in given else origin
        yield f"MACs are counted for {counted} ({', '.join(counted.axes)} {why})"
    if inside := uncounted(model):
        yield f"MACs leave out {inside} layers in bodies of If, Loop and Scan or in functions"


def macs(model: Model, inputs: Mapping[str, tuple[int, ...]] | None = None) -> int | None:
    """Multiply-accumulates of one run over the main graph.

    Args:
        model: not modified.
        inputs: shapes of the inputs to count for; where there are none, a free axis counts as 1.

    Returns:
        None if the shape of an operator that counts is not determined by the inputs.
    """
    total = 0
    for found in by_node(model, inputs):
        if found is None:
            return None
        total += found
    return total


def by_label(model: Model, inputs: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, int]:
    """The same by label of those nodes of the main graph that count, where shapes tell."""
    counts = zip(model.graph.nodes, by_node(model, inputs), strict=True)
    return {node.label: count for node, count in counts if count}


def by_node(model: Model, inputs: Mapping[str, tuple[int, ...]] | None = None) -> list[int | None]:
    """The same for every node of the main graph, in order; None for those whose shapes are not determined."""
    counts = ((spec_of(node).macs, node) for node in sized(model, inputs).graph.nodes)
    return [answer(count, node) if count else 0 for count, node in counts]
