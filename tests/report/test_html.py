"""Reports to keep: what is on the page, that hostile names stay text, and that the JSON is as documented."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from onnxslim import cli
from onnxslim.calibration.data import CalibrationData
from onnxslim.engine.base import Change, Changes, Figures, Skip, captioned
from onnxslim.engine.pipeline import Pipeline, Report, Step
from onnxslim.errors import SaveError, UsageError
from onnxslim.ir.model import Model, Stats, load
from onnxslim.passes.quantize import Quantize
from onnxslim.passes.slim import Slim
from onnxslim.recipes.recipe import Recipe
from onnxslim.report import layers
from onnxslim.report.html import SCHEMA, Document, document
from onnxslim.report.layers import analyse
from onnxslim.runtime.targets import Target
from onnxslim.validation.compare import validate
from onnxslim.validation.verdict import Verdict
from tests.helpers import FASHION, ROOT, parse

HOSTILE = (
    "<script>document.title='owned'</script>",
    '"onmouseover="alert(1)',
    "</text></svg><img src=x onerror=alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
    "\x1b[2J\x07 &lt;b&gt; \u202eevil",
    "'><style>body{display:none}</style>",
)


@pytest.fixture(scope="module")
def made() -> tuple[Model, Model, Document]:
    """A real report: a quantized network, with accuracy and everything else."""
    model = load(FASHION / "mobilenet.onnx")
    data = CalibrationData.from_npz(FASHION / "calibration.npz", batch_size=16).shard(0, 4)
    recipe = Recipe(passes=(Slim(), Quantize()), on_error="raise")
    result = recipe.run(model, data=data)
    test = CalibrationData.from_npz(FASHION / "test.npz", batch_size=100, exclude=["label"]).shard(0, 20)
    labels = np.load(FASHION / "test.npz")["label"][:100]
    targets = [Target.cpu(threads=1), Target.reference()]
    verdict = validate(model, result.model, test, targets, labels=labels, rounds=2)
    settings, limits = recipe.to_dict(), {"sqnr": 20.0, "max_abs": 0.0}
    told = document(model, result.model, result.report, verdict, recipe=settings, limits=limits, data=data)
    return model, result.model, told


class Page(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: set[str] = set()
        self.attributes: set[str] = set()
        self.texts: list[str] = []
        self.values: dict[str, list[str]] = {}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        for name, value in attrs:
            self.attributes.add(name)
            self.values.setdefault(name, []).append(value or "")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_has_everything(made: tuple[Model, Model, Document]) -> None:
    model, result, told = made
    html = told.to_html()
    text = " ".join(" ".join(Page(html).texts).split())
    for words in (
        "mobilenet.onnx",
        "Before and after",
        "sqnr at least 20 dB: met",
        "max_abs at most 0: cpu: output 'logits' has max abs difference",
        f"ONNX Runtime {onnxruntime.__version__}",
        str(datetime.now(timezone.utc).year),
        "On cpu",
        "On reference",
        "accuracy ",
        "latency, batch of 100",
        "Passes",
        "Conv runs in integers",
        "left alone:",
        "Signal-to-noise ratio, layer by layer",
        "The layers that add most noise",
        "integers stand for",
        "Where the bytes are",
        "By layer",
        "What changed in the graph",
        "Recipe",
        "- quantize:",
        f"source_sha256 {result.metadata['onnxslim.source_sha256']}",
        "Original against itself on cpu",
    ):
        assert words in text, words
    assert told.analysis is not None
    bars = (told.report.steps, told.analysis.fidelity, told.analysis.operators, told.analysis.layers)
    assert told.difference is not None
    drawn = sum(bool(side.nodes) for p in told.difference.places for side in (p.before, p.after))
    assert html.count("<svg") == sum(map(len, (*bars, told.analysis.distributions))) + drawn
    assert len(html) < 250_000
    assert html.count('<li class="bad">') == 1, "the limit that is not met"
    assert model.source is not None


def test_the_page_needs_nothing_and_allows_nothing(made: tuple[Model, Model, Document]) -> None:
    html = made[2].to_html()
    page = Page(html)
    assert not page.elements & {"img", "link", "iframe", "object", "form", "a", "base"}
    assert not page.attributes & {"src", "href", "style"}
    assert not [name for name in page.attributes if name.startswith("on")]
    (policy,) = [value for value in page.values["content"] if "default-src" in value]
    style = re.search(r"<style>(.*)</style>", html, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}'; script-src 'sha256-")
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy, "and no other"


@dataclass(frozen=True)
class FreeFigures(Figures):
    """Of a pass from elsewhere, whose captions may hold anything, too."""

    said: str | None = captioned(HOSTILE[2])
    unsaid: str = ""


def hostile() -> Document:
    """Names that try to get out, wherever names come from a model."""
    text = "g (float[N,4] x) => (float[N,4] y) { z = Mul(x, w)  y = Relu(z) }"
    weights = "<float[4] w = {1, 2, 3, 4}> "
    model = parse(text.replace("{ z", weights + "{ z"))
    for name, node in zip(HOSTILE, model.graph.nodes * 3, strict=True):
        node.name = name
    model.graph.nodes[0].outputs[0].name = HOSTILE[0]
    model.graph.outputs[0].name = HOSTILE[2]
    model.source = Path(HOSTILE[0].replace("/", "_"))
    changes = Changes(
        tuple(Change(name, name, name) for name in HOSTILE),
        tuple(Skip(name, name) for name in HOSTILE),
        FreeFigures(*HOSTILE[:2]),
    )
    sizes = Stats(1, 2, 3)
    report = Report((Step(HOSTILE[2], HOSTILE[0], 0.5, sizes, sizes, 1, None, changes, HOSTILE[1]),), HOSTILE)
    twin = model.copy().with_metadata({f"onnxslim.{name}_sha256": name for name in HOSTILE})
    data = [{"x": np.ones((2, 4), np.float32)}]
    verdict = validate(model, twin, data, [Target.cpu()], rounds=0)
    return document(model, twin, report, verdict, recipe={name: name for name in HOSTILE}, data=data)


def test_hostile_names_stay_text(made: tuple[Model, Model, Document]) -> None:
    html = hostile().to_html()
    page, harmless = Page(html), Page(made[2].to_html())
    assert page.elements <= harmless.elements | {"p", "details"}
    assert page.attributes <= harmless.attributes
    text = "".join(page.texts)
    assert "<script>document.title='owned'</script>" in text
    assert "{{ 7 * 7 }}{% raw %}" in text
    assert "\\x1b[2J\\x07 &lt;b&gt; \\u202eevil" in text
    assert not {character for character in html if not character.isprintable()} - {"\n"}


# ------------------------------------------------------------------------------------------- a browser

BROWSERS = (
    "chromium",
    "chromium-browser",
    "chromium-headless-shell",
    "google-chrome",
    "google-chrome-stable",
)


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"none of these browsers is installed: {', '.join(BROWSERS)}")
    return found


def opened(browser: str, page: Path, *words: str) -> tuple[str, list[str]]:
    """The page as the browser has it, and what it wrote to its console."""
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    command += [f"--user-data-dir={page.parent / 'profile'}", "--enable-logging=stderr", "--v=0", *words]
    done = subprocess.run(
        [*command, page.as_uri()], capture_output=True, text=True, encoding="utf-8", timeout=120, check=True
    )
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


@pytest.mark.browser
@pytest.mark.parametrize("kind", ["real", "hostile"])
def test_a_real_browser_shows_it_without_a_complaint(
    kind: str, browser: str, made: tuple[Model, Model, Document], tmp_path: Path
) -> None:
    told = made[2] if kind == "real" else hostile()
    told.save(tmp_path / "page.html")
    dom, console = opened(browser, tmp_path / "page.html", "--dump-dom")
    assert console == []
    title = "mobilenet.onnx" if kind == "real" else "&lt;script&gt;document.title"
    assert f"<title>onnxslim: {title}" in dom
    assert "</section>" in dom
    assert dom.count("<script>") == 1
    assert "<img" not in dom
    opened(
        browser, tmp_path / "page.html", f"--screenshot={tmp_path / 'shot.png'}", "--window-size=1000,1400"
    )
    image = pytest.importorskip("PIL.Image").open(tmp_path / "shot.png").convert("L")
    shades = np.bincount(np.asarray(image).reshape(-1), minlength=256)
    assert np.count_nonzero(shades) > 20, "text and bars were drawn"


FRAME = """<iframe id="f" src="page.html" style="width:{width}px;height:9000px;border:0"></iframe>
<p id="p"></p>
<script>document.getElementById("f").onload = () => {{
  const page = document.getElementById("f").contentDocument, root = page.documentElement;
  const first = [...page.querySelectorAll("th:first-child")].filter(each => each.offsetWidth);
  const out = [...page.querySelectorAll("h1,h2,h3,p,li,svg:not(.graph),figure,.wide,.row")];
  document.getElementById("p").textContent = JSON.stringify({{
    over: root.scrollWidth - root.clientWidth,
    beyond: out.filter(each => each.getBoundingClientRect().right > {width} + 1).length,
    narrowest: Math.min(...first.map(each => each.offsetWidth)),
    letters: Math.min(...out.map(each => parseFloat(getComputedStyle(each).fontSize)))}});
}}</script>"""


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 800, 1600])
@pytest.mark.parametrize("kind", ["real", "hostile"])
def test_it_fits_phones_and_screens(
    kind: str, width: int, browser: str, made: tuple[Model, Model, Document], tmp_path: Path
) -> None:
    (made[2] if kind == "real" else hostile()).save(tmp_path / "page.html")
    (tmp_path / "frame.html").write_text(FRAME.format(width=width), encoding="utf-8")
    dom, _ = opened(
        browser,
        tmp_path / "frame.html",
        "--dump-dom",
        "--allow-file-access-from-files",
        "--window-size=1700,900",
    )
    told = re.search(r'<p id="p">(.*?)</p>', dom)
    assert told is not None
    found = json.loads(told[1])
    assert found["over"] <= 0
    assert found["beyond"] == 0
    assert found["narrowest"] >= 80
    assert found["letters"] >= 12


@pytest.mark.browser
def test_it_sorts_and_finds(browser: str, made: tuple[Model, Model, Document], tmp_path: Path) -> None:
    act = """<iframe id="f" src="page.html"></iframe><p id="p"></p><script>
    document.getElementById("f").onload = () => {
      const page = document.getElementById("f").contentDocument, find = page.getElementById("find");
      page.querySelector("#passes th:nth-child(2)").click();
      const cells = [...page.querySelectorAll("#passes > .wide td:nth-child(2)")];
      const seconds = cells.map(each => each.textContent);
      find.value = "HARDSWISH";
      find.dispatchEvent(new Event("input"));
      const places = [...page.querySelectorAll(".place")], shown = places.filter(each => !each.hidden);
      document.getElementById("p").textContent = JSON.stringify({seconds, all: places.length,
        shown: shown.length, right: shown.every(each => each.textContent.includes("HardSwish"))});
    }</script>"""
    made[2].save(tmp_path / "page.html")
    (tmp_path / "frame.html").write_text(act, encoding="utf-8")
    dom, _ = opened(browser, tmp_path / "frame.html", "--dump-dom", "--allow-file-access-from-files")
    told = re.search(r'<p id="p">(.*?)</p>', dom)
    assert told is not None
    found = json.loads(told[1])
    assert [float(each) for each in found["seconds"]] == sorted(map(float, found["seconds"]), reverse=True)
    assert 0 < found["shown"] < found["all"]
    assert found["right"]


@pytest.mark.browser
def test_the_policy_really_stops_scripts_and_images(browser: str, tmp_path: Path) -> None:
    """What the page relies on besides escaping, tried on a page that is not escaped."""
    html = hostile().to_html().replace("</header>", f"{HOSTILE[0]}<img src='x.png'></header>")
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    dom, console = opened(browser, tmp_path / "page.html", "--dump-dom")
    assert "<title>owned" not in dom
    assert sum("Content Security Policy" in line for line in console) >= 2


# ------------------------------------------------------------------------------------------------ JSON


def keys(value: Any, path: str = "") -> Iterator[str]:
    """Paths of all keys, lists as []; of what is free, the path up to a star."""
    if path in (
        "metadata",
        "recipe",
        "machine.versions",
        "report.steps[].changes.figures",
        "report.steps[].kept.parts",
        "difference.changed",
        "difference.places[].before.nodes[].done",
        "difference.places[].after.nodes[].done",
    ):
        yield f"{path}.*"
    elif path in ("verdict.providers[].original", "verdict.providers[].placed"):
        yield path + ("[]" if path.endswith("original") else "")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from keys(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value:
        for item in value:
            yield from keys(item, f"{path}[]")
    elif value == []:
        yield f"{path}[]"
    else:
        yield path


def test_the_json_is_as_documented(made: tuple[Model, Model, Document]) -> None:
    _, text = (ROOT / "docs" / "reports.md").read_text("utf-8").split("## The JSON document")
    rows = re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE)
    documented = {key for row in rows for key in re.findall(r"`(.+?)`", row)}
    read = json.loads(made[2].to_json())
    # What is empty or unknown here is documented by what it has elsewhere.
    found = {
        key
        for key in keys(read)
        if key in documented or not any(each.startswith(key.removesuffix("[]")) for each in documented)
    }
    assert read["schema"] == SCHEMA
    assert found - documented == set()
    optional = {key for key in documented if any(part in key for part in (".range", ".metric", "[].changes"))}
    assert documented - found - optional == set()


# -------------------------------------------------------------------------------------------- analysis


def test_layers_are_compared_by_name_and_noise_is_found_where_it_begins() -> None:
    body = "{ a = Mul(x, w)  b = Relu(a)  c = Neg(b)  y = Abs(c) }"
    first = parse(f"g (float[N,2] x) => (float[N,2] y) <float[2] w = {{1, 2}}> {body}")
    second = parse(f"g (float[N,2] x) => (float[N,2] y) <float[2] w = {{1, 2.2}}> {body}")
    found = analyse(first, second, {"x": np.ones((1, 2), np.float32)})
    assert [layer.tensor for layer in found.fidelity] == ["a", "b", "c", "y"]
    expected = 10 * math.log10((1 + 4) / 0.2**2)
    assert [layer.sqnr for layer in found.fidelity] == pytest.approx([expected] * 4, abs=1e-4)
    assert found.fidelity[0].added == pytest.approx(0.04 / 5, rel=1e-4)
    assert [layer.added for layer in found.fidelity[1:]] == [0, 0, 0]
    assert {each.layer for each in found.distributions} == {found.fidelity[0].node}
    assert analyse(first, first, {"x": np.ones((1, 2), np.float32)}).distributions == ()


def test_bytes_belong_to_the_operator_they_are_for(made: tuple[Model, Model, Document]) -> None:
    model, result, _ = made
    found = analyse(model, result, None)
    operators = {share.name: share for share in found.operators}
    assert operators["Conv"].before > 3 * operators["Conv"].after
    for side, whole in (("before", model), ("after", result)):
        assert sum(getattr(share, side) for share in found.operators) == whole.stats().bytes
        assert sum(getattr(share, side) for share in found.layers) == whole.stats().bytes
    assert found.notes == ("no inputs to compare the layers on",)


def test_ranges_are_those_of_the_integers(made: tuple[Model, Model, Document]) -> None:
    analysis = made[2].analysis
    assert analysis is not None
    ranges = [each for each in analysis.distributions if each.range is not None]
    assert ranges
    for each in ranges:
        assert each.range is not None
        assert 0 <= each.beyond < 0.2
        assert sum(each.counts) > 0


@pytest.mark.parametrize(("how", "most"), [("Identity(q)", 127.5), ("Clip(q, z, t)", 7.5)])
def test_ranges_are_those_of_as_many_bits_as_there_are(how: str, most: float) -> None:
    model = parse(
        f"""g (float[N,4] x) => (float[N,4] y) <float s = {{0.5}}, uint8 z = {{0}}, uint8 t = {{15}}>
        {{ q = QuantizeLinear(x, s, z) c = {how} y = DequantizeLinear(c, s, z) }}"""
    )
    assert layers._integer_range(model, "x") == (0.0, most)


def test_layers_of_another_shape_are_left_out() -> None:
    first = parse("g (float[N,4] x) => (float[N,1] y) { a = Relu(x)  y = ReduceSum<axes=[1]>(a) }", opset=11)
    second = parse(
        "g (float[N,4] x) => (float[N,1] y) { b = Relu(x)  a = ReduceSum<axes=[1]>(b)  y = Abs(a) }", opset=11
    )
    found = analyse(first, second, {"x": np.ones((2, 4), np.float32)})
    assert [layer.tensor for layer in found.fidelity] == ["y"]
    assert found.notes == ("1 tensors changed their shape and are not compared",)


def test_models_that_do_not_run_are_still_reported() -> None:
    model = parse("g (float[N] x) => (float[N] y) { y = my.unknown(x) }")
    found = analyse(model, model, {"x": np.ones(2, np.float32)})
    assert found.notes[0].startswith("layers were not compared: ONNX Runtime refuses the model")


# ----------------------------------------------------------------------------------- the command line


def test_the_command_line_keeps_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = parse("g (float[N,4] x) => (float[N,4] y) { z = Identity(x)  y = Relu(z) }")
    model.save(tmp_path / "in.onnx")
    words = ["slim", str(tmp_path / "in.onnx"), str(tmp_path / "in.onnx"), "--report"]
    assert cli.main([*words, str(tmp_path / "r.html")]) == 0
    assert "made-up inputs" in capsys.readouterr().err
    assert "1 × identity" in (tmp_path / "r.html").read_text("utf-8")
    refused = [*words, str(tmp_path / "bad.json"), "--check", "max_abs=-1"]
    kept = (tmp_path / "in.onnx").read_bytes()
    assert cli.main(refused) == 4
    assert (tmp_path / "in.onnx").read_bytes() == kept
    (check,) = json.loads((tmp_path / "bad.json").read_text("utf-8"))["checks"]
    assert check["failures"] == ["cpu: output 'y' has max abs difference 0, required is at most -1"]
    capsys.readouterr()
    assert cli.main([*words, str(tmp_path / "r.json"), "--json"]) == 0
    told = json.loads((tmp_path / "r.json").read_text("utf-8"))
    assert told == json.loads(capsys.readouterr().out)
    assert (told["source"], told["metadata"]["onnxslim.version"]) == ("in.onnx", told["version"])
    assert cli.main([*words, str(tmp_path / "r.txt")]) == 2
    assert "a report is a file in .html, .json, .md or .xml" in capsys.readouterr().err


def test_a_report_of_what_cannot_run_is_still_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parse("g (float[N] x) => (float[N] y) { y = my.unknown(x) }").save(tmp_path / "in.onnx")
    assert cli.main(["slim", str(tmp_path / "in.onnx"), "--report", str(tmp_path / "r.html")]) == 0
    assert "the report has no comparison of the models" in capsys.readouterr().err
    html = (tmp_path / "r.html").read_text("utf-8")
    assert "the input does not run" in html
    assert "no inputs to compare the layers on" in html


def test_places_that_cannot_be_written(made: tuple[Model, Model, Document], tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="cannot write"):
        made[2].save(tmp_path / "none" / "r.html")
    with pytest.raises(UsageError, match=r"a report is a file in \.html, \.json, \.md or \.xml"):
        made[2].save(tmp_path / "r.pdf")


def test_a_report_without_steps_or_figures_is_a_page_too() -> None:
    model = parse("g (float[N] x) => (float[N] y) { y = Relu(x) }")
    empty: Verdict | None = None
    html = document(model, model, Pipeline()(model).report, empty).to_html()
    assert "<h2>Before and after" in html
    assert "Passes" not in html


def test_validate_keeps_reports_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, factor in (("a", 1.0), ("b", 1.1)):
        text = f"g (float[N,2] x) => (float[N,2] y) <float[2] w = {{1, {factor}}}> {{ y = Mul(x, w) }}"
        parse(text).save(tmp_path / f"{name}.onnx")
    np.savez(tmp_path / "data.npz", x=np.ones((4, 2), np.float32))
    words = ["validate", str(tmp_path / "a.onnx"), str(tmp_path / "b.onnx"), "--rounds", "0"]
    words += ["--data", str(tmp_path / "data.npz")]
    assert cli.main([*words, "--report", str(tmp_path / "r.html"), "--require", "sqnr=90"]) == 4
    html = (tmp_path / "r.html").read_text("utf-8")
    assert "a.onnx" in html
    assert "no inputs to compare" not in html
    assert "Signal-to-noise ratio, layer by layer" in html
    assert cli.main([*words, "--report", str(tmp_path / "b.onnx")]) == 2
    assert "would overwrite a model" in capsys.readouterr().err
