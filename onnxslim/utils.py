"""What a model consists of, in the form that callers of PyPI's OnnxSlim import from `onnxslim.utils`."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from onnxslim import shapes
from onnxslim.formats import size
from onnxslim.ir.graph import Tensor
from onnxslim.ir.model import Source, load
from onnxslim.report.inspect import Summary, summarize
from onnxslim.report.text import WIDTH, Rows, sectioned

COLUMNS = ("NodeName", "OpType", "OutputDtype", "OutputShape")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor: its name, its element type (None if it is no tensor or unknown), its shape ("?" per unknown
    size, None if the rank is unknown)."""

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[int | str, ...] | None

    def __str__(self) -> str:
        return f"{self.dtype}: {self.shape}"


@dataclass(frozen=True)
class OperatorInfo:
    """A node: its name, its operator, and those of its outputs whose type is known."""

    name: str
    op: str
    outputs: tuple[TensorInfo, ...]


@dataclass(frozen=True)
class ModelInfo:
    """Summary of a model, under the names that these callers know.

    Attributes:
        tag: how tables call it.
        summary: what was counted.
        op_info: nodes by name; those without one by their operator and first output.
        input_info, output_info: what is fed and returned, in order.
    """

    tag: str
    summary: Summary
    op_info: dict[str, OperatorInfo]
    input_info: list[TensorInfo]
    output_info: list[TensorInfo]

    @property
    def op_set(self) -> str:
        """Version of the standard operators."""
        return str(self.summary.opsets.get("", 1))

    @property
    def ir_version(self) -> str:
        """Of the file format."""
        return str(self.summary.ir_version)

    @property
    def model_size(self) -> int:
        """Bytes when saved, data files included."""
        return self.summary.bytes

    @property
    def op_type_counts(self) -> dict[str, int]:
        """Nodes per operator, whatever its domain; those of nested graphs and Constant nodes included."""
        found: Counter[str] = Counter()
        for name, count in self.summary.operators.items():
            found[name.rpartition(".")[2]] += count
        return dict(found)

    @property
    def input_maps(self) -> dict[str, TensorInfo]:
        """Inputs by name."""
        return {each.name: each for each in self.input_info}

    @property
    def output_maps(self) -> dict[str, TensorInfo]:
        """Outputs by name."""
        return {each.name: each for each in self.output_info}


def summarize_model(model: Source, tag: str = "OnnxModel") -> ModelInfo:
    """Count what a model consists of.

    Args:
        model: a file, a ModelProto or a Model; left as it is.
        tag: how tables call it; a file is called by its name instead.

    Raises:
        LoadError: it is missing, broken, or not an ONNX model.
    """
    if isinstance(model, str | os.PathLike):
        tag = Path(model).name
    twin = load(model).copy()
    summary = summarize(twin)
    shapes.infer(twin)
    return ModelInfo(
        tag=tag,
        summary=summary,
        op_info={node.label: OperatorInfo(node.name, node.op, _known(node.outputs)) for node in twin.nodes()},
        input_info=[_info(tensor) for tensor in twin.graph.inputs],
        output_info=[_info(tensor) for tensor in twin.graph.outputs],
    )


def _info(tensor: Tensor) -> TensorInfo:
    shape = tensor.shape
    known = None if shape is None else tuple("?" if dim is None else dim for dim in shape)
    return TensorInfo(tensor.name, tensor.dtype, known)


def _known(tensors: Iterable[Tensor]) -> tuple[TensorInfo, ...]:
    return tuple(_info(tensor) for tensor in tensors if tensor.dtype is not None)


def print_model_info_as_table(
    model_info_list: ModelInfo | Sequence[ModelInfo], elapsed_time: float | None = None
) -> None:
    """Print summaries side by side on the standard output.

    Args:
        model_info_list: one summary or several; the first one is the original.
        elapsed_time: seconds the work took, for the last line.
    """
    infos = [model_info_list] if isinstance(model_info_list, ModelInfo) else list(model_info_list)
    sections = [_head(infos), _tensors("IN", infos), _tensors("OUT", infos), _operators(infos), _size(infos)]
    if elapsed_time is not None:
        sections.append([("Elapsed Time", f"{elapsed_time:.2f} s")])
    grid = sectioned(("Model Name", *(info.tag for info in infos)), sections)
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=WIDTH)).print(grid)


def _head(infos: Sequence[ModelInfo]) -> Rows:
    return [("Model Info", *(f"Op Set: {info.op_set} / IR Version: {info.ir_version}" for info in infos))]


def _tensors(kind: str, infos: Sequence[ModelInfo]) -> Rows:
    maps = [info.input_maps if kind == "IN" else info.output_maps for info in infos]
    names = dict.fromkeys(name for each in maps for name in each)
    return [(f"{kind}: {name}", *(str(each.get(name, "")) for each in maps)) for name in names]


def _operators(infos: Sequence[ModelInfo]) -> Rows:
    ops = sorted({op for info in infos for op in info.op_type_counts})
    return [(op, *(str(info.op_type_counts.get(op, 0)) for info in infos)) for op in ops]


def _size(infos: Sequence[ModelInfo]) -> Rows:
    return [("Model Size", *(size(info.model_size) for info in infos))]


def dump_model_info_to_disk(model_info: ModelInfo) -> Path:
    """Write a row per output of every node to `<tag>_model_info.csv` in the working folder.

    Columns are NodeName, OpType, OutputDtype and OutputShape; further outputs of a node leave the first two
    empty. A file of that name is replaced.

    Returns:
        The file.
    """
    path = Path(f"{model_info.tag}_model_info.csv")
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for name, info in model_info.op_info.items():
            for index, made in enumerate(info.outputs):
                first = (_cell(name), _cell(info.op)) if index == 0 else ("", "")
                writer.writerow((*first, made.dtype, made.shape))
    return path


def _cell(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def inspect(models: Sequence[Source], *, dump_to_disk: bool = False) -> None:
    """Print summaries of models side by side.

    Args:
        models: files, ModelProtos or Models.
        dump_to_disk: also write a table of the nodes of each to a file.
    """
    infos = [summarize_model(model) for model in models]
    print_model_info_as_table(infos)
    for info in infos if dump_to_disk else ():
        print(f"Model info written to {dump_model_info_to_disk(info)}")
