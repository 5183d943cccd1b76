"""Recipes: read with care, written back equal, and the same bytes from the same recipe."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim import cli, passes
from onnxslim.engine.base import Pass
from onnxslim.engine.judging import TOLD
from onnxslim.engine.pipeline import Pipeline
from onnxslim.errors import CalibrationError, OnnxSlimError, UsageError, ValidationError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model, load, source_sha256
from onnxslim.passes.extract import Extract
from onnxslim.passes.half import Half
from onnxslim.passes.prune import Prune
from onnxslim.passes.quantize import Quantize
from onnxslim.passes.shapes import FixShapes
from onnxslim.passes.slim import Slim
from onnxslim.recipes.data import Data
from onnxslim.recipes.reading import MAX_BYTES
from onnxslim.recipes.recipe import Outcome, Recipe
from onnxslim.runtime.session import Session
from onnxslim.validation.certificate import content_sha256
from tests.helpers import normal, parse

WEIGHTS = ",".join(str(n / 7) for n in range(16))
PRODUCT = "g (float[N,4] x) => (float[N,4] y) "
PRODUCT += f"<float[4,4] w = {{{WEIGHTS}}}> {{ i = Identity(x)  z = Relu(i)  p = MatMul(z, w)  y = Relu(p) }}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`in.onnx` with metadata of its own, and `data/x.npz`."""
    model = parse(PRODUCT).with_metadata({"stride": "32", "onnxslim.version": "an older one"})
    model.save(tmp_path / "in.onnx")
    (tmp_path / "data").mkdir()
    samples = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)
    np.savez(tmp_path / "data" / "x.npz", x=samples)
    return tmp_path


@pytest.fixture
def write(folder: Path) -> Callable[[str], Path]:
    """Writes a recipe into the folder."""

    def write(text: str) -> Path:
        path = folder / "recipe.yaml"
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    return write


Write = Callable[[str], Path]
FULL = """
    passes:
      - slim
      - quantize: {observer: minmax, exclude: [nothing/*], classifier: true}
    data: {path: data/x.npz, batch_size: 4}
    seed: 3
    check: {sqnr: 10}
"""


def test_a_recipe_says_what_python_says(write: Write, folder: Path) -> None:
    assert Recipe.load(write(FULL)) == Recipe(
        passes=(Slim(), Quantize(observer="minmax", exclude=("nothing/*",), classifier=True)),
        data=Data(path=str(folder / "data" / "x.npz"), batch_size=4),
        seed=3,
        check={"sqnr": 10.0},
    )
    (only,) = Recipe.load(write("passes: [slim]\n")).passes
    assert only == Slim()


def test_running_gives_a_checked_result_that_tells_where_it_comes_from(write: Write, folder: Path) -> None:
    recipe = Recipe.load(write(FULL))
    outcome = recipe.run(folder / "in.onnx")
    assert isinstance(outcome, Outcome)
    assert outcome.verdict is not None
    assert [step.name for step in outcome.report.steps] == ["slim", "quantize"]
    told = outcome.model.metadata
    assert told["stride"] == "32", "the user's own is kept"
    assert told["onnxslim.source_sha256"] == hashlib.sha256((folder / "in.onnx").read_bytes()).hexdigest()
    assert told["onnxslim.recipe_sha256"] == recipe.sha256
    assert told["onnxslim.version"] != "an older one"
    assert [item.key for item in outcome.model.shell.metadata_props].count("onnxslim.version") == 1


def test_what_the_recipe_asks_for_is_insisted_on(write: Write, folder: Path) -> None:
    recipe = Recipe.load(write(FULL.replace("sqnr: 10", "sqnr: 200")))
    with pytest.raises(ValidationError, match="required is at least 200 dB"):
        recipe.run(folder / "in.onnx")


def test_a_model_that_nothing_changed_is_not_stamped() -> None:
    model = parse("g (float[N] x) => (float[N] y) { y = Relu(x) }")
    assert Recipe(passes=(Slim(),)).run(model).model is model


def test_data_may_be_given_in_python(folder: Path) -> None:
    batches = [{"x": np.ones((2, 4), np.float32)}]
    outcome = Recipe(passes=(Slim(),), check={"sqnr": 1}).run(folder / "in.onnx", data=lambda: batches)
    assert outcome.verdict is not None
    assert outcome.verdict.samples == 2


