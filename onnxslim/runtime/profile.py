"""What really runs, and where: placement, optimized graphs, and the targets that work here."""

from __future__ import annotations

import functools
import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx.parser

from onnxslim.errors import LoadError, TargetError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.runtime.backend import Loadable
from onnxslim.runtime.native import CPU
from onnxslim.runtime.session import BACKENDS, Session
from onnxslim.runtime.targets import REGISTRY, Target


def placement(model: Loadable, target: Target, feeds: Mapping[str, Array]) -> dict[str, int]:
    """How many operators each execution provider really runs, from ONNX Runtime's profile of one call.

    A provider may take many nodes of the model as one operator of its own.

    Raises:
        TargetError: the provider of the target loads, but runs none of them; or it keeps no profile.
    """
    with tempfile.TemporaryDirectory() as folder:
        session = Session(model, target, profile=Path(folder))
        session.run(feeds)
        events = json.loads(session.end_profile().read_text(encoding="utf-8"))
    ran = {
        event["name"]: event["args"]["provider"]
        for event in events
        if event.get("cat") == "Node" and event.get("args", {}).get("provider")
    }
    counts = dict(Counter(ran.values()))
    if ran and target.provider not in counts:
        others = ", ".join(f"{provider} runs {count}" for provider, count in counts.items())
        raise TargetError(f"{target.provider} loads, but runs no operator of the model: {others}")
    return counts


def may_stray(target: Target) -> bool:
    """Whether operators may run elsewhere than on the target, so that `placement` has something to tell."""
    return BACKENDS[target.backend].profiles and target.provider != CPU


def optimized_model(model: Model, target: Target | None = None) -> onnx.ModelProto:
    """The graph that ONNX Runtime really runs, weights left out."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        # "extended" fuses integer kernels but keeps plain operators where layout changes would hide them.
        Session(model, target, optimize="extended", optimized=path)
        return onnx.load_model(path, load_external_data=False)


def available() -> tuple[Target, ...]:
    """Every target that is seen to be really used here, in the order of the registry.

    A backend that does not tell what ran where, such as the reference evaluator, is used only when asked for.
    """
    seen = (target for target in REGISTRY.values() if BACKENDS[target.backend].profiles)
    return tuple(target for target in seen if not may_stray(target) or _works(target))


@functools.cache
def _works(target: Target) -> bool:
    """Whether a small product really runs on this target."""
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 13]> g (float[2,2] x) => (float[2,2] y) { y = MatMul(x, x) }'
    )
    try:
        placement(model, target, {"x": np.ones((2, 2), np.float32)})
    except (LoadError, TargetError):
        return False
    return True
