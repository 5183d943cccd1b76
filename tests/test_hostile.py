"""Files from strangers: one clear line, the right exit code, nothing lost, nothing leaked, no traceback."""

from __future__ import annotations

import csv
import ctypes
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim import cli
from onnxslim.ir.model import load
from tests.helpers import ROOT, heed_interrupts, parse

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links, signals and limits of Unix")

SECRET = b"CANARY-0123456789-CANARY"
# Of a process that imports onnx and onnxruntime: 0.1 GB, 1.5 s.
MAX_RSS = 1_000_000_000
MAX_SECONDS = 10.0


@dataclass(frozen=True)
class Done:
    """A finished run of the command line."""

    code: int
    out: str
    err: str
    rss: int
    seconds: float


# A process counts the memory of the one it was forked from as its own: between the tests and the command
# stands a small one, which waits for it and tells what it took.
LAUNCH = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(process.pid, 0)
with open(sys.argv[1], "w") as file:
    json.dump([os.waitstatus_to_exitcode(status), usage.ru_maxrss, usage.ru_utime + usage.ru_stime], file)
"""


# The command with less patience for loops on made-up inputs, since those that never end take all of it.
IMPATIENT = """
import sys
from dataclasses import replace
from onnxslim import cli
from onnxslim.runtime import probe
probe.LIMITS = replace(probe.LIMITS, seconds=1)
sys.exit(cli.main())
"""


def onnxslim(
    *words: str | Path,
    cwd: Path,
    limit: Callable[[], None] | None = None,
    called: Sequence[str] = ("-m", "onnxslim"),
) -> Done:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", *called, *map(str, words)]
    launch = [sys.executable, "-I", "-S", "-c", LAUNCH, ".told", *command]
    with open(cwd / ".out", "w+") as out, open(cwd / ".err", "w+") as err:
        subprocess.run(launch, stdout=out, stderr=err, cwd=cwd, env=environment, preexec_fn=limit, check=True)
        out.seek(0)
        err.seek(0)
        # Seconds of the processor, so that a busy machine does not count.
        code, kilobytes, seconds = json.loads((cwd / ".told").read_text())
        done = Done(code, out.read(), err.read(), kilobytes * 1024, seconds)
    for name in (".out", ".err", ".told"):
        (cwd / name).unlink()
    assert "Traceback" not in done.err
    return done


def within(capsys: pytest.CaptureFixture[str], *words: str | Path) -> Done:
    """The same in this process, where its memory and time do not matter."""
    code = cli.main([str(word) for word in words])
    captured = capsys.readouterr()
    return Done(code, captured.out, captured.err, 0, 0.0)


def refused(done: Done, code: int, *told: str) -> None:
    """One line on the standard error that says what is wrong, and nothing else."""
    assert done.code == code, done.err
    assert done.out == ""
    assert done.err.startswith("onnxslim: error: ")
    assert done.err.count("\n") == 1
    for text in told:
        assert text in done.err


def info(
    name: str, shape: Sequence[int | str] = ("N", 4), kind: int = TensorProto.FLOAT
) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def model(
    *nodes: onnx.NodeProto,
    constants: Sequence[TensorProto] = (),
    outputs: Sequence[str] = ("y",),
    ir: int = 8,
    opset: int = 17,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes), "g", [info("x")], [info(name) for name in outputs], list(constants)
    )
    return helper.make_model(graph, ir_version=ir, opset_imports=[helper.make_opsetid("", opset)])


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


def weight(values: object = None, name: str = "w") -> TensorProto:
    return numpy_helper.from_array(
        np.ones((4, 4), np.float32) if values is None else np.asarray(values), name
    )


RELU = node("Relu", "x", "y")
PRODUCT = node("MatMul", "x w", "y")


# ------------------------------------------------------------------------------------- external data


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A folder `in` beside a secret file, as large as the weight of a model that points there."""
    (tmp_path / "secret.bin").write_bytes((SECRET * 3)[:64])
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    os.link(tmp_path / "secret.bin", folder / "hard.bin")
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "secret.bin", tmp_path / "elsewhere" / "w.bin")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "pipe").mkdir()
    return folder


