"""Asking rules about nodes that may be broken."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

Args = ParamSpec("Args")
Answer = TypeVar("Answer")

# What reading a node raises that says what no operator means: a stride of 0, an infinite scale, an axis too
# many, a text where numbers belong, an input that is missing.
MALFORMED = (ArithmeticError, LookupError, TypeError, ValueError)


def answer(rule: Callable[Args, Answer | None], *args: Args.args, **named: Args.kwargs) -> Answer | None:
    """What a rule makes of a node; None of one that no runtime would run, as of one that it does not know."""
    try:
        return rule(*args, **named)
    except MALFORMED:
        return None