def net() -> tuple[Model, Array, Array]:
    """A classifier, 256 samples, and their labels: in half of them its own decisions."""
    text = "g (float[N,8] x) => (float[N,4] y) { a = MatMul(x, v) r = Relu(a) y = MatMul(r, w) }"
    model = parse(text, {"v": normal(8, 16), "w": normal(16, 4)})
    x = normal(256, 8)
    decided = Session(model).run({"x": x})["y"].argmax(1)
    return model, x, np.where(np.arange(256) % 2, decided, (decided + 1) % 4)


@pytest.mark.parametrize(
    ("steps", "given", "samples", "whose"),
    [
        ((Slim(),), 256, 256, None),
        ((Slim(), Quantize(classifier=True)), 256, 16, "held out"),
        ((Prune(ratio=0.25),), 256, 16, "held out"),
        ((Prune(ratio=0.25),), 64, 64, "fitted on"),
        ((Prune(ratio=0.25),), 0, 5, "made up"),
    ],
)
def test_a_check_is_of_samples_that_no_pass_has_seen(
    steps: tuple[Pass, ...], given: int, samples: int, whose: str | None
) -> None:
    model, x, _ = net()
    recipe = Recipe(passes=steps, check={"sqnr": 0})
    found = recipe.run(model, data={"x": x[:given]} if given else None).verdict
    assert found is not None
    assert (found.samples, found.whose) == (samples, whose)
    assert found.made_up == (whose == "made up")
    if whose is not None:
        assert f"{samples} samples {TOLD[whose]}" in str(found)  # type: ignore[index]


def test_test_data_is_what_is_checked_and_what_passes_never_see() -> None:
    model, x, labels = net()
    recipe = Recipe(passes=(Prune(ratio=0.25),), check={"max_accuracy_drop": 1.0})

    def run(test: Array, known: Array = labels[:100]) -> Outcome:
        return recipe.run(
            model, data={"x": x[:128]}, labels=labels[:128], test={"x": test}, test_labels=known
        )

    test = x[:100] + 1
    made = run(test)
    assert made.verdict is not None
    assert (made.verdict.samples, made.verdict.whose) == (100, "held out")
    kept = made.report.steps[0].kept
    assert kept is not None
    assert (kept.samples, kept.whose) == (64, "held out")
    (provider,) = made.verdict.providers
    assert provider.accuracy is not None
    assert kept.accuracy == (provider.accuracy.before, provider.accuracy.after)
    assert content_sha256(run(-test).model) == content_sha256(made.model), "it has no part in what is made"
    with pytest.raises(CalibrationError, match="test data: there are 99 labels for 100 samples"):
        run(test, labels[:99])
    with pytest.raises(UsageError, match="test data says nothing without data"):
        Pipeline(Slim())(model, test={"x": test})
    with pytest.raises(CalibrationError, match="the model has no input 'z'"):  # before the work
        Pipeline(Slim())(model, data={"x": x}, test={"z": test})


def test_recipes_name_test_data(write: Write, folder: Path) -> None:
    np.savez(folder / "test.npz", x=normal(12, 4))
    text = "passes: [{quantize: {classifier: true, require_sqnr: 0}}]\ndata: data/x.npz\ntest: test.npz\n"
    recipe = Recipe.load(write(text + "check: {sqnr: 0}\n"))
    found = recipe.run(folder / "in.onnx").verdict
    assert found is not None
    assert (found.samples, found.whose) == (12, "held out")
    recipe.save(folder / "again.yaml")
    assert Recipe.load(folder / "again.yaml") == recipe
    with pytest.raises(UsageError, match="test: there is no key 'pth'; did you mean 'path'"):
        Recipe.load(write("passes: [slim]\ntest: {pth: test.npz}\n"))


def test_same_recipe_same_data_same_bytes(write: Write, folder: Path) -> None:
    write(FULL)
    found = set()
    for seed in ("0", "1"):
        words = [sys.executable, "-m", "onnxslim", "run", "recipe.yaml", "in.onnx", f"out{seed}.onnx"]
        root = Path(__file__).parents[2]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)}
        subprocess.run(words, check=True, cwd=folder, env=environment, capture_output=True)
        found.add((folder / f"out{seed}.onnx").read_bytes())
    assert len(found) == 1
    Recipe.load(folder / "recipe.yaml").run(folder / "in.onnx").save(folder / "python.onnx")
    assert found == {(folder / "python.onnx").read_bytes()}


