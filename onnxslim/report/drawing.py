"""How two graphs differ, as boxes and lines of SVG for the page of a report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from onnxslim.report.diff import Difference
from onnxslim.report.places import Drawing, DrawnNode, DrawnPlace

# Of a box, and between boxes; characters that fit into one.
WIDTH, HEIGHT, ACROSS, DOWN, FITS = 148, 36, 12, 22, 21
# Lines of a list that the page shows, and colours that it has for passes.
MOST_LINES, COLOURS = 200, 8


def view(shown: Difference) -> dict[str, Any]:
    """What the page shows of a difference."""
    colours = {name: f"pass{at % COLOURS}" for at, name in enumerate(shown.passes)}
    changed = [f"{name}: {'; '.join(told)}" for name, told in shown.changed.items()]
    lists = (
        ("inputs and outputs", shown.interface),
        ("gone", shown.removed),
        ("new", shown.added),
        ("changed", changed),
    )
    return {
        "same": shown.same,
        "lists": [
            {"what": what, "count": len(lines), "lines": lines[:MOST_LINES]} for what, lines in lists if lines
        ],
        "most": MOST_LINES,
        "colours": colours,
        "places": [_place(place, colours) for place in shown.places],
        "left_out": shown.left_out,
    }


def _place(place: DrawnPlace, colours: Mapping[str, str]) -> dict[str, Any]:
    sides = (("before", place.before), ("after", place.after))
    return {
        "name": place.name,
        "count": place.count,
        "others": ", ".join(place.others),
        "made_by": place.made_by,
        "colour": colours.get(place.made_by, ""),
        "sides": [{"what": what, **_drawn(side, place.made_by, colours)} for what, side in sides],
    }


def _drawn(drawing: Drawing, made_by: str, colours: Mapping[str, str]) -> dict[str, Any]:
    rows = _rows(drawing)
    widest = max((len(row) for row in rows), default=0)
    at = {}
    for y, row in enumerate(rows):
        start = (widest - len(row)) * (WIDTH + ACROSS) / 2
        at.update({index: (start + x * (WIDTH + ACROSS), y * (HEIGHT + DOWN)) for x, index in enumerate(row)})
    return {
        "width": max(widest * (WIDTH + ACROSS) - ACROSS, 0) + 4,
        "height": max(len(rows) * (HEIGHT + DOWN) - DOWN, 0) + 4,
        "boxes": [_box(each, *at[index], made_by, colours) for index, each in enumerate(drawing.nodes)],
        "lines": [_line(*at[start], *at[end]) for start, end in drawing.edges],
    }


def _rows(drawing: Drawing) -> list[list[int]]:
    """Nodes by how many are before them, in the order of those that they read; the first of all near them."""
    makers: defaultdict[int, list[int]] = defaultdict(list)
    readers: defaultdict[int, list[int]] = defaultdict(list)
    for start, end in drawing.edges:
        makers[end].append(start)
        readers[start].append(end)
    depth: dict[int, int] = {}
    for index in range(len(drawing.nodes)):
        depth[index] = 1 + max((depth.get(maker, -1) for maker in makers[index]), default=-1)
    for index in depth:
        if not makers[index] and readers[index]:
            depth[index] = min(depth[reader] for reader in readers[index]) - 1
    rows: list[list[int]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for index, at in depth.items():
        rows[at].append(index)
    place: dict[int, float] = {}
    for row in rows:
        row.sort(key=lambda index: _mean([place[maker] for maker in makers[index] if maker in place]))
        place.update({index: x - len(row) / 2 for x, index in enumerate(row)})
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _box(node: DrawnNode, x: float, y: float, made_by: str, colours: Mapping[str, str]) -> dict[str, Any]:
    # Where no pass names a node, it has the colour of the place.
    own = list(node.done)[-1] if node.done else made_by
    done = [f"{name}: {action}" if action else name for name, action in node.done.items()]
    return {
        "x": x + 2,
        "y": y + 2,
        "classes": f"box {node.state} {colours.get(own, '') if node.state != 'same' else ''}".strip(),
        "op": node.op if len(node.op) <= FITS else node.op[: FITS - 1] + "…",
        "name": node.name if len(node.name) <= FITS else "…" + node.name[1 - FITS :],
        "title": "\n".join((f"{node.name} ({node.op})", *node.told, *done)),
    }


def _line(x: float, y: float, to_x: float, to_y: float) -> str:
    """From the lower edge of one box to the upper edge of another."""
    start, end = (x + 2 + WIDTH / 2, y + 2 + HEIGHT), (to_x + 2 + WIDTH / 2, to_y + 2)
    middle = (start[1] + end[1]) / 2
    return f"M{start[0]:g} {start[1]:g}C{start[0]:g} {middle:g} {end[0]:g} {middle:g} {end[0]:g} {end[1]:g}"
