"""How long decoders take to compress: made-up ones, of as many parameters as wanted.

    python benchmarks/decoders.py [--size SIZE ...] [--ways WAY ...] [--samples N]

Llama's structure (RMS norms, rotary positions, gated products, a table shared with the head), with weights of
random numbers: inputs of matrices have heavy-tailed scales, as those of trained decoders, and singular values
fall. Weights are external data, the samples 64 tokens each. Every run is a process of its own. Columns: CPU
seconds of the whole process, imports and its own children included; peak memory in MB, beside the file's own;
size of what it writes, relative to the float model; SQNR of the logits in dB on samples not seen.
"""

from __future__ import annotations

import argparse
import pickle
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.quantize import Tool, quantize
from onnxslim import CalibrationData, Target, load
from onnxslim.calibration.fidelity import Judge
from onnxslim.ir.graph import Array

Floats = NDArray[np.float32]

TOKENS, HEAD = 64, 64
# Bytes of a constant that the model's own file holds at most.
INSIDE = 1 << 16
# Samples to judge on.
JUDGED = 16
PROGRAM = """
import onnxslim
from onnxslim import CalibrationData, Pipeline
from onnxslim.passes import Factorize, Quantize, Slim
data = {data}
Pipeline(Slim(), {passes})(onnxslim.load(source), data=data).save(target)
"""
DATA = "CalibrationData(feeds)"
WAYS = {
    "int8": ('Quantize(activations="none")', "None"),
    "int4": ('Quantize(activations="none", weights="int4")', "None"),
    "int4, data": ('Quantize(activations="none", weights="int4")', DATA),
    "static": ("Quantize()", DATA),
    "factorize": ("Factorize(params=0.7)", DATA),
}


@dataclass(frozen=True)
class Decoder:
    """Sizes of one: vocabulary · width + layers · (4 · width² + 3 · width · hidden) parameters."""

    vocabulary: int
    width: int
    hidden: int
    layers: int


SIZES = {
    "21M": Decoder(16000, 512, 1408, 4),
    "119M": Decoder(32000, 1024, 2816, 7),
    "1200M": Decoder(32000, 2048, 5632, 22),
}


