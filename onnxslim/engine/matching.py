"""Globs by which users name nodes, tensors and operators: they mean the same in every pass."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import chain

from onnxslim.engine.base import Log
from onnxslim.errors import closest
from onnxslim.ir.graph import Constant, Node
from onnxslim.ir.model import Model

# What passes say of options that are globs, before what they do with what is meant.
GLOBS = "globs on names of nodes and tensors, and on operator types,"


def hit(globs: Sequence[str], *names: str) -> str | None:
    """The first glob that is one of the names, or matches it; upper and lower case differ."""
    return next(
        (glob for glob in globs for name in names if name and (glob == name or fnmatchcase(name, glob))),
        None,
    )


def names_of(node: Node) -> tuple[str, ...]:
    """What means a node itself and not one of its tensors: its name, how messages name it, its operator."""
    return node.name, node.label, node.op


def matches(globs: Sequence[str], node: Node) -> str | None:
    """The first glob that means a node: itself, or a tensor that it makes, or a constant that it reads."""
    return hit(globs, *_every_name(node)) if globs else None


def excluded(globs: Sequence[str], node: Node) -> str | None:
    """Why a pass has to leave a node alone, as its report says it; None if no glob means the node."""
    glob = matches(globs, node)
    return None if glob is None else f"excluded by '{glob}'"


def _every_name(node: Node) -> tuple[str, ...]:
    constants = (tensor.name for tensor in node.inputs if isinstance(tensor, Constant))
    return *names_of(node), *(tensor.name for tensor in node.outputs), *constants


def tell_idle(globs: Sequence[str], model: Model, log: Log) -> None:
    """Warn of globs that mean nothing in a model, bodies included, and of what may have been meant."""
    if not globs:
        return
    names = list(dict.fromkeys(chain.from_iterable(_every_name(node) for node in model.nodes())))
    for glob in globs:
        if hit([glob], *names) is None:
            meant = closest(glob, names)
            hint = f"; did you mean '{meant}'?" if meant else ""
            log.warn(glob, f"it matches no node, tensor or operator{hint}")