def test_the_hash_is_of_what_is_done_and_not_of_how_it_is_written(write: Write, folder: Path) -> None:
    first = Recipe.load(write(FULL))
    other = """
        check: {"sqnr": 10.0}
        seed: 3
        passes:
        - {slim: }
        - {quantize: {exclude: nothing/*, classifier: yes, observer: minmax, percentile: 99.99}}
        data: {batch_size: 4, path: ./data/x.npz}
    """
    assert Recipe.load(write(other)).sha256 == first.sha256
    for changed in ("seed: 4", "check: {sqnr: 11}"):
        key = changed.partition(":")[0]
        text = "\n".join(
            changed if line.strip().startswith(key) else line for line in textwrap.dedent(FULL).splitlines()
        )
        assert Recipe.load(write(text)).sha256 != first.sha256


def test_hashes_of_models_with_data_files_and_of_models_in_memory(folder: Path) -> None:
    weights = np.arange(512 * 4, dtype=np.float32).reshape(512, 4)
    text = "g (float[N,512] x, float[512,4] w) => (float[N,4] y) { y = MatMul(x, w) }"
    model = parse(text, {"w": weights})
    model.save(folder / "big.onnx", external_data=True)
    content = (folder / "big.onnx").read_bytes() + (folder / "big.onnx.data").read_bytes()
    assert source_sha256(load(folder / "big.onnx")) == hashlib.sha256(content).hexdigest()
    assert source_sha256(model) == source_sha256(model.copy())
    assert source_sha256(model) != source_sha256(parse(text, {"w": weights + 1}))


# --------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ("- slim", "expected keys such as 'passes', found a list"),
        ("passes: slim", "'passes' is a list of names"),
        ("passes: []", "needs at least one pass"),
        ("seed: 1", "'passes' is a list of names"),
        ("passes: [slim]\npases: 1", "there is no key 'pases'; did you mean 'passes'?"),
        ("passes: [slim, quantise]", r"passes\[1\]: there is no pass 'quantise'; did you mean 'quantize'?"),
        ("passes: [{quantize: {observr: kl}}]", "there is no option 'observr'; did you mean 'observer'?"),
        ("passes: [{quantize: {observer: kll}}]", "option 'observer': input should be "),
        ("passes: [{quantize: 3}]", "the options of 'quantize' are"),
        ("passes: [{slim: , quantize: }]", "expected a name, or"),
        ("passes: [{slim: {skip: [fusee]}}]", "there is no part or rule 'fusee'"),
        ("passes: [slim]\nseed: many", "'seed': input should be a valid integer"),
        ("passes: [slim]\ncheck: {snr: 3}", "did you mean 'sqnr'?"),
        ("passes: [slim]\non_error: ignore", "'on_error': input should be 'revert', 'keep' or 'raise'"),
        ("passes: [slim]\ntarget: 3", "'target' is the name"),
        ("passes: [slim]\ndata: {pth: x}", "data: there is no key 'pth'; did you mean 'path'?"),
        (
            "passes: [slim]\ndata: {path: data, batch_size: 0}",
            "data: option 'batch_size': input should be greater",
        ),
        ("passes: [slim]\ndata: {batch_size: 1}", "data: option 'path'"),
        ("passes: [slim]\ndata: 3", "'data' is a path"),
        ("passes: [slim]\ndata: nowhere", "there is no 'nowhere' in the folder of the recipe"),
        ("passes: [slim]\nseed: 1\nseed: 2", "line 3: key 'seed' is there twice"),
        ("passes: [{quantize: {percentile: 99, percentile: 98}}]", "key 'percentile' is there twice"),
        ("passes: [slim]\n1: 2", "line 2: a key is not text"),
        ("passes: [slim]\n? [a]\n: 2", "line 2: a key is not text"),
        ("passes: [slim", "not plain YAML"),
        ("passes: [slim]\n---\npasses: [slim]", "not plain YAML"),
        ("passes: [slim]\nseed: 2001-02-30", "not plain YAML"),
        ("passes: !!python/object/apply:os.system ['touch touched']", "not plain YAML"),
        ("passes: !!python/name:os.system", "not plain YAML"),
        ("passes: [slim]\nseed: &a [*a]", "it contains itself"),
        ("passes: " + "[" * 5000, "nested too deeply"),
    ],
)
def test_recipes_that_are_refused(write: Write, folder: Path, text: str, message: str) -> None:
    path = write(text)
    with pytest.raises(UsageError, match=message) as caught:
        Recipe.load(path)
    assert str(caught.value).startswith(f"recipe '{path}': ")
    assert "\n" not in str(caught.value)
    assert not (folder / "touched").exists()


