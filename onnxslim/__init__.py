"""Make ONNX models smaller and faster, and prove that they still work.

>>> import onnxslim
>>> from onnxslim import CalibrationData, Pipeline
>>> from onnxslim.passes import Quantize, Slim
>>> model = onnxslim.load("model.onnx")
>>> data, test = map(CalibrationData.from_npz, ("calibration.npz", "test.npz"))
>>> result = Pipeline(Slim(), Quantize())(model, data=data, test=test)
>>> onnxslim.validate(model, result.model, test).require(sqnr=20)
>>> result.save("model.int8.onnx")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxslim import passes
    from onnxslim.calibration.data import CalibrationData
    from onnxslim.compat.slim import slim
    from onnxslim.engine.base import Changes, Context, Pass
    from onnxslim.engine.pipeline import Pipeline, Report, Result
    from onnxslim.errors import (
        CalibrationError,
        InvalidGraph,
        LoadError,
        OnnxSlimError,
        PassError,
        SaveError,
        TargetError,
        TimeUp,
        UsageError,
        ValidationError,
    )
    from onnxslim.families.analysis import analyze
    from onnxslim.ir.model import Model, load
    from onnxslim.recipes.recipe import Recipe
    from onnxslim.reduction import Reduction, reduce
    from onnxslim.report.diff import Difference, diff
    from onnxslim.runtime.targets import Target
    from onnxslim.search import Goals, SearchResult, optimize
    from onnxslim.validation.compare import validate
    from onnxslim.validation.verdict import Verdict

    __version__: str

__all__ = [
    "CalibrationData",
    "CalibrationError",
    "Changes",
    "Context",
    "Difference",
    "Goals",
    "InvalidGraph",
    "LoadError",
    "Model",
    "OnnxSlimError",
    "Pass",
    "PassError",
    "Pipeline",
    "Recipe",
    "Reduction",
    "Report",
    "Result",
    "SaveError",
    "SearchResult",
    "Target",
    "TargetError",
    "TimeUp",
    "UsageError",
    "ValidationError",
    "Verdict",
    "__version__",
    "analyze",
    "diff",
    "load",
    "optimize",
    "passes",
    "reduce",
    "slim",
    "validate",
]

# Where each name lives. Nothing is imported before it is used: `onnxslim --help` needs none of it.
_HOMES = {
    "calibration.data": ("CalibrationData",),
    "families.analysis": ("analyze",),
    "compat.slim": ("slim",),
    "errors": (
        "CalibrationError",
        "InvalidGraph",
        "LoadError",
        "OnnxSlimError",
        "PassError",
        "SaveError",
        "TargetError",
        "TimeUp",
        "UsageError",
        "ValidationError",
    ),
    "ir.model": ("Model", "load"),
    "engine.base": ("Changes", "Context", "Pass"),
    "engine.pipeline": ("Pipeline", "Report", "Result"),
    "recipes.recipe": ("Recipe",),
    "reduction": ("Reduction", "reduce"),
    "report.diff": ("Difference", "diff"),
    "runtime.targets": ("Target",),
    "search": ("Goals", "SearchResult", "optimize"),
    "validation.compare": ("validate",),
    "validation.verdict": ("Verdict",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = importlib.import_module("onnxslim.version").version()
    elif name == "passes":
        value = importlib.import_module("onnxslim.passes")
    elif name in _HOME:
        value = getattr(importlib.import_module(f"onnxslim.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module 'onnxslim' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
