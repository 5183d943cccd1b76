"""The reference evaluator of onnx as a backend: a slow but independent judge."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter

from onnxslim.errors import LoadError, TargetError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import load
from onnxslim.runtime.backend import Loadable, Opening
from onnxslim.runtime.limits import RunLimits
from onnxslim.runtime.native import message
from onnxslim.runtime.targets import Target

MATCHES = ("QuantizeLinear", "DequantizeLinear")

MAX_REFERENCE_BYTES = 100_000_000
REFERENCE_OPSET = 21
_NAME = "onnx.reference"


class ReferenceModel:
    """A model in the reference evaluator.

    Raises:
        LoadError: the evaluator does not know an operator of the model.
        TargetError: the model is too large for it.
    """

    def __init__(self, model: Loadable) -> None:
        from onnx.reference import ReferenceEvaluator

        loaded = load(model)
        if loaded.nbytes() > MAX_REFERENCE_BYTES:
            raise TargetError(
                f"{_NAME} is for small models: this one has {loaded.nbytes()} bytes of constants, "
                f"the limit is {MAX_REFERENCE_BYTES}"
            )
        try:
            self._evaluator = ReferenceEvaluator(_modern(loaded.to_proto()))
        except Exception as error:  # whatever its operators raise
            raise LoadError(f"{_NAME} refuses the model: {message(error)}") from error
        self.input_names = tuple(spec.name for spec in loaded.inputs())
        self.output_names = tuple(self._evaluator.output_names)

    def run(
        self, names: Sequence[str], feeds: Mapping[str, Array], limits: RunLimits | None
    ) -> Sequence[Any]:
        """Outputs; nothing can stop it, so limits are not kept."""
        try:
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return list(self._evaluator.run(list(names), dict(feeds)))
        except Exception as error:  # whatever its operators raise
            raise LoadError(f"{_NAME} fails to run the model: {message(error)}") from error

    def end_profile(self) -> Path:
        raise TargetError(f"{_NAME} does not tell what ran where: all of it runs in NumPy")


class Reference:
    """NumPy code of the standard's authors, which no optimization and no provider changes."""

    profiles = False

    def no_latency(self, target: Target) -> str:
        return "its operators are those of NumPy"

    def open(self, model: Loadable, target: Target, how: Opening) -> ReferenceModel:
        return ReferenceModel(model)


def _modern(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in an opset whose operators the evaluator has: it lacks the older Q and DQ."""
    versions = {item.domain: item.version for item in model.opset_import}
    old = versions.get("", REFERENCE_OPSET) < REFERENCE_OPSET
    if not old or not any(
        node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node
    ):
        return model
    return onnx.version_converter.convert_version(model, REFERENCE_OPSET)
