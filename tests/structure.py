"""The product in numbers, to compare one state of it with another.

    python tests/structure.py [CHECKOUT ...]

Lines, modules, rooms (packages, and modules that stand alone), arrows between rooms, floors (the longest way
down), names of classes that stand twice, names of operators in strings outside `onnxslim/ops/`, and lines of
functions.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import networkx as nx
import onnx.defs

LINKS = ("passes", "calibration", "models")


@dataclass(frozen=True)
class Product:
    """The modules of one checkout, under their installed names without `onnxslim.`."""

    modules: dict[str, Path]

    @staticmethod
    def of(root: Path) -> Product:
        """What lies below the root of a checkout; models are data."""
        found = {}
        for package in ("onnxslim", "passes", "calibration"):
            for path in sorted((root / package).rglob("*.py")):
                parts = path.relative_to(root / package).with_suffix("").parts
                if package == "onnxslim" and parts[0] in LINKS:
                    continue
                whole = parts if package == "onnxslim" else (package, *parts)
                found[".".join(part for part in whole if part != "__init__")] = path
        return Product(found)

    def trees(self) -> Iterator[tuple[str, ast.Module]]:
        """Syntax of every module."""
        for name, path in self.modules.items():
            yield name, syntax(path)

    def arrows(self) -> Iterator[tuple[str, str]]:
        """Pairs of modules, of which the first imports the second, for type checkers at least."""
        for name, tree in self.trees():
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "onnxslim":
                    inside = str(node.module).partition(".")[2]
                    for alias in node.names:
                        inner = f"{inside}.{alias.name}".lstrip(".")
                        yield name, inner if inner in self.modules else inside

    def rooms(self) -> nx.DiGraph[str]:
        """Rooms and the arrows between them, without the face."""
        pairs = {(room(first), room(second)) for first, second in self.arrows()}
        graph = nx.DiGraph((first, second) for first, second in pairs if first != second and first and second)
        graph.add_nodes_from(room(name) for name in self.modules if name)
        return graph

    def classes(self) -> Counter[str]:
        """How often each name is that of a class."""
        return Counter(
            node.name for _, tree in self.trees() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
        )

    def functions(self) -> list[int]:
        """Lines of every function, the shortest first."""
        nodes = (node for _, tree in self.trees() for node in ast.walk(tree))
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
        return sorted((node.end_lineno or 0) - node.lineno + 1 for node in nodes if isinstance(node, kinds))

    def operators(self) -> Counter[str]:
        """Names of standard operators in strings outside `ops`, by module."""
        known = {schema.name for schema in onnx.defs.get_all_schemas()}
        return Counter(
            name
            for name, tree in self.trees()
            if room(name) != "ops"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and node.value in known
        )

    def lines(self) -> int:
        """Of all modules."""
        return sum(path.read_text(encoding="utf-8").count("\n") for path in self.modules.values())


@cache
def syntax(path: Path) -> ast.Module:
    """The syntax of one file, read once."""
    return ast.parse(path.read_text(encoding="utf-8"))


def room(name: str) -> str:
    """The package that a module lies in, or itself."""
    return name.split(".")[0]


def told(product: Product) -> dict[str, object]:
    """The figures, by what they are called."""
    rooms, functions, operators = product.rooms(), product.functions(), product.operators()
    floors = nx.dag_longest_path_length(nx.condensation(rooms)) + 1
    return {
        "lines of product code": product.lines(),
        "modules": len(product.modules),
        "rooms": len(rooms),
        "arrows between rooms": rooms.number_of_edges(),
        "floors": floors,
        "names of classes used twice": sum(count > 1 for count in product.classes().values()),
        "operators in strings outside ops": f"{operators.total()} in {len(operators)} modules",
        "lines of functions, p50 / p90 / longest": " / ".join(
            str(functions[int(share * (len(functions) - 1))]) for share in (0.5, 0.9, 1.0)
        ),
    }


def main(*roots: str) -> None:
    """Print a column for each checkout."""
    columns = [told(Product.of(Path(root))) for root in roots or (str(Path(__file__).parent.parent),)]
    for what in columns[0]:
        print(f"{what:45}", *(f"{column[what]!s:>24}" for column in columns))


if __name__ == "__main__":
    main(*sys.argv[1:])
