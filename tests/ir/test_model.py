"""Model: what comes in goes out, and nothing half-written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import convert_model_to_external_data

from onnxslim.engine.pipeline import Pipeline
from onnxslim.errors import LoadError, SaveError
from onnxslim.ir import files
from onnxslim.ir.graph import Array, Constant, Variable, bit_width
from onnxslim.ir.model import Model, load
from onnxslim.ir.proto import elem_type_of
from onnxslim.passes.prune import Prune
from tests import printer
from tests.helpers import parse, run


def _rich_proto() -> onnx.ModelProto:
    """Everything that graphsurgeon is known to lose, in one model."""
    proto = onnx.parser.parse_model(
        """<ir_version: 10, producer_name: "maker", producer_version: "3", domain: "org.example",
            model_version: 7, doc_string: "about", opset_import: ["" : 20, "my" : 1]>
        g (float[N, 4] x, float[4] scale, bool c) => (float[N, M] y, float[N, 4] z)
        <float[4] scale = {1, 2, 3, 4}, float[2] unused = {1, 2}, int64[1] one = {1}>
        {
            a = Mul(x, scale)
            y = If (c) <
                then_branch = t () => (float[N, 4] u) { u = my.twice(a) },
                else_branch = e () => (float[N, 4] v) { v = Identity(a) }>
            z = Identity(x)
        }
        <domain: "my", opset_import: ["" : 20]>
        twice (p) => (q) { q = Add(p, p) }
        """
    )
    proto.metadata_props.add(key="stride", value="32")
    proto.graph.doc_string = "the graph"
    proto.graph.metadata_props.add(key="g", value="1")
    proto.graph.node[0].doc_string = "a node"
    proto.graph.node[0].metadata_props.add(key="n", value="2")
    proto.graph.input[0].doc_string = "an input"
    proto.graph.input[0].type.denotation = "IMAGE"
    proto.graph.value_info.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, ["N", 4]))
    proto.graph.value_info[0].metadata_props.add(key="v", value="3")
    annotation = proto.graph.quantization_annotation.add(tensor_name="a")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="one")
    proto.graph.initializer.append(helper.make_tensor("packed", TensorProto.INT4, [3], [1, -2, 3]))
    sparse = proto.graph.sparse_initializer.add(dims=[4])
    sparse.values.CopyFrom(numpy_helper.from_array(np.array([5.0], np.float32), "sparse"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.array([2]), ""))
    proto.functions[0].overload = ""
    return proto


def test_round_trip_keeps_what_graphsurgeon_loses() -> None:
    proto = _rich_proto()
    assert load(proto).to_proto() == proto
    assert load(proto).copy().to_proto() == proto


def test_an_edit_leaves_everything_else_alone() -> None:
    proto = _rich_proto()
    model = load(proto)
    model.graph.nodes[0].name = "renamed"
    written = model.to_proto()
    assert written.graph.node[0].name == "renamed"
    written.graph.node[0].ClearField("name")
    assert written == proto


def test_an_overridable_initializer_is_an_input_with_a_default() -> None:
    model = load(_rich_proto())
    spec = next(spec for spec in model.inputs() if spec.name == "scale")
    assert not spec.required
    assert isinstance(model.graph.nodes[0].inputs[1], Variable)


def test_before_ir_4_initializers_are_constants_and_listed_as_inputs() -> None:
    text = """<ir_version: 3, opset_import: ["" : 8]>
        g (float[2] w, float[N, 2] x) => (float[N, 2] y) <float[2] w = {1, 2}> { y = Mul(x, w) }"""
    model = parse(text)
    assert [spec.name for spec in model.inputs()] == ["x"]
    assert isinstance(model.graph.nodes[0].inputs[1], Constant)
    assert [item.name for item in model.to_proto().graph.input] == ["w", "x"]


@pytest.mark.parametrize("values", [np.ones(1, np.float32), np.ones(2, np.float16)])
def test_before_ir_4_constants_are_listed_as_they_are_now(values: Array) -> None:
    model = parse("g (float[N, 2] x) => (float[N, 2] y) { y = Mul(x, w) }", {"w": np.ones(2, np.float32)})
    model.ir_version = 3
    read = load(model.to_proto())
    read.graph.initializers["w"].values = values
    (listed,) = (info for info in read.to_proto().graph.input if info.name == "w")
    assert listed == helper.make_tensor_value_info("w", elem_type_of(values.dtype), values.shape)


def test_values_keep_their_exact_type() -> None:
    model = load(_rich_proto())
    packed = model.graph.initializers["packed"]
    assert packed.dtype.name == "int4"
    assert packed.nbytes == 2
    assert packed.values.astype(int).tolist() == [1, -2, 3]
    assert model.graph.initializers["sparse"].values.tolist() == [0, 0, 5, 0]


# Types of numbers that this onnx knows, of one byte and less above all.
TYPES = [name for name, _ in TensorProto.DataType.items() if name not in ("UNDEFINED", "STRING")]


@pytest.mark.parametrize("name", TYPES)
def test_every_type_is_kept_and_written_anew(name: str, tmp_path: Path) -> None:
    """As it was read, and from its values, in the file and beside it; a last byte may be filled in part."""
    kind = TensorProto.DataType.Value(name)
    values = np.arange(3000) % 2
    info = helper.make_tensor_value_info("y", kind, [2999])
    weights = helper.make_tensor("w", kind, [2999], values[1:])
    graph = helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "g", [], [info], [weights])
    opsets = [helper.make_opsetid("", onnx.defs.onnx_opset_version())]
    proto = helper.make_model(graph, ir_version=onnx.IR_VERSION, opset_imports=opsets)
    model = load(proto)
    assert model.to_proto() == proto
    weight = model.graph.initializers["w"]
    found = np.asarray(weight.values).astype(complex)
    assert (found[::2] == 1).all()
    assert np.abs(found[1::2]).max() < 1e-30  # FLOAT8E8M0 has no zero
    weight.values = np.array(weight.values)
    onnx.save(proto, tmp_path / "beside.onnx", save_as_external_data=True, size_threshold=0)
    for written in (model.to_proto(), tmp_path / "beside.onnx"):
        again = load(written).graph.initializers["w"]
        assert again.dtype == weight.dtype
        assert again.nbytes == weight.nbytes == (2999 * bit_width(weight.dtype) + 7) // 8
        np.testing.assert_array_equal(again.values.view(np.uint8), weight.values.view(np.uint8))
    model.save(tmp_path / "model.onnx")
    saved = load(tmp_path / "model.onnx").graph.initializers["w"]
    np.testing.assert_array_equal(saved.values.view(np.uint8), weight.values.view(np.uint8))


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [(np.dtype(np.float16), 16), (np.dtype(np.bool_), 8), (np.dtype(np.int64), 64), (np.dtype(object), 0)],
)
def test_bit_width(dtype: np.dtype[np.generic], bits: int) -> None:
    assert bit_width(dtype) == bits


def test_sizes_that_exporters_do_not_know_are_unknown() -> None:
    model = parse("g (float[A, B] x) => (float[A, A] y) { y = Relu(x) }")
    proto = model.to_proto()
    for dim, name in zip(proto.graph.input[0].type.tensor_type.shape.dim, ("?", "?"), strict=True):
        dim.dim_param = name
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = -1
    read = load(proto)
    assert read.graph.inputs[0].shape == (None, None)
    assert read.graph.outputs[0].shape == ("A", None)
    assert read.to_proto() == proto


def test_unordered_nodes_are_put_in_order() -> None:
    model = parse("g (float[N] x) => (float[N] y) { y = Neg(a) a = Relu(x) }")
    assert [node.op for node in model.graph.nodes] == ["Relu", "Neg"]


def test_a_long_chain_does_not_overflow_the_stack() -> None:
    nodes = [helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"]) for i in range(20_000)]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("t0", "t20000")]
    graph = helper.make_graph(nodes[::-1], "chain", info[:1], info[1:])
    model = load(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]))
    assert [node.outputs[0].name for node in model.graph.nodes[:2]] == ["t1", "t2"]


def test_printing_is_stable_and_readable() -> None:
    assert printer.text(load(_rich_proto())) == textwrap.dedent(
        """\
        model ir 10 opset ai.onnx 20, my 1
        graph g
          input float32[N,4] x
          input float32[4] scale = [1.,2.,3.,4.]
          input bool[] c
          const float32[2] unused = [1.,2.]
          const int64[1] one = [1]
          const int4[3] packed = [1,-2,3]
          const float32[4] sparse = [0.,0.,5.,0.]
          a = Mul(x, scale)
          y = If(c)
            graph t
              u = my.twice(a)
              output float32[N,4] u
            graph e
              v = Identity(a)
              output float32[N,4] v
          z = Identity(x)
          output float32[N,M] y
          output float32[N,4] z
        """
    )


# Broken input


def _model_with(*nodes: str) -> str:
    body = " ".join(nodes)
    return f'<ir_version: 8, opset_import: ["" : 17]> g (float[N] x) => (float[N] y) {{ {body} }}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_model_with("y = Add(a, x)", "a = Relu(b)", "b = Neg(a)"), r"cycle through node 'Relu→a'"),
        (_model_with("y = Relu(nowhere)"), "reads tensor 'nowhere', which nothing in the model makes"),
        (_model_with("y = Relu(x)", "y = Neg(x)"), "tensor 'y' is made more than once"),
        (_model_with("a = Relu(x)"), "the list of graph outputs reads tensor 'y'"),
        (_model_with("y = Relu(x)").replace("17", "99"), "opset 99"),
    ],
)
def test_a_broken_graph_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(LoadError, match=message) as caught:
        load(onnx.parser.parse_model(text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x89PNG\r\n\x1a\n" + bytes(64), b"hello, this is no model"],
    ids=["empty", "png", "text"],
)
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(LoadError, match=r"model\.onnx"):
        load(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    data = _rich_proto().SerializeToString()
    path = tmp_path / "model.onnx"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(LoadError, match="cut short"):
        load(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="there is no file"):
        load(tmp_path / "nothing.onnx")
    with pytest.raises(LoadError, match="is a folder"):
        load(tmp_path)


# External data and saving


def _external(folder: Path, rows: int = 64) -> Path:
    weight = np.arange(rows * 64, dtype=np.float32).reshape(rows, 64)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 64])],
        [numpy_helper.from_array(weight, "w")],
    )
    proto = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    convert_model_to_external_data(proto, location="weights.bin", size_threshold=0)
    onnx.save(proto, folder / "model.onnx")
    return folder / "model.onnx"


def test_external_data_is_mapped_from_the_folder_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _external(tmp_path)
    monkeypatch.chdir("/")
    model = load(path)
    values = model.graph.initializers["w"].values
    assert isinstance(values, np.memmap)
    assert values[1, 0] == 64.0


def test_saving_elsewhere_embeds_or_writes_one_fresh_data_file(tmp_path: Path) -> None:
    model = load(_external(tmp_path))
    out = tmp_path / "out"
    out.mkdir()
    model.save(out / "small.onnx")
    model.save(out / "large.onnx", external_data=True)
    assert sorted(item.name for item in out.iterdir()) == [
        "large.onnx",
        "large.onnx.data",
        "small.onnx",
    ]
    shutil.rmtree(tmp_path / "out2", ignore_errors=True)
    feeds = {"x": np.ones((1, 64), np.float32)}
    expected = run(model, feeds)["y"]
    for name in ("small.onnx", "large.onnx"):
        np.testing.assert_array_equal(run(load(out / name), feeds)["y"], expected)


def test_saving_over_the_input_keeps_files_that_are_not_its_own(tmp_path: Path) -> None:
    path = _external(tmp_path)
    (tmp_path / "model.onnx.data").write_bytes(b"somebody else's")
    load(path).save(path, external_data=True)
    assert (tmp_path / "model.onnx.data").read_bytes() == b"somebody else's"
    assert (tmp_path / "model.onnx.1.data").exists()
    assert load(path).graph.initializers["w"].values[1, 0] == 64.0


@pytest.mark.parametrize(
    "location", ["../secret.bin", "/etc/hostname", "link.bin", "hard.bin", "missing.bin"]
)
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(64 * 64 * 4))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link.bin").symlink_to(secret)
    os.link(secret, folder / "hard.bin")
    path = _external(folder)
    proto = onnx.load(path, load_external_data=False)
    proto.graph.initializer[0].external_data[0].value = location
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(LoadError, match="'w'"):
        load(path)


@pytest.mark.parametrize(("key", "value"), [("offset", "99999999"), ("length", "99999999"), ("length", "8")])
def test_external_data_with_lying_bounds_is_refused(tmp_path: Path, key: str, value: str) -> None:
    path = _external(tmp_path)
    proto = onnx.load(path, load_external_data=False)
    tensor = proto.graph.initializer[0]
    entries = {item.key: item for item in tensor.external_data}
    (entries.get(key) or tensor.external_data.add(key=key)).value = value
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(LoadError, match="'w'"):
        _ = load(path).graph.initializers["w"].values


def _moved_out(tensor: TensorProto, folder: Path) -> TensorProto:
    """The tensor with its data in a file of its own."""
    location = f"{tensor.name or 'attribute'}.bin"
    (folder / location).write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def _external_everywhere(folder: Path) -> onnx.ModelProto:
    """External data in a body, an attribute, a sparse initializer and a function."""
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
        g (float[N,4] x, bool c) => (float[N,4] y) {
            k = Constant<value=float[4] {1,2,3,4}>()
            a = Add(x, k)
            b = Add(a, s)
            d = my.shift(b)
            y = If (c) < then_branch = t () => (float[N,4] p) <float[4] w = {5,6,7,8}> { p = Mul(d, w) },
                         else_branch = e () => (float[N,4] q) { q = Neg(d) }> }
        <domain: "my", opset_import: ["" : 17]>
        shift (p) => (q) { h = Constant<value=float[4] {4,3,2,1}>() q = Add(p, h) }"""
    )
    weight = proto.graph.node[4].attribute[0].g.initializer[0]
    constants = (proto.graph.node[0].attribute[0].t, proto.functions[0].node[0].attribute[0].t)
    for tensor, name in zip((weight, *constants), ("w", "k", "h"), strict=True):
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), name))
        _moved_out(tensor, folder)
    sparse = proto.graph.sparse_initializer.add(dims=[4])
    sparse.values.CopyFrom(_moved_out(numpy_helper.from_array(np.array([5.0], np.float32), "s"), folder))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.array([2]), "i"))
    return proto