def test_alias_bombs_and_large_files_are_refused_at_once(write: Write) -> None:
    laughs = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    laughs += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    with pytest.raises(UsageError, match="more than 10000 values"):
        Recipe.load(write("\n".join(laughs)))
    with pytest.raises(UsageError, match="larger than"):
        Recipe.load(write("#" * (MAX_BYTES + 1)))
    shared = "passes:\n- quantize: &q {observer: kl}\n- quantize: *q\n"
    assert len(Recipe.load(write(shared)).passes) == 2, "an alias as such is fine"


@pytest.mark.parametrize(
    "path",
    ["../outside.npz", "/etc", "data/../../outside.npz", "link", "C:\\data", "\\\\host\\x", "a\0b", "~"],
)
def test_a_recipe_cannot_reach_out_of_its_folder(tmp_path: Path, path: str) -> None:
    np.savez(tmp_path / "outside.npz", x=np.zeros((1, 4), np.float32))
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "data").mkdir()
    (tmp_path / "inner" / "link").symlink_to(tmp_path / "outside.npz")
    file = tmp_path / "inner" / "recipe.yaml"
    file.write_text(json.dumps({"passes": ["slim"], "data": path}))
    with pytest.raises(UsageError, match=r"leaves the folder|there is no '~'"):
        Recipe.load(file)


def test_a_recipe_cannot_name_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "evil.py").write_text("open('touched', 'w')\ndef batches(): return []")
    monkeypatch.chdir(folder)
    file = folder / "recipe.yaml"
    file.write_text("passes: [slim]\ndata: 'evil:batches'")
    with pytest.raises(UsageError, match="there is no 'evil:batches' in the folder"):
        Recipe.load(file)
    assert not (folder / "touched").exists()


NAMES = st.sampled_from(["passes", "data", "seed", "check", "quantize", "slim", "path"])
SCALARS = st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=5) | NAMES
DOCUMENTS = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=200)
@given(DOCUMENTS)
def test_any_document_is_a_recipe_or_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, document: Any
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    with contextlib.suppress(OnnxSlimError):
        Recipe.load(file)


# ---------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("name", passes.names())
def test_every_pass_is_written_and_read_back(name: str, tmp_path: Path) -> None:
    for each in (passes.create(name, {}), *_variants(name)):
        recipe = Recipe(passes=(each,), check={"sqnr": 20.5})
        recipe.save(tmp_path / "r.yaml")
        assert Recipe.load(tmp_path / "r.yaml") == recipe
        assert Recipe.load(tmp_path / "r.yaml").sha256 == recipe.sha256


def _variants(name: str) -> list[Any]:
    """The pass with each option in turn that a simple text sets to something else."""
    found = []
    for option in passes.options_of(passes.get(name)):
        if option.type == "file":
            continue
        for value in ("yes", "no", "7", "0.25", *option.type.split("|")):
            try:
                made = passes.create(name, {option.name: value})
            except (OnnxSlimError, ValueError):
                continue
            found.append(made)
    return found


def test_files_of_passes_stay_in_the_folder_and_are_hashed(folder: Path) -> None:
    (folder / "plan.json").write_text("{}")
    (folder / "r.yaml").write_text("passes: [{prune: {plan: plan.json}}]")
    recipe = Recipe.load(folder / "r.yaml")
    assert recipe.passes[0] == passes.create("prune", {"plan": str(folder / "plan.json")})
    recipe.save(folder / "s.yaml")
    assert yaml.safe_load((folder / "s.yaml").read_text()) == {"passes": [{"prune": {"plan": "plan.json"}}]}
    before = recipe.sha256
    (folder / "plan.json").write_text("{ }")
    assert recipe.sha256 != before
    (folder / "r.yaml").write_text("passes: [{prune: {plan: ../plan.json}}]")
    with pytest.raises(UsageError, match=r"passes\[0\]: '../plan.json' leaves the folder"):
        Recipe.load(folder / "r.yaml")


