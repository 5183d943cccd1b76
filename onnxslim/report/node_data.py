"""Figures of nodes for Google's Model Explorer, which colours a graph by them.

A file holds one figure: `results`, by the name of a tensor that the node makes, and a gradient of colours
(https://github.com/google-ai-edge/model-explorer/wiki/4.-API-Guide#create-custom-node-data).
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnxslim.errors import LoadError, one_line
from onnxslim.ir.graph import Constant
from onnxslim.ir.model import Model
from onnxslim.report.layers import FULL_DECIBELS
from onnxslim.runtime.probe import probes
from onnxslim.runtime.profile import microseconds
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target
from onnxslim.shapes import cost
from onnxslim.shapes.given import InputShapes, one_sample, with_sizes

# Colours of the smallest and the largest value.
COLOURS = ("#f1f3f6", "#c2541a")


def node_data(
    model: Model, input_shapes: InputShapes | None = None, report: Path | None = None, profile: bool = False
) -> dict[str, dict[str, Any]]:
    """Figures of the nodes of the main graph, by what they are; each as its file has it.

    Args:
        model: what Model Explorer shows.
        input_shapes: sizes to count for, by name of the input; free axes count as 1.
        report: of a run that made or took the model, in JSON: brings the signal-to-noise ratio in dB.
        profile: run it on made-up inputs, on one thread, as it is written: brings microseconds.

    Raises:
        UsageError: there is no input of that name, or it has other axes.
        LoadError: the report is none, or the model does not run.
    """
    declared = model.inputs()
    macs = cost.by_node(model, one_sample(declared, with_sizes(declared, input_shapes or {})))
    nodes = [(node, node.outputs[0].name) for node in model.graph.nodes if node.outputs]
    counted = zip(model.graph.nodes, macs, strict=True)
    found: dict[str, Mapping[str, float]] = {
        "macs": {node.outputs[0].name: count for node, count in counted if count},
        "bytes": {name: size for node, name in nodes if (size := _bytes(node.inputs))},
    }
    if report is not None:
        found["decibels"] = _decibels(report)
    if profile:
        took = _took(model)
        found["microseconds"] = {name: took[node.name] for node, name in nodes if node.name in took}
    return {figure: _file(values, falling=figure == "decibels") for figure, values in found.items()}


def _bytes(inputs: Any) -> int:
    return sum(tensor.nbytes for tensor in inputs if isinstance(tensor, Constant))


def _decibels(report: Path) -> dict[str, float]:
    try:
        layers = json.loads(report.read_text(encoding="utf-8"))["analysis"]["fidelity"]
        known = {each["tensor"]: each["sqnr"] for each in layers}
        return {name: min(float(value), FULL_DECIBELS) for name, value in known.items() if value is not None}
    except OSError as error:
        raise LoadError(f"cannot read '{report}': {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        told = f"'{report}' has no layers: take the JSON of --report ({one_line(error)})"
        raise LoadError(told) from error


def _took(model: Model) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        session = Session(model, Target.cpu(threads=1), optimize="none", profile=Path(folder))
        if not probes(model, session):
            raise LoadError("the model runs on no inputs that were made up, so that nothing can be timed")
        return microseconds(session.end_profile())


def _file(values: Mapping[str, float], falling: bool) -> dict[str, Any]:
    colours = COLOURS[::-1] if falling else COLOURS
    return {
        "results": {name: {"value": value} for name, value in values.items() if math.isfinite(value)},
        "gradient": [{"stop": stop, "bgColor": colour} for stop, colour in enumerate(colours)],
    }
