"""Model: a graph to edit together with everything else that is in an ONNX file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxslim.errors import LoadError, SaveError
from onnxslim.formats import size
from onnxslim.ir import files, proto
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Array, Constant, Graph, Node, Shape, Tensor

DEFAULT_DOMAINS = ("", "ai.onnx")
# What the file format says by operators: constants, and how integers stand for numbers.
MATCHES = ("Constant", "QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class InputSpec:
    """What a model says of one of its inputs.

    Attributes:
        name: its name.
        dtype: element type; None if it is not a tensor.
        shape: a size, a symbol or None per axis; None if the rank is not declared.
        required: whether a value must be fed; inputs with a default value need none.
    """

    name: str
    dtype: np.dtype[Any] | None
    shape: Shape = None
    required: bool = True


@dataclass(frozen=True)
class Stats:
    """Size of a model. `bytes` counts the tensors and everything else, wherever they are stored."""

    nodes: int
    parameters: int
    bytes: int


@contextmanager
def _texts_read() -> Iterator[None]:
    """protobuf reads texts that are not UTF-8, but does not write them."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise LoadError(f"a text in the model is not UTF-8: {error.object[:40]!r}") from error


class Model:
    """An ONNX model as the passes see it.

    Args:
        graph: the main graph; passes edit it in place.
        shell: the ModelProto without its graph: producer, metadata, functions, training info.
        source: the file it was read from, if any.

    Attributes:
        opsets: version of each operator set the model uses, by domain ("" is ai.onnx).
        ir_version: of the file format; raised only by a pass that needs it.
        data_files: names of the data files it was read from, beside `source`.
    """

    def __init__(self, graph: Graph, shell: onnx.ModelProto, source: Path | None = None) -> None:
        self.graph = graph
        self.shell = shell
        self.source = source
        self.data_files: tuple[str, ...] = ()
        self.ir_version = shell.ir_version
        self.opsets = {_domain(item.domain): item.version for item in shell.opset_import}

    @classmethod
    @_texts_read()
    def from_proto(cls, model: onnx.ModelProto, folder: Path | None = None) -> Model:
        """The model in a protobuf, which is kept and must not be changed afterwards.

        Raises:
            LoadError: it is not a model that could be run; says what is wrong with which node or tensor.
        """
        if not model.HasField("graph") or not model.opset_import:
            raise LoadError("not an ONNX model: it has no graph or imports no operator set")
        _check_versions(model)
        data_files: set[str] = set()

        def decode(tensor: TensorProto) -> Array:
            data_files.update(_location(tensor))
            return files.decode(tensor, folder)

        graph = proto.import_graph(model.graph, model.ir_version, decode)
        for constant in (
            c for each in ir.walk(graph) for c in (*each.initializers.values(), *each.defaults.values())
        ):
            tensor = constant.tensor_proto
            if tensor is None:
                continue
            if tensor.data_location != TensorProto.EXTERNAL:
                files.check_embedded(tensor)
            else:
                files.check_external(tensor, folder)
                data_files.update(_location(tensor))
        shell = proto.fields_but(model, "graph")
        proto.embed(shell, decode)
        made = cls(graph, shell)
        made.data_files = tuple(sorted(data_files))
        return made

    @property
    def opset(self) -> int:
        """Version of the standard operators."""
        return int(self.opsets.get("", 1))

    @property
    def metadata(self) -> dict[str, str]:
        """The model's own key-value pairs."""
        return {item.key: item.value for item in self.shell.metadata_props}

    @property
    def functions(self) -> frozenset[tuple[str, str]]:
        """Domain and name of the operators the model defines itself; they hide standard ones."""
        return frozenset((_domain(item.domain), item.name) for item in self.shell.functions)

    def copy(self) -> Model:
        """An independent model; values are shared, as nobody changes them in place."""
        twin = Model(ir.copy(self.graph), self.shell, self.source)
        twin.ir_version, twin.opsets = self.ir_version, dict(self.opsets)
        twin.data_files = self.data_files
        return twin

    def __repr__(self) -> str:
        nodes = sum(not is_literal(node) for node in self.nodes())
        name = f" '{self.graph.name}'" if self.graph.name else ""
        ends = [", ".join(tensor.name for tensor in each) for each in (self.graph.inputs, self.graph.outputs)]
        return f"<Model{name}: {nodes} nodes, {size(self.nbytes())} of constants, {' -> '.join(ends)}>"

    def _repr_html_(self) -> str:
        """For notebooks."""
        return escape(repr(self))

    def __reduce__(self) -> tuple[Any, ...]:
        """As one protobuf, which has to hold it; values in files beside the model come along."""
        return _unpickled, (self.to_proto().SerializeToString(), self.source)

    def with_metadata(self, entries: Mapping[str, str]) -> Model:
        """A copy with these key-value pairs besides, or instead of, its own."""
        twin = self.copy()
        twin.shell = proto.fields_but(self.shell)
        kept = [item for item in twin.shell.metadata_props if item.key not in entries]
        del twin.shell.metadata_props[:]
        twin.shell.metadata_props.extend(kept)
        for key, value in entries.items():
            twin.shell.metadata_props.add(key=key, value=value)
        return twin

    def become(self, other: Model) -> None:
        """Take over everything of another model, which must not be used any more."""
        self.graph, self.shell, self.source = other.graph, other.shell, other.source
        self.ir_version, self.opsets = other.ir_version, other.opsets

    def graphs(self) -> Iterator[Graph]:
        """The main graph and every one nested in it."""
        return ir.walk(self.graph)

    def nodes(self) -> Iterator[Node]:
        """Every node, those of nested graphs included."""
        return ir.all_nodes(self.graph)

    def constants(self) -> Iterator[Constant]:
        """Every constant that is stored in the model, once."""
        seen: set[int] = set()
        for graph in self.graphs():
            reads = (tensor for node in graph.nodes for tensor in node.inputs)
            for tensor in (*graph.initializers.values(), *graph.defaults.values(), *reads, *graph.outputs):
                if isinstance(tensor, Constant) and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield tensor

    def inputs(self) -> tuple[InputSpec, ...]:
        """What the caller feeds, in order."""
        return tuple(
            InputSpec(tensor.name, tensor.dtype, tensor.shape, tensor.name not in self.graph.defaults)
            for tensor in self.graph.inputs
        )

    def nbytes(self) -> int:
        """Bytes of all constants."""
        return sum(constant.nbytes for constant in self.constants())

    def stats(self) -> Stats:
        """Counts of nodes and parameters, and the size when saved.

        Constant nodes count as parameters instead; scales and zero points of Q and DQ as neither.
        """
        constants = list(self.constants())
        skeleton = self.to_proto_with(without_data).ByteSize()
        # An embedded constant folded into a Constant node counts as part of the skeleton.
        return Stats(
            nodes=sum(1 for node in self.nodes() if not is_literal(node)),
            parameters=sum(c.size for c in constants if not _is_encoding(c)) + sum(_literals(self)),
            bytes=skeleton + sum(constant.nbytes for constant in constants),
        )

    def to_proto(self) -> onnx.ModelProto:
        """A ModelProto with all data inside.

        Raises:
            SaveError: it would exceed what protobuf can hold; `save` splits such a model.
        """
        if self.nbytes() > files.MAX_EMBEDDED_BYTES:
            raise SaveError("the model is too large for one protobuf; save it to a file instead")
        return self.to_proto_with(proto.encode_embedded)

    @_texts_read()
    def to_proto_with(self, encode: proto.Encode) -> onnx.ModelProto:
        """A ModelProto whose tensors are written by `encode`."""
        model = onnx.ModelProto()
        model.CopyFrom(self.shell)
        if model.ir_version != self.ir_version:
            model.ir_version = self.ir_version
        self._write_opsets(model)
        model.graph.SetInParent()
        proto.export_graph(self.graph, model.graph, self.ir_version, encode)
        return model

    def _write_opsets(self, model: onnx.ModelProto) -> None:
        written = {_domain(item.domain): item for item in model.opset_import}
        for domain, version in self.opsets.items():
            if domain not in written:
                model.opset_import.add(domain=domain, version=version)
            elif written[domain].version != version:
                written[domain].version = version

    def save(self, path: str | os.PathLike[str], *, external_data: bool | None = None) -> None:
        """Write the model, replacing what is at `path` only when everything is on disk.

        Args:
            path: where to; may be the file the model came from.
            external_data: put tensors in one fresh `<name>.onnx.data` beside it; by default only if the
                model would not fit in one protobuf.

        Raises:
            SaveError: it could not be written; what was there is untouched.
        """
        final = Path(path)
        if external_data is None:
            external_data = self.nbytes() > files.MAX_EMBEDDED_BYTES
        with files.staging(final) as folder:
            staged = folder / final.name
            if not external_data:
                onnx.save_model(self.to_proto(), staged)
                _reload(staged)
                files.commit(staged, final)
                return
            with files.fresh_data_name(final) as data_name:
                writer = files.DataWriter(folder / data_name, data_name)
                try:
                    model = self.to_proto_with(writer.encode)
                    writer.close()
                finally:
                    writer.abandon()
                onnx.save_model(model, staged)
                _reload(staged)
                if (folder / data_name).stat().st_size:
                    files.commit(folder / data_name, final.with_name(data_name))
            files.commit(staged, final)