def test_files_are_named_from_the_folder_or_by_their_whole_path(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = folder / "data" / "x.npz"
    recipe = Recipe(passes=(Slim(),), data=Data(path=str(data)))
    recipe.save(folder / "r.yaml")
    assert (folder / "r.yaml").read_text() == "passes:\n- slim\ndata: data/x.npz\n"
    other = tmp_path_factory.mktemp("other") / "r.yaml"
    recipe.save(other)
    assert yaml.safe_load(other.read_text())["data"] == data.resolve().as_posix()
    with pytest.raises(UsageError, match="leaves the folder of the recipe, which takes trust"):
        Recipe.load(other)
    assert Recipe.load(other, trust=True) == recipe
    with pytest.raises(UsageError, match="data that is code"):
        Recipe(passes=(Slim(),), data=Data(path="module:function")).save(folder / "s.yaml")


def test_trust_is_of_files_and_not_of_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "evil.py").write_text("open('touched', 'w')\ndef batches(): return []")
    monkeypatch.chdir(folder)
    (folder / "r.yaml").write_text("passes: [slim]\ndata: 'evil:batches'")
    with pytest.raises(UsageError, match="there is no 'evil:batches'"):
        Recipe.load(folder / "r.yaml", trust=True)
    assert not (folder / "touched").exists()


def test_data_of_the_command_line_may_lie_anywhere(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, model = tmp_path_factory.mktemp("other") / "kept.yaml", str(folder / "in.onnx")
    words = ["quantize", model, str(folder / "one.onnx"), "--data", str(folder / "data"), "--batch-size", "4"]
    words += ["--on-error", "keep"]  # there is nothing to quantize in it
    assert cli.main([*words, "--observer", "minmax", "--save-recipe", str(kept)]) == 0
    again = ["run", str(kept), model, str(folder / "two.onnx")]
    assert cli.main(again) == 2
    assert "leaves the folder of the recipe" in capsys.readouterr().err
    assert cli.main([*again, "--trust"]) == 0
    assert (folder / "one.onnx").read_bytes() == (folder / "two.onnx").read_bytes()


def test_a_recipe_that_cannot_be_kept_is_told_before_any_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "own.py").write_text("def batches(): raise AssertionError('it was called')")
    monkeypatch.chdir(folder)
    words = ["slim", "in.onnx", "out.onnx", "--data", "own:batches", "--save-recipe", "kept.yaml"]
    assert cli.main(words) == 2
    assert "a recipe cannot hold data that is code" in capsys.readouterr().err
    assert not (folder / "out.onnx").exists()


def test_what_was_computed_is_saved_though_the_recipe_cannot_be(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device", "kept.yaml")

    monkeypatch.setattr(Recipe, "save", fail)
    files = [str(folder / name) for name in ("in.onnx", "out.onnx", "report.json", "kept.yaml")]
    words = ["slim", *files[:2], "--report", files[2], "--save-recipe", files[3]]
    assert cli.main(words) == 6
    assert "kept.yaml: No space left on device" in capsys.readouterr().err
    assert load(files[1]).graph.nodes
    assert json.loads(Path(files[2]).read_text())["recipe"]["passes"]


# ----------------------------------------------------------------------------- what the model is


def test_passes_that_say_what_the_model_is_come_first() -> None:
    Recipe(passes=(Extract(outputs=("z",)), FixShapes(inputs={"x": (2, 4)}), Slim()))
    with pytest.raises(UsageError, match="pass 'extract' says what the model is, so it comes before 'slim'"):
        Recipe(passes=(Slim(), Extract(outputs=("z",))))


def test_data_checks_and_reports_refer_to_the_model_that_was_cut_out(write: Write, folder: Path) -> None:
    np.savez(folder / "data" / "z.npz", z=np.ones((16, 4), np.float32))
    recipe = Recipe.load(
        write("""
            passes:
              - extract: {inputs: [z], outputs: [p]}
              - shapes: {inputs: {z: [8, 4]}}
              - quantize: {observer: minmax, classifier: true}
            data: data/z.npz
            check: {sqnr: 10}
        """)
    )
    outcome = recipe.run(folder / "in.onnx")
    assert [spec.name for spec in outcome.original.inputs()] == ["z"]
    assert outcome.opened is not None
    assert {feeds["z"].shape for feeds in outcome.opened.data} == {(8, 4)}
    assert outcome.verdict is not None
    assert [row.name for row in outcome.verdict.providers[0].outputs] == ["p"]
    assert [step.name for step in outcome.report.steps] == ["extract", "shapes", "quantize"]
    told = outcome.model.metadata["onnxslim.source_sha256"]
    assert told == hashlib.sha256((folder / "in.onnx").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(passes=(Slim(), Quantize())), "pass 'quantize' needs calibration data"),
        (Recipe(passes=(Slim(),), check={"max_accuracy_drop": 0.1}), "max_accuracy_drop needs labels"),
        (Recipe(passes=(Slim(),), check={"max_metric_drop": 0.1}), "max_metric_drop needs a metric"),
        (Recipe(passes=(Slim(), Prune(plan=Path("no.json")))), "option 'plan': there is no file 'no.json'"),
    ],
)
def test_what_is_missing_is_told_before_any_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch, recipe: Recipe, message: str
) -> None:
    def run(*_: object) -> None:
        raise AssertionError("it was run")

    monkeypatch.setattr(Slim, "run", run)
    with pytest.raises(OnnxSlimError, match=message):
        recipe.run(folder / "in.onnx")


