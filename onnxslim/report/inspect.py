"""What a model consists of and needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnxslim.ir.graph import Constant, Graph, Node, Tensor, bit_width, producer
from onnxslim.ir.model import DEFAULT_DOMAINS, Model, Source, is_literal, load
from onnxslim.ops import Trait, has, spec_of
from onnxslim.report.matching import encoded, narrowed, operator
from onnxslim.shapes import cost
from onnxslim.shapes.given import InputShapes, one_sample, sized_by, with_sizes


@dataclass(frozen=True)
class Memory:
    """What the results of operators take while one sample runs, in the order of the file.

    Attributes:
        peak: most bytes at a time; weights are not counted, nor what kernels need inside.
        node: the one that is running then.
        unknown: tensors left out, whose size does not follow from the inputs.
    """

    peak: int
    node: str
    unknown: int


@dataclass(frozen=True)
class Coverage:
    """How far a model is quantized.

    Attributes:
        quantized: operators with weights of which data and weight both come from DQ, or are integers.
        weights_only: those of which only the weight does.
        total: operators with weights.
        macs: fraction of the multiply-accumulates in the quantized ones; None if a shape is unknown.
    """

    quantized: int
    weights_only: int
    total: int
    macs: float | None


@dataclass(frozen=True)
class Summary:
    """What a model is and consists of, as far as it only has to be counted.

    Attributes:
        name: of the file; empty for a model in memory.
        opsets: version by domain.
        operators: nodes by operator, those of bodies and Constant nodes included; others with their domain.
        bytes: when saved, data files included.
    """

    name: str
    ir_version: int
    opsets: Mapping[str, int]
    producer: str
    operators: Mapping[str, int]
    nodes: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Inspection(Summary):
    """What `inspect` finds.

    Attributes:
        inputs, outputs: `type[sizes]` by name, as declared.
        macs: multiply-accumulates of one sample; None if a shape is unknown.
        counted: sizes of inputs with free axes that these and the memory are counted for, such as
            `x 1x3x640x640`, and whether they were assumed.
        uncounted: layers in branches, loop bodies and functions, whose multiply-accumulates are not counted.
        dtypes: bytes of constants by type.
        free: inputs and outputs with axes of free size, and their names for these.
        external: bytes by data file.
        functions: operators the model defines itself.
        custom: operators of domains other than the standard's, which only some runtimes have.
    """

    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    macs: int | None
    counted: Mapping[str, bool]
    uncounted: int
    memory: Memory
    dtypes: Mapping[str, int]
    free: Mapping[str, tuple[str, ...]]
    external: Mapping[str, int]
    coverage: Coverage
    functions: tuple[str, ...]
    custom: tuple[str, ...]
    metadata: Mapping[str, str]


def summarize(model: Model) -> Summary:
    """Count what a model consists of."""
    stats, shell = model.stats(), model.shell
    return Summary(
        name=model.source.name if model.source else "",
        ir_version=model.ir_version,
        opsets=dict(model.opsets),
        producer=" ".join(filter(None, (shell.producer_name, shell.producer_version))),
        operators=dict(Counter(operator(node) for node in model.nodes()).most_common()),
        nodes=stats.nodes,
        parameters=stats.parameters,
        bytes=stats.bytes,
    )


def inspect(model: Source, input_shapes: InputShapes | None = None) -> Inspection:
    """Find out what a model consists of and needs.

    Args:
        model: a file, a ModelProto or a Model; left as it is.
        input_shapes: sizes to count for, by name of the input; free axes count as 1.

    Raises:
        UsageError: there is no input of that name, or it has other axes.
        LoadError: it is missing, broken, or not an ONNX model.
    """
    loaded = load(model)
    declared = loaded.inputs()
    specs = with_sizes(declared, input_shapes or {})
    shapes, given = one_sample(declared, specs), sized_by(declared, specs)
    sized = cost.sized(loaded, shapes)
    interface = (*loaded.graph.inputs, *loaded.graph.outputs)
    domains = {node.domain or "" for node in loaded.nodes()} - set(DEFAULT_DOMAINS)
    foreign = {f"{n.domain}.{n.op}" for n in loaded.nodes() if n.domain in domains}
    return Inspection(
        **vars(summarize(loaded)),
        inputs={tensor.name: typed(tensor) for tensor in loaded.graph.inputs},
        outputs={tensor.name: typed(tensor) for tensor in loaded.graph.outputs},
        macs=cost.macs(loaded, shapes),
        counted={str(each): each.input not in given for each in cost.counted_sizes(declared, shapes)},
        uncounted=cost.uncounted(loaded),
        memory=_memory(sized.graph),
        dtypes=_dtypes(loaded),
        free={tensor.name: free for tensor in interface if (free := _free(tensor))},
        external=_external(loaded),
        coverage=_coverage(sized),
        functions=tuple(sorted(".".join(filter(None, key)) for key in loaded.functions)),
        custom=tuple(sorted(foreign - {".".join(key) for key in loaded.functions})),
        metadata=loaded.metadata,
    )


def typed(tensor: Tensor) -> str:
    """`float32[N,3,224,224]`; question marks for what is not declared."""
    if tensor.dtype is None:
        return "?"
    if tensor.shape is None:
        return f"{tensor.dtype}[…]"
    return f"{tensor.dtype}[{','.join('?' if dim is None else str(dim) for dim in tensor.shape)}]"


def _free(tensor: Tensor) -> tuple[str, ...]:
    if tensor.shape is None:
        return ("…",)
    return tuple("?" if dim is None else dim for dim in tensor.shape if not isinstance(dim, int))


def _dtypes(model: Model) -> dict[str, int]:
    found: Counter[str] = Counter()
    for constant in model.constants():
        found[str(constant.dtype)] += constant.nbytes
    return dict(found.most_common())


def _external(model: Model) -> dict[str, int]:
    folder = model.source.resolve().parent if model.source else None
    return {name: (folder / name).stat().st_size for name in model.data_files} if folder else {}


# --------------------------------------------------------------------------------------------- memory


def _memory(graph: Graph) -> Memory:
    """Tensors live from the operator that makes them, or the start, to the last one that reads them."""
    last: dict[int, int] = {}
    for index, node in enumerate(graph.nodes):
        for tensor in (*node.inputs, *(t for body in node.bodies for n in body.nodes for t in n.inputs)):
            last[id(tensor)] = index
    last.update((id(tensor), len(graph.nodes)) for tensor in graph.outputs)
    born = [(-1, tensor) for tensor in graph.inputs]
    born += [(index, made) for index, node in enumerate(graph.nodes) for made in node.outputs if made.name]
    ends: Counter[int] = Counter()
    for index, tensor in born:
        ends[max(last.get(id(tensor), index), index)] += _size(tensor) or 0
    live = sum(_size(tensor) or 0 for tensor in graph.inputs)
    peak, where = live, ""
    for index, node in enumerate(graph.nodes):
        live += sum(_size(made) or 0 for made in node.outputs if made.name)
        peak, where = max((peak, where), (live, node.label), key=lambda found: found[0])
        live -= ends[index]
    return Memory(peak, where, sum(_size(tensor) is None for _, tensor in born))


def _size(tensor: Tensor) -> int | None:
    shape = tensor.shape
    if tensor.dtype is None or shape is None or not all(isinstance(dim, int) for dim in shape):
        return None
    return (int(np.prod(shape, dtype=np.int64)) * bit_width(tensor.dtype) + 7) // 8  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------ coverage


def _coverage(sized: Model) -> Coverage:
    counts: Counter[str] = Counter()
    macs: dict[str, int | None] = {"all": 0, "integer": 0}
    for node in sized.graph.nodes:
        if not _has_weight(node):
            continue
        kind = _kind(node)
        counts[kind] += 1
        count = spec_of(node).macs
        found = count(node) if count else 0
        for key in ("all", *(["integer"] if kind == "quantized" else [])):
            total = macs[key]
            macs[key] = None if total is None or found is None else total + found
    total, integer = macs["all"], macs["integer"]
    share = None if total is None or integer is None else integer / total if total else 0.0
    return Coverage(counts["quantized"], counts["weights"], counts.total(), share)


def _has_weight(node: Node) -> bool:
    """Whether it multiplies by something that is in the model."""
    spec = spec_of(node)
    return spec.macs is not None and any(_is_stored(tensor) for tensor in node.inputs[spec.weight :][:1])


def _is_stored(tensor: Tensor) -> bool:
    return isinstance(encoded(tensor), Constant) or is_literal(producer(encoded(tensor)))


def _kind(node: Node) -> str:
    if has(node, Trait.INTEGER):
        return "quantized"
    pair, decoded = producer(node.inputs[0]), has(producer(node.inputs[1]), Trait.DEQUANTIZES)
    if pair is None or not decoded or not has(pair, Trait.DEQUANTIZES):
        return "weights" if decoded else "float"
    # A Clip between Q and DQ simulates fewer bits, with which nothing computes.
    return "weights" if narrowed(pair.inputs[0]) is not None else "quantized"
