"""Sparse weights stored without their zeros, where that is smaller."""

from __future__ import annotations

from collections.abc import Sequence

from onnxslim.ir.graph import Constant
from onnxslim.ir.model import Model
from onnxslim.passes.codes.storing import COUNTING_OPSET, CodeWriter, sparse_bytes, why_not


def pack(model: Model, weights: Sequence[Constant]) -> str | None:
    """Store weights without their zeros.

    A bit for each value says whether it is one, and those that are not zero follow one another
    (`passes.codes.storing`). Weights that would be no smaller stay.

    Args:
        model: edited in place.
        weights: constants of its main graph, none of them an output.

    Returns:
        Why that is not possible, if it is not.
    """
    why = why_not(model, COUNTING_OPSET)
    if why is None:
        writer = CodeWriter(model)
        for weight in weights:
            if sparse_bytes(weight.name, weight.values) < weight.nbytes:
                writer.write_sparse(weight)
        writer.finish()
    return why