class Writer:
    """Nodes of a decoder, and its weights, which go to a file as they are made.

    Args:
        decoder: its sizes.
        data: the file.
        free: whether it takes any number of tokens up to `TOKENS`, not just that many.
        seed: of its weights.
    """

    def __init__(self, decoder: Decoder, data: BinaryIO, *, free: bool = False, seed: int = 0) -> None:
        self.decoder = decoder
        self._free = free
        self._data = data
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[TensorProto] = []
        self._random = np.random.default_rng(seed)

    def add(self, op: str, *inputs: str, name: str, **attrs: Any) -> str:
        """A node and its only output, of the same name."""
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attrs))
        return name

    def constant(self, name: str, values: Array) -> str:
        """A constant; a large one outside of the model's file."""
        tensor = numpy_helper.from_array(values if values.nbytes < INSIDE else values[:0], name)
        if values.nbytes >= INSIDE:
            tensor = TensorProto(name=name, data_type=tensor.data_type, dims=values.shape)
            tensor.data_location = TensorProto.EXTERNAL
            place = {
                "location": Path(self._data.name).name,
                "offset": self._data.tell(),
                "length": values.nbytes,
            }
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            self._data.write(values.tobytes())
        self.weights.append(tensor)
        return name

    def matrix(self, name: str, inputs: int, outputs: int) -> str:
        """Heavy-tailed by input, and with singular values that fall to a tenth."""
        random = self._random
        rank = min(inputs, outputs) // 8
        scales = np.clip(random.standard_t(3, (inputs, 1)), -8, 8) * 0.5 + 1
        some = random.standard_normal((inputs, rank)) @ random.standard_normal((rank, outputs)) / rank**0.5
        values = scales * (0.7 * some + 0.7 * random.standard_normal((inputs, outputs)))
        return self.constant(name, (values / (1.5 * inputs**0.5)).astype(np.float32))

    def linear(self, x: str, name: str, inputs: int, outputs: int) -> str:
        """A product with a matrix."""
        return self.add("MatMul", x, self.matrix(f"{name}.weight", inputs, outputs), name=name)

    def norm(self, x: str, name: str) -> str:
        """RMS norm with gains that differ."""
        gains = np.exp(0.5 * self._random.standard_normal(self.decoder.width)).astype(np.float32)
        square = self.add("Mul", x, x, name=f"{name}.square")
        mean = self.add("ReduceMean", square, "last", name=f"{name}.mean", keepdims=1)
        root = self.add("Sqrt", self.add("Add", mean, "tiny", name=f"{name}.sum"), name=f"{name}.root")
        unit = self.add("Div", x, root, name=f"{name}.unit")
        return self.add("Mul", unit, self.constant(f"{name}.gain", gains), name=name)

    def heads(self, x: str, name: str, rotated: bool) -> str:
        """Split [batch, tokens, width] by heads, [batch, heads, tokens, HEAD]; turned by positions."""
        split = self.add("Reshape", x, "split", name=f"{name}.split")
        each = self.add("Transpose", split, name=f"{name}.heads", perm=(0, 2, 1, 3))
        if not rotated:
            return each
        self.nodes.append(
            helper.make_node("Split", [each], [f"{name}.a", f"{name}.b"], axis=3, num_outputs=2)
        )
        minus = self.add("Neg", f"{name}.b", name=f"{name}.minus")
        turned = self.add("Concat", minus, f"{name}.a", name=f"{name}.turned", axis=3)
        along = self.add("Mul", each, "cosines", name=f"{name}.along")
        across = self.add("Mul", turned, "sines", name=f"{name}.across")
        return self.add("Add", along, across, name=f"{name}.rotated")

    def attention(self, x: str, name: str) -> str:
        """Causal self-attention."""
        width = self.decoder.width
        q, k, v = (
            self.heads(self.linear(x, f"{name}.{each}", width, width), f"{name}.{each}", each != "v")
            for each in "qkv"
        )
        keys = self.add("Transpose", k, name=f"{name}.keys", perm=(0, 1, 3, 2))
        scaled = self.add(
            "Mul", self.add("MatMul", q, keys, name=f"{name}.qk"), "shrink", name=f"{name}.scaled"
        )
        masked = self.add("Add", scaled, "mask", name=f"{name}.masked")
        mixed = self.add(
            "MatMul", self.add("Softmax", masked, name=f"{name}.softmax", axis=-1), v, name=f"{name}.mixed"
        )
        back = self.add("Transpose", mixed, name=f"{name}.back", perm=(0, 2, 1, 3))
        joined = self.add("Reshape", back, "join", name=f"{name}.joined")
        return self.linear(joined, f"{name}.o", width, width)

    def gated(self, x: str, name: str) -> str:
        """SiLU(x G) * (x U) D."""
        width, hidden = self.decoder.width, self.decoder.hidden
        gate, up = (self.linear(x, f"{name}.{each}", width, hidden) for each in ("gate", "up"))
        silu = self.add("Mul", gate, self.add("Sigmoid", gate, name=f"{name}.sigmoid"), name=f"{name}.silu")
        return self.linear(self.add("Mul", silu, up, name=f"{name}.product"), f"{name}.down", hidden, width)

    def model(self) -> onnx.ModelProto:
        """All of it."""
        width = self.decoder.width
        self._constants()
        x = self.add(
            "Gather", self.matrix("table", self.decoder.vocabulary, width), "tokens", name="embedded"
        )
        x = self.add("Mul", x, "grow", name="residual")
        for number in range(self.decoder.layers):
            name = f"layer{number}"
            mixed = self.attention(self.norm(x, f"{name}.norm1"), f"{name}.attention")
            x = self.add("Add", x, mixed, name=f"{name}.middle")
            x = self.add("Add", x, self.gated(self.norm(x, f"{name}.norm2"), f"{name}.mlp"), name=name)
        flipped = self.add("Transpose", "table", name="head", perm=(1, 0))
        self.add("MatMul", self.norm(x, "norm"), flipped, name="logits")
        length = "length" if self._free else TOKENS
        tokens = helper.make_tensor_value_info("tokens", TensorProto.INT64, ("batch", length))
        logits = helper.make_tensor_value_info(
            "logits", TensorProto.FLOAT, ("batch", length, self.decoder.vocabulary)
        )
        graph = helper.make_graph(self.nodes, "decoder", [tokens], [logits], self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)

    def _constants(self) -> None:
        angles = np.outer(np.arange(TOKENS), 1e4 ** (-np.arange(HEAD // 2) / (HEAD // 2)))
        around = np.concatenate([angles, angles], axis=1)
        table_scale = self.decoder.vocabulary**0.5
        values: dict[str, Array] = {
            "cosines": np.cos(around).astype(np.float32),
            "sines": np.sin(around).astype(np.float32),
            "mask": np.triu(np.full((TOKENS, TOKENS), -1e4, np.float32), 1),
            "shrink": np.float32(HEAD**-0.5).reshape(()),
            "grow": np.float32(table_scale).reshape(()),
            "tiny": np.float32(1e-5).reshape(()),
            "last": np.array([-1], np.int64),
            "split": np.array([0, self._length, self.decoder.width // HEAD, HEAD], np.int64),
            "join": np.array([0, self._length, self.decoder.width], np.int64),
        }
        cut = {"cosines": 1, "sines": 1, "mask": 2} if self._free else {}
        for name, value in values.items():
            self.constant(f"all_{name}" if name in cut else name, value)
        if cut:
            length = self.add("Shape", "tokens", name="length", start=1, end=2)
            for name, axes in cut.items():
                begin, along = np.zeros(axes, np.int64), np.arange(axes)
                ends = self.add(
                    "Expand", length, self.constant(f"{name}.axes", np.array([axes])), name=f"{name}.ends"
                )
                starts = self.constant(f"{name}.starts", begin)
                self.add(
                    "Slice", f"all_{name}", starts, ends, self.constant(f"{name}.along", along), name=name
                )

    @property
    def _length(self) -> int:
        return -1 if self._free else TOKENS


def inputs_of(decoder: Decoder, samples: int, seed: int) -> list[dict[str, Array]]:
    """Tokens, few of them often."""
    random = np.random.default_rng(seed)
    draw = random.zipf(1.2, (samples, 1, TOKENS)) % decoder.vocabulary
    return [{"tokens": tokens.astype(np.int64)} for tokens in draw]


def save(decoder: Decoder, path: Path, *, free: bool = False) -> None:
    """Write one, with its weights beside it; see `Writer`."""
    with path.with_suffix(".data").open("wb") as data:
        onnx.save(Writer(decoder, data, free=free).model(), path)


def row(name: str, way: str, source: Path, samples: Path) -> str:
    """A line of the table; says so where it fails."""
    decoder = SIZES[name]
    passes, data = WAYS[way]
    made = source.with_name("made.onnx")
    cell = quantize(
        Path(sys.executable), Tool((), PROGRAM.format(passes=passes, data=data)), source, made, samples
    )
    if cell.problem:
        return f"| {name} | {way} | {cell.problem} | | | |"
    files = [file for file in source.parent.iterdir() if file.name.startswith("made.onnx")]
    size = sum(file.stat().st_size for file in files if file.suffix not in (".py", ".log"))
    judged = CalibrationData(inputs_of(decoder, JUDGED, seed=1))
    kept = Judge(load(source), judged, Target.cpu(), samples=JUDGED)(load(made)).sqnr
    share = size / source.with_suffix(".data").stat().st_size
    return f"| {name} | {way} | {cell.seconds:.1f} | {cell.megabytes:.0f} | {share:.2f} | {kept:.2f} |"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", nargs="*", default=["21M"], choices=list(SIZES))
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--samples", type=int, default=16)
    given = parser.parse_args()
    print("| decoder | way | CPU s | peak MB | size | SQNR dB |")
    print("|---|---|---|---|---|---|")
    for name in given.size:
        with tempfile.TemporaryDirectory() as folder:
            source, samples = Path(folder) / "decoder.onnx", Path(folder) / "samples.pickle"
            save(SIZES[name], source)
            samples.write_bytes(pickle.dumps(inputs_of(SIZES[name], given.samples, seed=0)))
            for way in given.ways:
                print(row(name, way, source, samples), flush=True)


if __name__ == "__main__":
    main()
