"""Small models on which a rewrite goes wrong if it overlooks something; each says what must be left of it.

A case in one of the .txt files is a name, the reason why it is a trap, the operators that must be left after
Eliminate and Fuse, and a graph. Options: `opset: 17`; `batch: 2 1` and `size: 3` for the free axes of inputs;
`feeds: special` for NaN, infinities, -0 and the limits of integers among them; `runs: no` if ONNX Runtime has
no kernel for it. In a graph `{*}` stands for random values and `{+}` for random positive ones; values of half
precision are decimal numbers too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnxslim.engine import rewrite
from onnxslim.engine.base import Context, Log
from onnxslim.engine.check import interface, wellformed
from onnxslim.engine.editor import Editor
from onnxslim.engine.rewrite import Rule
from onnxslim.ir.graph import Array, Node
from onnxslim.ir.model import Model
from onnxslim.passes.eliminate import RULES as ELIMINATE
from onnxslim.passes.eliminate import Eliminate
from onnxslim.passes.fuse import RULES as FUSE
from onnxslim.passes.fuse import Fuse
from onnxslim.passes.slim import Slim
from tests.helpers import apply, feeds_for, ops, parse, same_outputs

FOLDER = Path(__file__).parent
VALUES = re.compile(r"(\w+)(?:\[([\d,]*)\])?\s+(\w+)\s*=\s*\{([^}]*)\}")
HALF = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Trap:
    """One case; `left` are the operators that must be left, sorted."""

    name: str
    left: list[str]
    graph: str
    options: dict[str, str] = field(default_factory=dict)

    def model(self) -> Model:
        opset = self.options.get("opset", "17")
        header = f'<ir_version: 8, opset_import: ["" : {opset}, "com.example" : 1]>'
        return parse(f"{header}\n{VALUES.sub(_filled, self.graph)}")


def _filled(match: re.Match[str]) -> str:
    kind, dims, name, given = match.groups()
    numbers = _random(name, dims, given) if given in ("*", "+") else given
    if kind in HALF:
        # The text format takes the bits.
        halves = np.array(numbers.split(","), np.float64).astype(HALF[kind])
        numbers = ",".join(str(bits) for bits in halves.view(np.uint16))
    size = f"[{dims}]" if dims is not None else ""
    return f"{kind}{size} {name} = {{{numbers}}}"


def _random(name: str, dims: str | None, given: str) -> str:
    shape = [int(size) for size in dims.split(",")] if dims else []
    generator = np.random.default_rng(sum(map(ord, name)))
    values = generator.uniform(0.5, 1.5, shape) if given == "+" else generator.standard_normal(shape)
    return ",".join(f"{value:.4f}" for value in values.reshape(-1))


def _cases() -> Iterator[Trap]:
    for path in sorted(FOLDER.glob("*.txt")):
        for block in re.split(r"^=== ", path.read_text(), flags=re.MULTILINE)[1:]:
            head, start, graph = block.partition("\ng (")
            name, *lines = head.splitlines()
            options = dict(re.findall(r"^(\w+): *(.*)$", "\n".join(lines), flags=re.MULTILINE))
            left = sorted(options.pop("left").split())
            yield Trap(f"{path.stem}/{name}", left, (start + graph).strip(), options)


TRAPS = list(_cases())


def feeds(trap: Trap, model: Model) -> Iterator[dict[str, Array]]:
    """Inputs at two batch sizes, and with special values if the case asks for them."""
    size = int(trap.options.get("size", "3"))
    for batch in trap.options.get("batch", "2 1").split():
        fed = feeds_for(model, batch=int(batch), size=size, seed=int(batch))
        yield fed
        flags = {
            name: np.logical_not(array, out=array.copy())
            for name, array in fed.items()
            if array.dtype == bool
        }
        if flags:
            yield {**fed, **flags}
    if trap.options.get("feeds") == "special":
        yield {name: _special(array) for name, array in feeds_for(model, batch=5, size=size).items()}


def _special(array: Array) -> Array:
    if array.dtype.kind in "iu":
        info = np.iinfo(array.dtype)
        values: list[float] = [info.min, info.max, 0, 1, 7]
    elif array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16:
        values = [math.nan, math.inf, -math.inf, -0.0, 0.0, 1.5, -1.5, float(np.finfo(np.float16).max)]
    else:
        return array
    return np.resize(np.array(values, array.dtype), array.shape)


def _same(trap: Trap, before: Model, after: Model) -> None:
    if trap.options.get("runs") == "no":
        assert interface(after) == interface(before)
        wellformed(after)
        return
    for fed in feeds(trap, before):
        same_outputs(before, after, fed)


def _settled(model: Model) -> tuple[Model, set[str]]:
    """The model after both passes have nothing left to do, and the rules that did something."""
    twin, fired = model.copy(), set[str]()
    for _ in range(5):
        changes = [step.run(twin, Context()) for step in (Eliminate(), Fuse())]
        fired.update(change.reason for each in changes for change in each.changed)
        if not any(changes):
            return twin, fired
    raise AssertionError("the passes do not come to an end")


@pytest.fixture(autouse=True)
def _declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules make no operators but those that they declare, and those that are there."""
    active: list[Rule[Any]] = []
    attempt = rewrite._try

    def watched(rule: Rule[Any], node: Node, edit: Editor, log: Log) -> bool:
        active[:] = [rule]
        return attempt(rule, node, edit, log)

    def checked(method: Callable[..., Node]) -> Callable[..., Node]:
        def make(edit: Editor, node: Node, op: str, *args: Any, **options: Any) -> Node:
            assert op in active[-1].makes | {each.op for each in edit.model.nodes()}, active[-1].name
            return method(edit, node, op, *args, **options)

        return make

    monkeypatch.setattr(rewrite, "_try", watched)
    monkeypatch.setattr(Editor, "add", checked(Editor.add))
    monkeypatch.setattr(Editor, "replace_node", checked(Editor.replace_node))


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.name)
def test_trap(trap: Trap) -> None:
    before = trap.model()
    after, _ = _settled(before)
    assert sorted(ops(after).elements()) == trap.left
    _same(trap, before, after)


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.name)
def test_trap_in_slim(trap: Trap) -> None:
    before = trap.model()
    after, _ = apply(Slim(), before)
    _same(trap, before, after)


def test_there_are_enough() -> None:
    assert len({trap.name for trap in TRAPS}) == len(TRAPS) >= 80


def test_every_rule_is_tried() -> None:
    fired = set().union(*(_settled(trap.model())[1] for trap in TRAPS))
    assert fired == {rule.name for rule in (*ELIMINATE, *FUSE)}
