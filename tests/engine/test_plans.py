"""Plans as data: what is written is read back, and what is not a plan of the pass is one clear line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxslim.engine.plans import PassPlan
from onnxslim.errors import UsageError
from onnxslim.passes import create
from onnxslim.passes.factorize.plan import FactorizationPlan, LayerFactors
from onnxslim.passes.prune.plan import Entry, PruningPlan
from onnxslim.passes.quantize.recorded import LayerChoice, QuantizationPlan, QuantizeOptions, RangeChoice
from onnxslim.recipes.recipe import Recipe

names = st.text(max_size=8)
counts = st.integers(0, 1 << 40)
sizes = st.lists(counts.map(lambda count: count + 1), max_size=3).map(tuple)
removed = st.lists(counts, unique=True, max_size=4).map(tuple)
entries = st.builds(Entry, names, counts, counts, st.lists(names, max_size=2).map(tuple), removed)
factors = st.builds(LayerFactors, names, names, sizes, names, sizes)
PLANS = st.one_of(
    st.builds(PruningPlan, st.lists(counts).map(tuple), st.lists(entries, max_size=3).map(tuple)),
    st.lists(factors, max_size=3, unique_by=lambda each: each.output).map(tuple).map(FactorizationPlan),
)
ranges = st.builds(RangeChoice, names, st.sampled_from(["minmax", "percentile"]), st.floats(0, 100))
layers = st.builds(LayerChoice, names, sizes, st.none() | names)
OPTIONS = QuantizeOptions("int8", "auto", "target", ("first",), False, True, True, "cd")
QUANTIZED = st.builds(
    QuantizationPlan,
    st.just(OPTIONS),
    st.just("mse"),
    st.floats(0, 100),
    st.booleans(),
    st.none() | st.lists(names).map(tuple),
    st.booleans(),
    st.booleans(),
    st.lists(ranges, max_size=3).map(tuple),
    st.lists(layers, max_size=3, unique_by=lambda each: each.node).map(tuple),
)
LAYER = {"layer": "first", "output": "a", "weight": [1, 8, 8], "scheme": "svd", "ranks": [2]}


@given(PLANS | QUANTIZED)
def test_what_is_written_is_read_back(plan: PassPlan) -> None:
    assert type(plan).from_json(plan.to_json()) == plan


@given(PLANS | QUANTIZED)
def test_plans_in_reports_are_plans(plan: PassPlan) -> None:
    assert type(plan).from_json(json.dumps(plan.to_dict(), sort_keys=True)) == plan


def text(document: dict[str, Any] | None = None, **layer: Any) -> str:
    """A file of one layer, some of it otherwise."""
    whole = {"kind": "factorize", "version": 1, "layers": [{**LAYER, **layer}]}
    return json.dumps({**whole, **(document or {})})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON: Expecting value"),
        ("[" * 100_000, "not JSON: "),
        ("[]", "not an object with keys"),
        ('{"kind": "factorize", "kind": "factorize"}', "not JSON: key 'kind' is named twice"),
        ('{"version": 1, "layers": []}', "it is of pass 'prune'"),
        (text({"kind": "quantize"}), "it is of pass 'quantize'"),
        (text({"kind": []}), "it is of pass []"),
        (text({"version": 2}), "it has version 2, and this onnxslim reads 1"),
        (text({"version": True}), "it has version True"),
        (text({"layer": []}), "layer: there is no such key"),
        (text({"layers": [LAYER, LAYER]}), "layers: Value error, 'a' is named twice"),
        (text(rank=[2]), "layers.0.rank: there is no such key"),
        (text(ranks=["2"]), "layers.0.ranks.0: Input should be a valid integer"),
        (text(ranks=[0]), "layers.0.ranks.0: Input should be greater than or equal to 1"),
        (text(scheme=None), "layers.0.scheme: Input should be a valid string"),
    ],
)
def test_what_is_no_plan_of_the_pass_is_refused(content: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        FactorizationPlan.from_json(content)
    assert str(caught.value).startswith(f"not a plan of pass 'factorize': {message}")
    assert "\n" not in str(caught.value)


def test_files_of_before_plans_said_whose_they_are_are_those_of_pruning() -> None:
    assert PruningPlan.from_json('{"version": 1, "sizes": [8], "entries": []}') == PruningPlan((8,), ())


@pytest.mark.parametrize(
    ("name", "option"), [("factorize", "macs"), ("factorize", "exclude"), ("quantize", "exclude")]
)
def test_a_plan_leaves_other_options_nothing_to_say(name: str, option: str) -> None:
    values = {"macs": 0.25, "exclude": ("first",)}
    with pytest.raises(UsageError, match=f"pass '{name}': a plan says all of it, so {option} has nothing"):
        create(name, {"plan": Path("plan.json"), option: values[option]})


def test_a_plan_itself_is_as_good_as_its_file() -> None:
    plan = PruningPlan((8,), ())
    given = create("prune", {"plan": plan})
    assert given == create("prune", {"plan": plan})
    assert re.fullmatch(r"prune\(plan=<prune plan [0-9a-f]{8}>\)", given.describe())
    assert given.describe() != create("prune", {"plan": PruningPlan((9,), ())}).describe()


@pytest.mark.parametrize("plan", [FactorizationPlan(()), {"sizes": (8,), "entries": ()}, 5])
def test_plans_of_other_passes_are_no_plans(plan: object) -> None:
    with pytest.raises(UsageError, match="input should be a file or a PruningPlan, not"):
        create("prune", {"plan": plan})


def test_a_recipe_file_holds_no_plan(tmp_path: Path) -> None:
    recipe = Recipe((create("prune", {"plan": PruningPlan((8,), ())}),))
    with pytest.raises(UsageError, match="pass 'prune': recipes name files of plans"):
        recipe.save(tmp_path / "recipe.yaml")
    assert recipe.sha256 != Recipe((create("prune", {"plan": PruningPlan((9,), ())}),)).sha256
