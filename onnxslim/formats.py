"""Figures, names and plain data as reports show them.

Names and messages come from model files: whatever could steer a terminal is shown escaped.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.filesize import decimal

SHOWN_NAMES = 3
SHOWN_ITEMS = 8
SHOWN_CHARACTERS = 400


def names(nodes: Sequence[str]) -> str:
    """The first few names, quoted."""
    shown = ", ".join(f"'{node}'" for node in nodes[:SHOWN_NAMES])
    return shown + (", …" if len(nodes) > SHOWN_NAMES else "")


def shortened(value: Any) -> str:
    """What a pass reports, cut short where it is long; the JSON report has all of it."""
    text = _told(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " … (see the JSON report)"


def _told(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        parts = [f"{key} {_told(item)}" for key, item in value.items()]
    elif isinstance(value, list | tuple | set | frozenset):
        parts = [_told(item) for item in value]
    else:
        return str(value)
    more = f", and {len(parts) - SHOWN_ITEMS} more" if len(parts) > SHOWN_ITEMS else ""
    return (", ".join(parts[:SHOWN_ITEMS]) or "none") + more


def clean(value: str) -> str:
    """Text that is safe to show on a terminal: everything that does not print is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in value)


def count(value: int | None) -> str:
    """A number of things: exact below ten thousand, else to four digits."""
    if value is None or value < 10_000:
        return "?" if value is None else str(value)
    power = min((len(str(value)) - 1) // 3, 4)
    return f"{value / 1000**power:.4g} {' kMGT'[power]}"


def size(value: int | None) -> str:
    """Bytes in decimal units, as file managers show them."""
    return "?" if value is None else decimal(value)


def percent(value: float | None) -> str:
    """A fraction, in percent; empty if there is none."""
    return "" if value is None else f"{100 * value:.2f} %"


def decibels(value: float | None) -> str:
    """A signal-to-noise ratio; "exact" where there is no noise."""
    if value is None:
        return ""
    return "exact" if value == math.inf else f"{value:.1f}"


def figure(value: float | None, form: str) -> str:
    """A number in this format; empty if there is none."""
    return "" if value is None else format(value, form)


def quotient(value: float | None, reference: float | None) -> str:
    """How many times as large; empty if that is not known."""
    return "" if value is None or not reference else f"{value / reference:.3f}"


def arrow(before: str, after: str) -> str:
    """What something was and became; once if that is the same."""
    return after if before == after else f"{before} → {after}"


def plain(value: Any) -> Any:
    """Data that every JSON reader takes: NaN is null, infinities are the strings "inf" and "-inf"."""
    if isinstance(value, float | np.floating):
        number = float(value)
        return number if math.isfinite(number) else None if math.isnan(number) else str(number)
    if value is None or isinstance(value, str | int):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [
            plain(item) for item in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)
        ]
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)


def to_json(value: Any) -> str:
    """JSON text of a report, a verdict, or anything made of plain data."""
    return json.dumps(plain(value), indent=2, allow_nan=False)
