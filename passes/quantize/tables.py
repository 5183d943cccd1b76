"""Embeddings in few bits, in ONNX Runtime's own form: GatherBlockQuantized.

The standard has no form for them: Gather takes no codes of four bits, and of a DequantizeLinear in front of
it ONNX Runtime turns back the whole table to look up a few rows. A table that is also the weight of the head,
as decoders have it, keeps one set of codes for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from onnxslim.engine.base import Log
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Constant, Namer, Node, Tensor, Variable
from onnxslim.ir.model import DEFAULT_DOMAINS, Model
from onnxslim.ops.blocks import packed
from onnxslim.ops.contrib import DOMAIN
from onnxslim.passes.quantize.block_products import unwritable
from onnxslim.passes.quantize.blocks import Blocks

MATCHES = ("Gather", "Gemm", "MatMul", "Transpose")
MAKES = ("GatherBlockQuantized", "Reshape", "Transpose")

# Tables below this many bytes are left alone.
MIN_BYTES = 1 << 16
# The fewest inputs of a block.
LEAST = 16


class SharedTable(NamedTuple):
    """A matrix product by a table that is looked up, too.

    Attributes:
        node: the product.
        table: [rows, columns]; the product sums over columns.
        flip: the Transpose in between, if there is one.
    """

    node: Node
    table: Constant
    flip: Node | None


# Why it stays in floats where nothing else becomes of it: it would be stored twice.
SHOWN = "its constant is an output of the model, and stays"


def table_of(node: Node) -> Constant | None:
    """The table whose rows a node looks up, if nothing else reads it; float32, finite and not small."""
    table = _looked_up(node)
    return table if table is not None and len(table.outputs) == 1 else None


def weight_of(node: Node) -> Tensor:
    """What a node multiplies by, or looks rows up in."""
    return table_of(node) or node.inputs[1]


def _looked_up(node: Node) -> Constant | None:
    table = node.input(0)
    if node.op != "Gather" or node.domain not in DEFAULT_DOMAINS or node.attrs.get("axis", 0) != 0:
        return None
    fits = (
        isinstance(table, Constant)
        and len(table.shape) == 2
        and table.dtype == np.float32
        and table.nbytes >= MIN_BYTES
        and bool(np.isfinite(table.values).all())
    )
    return table if fits and isinstance(table, Constant) else None


def ties_of(model: Model) -> Iterator[SharedTable]:
    """All products of the main graph by such tables that nothing else reads.

    Blocks have to fill their rows: then the bytes are the same for both.
    """
    outputs = {id(tensor) for tensor in model.graph.outputs}
    for node in model.graph.nodes:
        tie = _tie(node)
        if tie is None or id(tie.table) in outputs or len(tie.table.shape) != 2 or tie.table.shape[1] % LEAST:
            continue
        through = {id(tie.flip or node)}
        others = [each for each in tie.table.outputs if id(each) not in through]
        if others and all(_looked_up(each) is tie.table for each in others):
            yield tie


def _tie(node: Node) -> SharedTable | None:
    weight = node.input(1)
    if node.domain not in DEFAULT_DOMAINS or weight is None or len(weight.outputs) != 1:
        # A table is read by its lookups, too.
        return _gemm(node, weight)
    flip = ir.producer(weight)
    if node.op != "MatMul" or flip is None or flip.op != "Transpose" or flip.domain not in DEFAULT_DOMAINS:
        return None
    table = flip.inputs[0]
    turned = tuple(flip.attrs.get("perm", (1, 0))) == (1, 0)
    return (
        SharedTable(node, table, flip)
        if turned and isinstance(table, Constant) and len(table.shape) == 2
        else None
    )


def _gemm(node: Node, weight: Tensor | None) -> SharedTable | None:
    fits = node.op == "Gemm" and node.domain in DEFAULT_DOMAINS and node.attrs.get("transB", 0)
    return SharedTable(node, weight, None) if fits and isinstance(weight, Constant) else None


def untie(model: Model) -> dict[str, str]:
    """Give products a weight of their own, in place; returns the name of the table by that of the weight."""
    name, gone, found = Namer(model.graph), set[int](), dict[str, str]()
    for node, table, flip in list(ties_of(model)):
        if unwritable(node):
            continue
        values = table.values if flip is None else np.ascontiguousarray(table.values.T)
        weight = Constant(name(f"{table.name}_head"), values)
        node.inputs[1] = weight
        found[weight.name] = table.name
        if flip is not None:
            ir.detach(flip)
            gone.add(id(flip))
    ir.sweep(model.graph, gone)
    return found


def retie(model: Model, ties: Mapping[str, str]) -> None:
    """Have products that still multiply by floats read the table again, in place."""
    name, tables = Namer(model.graph), dict[str, Constant]()
    for node in model.graph.nodes:
        tables.update({each.name: each for each in node.inputs if isinstance(each, Constant)})
    new: list[Node] = []
    for node in model.graph.nodes:
        weight = node.input(1)
        if not isinstance(weight, Constant) or weight.name not in ties:
            continue
        table = tables[ties[weight.name]]
        if node.op == "Gemm":
            node.inputs[1] = table
        else:
            turned = Variable(weight.name, weight.dtype, weight.shape)
            node.inputs[1] = turned
            new.append(
                Node("Transpose", name(f"{weight.name}_Transpose"), {"perm": (1, 0)}, [table], [turned])
            )
        model.graph.initializers.pop(weight.name, None)
    if new:
        model.graph.nodes.extend(new)
        ir.sort(model.graph)


class BlockTables:
    """Rewrites lookups of one model.

    Args:
        model: edited in place; `finish` puts the new nodes in.
        log: what is done goes here.
    """

    def __init__(self, model: Model, log: Log) -> None:
        self._model = model
        self._log = log
        self._name = Namer(model.graph)
        self._new: list[Node] = []

    def write(self, node: Node, blocks: Blocks) -> None:
        """Have a node look up these integers, [columns, rows] of its table."""
        table, blocking = node.inputs[0], blocks.blocking
        codes = packed((blocks.codes.T.astype(np.int16) - blocking.low).astype(np.uint8), blocking.bits)
        what = f"{table.name}_int{blocking.bits}", f"{table.name}_scale"
        data, scales = (
            Constant(self._name(name), values)
            for name, values in zip(what, (codes, np.ascontiguousarray(blocks.scales.T)), strict=True)
        )
        steps = [scales]
        if blocks.zeros is not None:
            zeros = packed((blocks.zeros.T.astype(np.int16) - blocking.low).astype(np.uint8), blocking.bits)
            steps.append(Constant(self._name(f"{table.name}_zero_point"), zeros))
        self._look_up(node, data, steps, blocks)

    def share(self, table: Tensor, product: Node, blocks: Blocks) -> None:
        """Have all that looks up a table and a product by it read the same integers.

        Lookups read them as they are stored, so that types and shapes behind them are known.
        """
        codes, scales, *zeros = product.inputs[1:4]
        assert isinstance(codes, Constant)
        rows = Constant(self._name(f"{codes.name}_rows"), codes.values.reshape(len(codes.values), -1))
        shape = Constant(self._name(f"{codes.name}_shape"), np.array(codes.values.shape, np.int64))
        blocked = Variable(codes.name, codes.dtype, codes.shape)
        self._new.append(Node("Reshape", self._name(f"{codes.name}_Reshape"), {}, [rows, shape], [blocked]))
        product.inputs[1] = blocked
        for node in [each for each in table.outputs if _looked_up(each) is table]:
            self._look_up(node, rows, [scales, *(each for each in zeros if each.name)], blocks)

    def _look_up(self, node: Node, data: Tensor, steps: Sequence[Tensor], blocks: Blocks) -> None:
        table, blocking = node.inputs[0], blocks.blocking
        node.op = "GatherBlockQuantized"
        node.domain, node.inputs = DOMAIN, [data, node.inputs[1], *steps]
        node.attrs = {
            "bits": blocking.bits,
            "block_size": blocking.size,
            "gather_axis": 0,
            "quantize_axis": 1,
        }
        self._model.opsets.setdefault(DOMAIN, 1)
        if not table.outputs:
            self._model.graph.initializers.pop(table.name, None)
        self._log.change(node.label, f"looks up its table as int{blocking.bits}")

    def finish(self) -> None:
        """Put the new nodes into the graph."""
        if self._new:
            self._model.graph.nodes.extend(self._new)
            ir.sort(self._model.graph)
