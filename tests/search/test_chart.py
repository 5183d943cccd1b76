"""Drawings of trials: every point where it belongs, and names that stay text."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from onnxslim.formats import clean
from onnxslim.search.chart import HEIGHT, WIDTH, chart
from onnxslim.search.goals import TrialFigures
from onnxslim.search.trials import SearchTrial

SVG = "{http://www.w3.org/2000/svg}"


def trial(
    name: str, latency: float | None, size: float, sqnr: float, drop: float | None = None
) -> SearchTrial:
    agreement = None if drop is None else 1.0 - drop
    figures = TrialFigures(sqnr, agreement, None, latency, size, size, None, 0.0)
    return SearchTrial(name, name, 1.0, "", figures)


def points(trials: list[SearchTrial]) -> list[list[tuple[str, str, float, float]]]:
    """Of each panel: name, class, and place of every point."""

    def point(circle: ElementTree.Element) -> tuple[str, str, float, float]:
        found = circle.attrib
        return circle[0].text or "", found["class"], float(found["cx"]), float(found["cy"])

    root = ElementTree.fromstring(chart(trials))
    return [[point(each) for each in panel.iter(f"{SVG}circle")] for panel in root.iter(f"{SVG}g")]


def test_better_is_higher_and_cheaper_is_left() -> None:
    fast, good, bad = (
        trial("fast", 0.2, 0.9, 20.0),
        trial("good", 0.8, 0.2, 40.0),
        trial("bad", 0.9, 0.95, 10.0),
    )
    times, sizes = points([fast, good, bad])
    place = {name: (x, y) for name, _, x, y in times}
    assert place["fast"][0] < place["good"][0] < place["bad"][0]
    assert place["good"][1] < place["fast"][1] < place["bad"][1]
    assert [name for name, kind, *_ in times if kind == "best"] == ["fast", "good"]
    assert [name for name, kind, *_ in sizes if kind == "best"] == ["good"]


@pytest.mark.parametrize("drop", [None, 0.0, 0.3])
def test_points_lie_within_the_panel_whatever_figures_are(drop: float | None) -> None:
    odd = [
        trial("a", 3.0, 0.1, math.inf, drop),
        trial("b", 0.1, 2.0, -math.inf, drop),
        trial("c", None, 1.0, math.nan, drop),
    ]
    for panel in points(odd):
        assert panel
        for _, _, x, y in panel:
            assert 0 <= x <= WIDTH
            assert 0 <= y <= HEIGHT
    assert points([]) == [[], []]


@pytest.mark.parametrize("name", ["</title><script>alert(1)</script>", "a\x1b[2J\x00", "&lt;"])
def test_names_stay_text(name: str) -> None:
    ((told, *_),), _ = points([trial(name, 0.5, 0.5, 30.0)])
    assert told == clean(name)