def external(folder: Path, **entries: str) -> Path:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    path = folder / "model.onnx"
    path.write_bytes(model(PRODUCT, constants=[tensor]).SerializeToString())
    return path


LOCATIONS = {
    "parent": "../secret.bin",
    "deep parent": "pipe/../../secret.bin",
    "absolute": "{parent}/secret.bin",
    "symbolic link": "link.bin",
    "hard link": "hard.bin",
    "linked folder": "linked/w.bin",
    "NUL": "link.bin\0.data",
    "backslash": "..\\secret.bin",
    "drive": "C:\\secret.bin",
    "folder": "pipe",
    "missing": "nothing.bin",
    "empty": "",
    "itself": ".",
    "device": "/dev/zero",
    "process": "/proc/self/environ",
}


@pytest.mark.parametrize("kind", LOCATIONS)
@pytest.mark.parametrize("command", ["slim", "inspect"])
def test_data_outside_of_the_model_is_refused_and_never_read(
    canary: Path, kind: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = external(canary, location=LOCATIONS[kind].format(parent=canary.parent))
    results: list[str | Path] = []
    if command == "slim":
        results = [canary / "out.onnx", "--report", canary / "report.html"]
    before = sorted(canary.rglob("*"))
    done = within(capsys, command, path, *results)
    refused(done, 3, "'w'")
    assert "CANARY" not in done.err
    assert sorted(canary.rglob("*")) == before


LIES = {
    "negative offset": {"offset": "-64"},
    "negative length": {"length": "-64"},
    "beyond the end": {"offset": "32"},
    "far beyond": {"offset": str(1 << 60)},
    "huge length": {"length": str(1 << 60)},
    "odd length": {"length": "63"},
    "no number": {"offset": "many"},
    "overflow": {"offset": str((1 << 64) - 32), "length": "64"},
}


@pytest.mark.parametrize("kind", LIES)
def test_lies_about_offset_and_length_are_refused(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(64))
    path = external(tmp_path, location="w.bin", **LIES[kind])
    refused(within(capsys, "slim", path, tmp_path / "out.onnx"), 3, "'w'")
    assert not (tmp_path / "out.onnx").exists()


def test_results_go_where_they_are_told_whatever_the_input_says(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "y.onnx.data").write_bytes(b"somebody else's")
    (tmp_path / "y.onnx.data").write_bytes(b"somebody else's too")
    (tmp_path / "in" / "odd name.bin").write_bytes(np.ones(1024, np.float32).tobytes())
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 256])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="odd name.bin")
    proto = model(node("Identity", "x", "t"), node("MatMul", "t w", "y"), constants=[tensor])
    proto.graph.output[0].CopyFrom(info("y", ("N", 256)))
    (tmp_path / "in" / "x.onnx").write_bytes(proto.SerializeToString())
    done = onnxslim("slim", "in/x.onnx", "out/y.onnx", "--external-data", cwd=tmp_path)
    assert done.code == 0, done.err
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == [
        "in/odd name.bin",
        "in/x.onnx",
        "out/y.onnx",
        "out/y.onnx.1.data",
        "out/y.onnx.data",
        "y.onnx.data",
    ]
    assert (tmp_path / "out" / "y.onnx.data").read_bytes() == b"somebody else's"
    assert (tmp_path / "y.onnx.data").read_bytes() == b"somebody else's too"


# ------------------------------------------------------------------------------------------- bombs


def shape(*sizes: int) -> TensorProto:
    return numpy_helper.from_array(np.array(sizes, np.int64), "s")


