"""Names of operators stand in their rows; elsewhere only what code matches or makes, which it declares.

A rule declares them as `ops`, `matches` and `makes`; a module, for its functions and other classes, as
`MATCHES` and `MAKES`. Lists of operators that share a property are traits of their rows.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import onnx.defs

from onnxslim.ops import REGISTRY
from tests.helpers import ROOT
from tests.structure import Product, room, syntax

NAMES = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if not schema.domain}
NAMES |= {op for _, op in REGISTRY}
# Calls that make nodes of an operator.
MAKERS = ("Node", "add", "replace_node", "_add", "Found", "get_schema", "term")
MATCHED, MADE = ("ops", "matches", "MATCHES"), ("makes", "needs", "MAKES")
PRODUCT = Product.of(ROOT)
# What operators compute in PyTorch is in rows, too.
MODULES = sorted(
    name for name in PRODUCT.modules if room(name) != "ops" and not name.startswith("learn.forward.")
)

# Longer lists of operators are properties that rows should have.
MOST_IN_A_LIST = 3


@dataclass(frozen=True)
class Literal:
    """The name of an operator in the code.

    Attributes:
        name: of the operator.
        line: where.
        owner: the class around it.
        makes: whether a node of it is made here.
        declares: whether this is the declaration.
    """

    name: str
    line: int
    owner: str | None
    makes: bool
    declares: bool


def _called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


def _targets(node: ast.AST) -> Iterator[str]:
    """Names and attributes that an assignment sets."""
    for target in getattr(node, "targets", [getattr(node, "target", None)]):
        for each in ast.walk(target) if target is not None else ():
            if isinstance(each, ast.Name | ast.Attribute):
                yield each.id if isinstance(each, ast.Name) else each.attr


def _literals(tree: ast.AST) -> Iterator[Literal]:
    made: set[int] = set()
    pending: list[tuple[ast.AST, str | None, bool]] = [(tree, None, False)]
    while pending:
        node, owner, declares = pending.pop()
        if isinstance(node, ast.ClassDef):
            owner = node.name
        elif isinstance(node, ast.Call) and _called(node) in MAKERS:
            made |= {id(each) for arg in node.args for each in _chosen(arg)}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = set(_targets(node))
            declares = declares or bool(targets & {*MATCHED, *MADE})
            made |= {id(each) for each in _chosen(node.value)} if "op" in targets else set()
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in NAMES:
            yield Literal(node.value, node.lineno, owner, id(node) in made, declares)
        pending.extend((child, owner, declares) for child in ast.iter_child_nodes(node))


def _chosen(node: ast.expr | None) -> Iterator[ast.AST]:
    """A literal, those that a condition chooses between, or those in a tuple."""
    if isinstance(node, ast.IfExp):
        yield from (*_chosen(node.body), *_chosen(node.orelse))
    elif isinstance(node, ast.Tuple):
        yield from (each for item in node.elts for each in _chosen(item))
    elif node is not None:
        yield node


@cache
def _found(name: str) -> tuple[Literal, ...]:
    return tuple(_literals(syntax(PRODUCT.modules[name])))


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"onnxslim.{name}" if name else "onnxslim")


def _declared(holder: object, words: tuple[str, ...]) -> frozenset[str]:
    return frozenset[str]().union(*(getattr(holder, word, ()) for word in words))


def _allowed(module: ModuleType, owner: str | None, words: tuple[str, ...]) -> frozenset[str]:
    """What is declared for a class and its module; functions of a module work for its rules."""
    inner = [
        each
        for each in vars(module).values()
        if isinstance(each, type) and each.__module__ == module.__name__
    ]
    holders = [each for each in inner if owner is None or each.__name__ == owner]
    return _declared(module, words).union(*(_declared(each, words) for each in holders))


def test_operators_are_named_where_they_are_matched_or_made() -> None:
    problems = [
        f"{name}, line {each.line}: '{each.name}' is not declared in {' or '.join(words)}; "
        "if this is a property of the operator, ask its row"
        for name in MODULES
        for each in _found(name)
        if not each.declares
        for words in [MADE if each.makes else MATCHED]
        if each.name not in _allowed(_module(name), each.owner, words)
    ]
    assert not problems, "\n".join(problems)


def test_what_is_declared_is_there() -> None:
    idle = {
        f"{name}.{word}": unused
        for name in MODULES
        if _found(name)
        for word in ("MATCHES", "MAKES")
        if (
            unused := _declared(_module(name), (word,))
            - {each.name for each in _found(name) if not each.declares}
        )
    }
    assert not idle


def _lists(tree: ast.AST) -> Iterator[tuple[int, list[str]]]:
    """Lists of operators outside declarations, by their lines."""
    statements = (node for node in ast.walk(tree) if isinstance(node, ast.Assign | ast.AnnAssign))
    declared = {
        id(each) for node in statements if {*_targets(node)} & {*MATCHED, *MADE} for each in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Tuple | ast.List | ast.Set) and id(node) not in declared:
            named = [each.value for each in node.elts if isinstance(each, ast.Constant)]
            yield node.lineno, [str(each) for each in named if each in NAMES]


def test_properties_of_operators_are_not_listed() -> None:
    problems = [
        f"{name}, line {line}: {named}"
        for name, tree in PRODUCT.trees()
        if name in MODULES and _found(name)
        for line, named in _lists(tree)
        if len(named) > MOST_IN_A_LIST
    ]
    assert not problems, "\n".join(problems)
