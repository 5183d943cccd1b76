"""The ONNX node suite, computed with PyTorch: what is known is right, what is not has a reason here."""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, numpy_helper

from onnxslim.engine.base import Context
from onnxslim.errors import LoadError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import load
from onnxslim.learn.door import UnknownError, to_numpy, to_torch
from onnxslim.learn.net import Net, unknown
from onnxslim.passes.learning.apart import taken_apart
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target
from tests.test_conformance import cases

pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'onnx-slimkit[train]'")
pytestmark = [pytest.mark.train, pytest.mark.conformance]

# Why nothing, or not in all cases, is computed of some operators.
STRINGS = "texts, sequences and optional values are no tensors"
LEARNERS = "optimizers, trees and tables of other domains"
DETECTION = "chooses among boxes, or decodes images: it stands before or behind what is learnt"
SPECTRA = "Fourier transforms and what is made for them"
RARE = "rare: nobody has asked for it"
UNKNOWN = {
    **dict.fromkeys(("OptionalHasElement", "OptionalGetElement", "Optional", "SequenceConstruct"), STRINGS),
    **dict.fromkeys(("SequenceInsert", "SequenceMap", "SequenceAt", "SequenceEmpty"), STRINGS),
    **dict.fromkeys(("SequenceLength", "SplitToSequence", "StringConcat", "StringSplit"), STRINGS),
    **dict.fromkeys(("StringNormalizer", "RegexFullMatch", "TfIdfVectorizer"), STRINGS),
    **dict.fromkeys(("Adagrad", "Adam", "Momentum", "TreeEnsemble", "ArrayFeatureExtractor"), LEARNERS),
    **dict.fromkeys(("Binarizer", "LabelEncoder"), LEARNERS),
    **dict.fromkeys(("NonMaxSuppression", "RoiAlign", "ImageDecoder"), DETECTION),
    **dict.fromkeys(("DFT", "STFT", "MelWeightMatrix", "BlackmanWindow"), SPECTRA),
    **dict.fromkeys(("FlexAttention", "LinearAttention", "CausalConvWithState", "Attention"), RARE),
    **dict.fromkeys(("BitCast", "DeformConv"), RARE),
    "RandomUniformLike": "random",
}
# What else nodes ask for that is not computed: beginnings of what is said.
NOT_COMPUTED = (
    "PyTorch does not compute in ",
    "BatchNormalization by the statistics of a batch",
    "Dropout that drops is random",
    "Scan before opset 9",
    "Col2Im over 3 axes",
)
# Of 1,884 cases of onnx 1.23; older versions have fewer.
LEAST_EQUAL = 1450


@cache
def outcomes() -> dict[str, list[str]]:
    """Names of cases by what came of them."""
    found = defaultdict(list)
    for case in cases():
        found[outcome(case)].append(case.name)
    return found


def outcome(case: Any) -> str:
    """What comes of computing a case: empty if it is right."""
    model = taken_apart(load(case.model), Context())
    left = sorted({node.op for node, _ in unknown(model)})
    if left:
        return f"unknown: {' '.join(left)}"
    try:
        net = Net(model)
        return next(filter(None, (compared(case, net, *arrays) for arrays in case.data_sets)), "")
    except UnknownError as why:
        return str(why)


def compared(case: Any, net: Net, inputs: Any, outputs: Any) -> str:
    """What differs from ONNX Runtime, or where it has no kernel from what the suite expects."""
    feeds = {info.name: array_of(each) for info, each in zip(case.model.graph.input, inputs, strict=False)}
    found = net({name: to_torch(array) for name, array in feeds.items()})
    wanted = {info.name: array_of(each) for info, each in zip(case.model.graph.output, outputs, strict=True)}
    if not any(differs(array, to_numpy(found[name]), case) for name, array in wanted.items()):
        return ""
    with suppress(LoadError):
        wanted = Session(load(case.model), Target.cpu(threads=1), optimize="none").run(feeds)
    return next(filter(None, (differs(wanted[name], to_numpy(found[name]), case) for name in wanted)), "")


def array_of(given: Any) -> Array:
    return numpy_helper.to_array(given) if isinstance(given, TensorProto) else np.asarray(given)


def differs(expected: Array, found: Array, case: Any) -> str:
    """How two arrays differ; bfloat16 comes as float32."""
    coarse = expected.dtype.name in ("bfloat16", "float16")
    if expected.dtype.name == "bfloat16":
        expected = expected.astype(np.float32)
    if (expected.shape, expected.dtype) != (found.shape, found.dtype):
        return f"{case.name}: {expected.dtype} {expected.shape} is {found.dtype} {found.shape}"
    if expected.dtype.kind != "f":
        return "" if np.array_equal(expected, found) else f"{case.name}: other elements"
    rtol, atol = (1e-2, 1e-2) if coarse else (max(case.rtol, 1e-5), max(case.atol, 1e-6))
    close = np.allclose(expected.astype(np.float64), found.astype(np.float64), rtol, atol, equal_nan=True)
    return "" if close else f"{case.name}: other numbers"


def test_what_is_computed_is_right() -> None:
    wrong = [
        reason
        for reason in outcomes()
        if reason and not reason.startswith("unknown: ") and not any(each in reason for each in NOT_COMPUTED)
    ]
    assert wrong == []
    assert len(outcomes()[""]) >= LEAST_EQUAL


def test_what_is_not_known_is_listed_with_its_reason() -> None:
    left = {op for reason in outcomes() if reason.startswith("unknown: ") for op in reason.split()[1:]}
    assert left == UNKNOWN.keys()