SUM = (node("ReduceSum", "c", "r", keepdims=0), node("Add", "x r", "y"))
ONE = weight(np.ones((1, 1), np.float32), "o")
BOMBS = {
    "ConstantOfShape, 4 TB": ([node("ConstantOfShape", "s", "c"), *SUM], [shape(1 << 40)]),
    "ConstantOfShape, 4.8 GB": ([node("ConstantOfShape", "s", "c"), *SUM], [shape(1_200_000_000)]),
    "ConstantOfShape, less than nothing": ([node("ConstantOfShape", "s", "c"), *SUM], [shape(-5)]),
    "Expand, 40 GB": ([node("Expand", "o s", "c"), *SUM], [ONE, shape(100_000, 100_000)]),
    "Tile, 40 GB": ([node("Tile", "o s", "c"), *SUM], [ONE, shape(100_000, 100_000)]),
    "Range, 4 TB": (
        [node("Range", "a b d", "i"), node("Cast", "i", "c", to=1), *SUM],
        [weight(np.int64(value), name) for name, value in (("a", 0), ("b", 1 << 40), ("d", 1))],
    ),
    "a chain of doublings": (
        [
            *(node("Concat", f"c{i} c{i}", f"c{i + 1}", axis=0) for i in range(40)),
            node("ReduceSum", "c40", "r", keepdims=0),
            node("Add", "x r", "y"),
        ],
        [weight(np.ones(1 << 10, np.float32), "c0")],
    ),
}
RUN = ("Expand, 40 GB", "a chain of doublings")
# What is small in a file but not in bodies: ones that fill memory, and loops that never end or double.
ENDLESS_CONSTANTS = "a loop over constants that never ends"
BODIES = {
    "ConstantOfShape in a branch, 4.8 GB": (
        """y = If(c) <then_branch = t () => (float a) { k = ConstantOfShape(s) a = ReduceSum<keepdims=0>(k) },
        else_branch = e () => (float b) { b = ReduceSum<keepdims=0>(x) }>""",
        {"s": np.array([1_200_000_000])},
    ),
    "a loop that never ends": (
        """z = Loop(m, , x) <body = b (int64 i, bool c1, float[N] p) => (bool c2, float[N] q)
        { c2 = Identity(c1) q = Cos(p) }> y = ReduceSum<keepdims=0>(z)""",
        {"m": np.array(1 << 40)},
    ),
    ENDLESS_CONSTANTS: (
        """z = Loop(m, , w) <body = b (int64 i, bool c1, float[1] p) => (bool c2, float[1] q)
        { c2 = Identity(c1) q = Cos(p) }> s = Add(x, z) y = ReduceSum<keepdims=0>(s)""",
        {"m": np.array(1 << 40), "w": np.ones(1, np.float32)},
    ),
    "a loop that doubles": (
        """z = Loop(m, , w) <body = b (int64 i, bool c1, float[P] p) => (bool c2, float[Q] q)
        { c2 = Identity(c1) q = Concat<axis=0>(p, p) }> s = ReduceSum<keepdims=0>(z)
        t = ReduceSum<keepdims=0>(x) y = Add(s, t)""",
        {"m": np.array(40), "w": np.ones(1024, np.float32)},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_are_neither_folded_nor_run(tmp_path: Path, kind: str) -> None:
    nodes, constants = BOMBS[kind]
    (tmp_path / "in.onnx").write_bytes(model(*nodes, constants=constants).SerializeToString())
    done = onnxslim("slim", "in.onnx", "out.onnx", "--report", "report.html", cwd=tmp_path)
    assert done.code == 0, done.err
    assert (tmp_path / "out.onnx").stat().st_size < 20_000
    assert "ReduceSum" in {each.op for each in load(tmp_path / "out.onnx").nodes()}, "left unfolded"
    # What holds a model's run in bounds is the same for all of them.
    ran = [onnxslim("validate", "in.onnx", "in.onnx", cwd=tmp_path)] if kind in RUN else []
    for each in (done, *ran):
        assert each.rss < MAX_RSS
        assert each.seconds < MAX_SECONDS
        assert each.code in (0, 3, 5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BODIES)
def test_bombs_in_bodies_are_stopped(tmp_path: Path, kind: str) -> None:
    body, constants = BODIES[kind]
    parse(f"g (float[N] x, bool c) => (float y) {{ {body} }}", constants).save(tmp_path / "in.onnx")
    # What it is run on makes no difference to a loop that never ends.
    ran = ("validate", "in.onnx", "in.onnx")
    for words in (("slim", "in.onnx", "out.onnx"), *((ran,) if kind != ENDLESS_CONSTANTS else ())):
        done = onnxslim(*words, cwd=tmp_path, called=("-c", IMPATIENT))
        assert done.rss < MAX_RSS
        assert done.seconds < MAX_SECONDS
        assert done.code in (0, 3, 5)
    assert (tmp_path / "out.onnx").exists()


def test_inputs_that_nobody_could_feed_are_not_made_up(tmp_path: Path) -> None:
    proto = model(RELU)
    for each in (proto.graph.input[0], proto.graph.output[0]):
        each.CopyFrom(info(each.name, (1 << 40, 4)))
    (tmp_path / "in.onnx").write_bytes(proto.SerializeToString())
    done = onnxslim("slim", "in.onnx", "out.onnx", cwd=tmp_path)
    assert done.code == 0
    assert done.rss < MAX_RSS
    assert "no inputs could be made up" in done.out


# ------------------------------------------------------------------------------------ broken models


def varint(value: int) -> bytes:
    made = b""
    while value > 127:
        made, value = made + bytes([value & 127 | 128]), value >> 7
    return made + bytes([value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def nested(depth: int) -> bytes:
    """An If in an If in an If, which onnx itself refuses to build."""
    graph = b""
    for _ in range(depth):
        branch = field(1, b"then_branch") + field(6, graph) + varint(20 << 3) + varint(5)
        graph = field(1, field(4, b"If") + field(5, branch))
    return varint(1 << 3) + varint(8) + field(7, graph) + field(8, varint(2 << 3) + varint(17))


def resized(*dims: int) -> TensorProto:
    tensor = weight()
    tensor.dims[:] = dims
    return tensor


def truncated() -> bytes:
    content = model(PRODUCT, constants=[weight()]).SerializeToString()
    return content[: len(content) // 2]


Broken = bytes | onnx.ModelProto
BROKEN: dict[str, tuple[Broken, str]] = {
    "nothing": (b"", "not an ONNX model"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(64), "is not an ONNX model"),
    "a text": (b"hello, world", "is not an ONNX model"),
    "half a model": (truncated(), "cut short"),
    "nested 60 deep": (nested(60), "nested more deeply than protobuf reads"),
    "nested 5000 deep": (nested(5000), "nested more deeply than protobuf reads"),
    "a cycle": (
        model(node("Add", "x c", "a"), node("Relu", "a", "b"), node("Neg", "b", "c"), node("Relu", "c", "y")),
        "the graph has a cycle through node",
    ),
    "dangling input": (model(node("MatMul", "x nope", "y")), "reads tensor 'nope', which nothing"),
    "no such output": (model(node("Relu", "x", "z")), "reads tensor 'y', which nothing"),
    "an output made twice": (model(RELU, node("Neg", "x", "y")), "tensor 'y' is made more than once"),
    "an initializer twice": (
        model(PRODUCT, constants=[weight(), weight()]),
        "initializer 'w' is there twice",
    ),
    "too little data": (model(PRODUCT, constants=[resized(40, 4)]), "takes 640 bytes, but has 64"),
    "too much data": (model(PRODUCT, constants=[resized(2, 4)]), "takes 32 bytes, but has 64"),
    "negative size": (model(PRODUCT, constants=[resized(-4, 4)]), "'w' has a negative size"),
    "enormous sizes": (model(PRODUCT, constants=[resized(1 << 40, 1 << 40)]), "but has 64"),
    "an unknown type": (
        model(PRODUCT, constants=[TensorProto(name="w", data_type=99, dims=[1], raw_data=b"1")]),
        "unknown type 99",
    ),
    "IR from the future": (model(RELU, ir=99), "IR version 99; the installed onnx"),
    "opset from the future": (model(RELU, opset=99), "opset 99 of ai.onnx; the installed onnx"),
    "opset from before": (model(RELU, opset=-3), "opset -3 of ai.onnx"),
    "no outputs": (model(RELU, outputs=()), "the model has no outputs"),
    "no operator sets": (onnx.ModelProto(ir_version=8, graph=model(RELU).graph), "imports no operator set"),
    "text that is none": (
        model(PRODUCT, constants=[weight()]).SerializeToString().replace(b"MatMul", b"Mat\xff\xfel"),
        "is not UTF-8",
    ),
    "no graph": (
        onnx.ModelProto(ir_version=8, opset_import=[helper.make_opsetid("", 17)]),
        "it has no graph",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_models_are_refused_in_one_line(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, told = BROKEN[kind]
    path = tmp_path / "in.onnx"
    path.write_bytes(broken if isinstance(broken, bytes) else broken.SerializeToString())
    (tmp_path / "out.onnx").write_bytes(b"what was there before")
    for words in (("slim", path, tmp_path / "out.onnx"), ("inspect", path), ("validate", path, path)):
        refused(within(capsys, *words), 3, told, "in.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == b"what was there before"


def test_deep_nesting_that_protobuf_reads_is_no_problem(tmp_path: Path) -> None:
    def body(depth: int) -> list[onnx.NodeProto]:
        if not depth:
            return [node("Relu", "x", "y0")]
        inner = helper.make_graph(body(depth - 1), "t", [], [info(f"y{depth - 1}")])
        other = helper.make_graph([node("Neg", "x", f"y{depth - 1}")], "e", [], [info(f"y{depth - 1}")])
        return [node("If", "c", f"y{depth}", then_branch=inner, else_branch=other)]

    proto = model(*body(20), outputs=("y20",))
    proto.graph.input.append(info("c", (), TensorProto.BOOL))
    (tmp_path / "in.onnx").write_bytes(proto.SerializeToString())
    done = onnxslim("slim", "in.onnx", "out.onnx", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.seconds < MAX_SECONDS


def test_unsorted_nodes_are_sorted(tmp_path: Path) -> None:
    (tmp_path / "in.onnx").write_bytes(
        model(node("Neg", "t", "y"), node("Relu", "x", "t")).SerializeToString()
    )
    assert onnxslim("slim", "in.onnx", "out.onnx", cwd=tmp_path).code == 0
    onnx.checker.check_model(str(tmp_path / "out.onnx"))


def test_custom_operators_are_kept_and_left_alone(tmp_path: Path) -> None:
    proto = model(
        node("Identity", "x", "t"), node("Magic", "t", "u", domain="acme", strength=3), node("Relu", "u", "y")
    )
    proto.opset_import.append(helper.make_opsetid("acme", 1))
    proto.metadata_props.add(key="custom_ops_library", value=str(tmp_path / "evil.so"))
    (tmp_path / "in.onnx").write_bytes(proto.SerializeToString())
    done = onnxslim("slim", "in.onnx", "out.onnx", cwd=tmp_path)
    assert done.code == 0
    assert "the input does not run" in done.out
    kept = next(each for each in load(tmp_path / "out.onnx").nodes() if each.op == "Magic")
    assert (kept.domain, kept.attrs["strength"]) == ("acme", 3)
    refused(
        onnxslim("slim", "in.onnx", "--custom-ops", "evil.so", cwd=tmp_path),
        2,
        "custom operators from 'evil.so'",
    )


def test_custom_operators_run_where_a_flag_names_their_library(tmp_path: Path) -> None:
    extensions = pytest.importorskip(
        "onnxruntime_extensions", reason="no library of custom operators: pip install onnxruntime-extensions"
    )
    text = '<ir_version: 8, opset_import: ["" : 17, "ai.onnx.contrib" : 1]> '
    text += "g (string[N] x) => (string[N] y) { t = Identity(x)  y = ai.onnx.contrib.StringUpper(t) }"
    onnx.save(onnx.parser.parse_model(text), tmp_path / "in.onnx")
    words = ("slim", "in.onnx", "out.onnx", "--custom-ops", extensions.get_library_path())
    done = onnxslim(*words, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "does not run" not in done.out
    assert [each.op for each in load(tmp_path / "out.onnx").nodes()] == ["StringUpper"]


# ------------------------------------------------------------------------------------------ NaN weights


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_no_numbers(tmp_path: Path, bad: float) -> None:
    values = np.ones((4, 4), np.float32)
    values[1, 2] = bad
    proto = model(node("MatMul", "x w", "t"), node("Relu", "t", "y"), constants=[weight(values)])
    (tmp_path / "in.onnx").write_bytes(proto.SerializeToString())
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32))
    done = onnxslim("slim", "in.onnx", "out.onnx", cwd=tmp_path)
    assert done.code == 0, done.err
    kept = next(load(tmp_path / "out.onnx").constants()).values
    np.testing.assert_array_equal(kept, values)
    done = onnxslim("quantize", "in.onnx", "q.onnx", "--data", "data.npz", "--classifier", cwd=tmp_path)
    assert done.code == 4, "there is nothing that can be done in integers"
    assert "internal" not in done.err
    assert not (tmp_path / "q.onnx").exists()


# ------------------------------------------------------------------------------------------------ data


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_data_never_runs_code_and_never_fills_the_memory(tmp_path: Path) -> None:
    parse("g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }").save(tmp_path / "in.onnx")
    trap = np.empty(1, object)
    trap[0] = Trap(tmp_path / "touched")
    np.savez(tmp_path / "pickle.npz", x=trap)
    np.save(tmp_path / "pickle.npy", trap, allow_pickle=True)
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (2500000000, 4), }".ljust(117) + "\n"
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00v\x00" + header.encode() + bytes(1 << 22))
    assert (tmp_path / "bomb.npz").stat().st_size < 20_000
    for name in ("pickle.npz", "pickle.npy", "bomb.npz"):
        done = onnxslim("validate", "in.onnx", "in.onnx", "--data", name, cwd=tmp_path)
        refused(done, 5, name)
        assert done.rss < MAX_RSS
    assert not (tmp_path / "touched").exists()


def test_tables_for_spreadsheets_hold_no_formulas(tmp_path: Path) -> None:
    proto = model(helper.make_node("Relu", ["x"], ["y"], name="=cmd|' /C calc'!A0"))
    (tmp_path / "in.onnx").write_bytes(proto.SerializeToString())
    assert onnxslim("inspect", "in.onnx", "--dump-to-disk", cwd=tmp_path).code == 0
    with open(tmp_path / "in.onnx_model_info.csv", newline="", encoding="utf-8") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert "'=cmd|' /C calc'!A0" in cells
    assert not [cell for cell in cells if cell.startswith("=")]


# -------------------------------------------------------------------------------------------- saving


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """A folder with a model that slim changes, its weights in a data file."""
    weights = {"w": np.arange(512 * 512, dtype=np.float32).reshape(512, 512)}
    text = "g (float[N,512] x, float[512,512] w) => (float[N,512] y) { t = Identity(x)  y = MatMul(t, w) }"
    parse(text, weights).save(tmp_path / "m.onnx", external_data=True)
    return tmp_path


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


KILLER = """
import os, signal, sys
step, path = int(sys.argv[1]), sys.argv[2]
count = 0
def counted(call):
    def wrapped(*args, **kwargs):
        global count
        count += 1
        if count == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return wrapped
for name in ("fsync", "replace", "open", "mkdir", "unlink", "rmdir"):
    setattr(os, name, counted(getattr(os, name)))
from onnxslim.ir.model import load
model = load(path)
model.graph.nodes[0].op = "Neg"
count = 0
model.save(path, external_data=True)
print("saved")
"""


def test_kill_9_at_any_step_leaves_the_old_pair_or_the_new_one(big: Path) -> None:
    saved = False
    seen = set()
    for step in range(1, 40):
        folder = big / f"step{step}"
        folder.mkdir()
        for name in ("m.onnx", "m.onnx.data"):
            shutil.copy(big / name, folder / name)
        command = [sys.executable, "-c", KILLER, str(step), str(folder / "m.onnx")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        found = load(folder / "m.onnx")
        seen.add(found.graph.nodes[0].op)
        assert next(found.constants()).values[1, 0] == 512.0
        if "saved" in done.stdout:
            saved = True
            break
        assert done.returncode == -signal.SIGKILL
    assert saved
    assert seen == {"Identity", "Neg"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if (
        os.geteuid()
        or shutil.which("mount") is None
        or subprocess.run(command, check=False, capture_output=True).returncode
    ):
        pytest.skip("mounting a small file system takes root and a kernel that lets it")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_loses_nothing(big: Path, small_disk: Path) -> None:
    for name in ("m.onnx", "m.onnx.data"):
        shutil.copy(big / name, small_disk / name)
    (small_disk / "filler").write_bytes(bytes(1_500_000))
    before = listing(small_disk)
    for words in ((), ("--external-data",)):
        done = onnxslim("slim", small_disk / "m.onnx", small_disk / "m.onnx", *words, "-q", cwd=big)
        refused(done, 6, "cannot write", "No space left on device")
    assert listing(small_disk) == before
    assert load(small_disk / "m.onnx").graph.nodes[0].op == "Identity"


def test_a_limit_on_file_sizes_loses_nothing(big: Path) -> None:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    before = listing(big)
    refused(onnxslim("slim", "m.onnx", "m.onnx", "-q", cwd=big, limit=limit), 6, "cannot write")
    assert listing(big) == before


def obey_modes() -> None:
    """Give up what lets root read and write everywhere: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    for capability in (1, 2) if not os.geteuid() else ():
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_a_read_only_folder_is_refused_before_any_work(big: Path) -> None:
    private = big / "private"
    private.mkdir()
    private.chmod(0o555)
    # That there is no such model would come later.
    done = onnxslim("slim", "none.onnx", private / "out.onnx", cwd=big, limit=obey_modes)
    refused(done, 6, "is not writable")
    shutil.copy(big / "m.onnx", big / "locked.onnx")
    (big / "locked.onnx").chmod(0o000)
    refused(onnxslim("slim", "locked.onnx", cwd=big, limit=obey_modes), 3, "Permission denied")


def test_eight_runs_at_once_into_one_folder(big: Path) -> None:
    """Half of them even to one file: it is one of the results, with its own data."""
    words = [sys.executable, "-m", "onnxslim", "slim", "m.onnx"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [*words, f"out{index // 2 if index < 4 else 9}.onnx", "--external-data", "-q"],
            cwd=big,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(8)
    ]
    for process in running:
        out, err = process.communicate(timeout=300)
        assert (process.returncode, out, err) == (0, "", "")
    for name in ("out0.onnx", "out1.onnx", "out9.onnx"):
        found = load(big / name)
        assert [each.op for each in found.nodes()] == ["MatMul"]
        assert next(found.constants()).values[1, 0] == 512.0
    assert not [path.name for path in big.iterdir() if path.name.startswith(".") or path.suffix == ".tmp"]


SLOW = """
import time
import numpy as np

def batches():
    print("reading", flush=True)
    for _ in range(1000):
        time.sleep(0.05)
        yield {"x": np.ones((2, 512), np.float32)}
"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_control_c_while_calibrating_leaves_nothing(big: Path, jobs: int) -> None:
    (big / "slow_data.py").write_text(SLOW)
    temporary = big / "temporary"
    temporary.mkdir()
    before = listing(big)
    words = ["quantize", "m.onnx", "out.onnx", "--data", "slow_data:batches", "--classifier"]
    words += ["--jobs", str(jobs)]
    process = subprocess.Popen(
        [sys.executable, "-B", "-m", "onnxslim", *words],
        cwd=big,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)},
        preexec_fn=heed_interrupts,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    time.sleep(1.0 if jobs == 1 else 5.0)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: everybody gets it
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "onnxslim: interrupted"
    assert "Traceback" not in err
    assert "saved" not in out
    assert listing(big) == before


def test_nothing_goes_over_the_network(big: Path) -> None:
    if (
        os.geteuid()
        or shutil.which("unshare") is None
        or subprocess.run(["unshare", "-n", "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("a namespace without a network takes root")
    words = [
        "unshare",
        "-n",
        sys.executable,
        "-m",
        "onnxslim",
        "slim",
        "m.onnx",
        "out.onnx",
        "--report",
        "r.html",
    ]
    done = subprocess.run(
        words,
        cwd=big,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
