"""Codes of 1 to 8 bits in a model file, and the standard operators that look them up in tables.

No type of the standard holds codes of all these widths, and none below 8 bits indexes a table. So codes lie
in bytes without gaps: 8 / gcd(8, bits) of them make up a word of bits / gcd(8, bits) bytes, lowest bits
first.

    words = Cast(bytes) @ [1, 256, 65536, …]       where a word has more than one byte
    codes = Mod(Div(words, [1, 2^bits, 4^bits, …]), 2^bits)
    weight = Gather(table, Reshape(codes)) * scales

Where entries are multiples of a step, there is no table:

    weight = Cast(codes) * scales

A weight without its zeros has one bit for each of its values, and the table is what is not zero:

    weight = Gather([0, values…], CumSum(bits) * bits)

The place where its table begins is added to a code if there are several, and scales of output channels are
left out where there are none.

All of it depends on constants alone: runtimes that fold these when they load a model, as ONNX Runtime does,
run the same kernels on the same weights as before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import helper

from onnxslim.ir import graph as ir
from onnxslim.ir.download import deflated
from onnxslim.ir.graph import Array, Constant, Namer, Node, Tensor, Variable
from onnxslim.ir.model import Model
from onnxslim.passes.codes.tables import Codebook, Codes

MAKES = ("Add", "Cast", "CumSum", "Div", "Gather", "MatMul", "Mod", "Mul", "Reshape", "Slice")

# The version of the standard operators that has Mod, and Slice by inputs; and that which has CumSum.
LEAST_OPSET, COUNTING_OPSET = 10, 11
# Bytes of a node, and of a constant, besides names of tensors, and what is added to the name of a weight.
_NODE, _CONSTANT, _SUFFIX = 40, 24, 9
# Bytes of a node once the file is deflated, as nodes resemble one another.
_NODE_SENT = 20
# Bits of a word up to which it fits into 32 bits with a sign.
_NARROW = 24


@dataclass(frozen=True)
class Packing:
    """How codes of one width lie in bytes.

    Attributes:
        bits: of a code, 1 to 8.
    """

    bits: int

    @property
    def per_word(self) -> int:
        """Codes of a word."""
        return 8 // math.gcd(8, self.bits)

    @property
    def word_bytes(self) -> int:
        """Bytes of a word."""
        return self.per_word * self.bits // 8

    @property
    def integer(self) -> np.dtype[Any]:
        """What a word is computed in."""
        return np.dtype(np.int32 if self.word_bytes * 8 <= _NARROW else np.int64)

    def nbytes(self, count: int) -> int:
        """Bytes of so many codes."""
        return -(-count // self.per_word) * self.word_bytes

    def packed(self, codes: Codes) -> Codes:
        """Bytes of codes, shape (words, bytes of a word); what is missing of the last word is zero."""
        flat = np.zeros((-(-codes.size // self.per_word), self.per_word), np.int64)
        flat.ravel()[: codes.size] = codes.ravel()
        words = (flat << self._shifts()).sum(axis=1, keepdims=True)
        return np.asarray(words >> (8 * np.arange(self.word_bytes)) & 255, np.uint8)

    def divisors(self) -> Array:
        """What a word is divided by to have each of its codes last."""
        return np.asarray(1 << self._shifts(), self.integer)

    def radices(self) -> Array:
        """What the bytes of a word count, shape (bytes of a word, 1)."""
        return np.asarray(1 << (8 * np.arange(self.word_bytes)), self.integer)[:, None]

    def _shifts(self) -> Array:
        return self.bits * np.arange(self.per_word, dtype=np.int64)


def why_not(model: Model, opset: int = LEAST_OPSET) -> str | None:
    """Why a model cannot look up its weights with operators of this opset; None if it can."""
    if model.opset < opset:
        return f"its opset is {model.opset}, and codes are looked up by operators of opset {opset}"
    own = sorted(op for op in MAKES if ("", op) in model.functions)
    return f"it has functions of its own for {', '.join(own)}" if own else None


def sparse_bytes(name: str, values: Array) -> int:
    """Bytes of a weight without its zeros, with the nodes that put them back, about and not too few."""
    table = np.count_nonzero(values) + 1
    codes = stored_bytes(name, values.shape, values.dtype.itemsize, 1, 0, table)
    return codes + 3 * (_NODE + 2 * (len(name) + _SUFFIX))  # CumSum, Mul and another Reshape


def stored_bytes(
    name: str, shape: tuple[int, ...], itemsize: int, bits: int, tables: int, scales: int
) -> int:
    """Bytes that a weight takes as codes, with the nodes that look them up, about and not too few.

    Args:
        name, shape: of the weight.
        itemsize: bytes of one of its values.
        bits: of a code.
        tables, scales: their number.
    """
    packing, count = Packing(bits), math.prod(shape)
    nodes = _nodes(packing, count, tables, scales)
    # Every node has a tensor with such a name, as have codes and table, and each is named twice.
    named = len(name) + _SUFFIX
    overhead = nodes * (_NODE + 2 * named) + 2 * (_CONSTANT + 2 * named)
    return packing.nbytes(count) + itemsize * ((tables << bits) + scales) + overhead


def _nodes(packing: Packing, count: int, tables: int, scales: int) -> int:
    """How many nodes make a weight of codes."""
    found = 3 + (packing.word_bytes > 1) + 2 * (packing.per_word > 1) + 2 * bool(count % packing.per_word)
    return found + (tables > 1) + bool(scales)


def sent_bytes(book: Codebook) -> int:
    """Bytes that a weight takes as codes once the file is deflated, with the nodes for them, about."""
    packing, scales = Packing(book.bits), b"" if book.scales is None else book.scales.tobytes()
    if book.even:
        return deflated((book.codes.tobytes(), scales)) + 2 * _NODE_SENT
    nodes = _nodes(packing, book.codes.size, len(book.tables), len(scales))
    return (
        deflated((packing.packed(book.codes).tobytes(), book.tables.tobytes(), scales)) + nodes * _NODE_SENT
    )


class CodeWriter:
    """Puts codes and tables into one model in place of weights.

    Args:
        model: edited; `finish` has to be called in the end.
    """

    def __init__(self, model: Model) -> None:
        self._graph = model.graph
        self._name = Namer(model.graph)
        self._new: list[Node] = []
        self._shared: dict[tuple[Any, ...], Constant] = {}

    def write(self, weight: Constant, book: Codebook) -> None:
        """Have all that reads a weight read what the codes stand for.

        Args:
            weight: a constant of the main graph that is none of its outputs.
            book: codes of its shape, tables of its type.
        """
        name, packing = weight.name, Packing(book.bits)
        restored = self._restored(weight, self._name(f"{name}_values"))
        if book.even and book.scales is not None:
            codes = Constant(self._name(f"{name}_codes"), (book.codes + book.tables[0, 0]).astype(np.int8))
            kind = int(helper.np_dtype_to_tensor_dtype(book.tables.dtype))
            found = self._add("Cast", f"{name}_found", codes, to=kind)
            self._add("Mul", restored, found, self._scales(name, book, book.scales))
            return
        at = self._integers_of(name, packing, book.codes, book.codes.shape)
        if len(book.tables) > 1:
            starts = np.asarray(book.which << book.bits, packing.integer)
            at = self._add("Add", f"{name}_places", at, self._constant("starts", starts))
        table = Constant(self._name(f"{name}_table"), book.tables.ravel())
        if book.scales is None:
            self._add("Gather", restored, table, at)
            return
        found = self._add("Gather", f"{name}_found", table, at)
        self._add("Mul", restored, found, self._scales(name, book, book.scales))

    def _scales(self, name: str, book: Codebook, scales: Array) -> Constant:
        return Constant(self._name(f"{name}_scales"), book.factors(scales))

    def write_sparse(self, weight: Constant) -> None:
        """Have all that reads a weight read its values without zeros, put back to where they were.

        Args:
            weight: a constant of the main graph that is none of its outputs.
        """
        name, values = weight.name, weight.values
        stays, packing = np.asarray(values != 0, np.uint8), Packing(1)
        restored = self._restored(weight, name)  # as it is called where its zeros are restored
        flat = self._integers_of(name, packing, stays, (-1,))
        axis = self._constant("axis", np.asarray(0, packing.integer))
        counted = self._add("CumSum", f"{name}_counted", flat, axis)
        places = self._add("Mul", f"{name}_places", counted, flat)
        at = self._add("Reshape", f"{name}_at", places, self._integers(*values.shape))
        table = np.concatenate((np.zeros(1, values.dtype), values[stays != 0]))
        self._add("Gather", restored, Constant(self._name(f"{name}_table"), table), at)

    def _restored(self, weight: Constant, name: str) -> Variable:
        """What is read instead of a weight, still to be made."""
        restored = Variable(name, weight.dtype, weight.shape)
        ir.replace_uses(weight, restored)
        self._graph.initializers.pop(weight.name, None)
        return restored

    def _integers_of(self, name: str, packing: Packing, codes: Codes, shape: tuple[int, ...]) -> Tensor:
        """Integers of some shape."""
        kind, count = packing.integer, codes.size
        made: Tensor = Constant(self._name(f"{name}_codes"), packing.packed(codes))
        made = self._add("Cast", f"{name}_bytes", made, to=int(helper.np_dtype_to_tensor_dtype(kind)))
        if packing.word_bytes > 1:
            made = self._add("MatMul", f"{name}_words", made, self._constant("radices", packing.radices()))
        if packing.per_word > 1:
            made = self._add("Div", f"{name}_shifted", made, self._constant("divisors", packing.divisors()))
            modulus = np.asarray(1 << packing.bits, kind)
            made = self._add("Mod", f"{name}_digits", made, self._constant("modulus", modulus))
        if count % packing.per_word:
            made = self._add("Reshape", f"{name}_flat", made, self._integers(-1))
            made = self._add("Slice", f"{name}_used", made, self._integers(0), self._integers(count))
        return self._add("Reshape", f"{name}_indices", made, self._integers(*shape))

    def _integers(self, *values: int) -> Constant:
        return self._constant("sizes", np.asarray(values, np.int64))

    def _constant(self, wanted: str, values: Array) -> Constant:
        """A constant that all weights share."""
        key = values.dtype, values.shape, values.tobytes()
        if key not in self._shared:
            self._shared[key] = Constant(self._name(wanted), values)
        return self._shared[key]

    def _add(self, op: str, made: str | Variable, *inputs: Tensor, **attrs: int) -> Variable:
        out = Variable(self._name(made)) if isinstance(made, str) else made
        self._new.append(Node(op, "", attrs, inputs, [out]))  # names would take more room than some codes
        return out

    def finish(self) -> None:
        """Put the nodes where they can be run."""
        self._graph.nodes.extend(self._new)
        ir.sort(self._graph)
