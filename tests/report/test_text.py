"""What reports say, that they cannot steer a terminal, and that JSON readers take them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from onnxslim.engine.base import Change, Changes, Context, Figures, Pass, Skip, captioned, options
from onnxslim.engine.pipeline import Pipeline, Report, Step
from onnxslim.errors import CalibrationError, PassError
from onnxslim.formats import clean, count, plain, size, to_json
from onnxslim.ir.model import Model, Stats
from onnxslim.report.text import text
from onnxslim.validation.verdict import Footprint, OutputRow, ProviderVerdict, Verdict
from tests.helpers import parse

SIZES = Stats(nodes=12, parameters=34_567, bytes=1_234_567), Stats(nodes=9, parameters=34_567, bytes=654_321)


def step(changes: Changes, error: str = "") -> Step:
    return Step("slim", "slim(rounds=3)", 0.125, *SIZES, 42_000_000, None, changes, error)


def shown(changes: Changes, error: str = "") -> str:
    return text(Report((step(changes, error),)))


def test_sizes_before_and_after() -> None:
    lines = shown(Changes((Change("n", "a"),))).splitlines()
    assert lines[0].split() == ["pass", "seconds", "nodes", "parameters", "bytes", "MACs"]
    assert " ".join(lines[2].split()) == "slim 0.12 12 → 9 34.57 k 1.2 MB → 654.3 kB 42 M → ?"


def test_changes_are_grouped_by_rule_and_counted() -> None:
    changed = [Change(f"bn{i}", "folded into the convolution", "fold-norm") for i in range(3)]
    changed += [Change(f"c{i}", f"folded {i} values", "fold") for i in range(2)]
    lines = shown(Changes((*changed, Change("x", "removed"))))
    assert "  3 × fold-norm: folded into the convolution\n  2 × fold\n  1 × removed" in lines


def test_skips_are_grouped_by_reason_with_the_first_names() -> None:
    skipped = tuple(Skip(f"conv{i}", "its weight is shared") for i in range(5))
    assert "  left alone 5 × its weight is shared ('conv0', 'conv1', 'conv2', …)" in shown(
        Changes((), skipped)
    )


def test_many_kinds_are_cut_short() -> None:
    changed = tuple(Change("n", "a", f"rule{i}") for i in range(25))
    assert "and 5 more kinds" in shown(Changes(changed))


@dataclass(frozen=True)
class Weighing(Figures):
    """Of a pass that somebody wrote."""

    fused: Mapping[str, int] | None = captioned("run as one")
    unfused: tuple[str, ...] | None = captioned("left")
    loss: float | None = captioned("lost")
    many: tuple[int, ...] | None = captioned("many")
    plan: Mapping[str, Any] | None = captioned("long")
    secret: int = 7


def test_figures_are_told_under_their_captions() -> None:
    figures = Weighing({"Conv": 13, "Add": 2}, (), 0.123456789, tuple(range(20)))
    lines = shown(Changes((Change("n", "a"),), (), figures))
    for line in ("run as one: Conv 13, Add 2", "left: none", "lost: 0.123457", "6, 7, and 12 more"):
        assert f"{line}\n" in f"{lines}\n"
    assert "long" not in lines, "it is not known"
    assert "7" not in lines.split("12 more")[1], "without a caption, for programs only"


def test_figures_are_read_as_what_they_are() -> None:
    changes = Changes((), (), Weighing(loss=0.5))
    assert Weighing.of(changes).loss == 0.5
    with pytest.raises(TypeError, match="reported Figures, not Weighing"):
        Weighing.of(Changes())


def test_long_figures_are_cut_short() -> None:
    plan = {"families": [{"name": f"family{i}", "removed": list(range(30))} for i in range(30)]}
    lines = shown(Changes((Change("n", "a"),), (), Weighing(plan=plan))).splitlines()
    (line,) = [line for line in lines if "long: " in line]
    assert len(line) < 450
    assert line.endswith("… (see the JSON report)")


def test_reverted_steps_say_so_and_why() -> None:
    assert "was reverted, the model is as it was before: output 'y' differs" in shown(
        Changes(), "output 'y' differs"
    )
    kept = Changes((Change("n", "a"),))
    assert "was partly reverted: output 'y' differs" in shown(kept, "output 'y' differs")


def test_idle_steps_say_why() -> None:
    assert step(Changes()).outcome == "changed nothing: it found nothing to do"
    skipped = (Skip("c", "its weight is a vector"), Skip("a", "excluded"), Skip("b", "excluded"))
    assert step(Changes((), skipped)).outcome == "changed nothing: excluded; its weight is a vector"
    many = tuple(Skip(str(index), f"reason {index}") for index in range(5))
    assert step(Changes((), many)).outcome.endswith("reason 2; and 2 more reasons, see the report")
    assert step(Changes((Change("n", "a"),))).outcome == ""


def test_notes_are_told() -> None:
    assert text(Report((), ("the input does not run",))) == "note: the input does not run"
    assert str(Report((), ("the input does not run",))) == "note: the input does not run"


# ------------------------------------------------------------------------------------------------- safety

EVIL = "\x1b[2J\x9b31m\r\n\u202e[red]x[/red][link=http://e]\u200b"


@given(st.text())
def test_cleaned_text_prints_and_nothing_else(value: str) -> None:
    assert clean(value).isprintable()
    if value.isprintable():
        assert clean(value) == value


def test_names_cannot_steer_the_terminal_nor_act_as_markup() -> None:
    figures = Weighing({EVIL: 1}, (EVIL,))
    changes = Changes((Change(EVIL, EVIL, EVIL),), (Skip(EVIL, EVIL),), figures)
    report = Report((Step(EVIL, EVIL, 0.0, *SIZES, 0, 0, changes, EVIL),), (EVIL,))
    verdict = Verdict(
        Footprint(1, 1, 1, 1),
        Footprint(1, 1, 1, 1),
        (ProviderVerdict(EVIL, (OutputRow(EVIL, 1.0, problem=EVIL), OutputRow(EVIL, 1.0, 0.0, 1.0, 1.0))),),
        1,
        1,
        1,
        notes=(EVIL,),
    )
    for found in (str(report), str(verdict)):
        assert all(line.isprintable() for line in found.split("\n"))
        assert "[red]x[/red]" in found
        assert "\\x1b[2J" in found


# --------------------------------------------------------------------------------------------------- JSON

NUMBERS = st.floats() | st.floats(width=32).map(np.float32) | st.integers(-5, 5).map(np.int64)
VALUES = st.recursive(
    NUMBERS | st.text() | st.none() | st.booleans(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner),
    max_leaves=8,
)


@given(VALUES)
def test_json_takes_every_value(value: Any) -> None:
    data = plain(value)
    assert json.loads(to_json(value)) == data
    assert plain(data) == data


def test_values_of_other_libraries_become_plain() -> None:
    assert plain([np.float32(0.5), np.int8(3), np.bool_(True), np.arange(2)]) == [0.5, 3, True, [0, 1]]
    assert plain(np.float64(math.nan)) is None
    assert plain([np.float32(np.inf), -math.inf]) == ["inf", "-inf"]
    assert plain(ml_dtypes.bfloat16(1.5)) == 1.5
    assert plain({1: Path("a/b"), "t": np.dtype(np.int8), "s": {"b", "a"}}) == {
        "1": str(Path("a/b")),
        "t": "int8",
        "s": ["a", "b"],
    }


def test_reports_become_plain() -> None:
    found = Report((step(Changes((Change("n", "a"),), (), Weighing(loss=math.nan))),)).to_dict()
    assert found["steps"][0]["before"] == {"nodes": 12, "parameters": 34_567, "bytes": 1_234_567}
    assert found["steps"][0]["changes"]["figures"] == {
        "fused": None,
        "unfused": None,
        "loss": None,
        "many": None,
        "plan": None,
        "secret": 7,
    }
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "?"), (0, "0"), (9_999, "9999"), (10_000, "10 k"), (351_512, "351.5 k"), (42_212_352, "42.21 M")],
)
def test_counts(value: int | None, expected: str) -> None:
    assert count(value) == expected


def test_sizes() -> None:
    assert (size(None), size(999), size(1_417_796)) == ("?", "999 bytes", "1.4 MB")


# ---------------------------------------------------------------------------------- what a pipeline reports


@options
class Rename(Pass):
    """Renames the first node."""

    name: ClassVar[str] = "rename"

    to: str = Field(default="n", description="new name")
    fail: bool = Field(default=False, description="fail instead")

    def run(self, model: Model, ctx: Context) -> Changes:
        if self.fail:
            raise PassError("no such luck")
        model.graph.nodes[0].name = self.to
        return Changes((Change(self.to, "renamed"),))


PRODUCT = "g (float[N,T,4] x) => (float[N,T,2] y) <float[4,2] w = {1,2,3,4,5,6,7,8}> { y = MatMul(x, w) }"


def test_macs_are_those_of_one_sample() -> None:
    data = [{"x": np.ones((3, 5, 4), np.float32)}]
    found = Pipeline(Rename())(parse(PRODUCT), data=data).report.steps[0]
    assert (found.macs_before, found.macs_after) == (5 * 4 * 2, 5 * 4 * 2)


def test_steps_name_the_options_that_were_given() -> None:
    steps = Pipeline(Rename(), Rename(to="m"), Rename(fail=True))(parse(PRODUCT)).report.steps
    assert [each.description for each in steps] == ["rename()", "rename(to='m')", "rename(fail=True)"]
    assert [each.name for each in steps] == ["rename"] * 3
    assert [each.error for each in steps] == ["", "", "no such luck"]
    assert steps[2].before == steps[2].after


def test_progress_tells_of_every_pass() -> None:
    told: list[tuple[str, int, int | None]] = []
    Pipeline(Rename(), Rename())(parse(PRODUCT), progress=lambda *words: told.append(words))
    assert told == [("rename", 0, 1), ("rename", 1, 1)] * 2


def test_empty_data_is_refused() -> None:
    empty: list[Mapping[str, Any]] = []
    with pytest.raises(CalibrationError, match="there is no data"):
        Pipeline(Rename())(parse(PRODUCT), data=empty)