Source: TypeAlias = "str | os.PathLike[str] | bytes | onnx.ModelProto | Model"
"""What a model is read from: a file, a ModelProto, one that was serialized, or a Model."""


def load(source: Source) -> Model:
    """Read a model.

    Args:
        source: a file, a ModelProto (kept, not copied: do not change it afterwards), the bytes of one, or a
            Model, which is returned as it is.

    Raises:
        LoadError: it is missing, broken, or not an ONNX model.
    """
    if isinstance(source, Model):
        return source
    if isinstance(source, onnx.ModelProto):
        return Model.from_proto(source)
    if isinstance(source, bytes):
        return Model.from_proto(files.parsed(source))
    if not isinstance(source, str | os.PathLike):
        raise LoadError(f"a model is a path, a ModelProto or a Model, not {type(source).__name__}")
    path = Path(source)
    try:
        model = Model.from_proto(files.read_model(path), path.resolve().parent)
    except LoadError as error:
        if str(path) in str(error):
            raise
        raise LoadError(f"'{path}': {error}") from error
    model.source = path
    return model


def _unpickled(serialized: bytes, source: Path | None) -> Model:
    model = load(serialized)
    model.source = source
    return model


def constant_of(tensor: Tensor | None) -> Array | None:
    """Values of a tensor that is in the model, be it an initializer or the output of a Constant node."""
    if isinstance(tensor, Constant):
        return tensor.values
    node = ir.producer(tensor)
    return literal(node) if node is not None and is_literal(node) else None