@pytest.mark.parametrize("external", [False, True])
def test_external_data_is_found_wherever_it_hangs(tmp_path: Path, external: bool) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    (source / "m.onnx").write_bytes(_external_everywhere(source).SerializeToString())
    load(source / "m.onnx").save(out / "m.onnx", external_data=external)
    shutil.rmtree(source)
    assert [item.name for item in out.iterdir()] == ["m.onnx"], "nothing is large enough for a data file"
    feeds = {"x": np.zeros((1, 4), np.float32), "c": np.array(True)}
    np.testing.assert_array_equal(run(load(out / "m.onnx"), feeds)["y"], [[5.0 * 5, 6 * 5, 7 * 10, 8 * 5]])


@pytest.mark.parametrize("key", ["location", "offset", "length"])
def test_external_data_in_a_body_is_checked_too(tmp_path: Path, key: str) -> None:
    proto = _external_everywhere(tmp_path)
    tensor = proto.graph.node[4].attribute[0].g.initializer[0]
    del tensor.external_data[:]
    lies = {
        "location": "w.bin",
        "offset": "0",
        "length": "16",
        key: {"location": "../w.bin"}.get(key, "4096"),
    }
    for name, value in lies.items():
        tensor.external_data.add(key=name, value=value)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(LoadError, match="'w'"):
        load(tmp_path / "m.onnx")


