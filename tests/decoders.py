"""Small decoders as tools for generation export them: operators of ONNX Runtime's own all over."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from tests.helpers import parse

_HEAD = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
# Positions that angles are there for.
_LONGEST = 32


@dataclass(frozen=True)
class Decoder:
    """GroupQueryAttention and a gated product in each layer, normalized by what ONNX Runtime has for it.

    Attributes:
        layers, width, hidden, vocabulary: of it.
        heads, shared: of queries, and of keys and values.
        size: channels of a head.
        past: whether keys and values of what was before are inputs, and come out with what is new.
        packed: whether queries, keys and values come out of one product.
        rotary: whether attention turns queries and keys; RotaryEmbedding does otherwise.
        bits: of the codes of matrices; 0 for float32.
        table: whether embeddings are codes, too.
    """

    layers: int = 2
    width: int = 64
    hidden: int = 96
    vocabulary: int = 50
    heads: int = 4
    shared: int = 2
    size: int = 16
    past: bool = False
    packed: bool = False
    rotary: bool = True
    bits: int = 0
    table: bool = False

    def model(self) -> Model:
        """It, with weights of random numbers."""
        return _Text(self).model()

    def tokens(self, samples: int, length: int = 8, seed: int = 0) -> list[dict[str, Array]]:
        """Inputs, of one sample each."""
        random = np.random.default_rng(seed)
        past = {f"past{at}": normal for at, normal in enumerate(self._past(random))} if self.past else {}
        return [{"tokens": random.integers(0, self.vocabulary, (1, length)), **past} for _ in range(samples)]

    def _past(self, random: np.random.Generator) -> list[Array]:
        shape = (1, self.shared, 3, self.size)
        return [random.standard_normal(shape).astype(np.float32) for _ in range(2 * self.layers)]


class _Text:
    """Nodes of a decoder, as text, and its constants."""

    def __init__(self, of: Decoder) -> None:
        self.of = of
        self.nodes: list[str] = []
        self.constants: dict[str, Array] = {}
        self._random = np.random.default_rng(7)

    def model(self) -> Model:
        of = self.of
        angles = np.outer(np.arange(_LONGEST), 100.0 ** -np.linspace(0, 1, of.size // 2))
        self.constants |= {
            "cosines": np.cos(angles).astype(np.float32),
            "sines": np.sin(angles).astype(np.float32),
            "one": np.array(1),
            "axis": np.array([0]),
            "first": np.zeros(1, np.int64),
        }
        self._lengths()
        self._embedded()
        self._norm("r0", None, "n0")
        for at in range(of.layers):
            self._attention(f"n{2 * at}", at)
            self._norm(f"r{2 * at}", f"o{at}", f"n{2 * at + 1}")
            self._gated(f"n{2 * at + 1}", at)
            self._norm(f"r{2 * at + 1}", f"d{at}", f"n{2 * at + 2}")
        self._product(f"n{2 * of.layers}", "logits", of.width, of.vocabulary)
        cache = f"float[B,{of.shared},P,{of.size}]"
        grown = f"float[B,{of.shared},T,{of.size}]"
        past = "".join(f", {cache} past{at}" for at in range(2 * of.layers)) if of.past else ""
        present = "".join(f", {grown} present{at}" for at in range(2 * of.layers)) if of.past else ""
        text = f"{_HEAD} g (int64[B,S] tokens{past}) => (float[B,S,{of.vocabulary}] logits{present})"
        return parse(f"{text} {{ {' '.join(self.nodes)} }}", self.constants)

    def _lengths(self) -> None:
        """How many tokens there are, with those before, and the same less one for each sample."""
        self.nodes += ["b = Shape<end=1>(tokens)", "s = Shape<start=1>(tokens)"]
        total = "s"
        if self.of.past:
            self.nodes += ["before = Shape<start=2, end=3>(past0)", "t = Add(before, s)"]
            total = "t"
        self.nodes += [
            f"total64 = Squeeze({total}, axis)",
            "total = Cast<to=6>(total64)",
            "last64 = Sub(total64, one)",
            "last = Cast<to=6>(last64)",
            "lengths = Expand(last, b)",
        ]

    def _matrix(self, inputs: int, outputs: int) -> Array:
        """Of a rank of an eighth, as far as a tenth of it goes."""
        random, rank = self._random, min(inputs, outputs) // 8
        some = random.standard_normal((inputs, rank)) @ random.standard_normal((rank, outputs)) / rank**0.5
        values = (some + 0.1 * random.standard_normal((inputs, outputs))) / inputs**0.5
        return np.asarray(values, np.float32)

    def _embedded(self) -> None:
        table = self._matrix(self.of.vocabulary, self.of.width)
        if not self.of.table:
            self.constants["table"] = table
            self.nodes.append("r0 = Gather(table, tokens)")
            return
        self.constants["table"], self.constants["s_table"] = self._coded(table)
        attrs = f"bits={self.of.bits}, block_size=16"
        self.nodes.append(f"r0 = com.microsoft.GatherBlockQuantized<{attrs}>(table, tokens, s_table)")

    def _coded(self, rows: Array) -> tuple[Array, Array]:
        """Codes of rows with a scale for each 16, and the scales, a row of them for each."""
        bits, blocks = self.of.bits, rows.reshape(len(rows), -1, 16)
        scales = np.abs(blocks).max(2) / (2 ** (bits - 1) - 1)
        codes = (np.rint(blocks / scales[..., None]) + 2 ** (bits - 1)).astype(np.uint8).reshape(rows.shape)
        return (codes[:, ::2] | (codes[:, 1::2] << 4) if bits == 4 else codes), scales.astype(np.float32)

    def _product(self, x: str, made: str, inputs: int, outputs: int) -> None:
        """A product by a matrix, whose codes have a scale for each 16 of a column."""
        weight = self._matrix(inputs, outputs)
        if not self.of.bits:
            self.constants[f"w_{made}"] = weight
            self.nodes.append(f"{made} = MatMul({x}, w_{made})")
            return
        stored, scales = self._coded(weight.T)
        self.constants |= {
            f"w_{made}": stored.reshape(outputs, inputs // 16, -1),
            f"s_{made}": scales.reshape(-1),
        }
        attrs = f"K={inputs}, N={outputs}, bits={self.of.bits}, block_size=16, accuracy_level=1"
        self.nodes.append(f"{made} = com.microsoft.MatMulNBits<{attrs}>({x}, w_{made}, s_{made})")

    def _norm(self, x: str, added: str | None, made: str) -> None:
        """A normalization of x and what is added to it; the sum goes on to the next."""
        number = int(made[1:])
        self.constants[f"g{number}"] = np.exp(0.3 * self._random.standard_normal(self.of.width)).astype(
            np.float32
        )
        if added is None:
            self.nodes.append(f"{made} = SimplifiedLayerNormalization<axis=-1, epsilon=1e-5>({x}, g{number})")
        else:
            total = f", , , r{number}" if number < 2 * self.of.layers else ""
            self.nodes.append(
                f"{made}{total} = com.microsoft.SkipSimplifiedLayerNormalization<epsilon=1e-5>"
                f"({x}, {added}, g{number})"
            )

    def _attention(self, x: str, at: int) -> None:
        of = self.of
        wide, narrow = of.heads * of.size, of.shared * of.size
        if of.packed:
            self._product(x, f"qkv{at}", of.width, wide + 2 * narrow)
            reads = f"qkv{at}, , "
        else:
            for name, outputs in (("q", wide), ("k", narrow), ("v", narrow)):
                self._product(x, f"{name}{at}", of.width, outputs)
            reads = f"q{at}, k{at}, v{at}"
        if not of.rotary:
            for name in "qk":
                self.nodes.append(
                    f"{name}t{at} = com.microsoft.RotaryEmbedding({name}{at}, first, cosines, sines)"
                )
            reads = f"qt{at}, kt{at}, v{at}"
        past = f"past{2 * at}, past{2 * at + 1}" if of.past else ", "
        angles = ", cosines, sines" if of.rotary else ""
        attrs = f"num_heads={of.heads}, kv_num_heads={of.shared}, do_rotary={int(of.rotary)}"
        self.nodes.append(
            f"a{at}, present{2 * at}, present{2 * at + 1} = com.microsoft.GroupQueryAttention<{attrs}>"
            f"({reads}, {past}, lengths, total{angles})"
        )
        self._product(f"a{at}", f"o{at}", wide, of.width)

    def _gated(self, x: str, at: int) -> None:
        of = self.of
        for name in ("gate", "up"):
            self._product(x, f"{name}{at}", of.width, of.hidden)
        self.nodes += [
            f"sigmoid{at} = Sigmoid(gate{at})",
            f"silu{at} = Mul(gate{at}, sigmoid{at})",
            f"mixed{at} = Mul(silu{at}, up{at})",
        ]
        self._product(f"mixed{at}", f"d{at}", of.hidden, of.width)