def is_literal(node: Node | None) -> bool:
    """Whether a node is a Constant, which states its result."""
    return node is not None and node.op == "Constant" and node.domain in DEFAULT_DOMAINS


def literal(node: Node) -> Array | None:
    """Values of a Constant node with their exact type; None for sparse and string forms."""
    for name, dtype in (
        ("value_int", np.int64),
        ("value_ints", np.int64),
        ("value_float", np.float32),
        ("value_floats", np.float32),
    ):
        if name in node.attrs:
            return np.array(node.attrs[name], dtype)
    value = node.attrs.get("value")
    if isinstance(value, onnx.AttributeProto) and not value.ref_attr_name:
        return files.decode(value.t, None)
    return None


def _is_encoding(constant: Constant) -> bool:
    """Whether a constant says how integers stand for numbers, and is no parameter of its own."""
    readers = {id(node): node for node in constant.outputs}.values()
    return bool(readers) and all(
        node.op in ("QuantizeLinear", "DequantizeLinear") and node.inputs[0] is not constant
        for node in readers
    )


def _literals(model: Model) -> Iterator[int]:
    for node in model.nodes():
        value = node.attrs.get("value") if is_literal(node) else None
        if isinstance(value, onnx.AttributeProto):
            size = 1
            for dim in value.t.dims:
                size *= dim
            yield size


def _location(tensor: TensorProto) -> Iterator[str]:
    """The data file of a tensor, if it is in one."""
    if tensor.data_location == TensorProto.EXTERNAL:
        yield from (item.value for item in tensor.external_data if item.key == "location")


def _domain(name: str) -> str:
    return "" if name in DEFAULT_DOMAINS else name


def _check_versions(model: onnx.ModelProto) -> None:
    if model.ir_version > onnx.IR_VERSION:
        raise LoadError(
            f"the model has IR version {model.ir_version}; the installed onnx {onnx.__version__} knows "
            f"versions up to {onnx.IR_VERSION}"
        )
    if not model.graph.output:
        raise LoadError("the model has no outputs, so it computes nothing")
    newest = onnx.defs.onnx_opset_version()
    for item in model.opset_import:
        if _domain(item.domain) == "" and not 1 <= item.version <= newest:
            raise LoadError(
                f"the model uses opset {item.version} of ai.onnx; the installed onnx {onnx.__version__} "
                f"knows opsets 1 to {newest}"
            )


def without_data(constant: Constant) -> TensorProto:
    """A constant with its type and shape alone; see `Model.to_proto_with`."""
    tensor = TensorProto(name=constant.name, data_type=helper.np_dtype_to_tensor_dtype(constant.dtype))
    tensor.dims.extend(constant.shape)
    return tensor


def _reload(path: Path) -> None:
    """Read back what was written; a disk that lies is noticed before the old file is replaced."""
    files.read_model(path)


def source_sha256(model: Model) -> str:
    """Hash of the file a model was read from, followed by its data files in order of their names.

    That of `cat model.onnx a.data b.data | sha256sum`. Of a model that is only in memory, the hash of its
    tensors followed by that of everything else.
    """
    digest = hashlib.sha256()
    if model.source is None:
        digest.update(model.to_proto_with(partial(_hashed, digest)).SerializeToString(deterministic=True))
        return digest.hexdigest()
    folder = model.source.resolve().parent
    for file in (model.source, *(folder / name for name in model.data_files)):
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _hashed(digest: Any, constant: Constant) -> TensorProto:
    """Takes in one tensor after the other, so that all of them may be more than a protobuf holds."""
    digest.update(proto.encode_embedded(constant).SerializeToString(deterministic=True))
    return TensorProto(name=constant.name)