@pytest.mark.parametrize("kind", ["INT4", "UINT4", "FLOAT4E2M1", "INT8", "BFLOAT16", "FLOAT8E4M3FN"])
def test_data_that_is_not_stored_as_bytes_can_be_moved_out(tmp_path: Path, kind: str) -> None:
    """`make_tensor` puts small types into a field of wider numbers."""
    values = np.resize(np.array([0, 1, 1, 0, 1]), 5001)
    tensor = helper.make_tensor("w", getattr(TensorProto, kind), values.shape, values)
    info = helper.make_tensor_value_info("w", tensor.data_type, values.shape)
    graph = helper.make_graph([], "g", [], [info], [tensor])
    model = load(helper.make_model(graph, ir_version=11, opset_imports=[helper.make_opsetid("", 23)]))
    model.save(tmp_path / "m.onnx", external_data=True)
    assert (tmp_path / "m.onnx.data").stat().st_size == model.nbytes()
    again = load(tmp_path / "m.onnx").graph.initializers["w"].values
    np.testing.assert_array_equal(again.astype(np.float32), numpy_helper.to_array(tensor).astype(np.float32))


def test_saving_at_once_to_one_path_never_mixes_models(tmp_path: Path) -> None:
    def save(value: int) -> None:
        model = load(source).copy()
        model.graph.initializers["w"].values = np.full((64, 64), value, np.float32)
        for _ in range(5):
            model.save(tmp_path / "out.onnx", external_data=True)

    source = _external(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(save, range(4)))
    assert len(np.unique(load(tmp_path / "out.onnx").graph.initializers["w"].values)) == 1
    assert len(list(tmp_path.glob("out.onnx.*data"))) == 20


