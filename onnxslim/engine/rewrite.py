"""Pattern rewriting: rules that look at one node, say why not, and edit around it.

A rule has three steps. `pattern` recognises a place by its structure; `check` looks up the facts that the
rewrite needs and says which is missing; `rewrite` edits. A fact that is not known is a reason not to fire.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from onnxslim import shapes
from onnxslim.engine.base import Log
from onnxslim.engine.editor import Editor
from onnxslim.engine.pipeline import MAX_ROUNDS
from onnxslim.ir.graph import Graph, Node
from onnxslim.ir.model import DEFAULT_DOMAINS, Model

M = TypeVar("M")


class Rule(ABC, Generic[M]):
    """One rewrite.

    Attributes:
        name: for messages and for switching it off.
        ops: operators of the standard domain at which `pattern` is tried.
        matches: others that it looks for around them by name.
        makes: those it makes. A model's own functions may hide standard operators; where they hide one of
            these, the rule is not applied at all.
        since: first opset the result is valid in.
    """

    name: ClassVar[str]
    ops: ClassVar[frozenset[str]]
    matches: ClassVar[frozenset[str]] = frozenset()
    makes: ClassVar[frozenset[str]] = frozenset()
    since: ClassVar[int] = 1

    @abstractmethod
    def pattern(self, node: Node, edit: Editor) -> M | None:
        """What the rule found at this node by structure alone, or None if this is not its place."""

    @abstractmethod
    def check(self, match: M, edit: Editor) -> str | None:
        """Why the rewrite would be wrong or is not known to be right; None if it may go ahead."""

    @abstractmethod
    def rewrite(self, match: M, edit: Editor) -> str:
        """Edit the graph; returns what was done, for the report."""


def apply(rules: Sequence[Rule[Any]], model: Model, log: Log, *, lossless: bool = False) -> bool:
    """Apply rules everywhere, bodies included, until none fires; True if any did.

    Args:
        rules: tried in this order at each node.
        model: edited in place.
        log: what was done and what was not.
        lossless: whether every tensor that a rule leaves has its shape afterwards, so that not all of them
            need to be inferred anew.
    """
    table: dict[str, list[Rule[Any]]] = {}
    # A function of the model's own goes before the standard operator of its name.
    redefined = {function.name for function in model.shell.functions if function.domain in DEFAULT_DOMAINS}
    for rule in rules:
        if model.opset >= rule.since and not redefined & (rule.matches | rule.makes):
            for op in rule.ops - redefined:
                table.setdefault(op, []).append(rule)
    changed = False
    for _ in range(MAX_ROUNDS):
        edit = Editor(model)
        fired = sum(_visit(graph, table, edit, log) for graph in list(model.graphs()))
        edit.commit()
        if lossless:
            shapes.keep(model)
        if not fired:
            break
        changed = True
    return changed


def _visit(graph: Graph, table: Mapping[str, list[Rule[Any]]], edit: Editor, log: Log) -> int:
    fired = 0
    for node in list(graph.nodes) if edit.can_edit(graph) else ():
        if node.domain not in DEFAULT_DOMAINS:
            continue
        for rule in table.get(node.op, ()):
            if edit.is_gone(node):
                break
            fired += _try(rule, node, edit, log)
    return fired


def _try(rule: Rule[Any], node: Node, edit: Editor, log: Log) -> bool:
    match = rule.pattern(node, edit)
    if match is None:
        return False
    label = node.label
    why_not = rule.check(match, edit)
    if why_not is not None:
        log.skip(label, f"{rule.name}: {why_not}")
        return False
    log.change(label, rule.rewrite(match, edit), rule.name)
    return True
