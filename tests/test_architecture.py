"""Rooms import downwards only: a picture in `docs/architecture.md`, and this list, say which stands on which.

A room is a package, or a module that stands alone. What only type checkers see counts, too.
"""

from __future__ import annotations

import ast
from functools import cache

import networkx as nx
import pytest

from tests.helpers import ROOT
from tests.structure import Product, room

# Highest first; rooms on one floor do not know of one another.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("compat", "search"),
    ("recipes", "utils"),
    ("report",),
    ("reduction", "validation"),
    ("passes",),
    ("families", "engine", "learn"),
    ("calibration",),
    ("runtime",),
    ("shapes",),
    ("ops",),
    ("ir",),
    ("errors", "formats", "version"),
)
# The floors inside the room of the passes.
PASSES: tuple[tuple[str, ...], ...] = (
    ("sparsify",),
    ("cheapen", "cluster"),
    ("factorize", "quantize", "prune"),
    ("codes", "distill"),
    ("repair", "half", "slim", "learning"),
    ("fuse", "legalize"),
    ("unfuse",),
    ("opsets",),
    ("dedupe", "eliminate", "extract", "fold", "inline"),
    ("dead", "predicates", "shapes", "single"),
)
# The face stands beside the tower: anybody's caller, nobody's foundation.
FACE = ""
# A report prints itself: the only arrows up, taken when somebody asks for the text.
UPWARDS = {("engine.pipeline", "report.text"), ("validation.verdict", "report.text")}
MOST_IN_THE_HALL = 8

PRODUCT = Product.of(ROOT)


@cache
def arrows() -> frozenset[tuple[str, str]]:
    """Who imports whom; read when a test asks, not while tests are collected."""
    return frozenset(PRODUCT.arrows())


@cache
def imports(name: str) -> frozenset[str]:
    """Modules that a module of the product imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(PRODUCT.modules[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: imports are absolute"
            if not str(node.module).startswith("onnxslim"):
                found.add(str(node.module))
    return frozenset(found | {f"onnxslim.{other}".rstrip(".") for mine, other in arrows() if mine == name})


def floor(room: str, floors: tuple[tuple[str, ...], ...]) -> int:
    found = [index for index, rooms in enumerate(floors) if room in rooms]
    assert len(found) == 1, f"'{room}' has no floor: add it to tests/test_architecture.py"
    return found[0]


@pytest.mark.parametrize("name", sorted(PRODUCT.modules))
def test_imports_point_down(name: str) -> None:
    for imported in imports(name):
        package, _, other = imported.partition(".")
        if package != "onnxslim" or name == FACE or (name, other) in UPWARDS:
            continue
        if not other:
            assert room(name) == "cli", f"{name} imports the package's face; import the module"
        elif room(other) != room(name):
            below = floor(room(other), FLOORS) > floor(room(name), FLOORS)
            assert below, f"{name} imports {other}, which is not below it"


@pytest.mark.parametrize("name", sorted(name for name in PRODUCT.modules if name.startswith("passes.")))
def test_passes_stand_on_one_another(name: str) -> None:
    mine = name.split(".")[1]
    for imported in imports(name):
        parts = imported.split(".")
        if parts[:2] == ["onnxslim", "passes"] and len(parts) > 2 and parts[2] != mine:
            assert floor(parts[2], PASSES) > floor(mine, PASSES), f"{name} imports {imported}"


def test_modules_make_no_circles() -> None:
    faces = {FACE, "passes"}  # they name what is inside them, for type checkers
    graph = nx.DiGraph(pair for pair in arrows() - UPWARDS if not faces & set(pair))
    assert [part for part in nx.strongly_connected_components(graph) if len(part) > 1] == []


def test_the_hall_is_small() -> None:
    hall = [path.name for path in (ROOT / "onnxslim").glob("*.py")]
    assert len(hall) <= MOST_IN_THE_HALL, hall


def test_no_class_name_stands_for_two_things() -> None:
    assert {name: count for name, count in PRODUCT.classes().items() if count > 1} == {}


def test_exceptions_are_still_needed() -> None:
    assert arrows() >= UPWARDS


@pytest.mark.parametrize(
    ("library", "owners"),
    [
        ("onnxruntime", {"runtime"}),
        ("onnx_graphsurgeon", {"ir"}),
        ("typer", {"cli"}),
        ("torch", set()),
    ],
)
def test_libraries_have_one_door(library: str, owners: set[str]) -> None:
    found = {
        room(name) for name in PRODUCT.modules if any(each.split(".")[0] == library for each in imports(name))
    }
    assert found == owners


def test_passes_neither_load_nor_save_nor_print() -> None:
    forbidden = ("print", "open", "load_model", "save_model", "InferenceSession", "Session")
    for name, path in PRODUCT.modules.items():
        if room(name) != "passes":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                assert called not in forbidden, f"{name}, line {node.lineno} calls {called}"
