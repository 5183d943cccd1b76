"""Writes docs/passes.md from the passes themselves.

python docs/generate.py
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from onnxslim import passes
from onnxslim.engine.base import Pass
from onnxslim.engine.rewrite import Rule
from onnxslim.passes import eliminate, fuse
from onnxslim.passes.slim import Slim

PAGE = Path(__file__).with_name("passes.md")
HEAD = """# Passes

Written by `python docs/generate.py` from the code; change the docstrings and options there, not here.

Options are fields of the class in Python (`Quantize(observer="kl")`), `--name value` on the command line of
`onnxslim slim` and `onnxslim quantize`, and `name:option=value,option=value` for `onnxslim run --pass`.
`onnxslim passes NAME` prints the same in a terminal. A lossless pass is held to the same outputs up to
rounding, any other one to the same types and shapes and to finite numbers: see
[checks](architecture.md#checks).
"""
RULES: dict[str, Sequence[Rule[Any]]] = {"eliminate": eliminate.RULES, "fuse": fuse.RULES}


def page() -> str:
    """The whole page."""
    return "\n".join((HEAD, *(line for name in passes.names() for line in _section(passes.get(name)))))


def _section(cls: type[Pass]) -> Iterator[str]:
    kind = "lossless" if cls.lossless else "lossy"
    needs = ", needs calibration data" if cls().needs_data else ""
    yield from (f"## {cls.name}", "", f"`onnxslim.passes.{cls.__name__}`: {kind}{needs}.", "")
    yield from (inspect.getdoc(cls) or "", "")
    if cls is Slim:
        yield from ("Its parts, in order: " + ", ".join(part.name for part in Slim().parts()) + ".", "")
    found = passes.options_of(cls)
    if found:
        rows = [(f"`{each.name}`", each.type, each.default, each.help) for each in found]
        yield from _table(("option", "values", "default", "meaning"), rows)
    else:
        yield from ("No options.", "")
    if cls.name in RULES:
        yield from _table(("rule", "tried at", "what it does"), [_rule(rule) for rule in RULES[cls.name]])


def _rule(rule: Rule[Any]) -> tuple[str, ...]:
    since = f" (opset {rule.since} on)" if rule.since > 1 else ""
    text = " ".join((inspect.getdoc(type(rule)) or "").split("\n\n")[0].split())
    return f"`{rule.name}`", ", ".join(sorted(rule.ops)) + since, text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *rows):
        yield "| " + " | ".join(_cell(cell) for cell in row) + " |"
    yield ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
