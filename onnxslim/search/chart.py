"""Trials as a drawing: what each costs and keeps, with the fronts, as SVG that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from onnxslim.formats import clean, figure, percent
from onnxslim.search.trials import CostKind, SearchTrial, front

# Of one panel, and of the margin around what it shows.
WIDTH, HEIGHT, MARGIN = 420, 300, 48
# Above this, in dB, all is the same.
MOST_SQNR = 60.0
STYLE = """text { font: 12px system-ui, sans-serif; fill: #1c2430 } .axis { stroke: #98a2b3; fill: none }
.front { stroke: #2f6fdb; fill: none; stroke-width: 1.5 } .point { fill: #b9c3d0 } .best { fill: #2f6fdb }
@media (prefers-color-scheme: dark) { text { fill: #e6e9ee } .point { fill: #57616f } }"""


def chart(trials: Sequence[SearchTrial]) -> str:
    """Two panels, time and bytes against what is kept, as an SVG document; hovering tells what a point is."""
    kinds: tuple[CostKind, ...] = ("latency", "size")
    panels = "".join(
        f'<g transform="translate({at * WIDTH} 0)">{"".join(_panel(trials, kind))}</g>'
        for at, kind in enumerate(kinds)
    )
    size = f'width="{WIDTH * len(kinds)}" height="{HEIGHT}" viewBox="0 0 {WIDTH * len(kinds)} {HEIGHT}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>{panels}</svg>\n'


def _panel(trials: Sequence[SearchTrial], kind: CostKind) -> Iterator[str]:
    known = [each for each in trials if each.figures is not None and getattr(each.figures, kind) is not None]
    decided = bool(known) and all(each.figures and each.figures.drop is not None for each in known)
    best = front(known, kind)
    left, right, top, bottom = MARGIN, WIDTH - 12, 24, HEIGHT - MARGIN
    yield f'<path class="axis" d="M{left} {top}V{bottom}H{right}"/>'
    middle = f'x="{(left + right) // 2}" y="{HEIGHT - 12}" text-anchor="middle"'
    yield f"<text {middle}>{kind}, of the original</text>"
    yield f'<text x="{left}" y="14">{"lost" if decided else "kept, dB"}</text>'
    most = max([1.0, *(getattr(each.figures, kind) for each in known)])
    worst = max([0.01, *(_loss(each, decided) for each in known)])

    def place(trial: SearchTrial) -> tuple[float, float]:
        x = left + (right - left) * getattr(trial.figures, kind) / most
        return round(x, 1), round(top + (bottom - top) * _loss(trial, decided) / worst, 1)

    for share in (0.0, 0.5, 1.0):
        x = left + (right - left) * share
        yield f'<text x="{x:.0f}" y="{bottom + 16}" text-anchor="middle">{figure(share * most, ".3g")}</text>'
        y, shown = top + (bottom - top) * share, share * worst
        told = percent(shown) if decided else figure(MOST_SQNR - shown, ".3g")
        yield f'<text x="{left - 4}" y="{y + 4:.0f}" text-anchor="end">{told}</text>'
    if best:
        yield f'<polyline class="front" points="{" ".join(f"{x},{y}" for x, y in map(place, best))}"/>'
    keys = {each.key for each in best}
    for trial in known:
        x, y = place(trial)
        kind_of = "best" if trial.key in keys else "point"
        name = escape(clean(trial.label))
        yield f'<circle class="{kind_of}" cx="{x}" cy="{y}" r="4"><title>{name}</title></circle>'


def _loss(trial: SearchTrial, decided: bool) -> float:
    """How far down a trial is drawn: what it loses, or how many dB below `MOST_SQNR` it keeps."""
    assert trial.figures is not None
    if decided:
        return max(trial.figures.drop or 0.0, 0.0)
    sqnr = trial.figures.sqnr
    return min(max(MOST_SQNR - (0.0 if math.isnan(sqnr) else sqnr), 0.0), MOST_SQNR)