def test_the_command_line_saves_and_runs_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "run",
        "in.onnx",
        "one.onnx",
        "-p",
        "slim",
        "-p",
        "quantize:observer=minmax,classifier=yes",
        "--data",
        "data/x.npz",
    ]
    words += ["--batch-size", "4", "--seed", "5", "--check", "sqnr=10", "--save-recipe", "kept.yaml"]
    files = (".onnx", ".yaml", ".npz")
    placed = [str(folder / word) if word.endswith(files) else word for word in words]
    assert cli.main(placed) == 0
    assert yaml.safe_load((folder / "kept.yaml").read_text()) == {
        "passes": ["slim", {"quantize": {"observer": "minmax", "classifier": True}}],
        "data": {"path": "data/x.npz", "batch_size": 4},
        "seed": 5,
        "check": {"sqnr": 10.0},
    }
    again = [str(folder / name) for name in ("kept.yaml", "in.onnx", "two.onnx")]
    assert cli.main(["run", *again]) == 0
    assert (folder / "one.onnx").read_bytes() == (folder / "two.onnx").read_bytes()
    assert cli.main(["run", *again, "--check", "sqnr=200"]) == 4, "words win over the file"
    assert "required is at least 200 dB" in capsys.readouterr().err
    assert cli.main(["run", *again, "-p", "slim"]) == 2
    assert cli.main(["run", *again, "--save-recipe", again[0]]) == 2
    assert "would overwrite the recipe" in capsys.readouterr().err


def test_commands_save_all_they_do_as_recipes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, one, two = (str(folder / name) for name in ("kept.yaml", "one.onnx", "two.onnx"))
    words = ["slim", str(folder / "in.onnx"), one, "--skip", "fuse", "--save-recipe", kept]
    assert cli.main(words) == 0
    assert Recipe.load(kept) == Recipe(passes=(Slim(skip=("fuse",)),))
    words += ["--inputs", "z", "--outputs", "p", "--input-shapes", "z:1,4", "--size-threshold", "9"]
    assert cli.main([*words, "--dtype", "fp16"]) == 0
    cut = Extract(inputs=("z",), outputs=("p",)), FixShapes(inputs={"z": (1, 4)})
    slim = Slim(skip=("fuse",), max_growth=9)
    assert Recipe.load(kept) == Recipe(passes=(*cut, slim, Half(everywhere=True)))
    assert cli.main(["run", kept, str(folder / "in.onnx"), two]) == 0
    assert Path(one).read_bytes() == Path(two).read_bytes()
    (spec,) = load(two).inputs()
    assert (spec.name, spec.shape, spec.dtype) == ("z", (1, 4), np.dtype(np.float16))
    assert cli.main([*words, "--model-check"]) == 2
    assert "a recipe cannot hold --model-check" in capsys.readouterr().err


def test_stamps_survive_the_checker(folder: Path) -> None:
    outcome = Recipe(passes=(Slim(),)).run(folder / "in.onnx")
    onnx.checker.check_model(outcome.model.to_proto(), full_check=True)
    assert isinstance(outcome.model, Model)
