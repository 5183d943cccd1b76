"""Arithmetic with sizes that may be symbols.

A term is a number, a symbol, or an expression: a tuple of an operator and terms, in one form for all that is
equal by reordering. ("axis", tensor, index) stands for a size that has no other name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, TypeAlias

Term: TypeAlias = int | str | tuple[Any, ...]

_SIZES = ("axis", "*", "+", "min")


def is_size(term: Term | None) -> bool:
    """Whether a term cannot be negative."""
    if isinstance(term, tuple):
        return term[0] == "axis" or (term[0] in _SIZES and all(map(is_size, term[1:])))
    return isinstance(term, str) or (isinstance(term, int) and term >= 0)


def spell(term: Term) -> str:
    """A symbol's name for a term."""
    if not isinstance(term, tuple):
        return str(term)
    if term[0] == "min":
        return f"min({', '.join(map(spell, term[1:]))})"
    return f"({term[0].join(map(spell, term[1:]))})"


def _parts(term: Term, operator: str) -> tuple[Term, ...]:
    return term[1:] if isinstance(term, tuple) and term[0] == operator else (term,)


def _joined(operator: str, number: int, neutral: int, symbols: Iterable[Term]) -> Term:
    parts: list[Term] = sorted(symbols, key=repr)
    if number != neutral or not parts:
        parts.append(number)
    return parts[0] if len(parts) == 1 else (operator, *parts)


def plus(first: Term, second: Term) -> Term:
    """The sum of two terms."""
    parts = (*_parts(first, "+"), *_parts(second, "+"))
    number = sum(part for part in parts if isinstance(part, int))
    return _joined("+", number, 0, (part for part in parts if not isinstance(part, int)))


def minus(first: Term, second: Term) -> Term:
    """The difference of two terms."""
    if isinstance(second, int):
        return plus(first, -second)
    left, taken = Counter(_parts(first, "+")), Counter(_parts(second, "+"))
    if taken - left:
        return ("-", first, second)
    difference: Term = 0
    for part in (left - taken).elements():
        difference = plus(difference, part)
    return difference


def times(first: Term, second: Term) -> Term:
    """The product of two terms."""
    number, symbols = 1, list[Term]()
    for part in (*_parts(first, "*"), *_parts(second, "*")):
        if isinstance(part, int):
            number *= part
        else:
            symbols.append(part)
    return 0 if number == 0 else _joined("*", number, 1, symbols)


def product(terms: Iterable[Term]) -> Term:
    """The product of any number of terms."""
    result: Term = 1
    for term in terms:
        result = times(result, term)
    return result


def over(first: Term, second: Term) -> Term | None:
    """The quotient of two terms rounded towards zero; None if they are numbers and there is none."""
    if isinstance(first, int) and isinstance(second, int):
        sign = -1 if (first < 0) != (second < 0) else 1
        return None if second == 0 else sign * (abs(first) // abs(second))
    exact = exactly_over(first, second)
    return exact if exact is not None else ("/", first, second)


def exactly_over(first: Term, second: Term) -> Term | None:
    """The quotient of two products without remainder, provided the divisor is not zero; None if unknown."""
    above, below = Counter(_parts(first, "*")), Counter(_parts(second, "*"))
    numbers = [1, 1]
    for side, parts in enumerate((above, below)):
        for part in [part for part in parts if isinstance(part, int)]:
            numbers[side] *= part ** parts.pop(part)
    if numbers[1] == 0 or numbers[0] % numbers[1] or below - above:
        return None
    return times(numbers[0] // numbers[1], product((above - below).elements()))


def least(first: Term, second: Term) -> Term:
    """The lesser of two sizes."""
    if isinstance(first, int) and isinstance(second, int):
        return min(first, second)
    return first if first == second else ("min", *sorted((first, second), key=repr))


def moved(term: Term | None, ids: Mapping[int, int]) -> Term | None:
    """The same size in another model, whose tensors have these ids instead."""
    if not isinstance(term, tuple):
        return term
    operator, *parts = term
    if operator == "axis":
        return (operator, ids.get(parts[0], parts[0]), parts[1])
    return reduce(_OPERATIONS[operator], (moved(part, ids) for part in parts))


def broadcast(terms: Sequence[Term | None]) -> Term | None:
    """Size of an axis that several sizes are broadcast to; None if it is one of them, but not known which."""
    result: Term | None = 1
    for term in terms:
        result = _wider(result, term)
    return result


# Terms in one form depend on the order of ids, and are put together anew where these change.
_OPERATIONS: Mapping[str, Callable[[Any, Any], Any]] = {
    "+": plus,
    "-": minus,
    "*": times,
    "/": over,
    "min": least,
}


def _wider(first: Term | None, second: Term | None) -> Term | None:
    if first == second or second == 1:
        return first
    if first == 1:
        return second
    for one, other in ((first, second), (second, first)):
        # Sizes that are broadcast are equal or 1, and a part of a size is not more than the whole.
        if (isinstance(one, int) and one > 1) or (one is not None and _is_part(other, one)):
            return one
    return None


def _is_part(term: Term | None, whole: Term) -> bool:
    """Whether a term is the lesser of another one and a number that is not zero."""
    parts = _parts(term, "min") if term is not None else ()
    return len(parts) == 2 and whole in parts and any(isinstance(part, int) and part > 0 for part in parts)