def test_names_that_cannot_be_files_are_one_error(tmp_path: Path) -> None:
    model = load(_external(tmp_path))
    for name in ("a" * 300 + ".onnx", "a" * 250 + ".onnx", "a\0.onnx"):
        with pytest.raises(SaveError, match="cannot write"):
            model.save(tmp_path / name)
        with pytest.raises(LoadError):
            load(tmp_path / name)


def test_a_full_disk_leaves_the_old_model_as_it_was(tmp_path: Path) -> None:
    path = _external(tmp_path, rows=512)
    before = path.read_bytes(), (tmp_path / "weights.bin").read_bytes()
    script = f"""
import resource, signal, sys
from onnxslim.errors import SaveError
from onnxslim.ir.model import load
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = load({str(path)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    model.save({str(path)!r})
except SaveError as error:
    sys.exit(f"save error: {{error}}")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "save error: cannot write" in done.stderr
    assert (path.read_bytes(), (tmp_path / "weights.bin").read_bytes()) == before
    assert sorted(item.name for item in tmp_path.iterdir()) == ["model.onnx", "weights.bin"]


def test_saving_to_a_missing_folder_or_over_a_folder_is_one_error(tmp_path: Path) -> None:
    model = parse("g (float[N] x) => (float[N] y) { y = Relu(x) }")
    for target in (tmp_path / "nowhere" / "model.onnx", tmp_path):
        with pytest.raises(SaveError, match="cannot write"):
            model.save(target)


def test_a_failing_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    first = parse("g (float[N] x) => (float[N] y) { y = Relu(x) }")
    first.save(path)
    before = path.read_bytes()

    def fail(staged: Path) -> onnx.ModelProto:
        raise LoadError(f"'{staged}' was cut short")

    monkeypatch.setattr(files, "read_model", fail)
    with pytest.raises(LoadError):
        parse("g (float[N] x) => (float[N] y) { y = Neg(x) }").save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_stats_count_weights_wherever_they_are() -> None:
    model = parse(
        """g (float[N, 2] x) => (float[N, 2] y) <float[2] w = {1, 2}>
        { c = Constant<value = float[2] {3, 4}>() a = Mul(x, w) y = Add(a, c) }"""
    )
    stats = model.stats()
    assert (stats.nodes, stats.parameters) == (2, 4)
    assert abs(stats.bytes - model.to_proto().ByteSize()) < 16


def test_scales_and_zero_points_are_no_parameters() -> None:
    model = parse(
        """g (float[N, 2] x) => (float[N, 2] y)
        <int8[2, 2] w = {1, 2, 3, 4}, float[2] s = {1, 1}, int8[2] z = {0, 0}>
        { d = DequantizeLinear<axis=1>(w, s, z) y = MatMul(x, d) }"""
    )
    assert model.stats().parameters == 4


def test_a_model_can_be_copied_and_edited_apart() -> None:
    model = load(_rich_proto())
    twin = model.copy()
    twin.graph.nodes[0].op = "Div"
    twin.opsets[""] = 21
    assert model.graph.nodes[0].op == "Mul"
    assert model.opset == 20
    body = twin.graph.nodes[1].bodies[0].nodes[0]
    assert body.inputs[0] is twin.graph.nodes[0].outputs[0]


def test_load_takes_a_model_as_it_is() -> None:
    model = parse("g (float[N] x) => (float[N] y) { y = Relu(x) }")
    assert load(model) is model
    assert isinstance(load(model.to_proto()), Model)


SHARDED = """<ir_version: 11, opset_import: ["" : 17]>
g (float[N,8] x) => (float[N,4] y) <float[8,16] w, float[16,4] v>
{ a = MatMul(x, w) r = Relu(a) y = MatMul(r, v) }"""


def _sharded() -> Model:
    """A product whose matrix, and what it makes, are split in two; its data is on all devices."""
    proto = parse(SHARDED, {"w": np.ones((8, 16), np.float32), "v": np.ones((16, 4), np.float32)}).to_proto()
    proto.configuration.add(name="two", num_devices=2, device=["a", "b"])
    placed = proto.graph.node[0].device_configurations.add(configuration_id="two", pipeline_stage=1)
    placed.sharding_spec.add(tensor_name="x", device=[0, 1])
    for name, axis in (("w", 1), ("a", -1)):
        spec = placed.sharding_spec.add(tensor_name=name, device=[0, 1])
        spec.sharded_dim.add(axis=axis).simple_sharding.add(dim_value=16, num_shards=2)
    return load(proto)


def test_placement_on_devices_is_kept() -> None:
    model = _sharded()
    proto = model.to_proto()
    assert load(proto).copy().to_proto() == proto
    model.graph.nodes[0].name = "renamed"
    written = model.to_proto()
    assert written.configuration == proto.configuration
    assert written.graph.node[0].device_configurations == proto.graph.node[0].device_configurations


def test_placement_is_of_tensors_that_a_node_has() -> None:
    model = _sharded()
    model.graph.nodes[0].inputs[1] = Constant("other", np.ones((8, 16), np.float32))
    (placed,) = model.to_proto().graph.node[0].device_configurations
    assert [spec.tensor_name for spec in placed.sharding_spec] == ["x", "a"]
    assert placed.pipeline_stage == 1


def test_an_axis_that_is_cut_is_not_sharded() -> None:
    model = _sharded()
    small = Pipeline(Prune(ratio=0.5, align=1), on_error="raise")(model).model
    assert small.graph.nodes[0].inputs[1].shape == (8, 8)
    (placed,) = small.to_proto().graph.node[0].device_configurations
    assert [spec.tensor_name for spec in placed.sharding_spec] == ["x"]
    assert len(_sharded().to_proto().graph.node[0].device_configurations[0].sharding_spec) == 3
    assert len(model.to_proto().graph.node[0].device_configurations[0].sharding_spec) == 3


def test_another_operator_is_of_no_overload() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 17, "own" : 1]> g (float x) => (float y) { y = own.F(x) }
        <domain: "own", opset_import: ["" : 17]> F (a) => (b) { b = Exp(a) }"""
    )
    proto.functions[0].overload = proto.graph.node[0].overload = "second"
    model = load(proto)
    (node,) = model.graph.nodes
    node.name = "renamed"
    assert model.to_proto().graph.node[0].overload == "second"
    node.op, node.domain = "Exp", ""
    assert model.to_proto().graph.node[0].overload == ""


@pytest.mark.parametrize(
    ("op", "name", "kind"), [("ReduceMean", "axes", "INTS"), ("Constant", "value_floats", "FLOATS")]
)
def test_an_attribute_without_elements_has_the_type_its_operator_says(op: str, name: str, kind: str) -> None:
    model = parse("g (float[2] x) => (float[] y) { y = Relu(x) }")
    model.graph.nodes[0].op, model.graph.nodes[0].attrs[name] = op, ()
    (written,) = model.to_proto().graph.node[0].attribute
    assert written.type == onnx.AttributeProto.AttributeType.Value(kind)
    assert load(model.to_proto()).graph.nodes[0].attrs == {name: ()}
