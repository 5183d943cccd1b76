"""Modules import downwards only. The levels, highest first; modules of one level may not import each other
unless the level says so.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"onnxslim": ROOT / "onnxslim", "onnxslim.passes": ROOT / "passes"}
PACKAGES |= {"onnxslim.calibration": ROOT / "calibration", "onnxslim.models": ROOT / "models"}
LINKS = ("passes", "calibration", "models")

LEVELS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("recipes",),
    ("compat", "demo"),
    ("utils", "precision"),
    ("terminal",),
    ("sources",),
    ("page",),
    ("analysis", "inspection"),
    ("validation",),
    ("report",),
    ("verdict",),
    ("passes",),
    ("calibration",),
    ("rewrite",),
    ("pipeline",),
    ("costs",),
    ("channels", "check", "evaluate"),
    ("probe",),
    ("latency", "metric"),
    ("runtime",),
    ("watch",),
    ("ops.cost",),
    ("ops",),
    ("labels",),
    ("shapes",),
    ("dims",),
    ("sizes",),
    ("values",),
    ("inference",),
    ("quirks",),
    ("printer",),
    ("model",),
    ("files",),
    ("proto",),
    ("budget",),
    ("graph",),
    ("terms",),
    ("errors", "formats", "version"),
)
# Packages whose modules build on each other.
FAMILIES = ("passes", "calibration", "ops", "cli")
# The face and the models stand beside the tower: anybody's callers, nobody's foundation.
OUTSIDE = ("", "models")


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the product under its installed name, without `onnxslim.`."""
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if package == "onnxslim" and parts[0] in LINKS:
                continue
            whole = (*package.split(".")[1:], *parts)
            yield ".".join(part for part in whole if part != "__init__"), path


def level(name: str) -> int | None:
    """Where a module stands: by its own name, or by the package it is in; None if it is outside."""
    while True:
        for index, names in enumerate(LEVELS):
            if name in names:
                return index
        if name.split(".")[0] in OUTSIDE:
            return None
        assert "." in name, f"'{name}' has no level: add it to LEVELS"
        name = name.rpartition(".")[0]


def family(name: str) -> str:
    return next((each for each in FAMILIES if name == each or name.startswith(f"{each}.")), name)


@cache
def known() -> dict[str, Path]:
    return dict(modules())


def imports(path: Path, *, running: bool = True) -> Iterator[str]:
    """Modules a file imports, anywhere in it; without those that only type checkers see."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = set()
    if running:
        guards = (
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        )
        skipped = {id(inner) for guard in guards for inner in ast.walk(guard)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner.removeprefix("onnxslim.") in known() else str(node.module)


@pytest.mark.parametrize("name", sorted(name for name, _ in modules()))
def test_imports_point_down(name: str) -> None:
    mine = level(name)
    for imported in imports(known()[name]):
        package, _, other = imported.partition(".")
        if package != "onnxslim" or mine is None:
            continue
        if other == "":
            assert family(name) == "cli", f"{name} imports the package's face; import the module"
            continue
        theirs = level(other)
        assert theirs is not None, f"{name} imports {other}"
        lazy = (name, other) in UPWARDS
        same_family = theirs == mine and family(name) == family(other)
        assert lazy or theirs > mine or same_family, f"{name} imports {other}, which is above it"


# A report prints itself: the only arrows up, taken when somebody asks for the text.
UPWARDS = {("pipeline", "report"), ("verdict", "report")}


def test_exceptions_are_still_needed() -> None:
    for name, other in UPWARDS:
        assert f"onnxslim.{other}" in set(imports(known()[name]))


@pytest.mark.parametrize(
    ("library", "owners"),
    [
        ("onnxruntime", {"runtime"}),
        ("onnx_graphsurgeon", {"graph"}),
        ("typer", {"cli"}),
    ],
)
def test_libraries_have_one_door(library: str, owners: set[str]) -> None:
    found = {
        family(name)
        for name, path in modules()
        if not name.startswith("models") and any(each.split(".")[0] == library for each in imports(path))
    }
    assert found == owners


def test_passes_neither_load_nor_save_nor_print() -> None:
    for name, path in modules():
        if not name.startswith("passes"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                assert called not in (
                    "print",
                    "open",
                    "load_model",
                    "save_model",
                    "InferenceSession",
                    "Session",
                ), f"{name}, line {node.lineno} calls {called}"
