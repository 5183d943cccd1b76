"""The public face: what it holds, and that it loads nothing before it is used."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import onnxslim
import onnxslim.errors
import onnxslim.passes
import onnxslim.validation.compare
from tests.helpers import ROOT

FACE = ROOT / "onnxslim" / "__init__.py"


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()


def test_every_public_name_is_there() -> None:
    assert onnxslim.__all__ == sorted(onnxslim.__all__, key=lambda name: (name.islower(), name))
    for name in onnxslim.__all__:
        assert getattr(onnxslim, name) is not None
    assert set(onnxslim.__all__) <= set(dir(onnxslim))


def test_type_checkers_see_every_public_name() -> None:
    tree = ast.parse(FACE.read_text(encoding="utf-8"))
    guard = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name for node in ast.walk(guard) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen | {"__version__"} == set(onnxslim.__all__)


def test_every_error_is_public() -> None:
    own = onnxslim.errors.__name__
    found = vars(onnxslim.errors).items()
    errors = {name for name, each in found if inspect.isclass(each) and each.__module__ == own}
    assert errors <= set(onnxslim.__all__)


@pytest.mark.parametrize(
    "name", [name for name in onnxslim.__all__ if name.endswith(("Error", "Graph", "Up"))]
)
def test_errors_are_one_line_whatever_names_are_in_them(name: str) -> None:
    error = getattr(onnxslim, name)("tensor 'a\nb\x1b[2J\u2028é'")
    assert str(error) == "tensor 'a\\nb\\x1b[2J\\u2028é'"
    assert str(type(error)(str(error))) == str(pickle.loads(pickle.dumps(error))) == str(error)


def test_unknown_names_are_attribute_errors() -> None:
    assert not hasattr(onnxslim, "nonsense")
    assert not hasattr(onnxslim.passes, "Nonsense")


def test_functions_are_not_shadowed_by_modules() -> None:
    assert not isinstance(onnxslim.validate, ModuleType)
    assert not isinstance(onnxslim.slim, ModuleType)
    assert onnxslim.validate is onnxslim.validation.compare.validate


def test_importing_loads_nothing_heavy() -> None:
    heavy = ("numpy", "onnx", "onnxruntime", "onnx_graphsurgeon", "pydantic", "rich", "networkx", "joblib")
    code = f"import sys, onnxslim, onnxslim.passes; print([m for m in {heavy} if m in sys.modules])"
    assert python(code) == "[]"
    assert python("import sys, onnxslim; onnxslim.load; print('onnx' in sys.modules)") == "True"


def test_lazy_names_in_a_fresh_interpreter() -> None:
    assert (
        python("from onnxslim import *; print(Pipeline.__name__, validate.__name__)") == "Pipeline validate"
    )
    assert (
        python("from onnxslim.passes import Slim, Quantize; print(Slim.name, Quantize.name)")
        == "slim quantize"
    )
    assert python("import onnxslim.validation, onnxslim; print(callable(onnxslim.validate))") == "True"


def test_onnx_runtime_tells_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it would, it keeps a number of the machine and what is to be sent in the home directory."""
    for name in ("CI", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    python("from onnxslim.runtime.native import onnxruntime; onnxruntime().SessionOptions()")
    assert not list(tmp_path.iterdir())


def test_version_is_that_of_the_distribution() -> None:
    assert onnxslim.__version__[0].isdigit()


@pytest.mark.parametrize("package", ["passes", "calibration"])
def test_no_second_copy_under_another_name(package: str) -> None:
    spec = importlib.util.spec_from_file_location(package, ROOT / package / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=rf"import onnxslim\.{package}, not {package}"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
