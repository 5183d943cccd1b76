"""Reports where models are built: Markdown to show and JUnit's XML to count, whatever names a model has."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt

from onnxslim import cli
from onnxslim.engine.base import Changes
from onnxslim.engine.pipeline import Report, Step
from onnxslim.formats import clean
from onnxslim.ir.model import Stats
from onnxslim.report import junit, markdown
from onnxslim.validation.verdict import Checked, Footprint, OutputRow, ProviderVerdict, Verdict
from tests.helpers import parse

HOSTILE = (
    "<script>alert(1)</script>",
    "a|b | c",
    "[x](javascript:alert(1)) ![y](http://evil/z.png)",
    "`code` **bold** _it_ ~~s~~ # head",
    "&lt;b&gt; \\| \\\\",
    "line\nbreak \x1b[2J\x00 \ufffe",
    "| --- | http://evil www.evil.com",
    "]]> <!-- <?x ?>",
)
ELEMENTS = {"h3", "ul", "li", "p", "strong", "table", "thead", "tbody", "tr", "th", "td"}
SIZE = Footprint(1, 2, 3, None)
STATS = Stats(1, 2, 3)


def _verdict(name: str, problem: str = "") -> Verdict:
    row = OutputRow(name, 1.0, 0.0, 30.0, 1.0, None, problem)
    return Verdict(SIZE, SIZE, (ProviderVerdict(name, (row,)),), 4, 1, 4, notes=(name,))


def _report(name: str, error: str = "") -> Report:
    return Report((Step("slim", name, 0.5, STATS, STATS, None, None, Changes(), error),), (name,))


class Page(HTMLParser):
    """Elements of a page, and the text in table cells, headings and list items."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[str] = []
        self.texts: list[str] = [""]
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.texts.append("")

    def handle_data(self, data: str) -> None:
        self.texts[-1] += data


@pytest.mark.parametrize("name", HOSTILE)
def test_names_stay_text_in_markdown(name: str) -> None:
    checks = (Checked("sqnr", "at least 20 dB", (f"{name} has 3 dB",)), Checked("top1", "at least 1", ()))
    text = markdown.page(name, _report(name, name), _verdict(name), checks)
    page = Page(MarkdownIt("commonmark").enable("table").render(text))
    shown = [each.strip() for each in page.texts]
    # As heading, output and note; behind the provider stands more.
    assert shown.count(clean(name).strip()) == 3
    assert f"{clean(name)}, 4 samples" in shown
    assert f"{clean(name)} has 3 dB" in shown
    assert set(page.elements) <= ELEMENTS
    assert page.elements.count("table") == 3
    assert page.elements.count("tr") == 2 + 2 + 5


@pytest.mark.parametrize("name", HOSTILE)
def test_names_stay_text_in_junit(name: str) -> None:
    checks = (Checked("sqnr", "at least 20 dB", (f"{name} has 3 dB",)), Checked("top1", "at least 1", ()))
    root = ElementTree.fromstring(junit.suites(name, _report(name, name), _verdict(name, name), checks))
    asked, passes, provider = root
    assert root.get("name") == provider.get("name") == clean(name)
    assert [each.get("failures") for each in root] == ["1", "0", "1"]
    assert [each.get("skipped") for each in root] == ["0", "1", "0"]
    assert [each.get("tests") for each in root] == ["2", "1", "1"]
    (failure,) = asked.iter("failure")
    assert failure.get("message") == f"{clean(name)} has 3 dB"
    (skipped,) = passes.iter("skipped")
    assert clean(name) in skipped.get("message", "")
    assert provider[0].get("name") == f"output {clean(name)}"


def test_every_form_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "in.onnx"
    parse("g (float[N] x) => (float[N] y) { a = Identity(x) y = Relu(a) }").save(model)
    forms = [tmp_path / f"r{form}" for form in (".html", ".json", ".md", ".xml")]
    words = [word for form in forms for word in ("--report", str(form))]
    assert cli.main(["validate", str(model), str(model), "--rounds", "0", *words]) == 0
    assert all(form.read_text("utf-8") for form in forms)
    assert cli.main(["slim", str(model), "--check", "max_abs=-1", *words]) == 4
    assert "❌ max\\_abs at most -1" in forms[2].read_text("utf-8")
    (failed,) = ElementTree.parse(forms[3]).iter("failure")
    assert "required is at most -1" in failed.get("message", "")
    assert (
        cli.main(["slim", str(model), "--report", str(model.with_suffix(".xml")), "--report", "x.txt"]) == 2
    )
    assert "a report is a file in" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [("validate", "in.onnx", "in.onnx", "--rounds", "0"), ("slim", "in.onnx")]
)
def test_forms_are_named_where_files_have_other_names(
    command: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    parse("g (float[N] x) => (float[N] y) { a = Identity(x) y = Relu(a) }").save("in.onnx")
    assert cli.main([*command, "--junit", "tests.log", "--markdown", "summary", "--report", "r.json"]) == 0
    assert ElementTree.parse("tests.log").getroot().tag == "testsuites"
    assert Path("summary").read_text("utf-8").startswith("### ")
    assert Path("r.json").is_file()
    capsys.readouterr()
    assert cli.main([*command, "--junit", "in.onnx"]) == 2
    assert "--junit in.onnx would overwrite " in capsys.readouterr().err
    assert cli.main([*command, "--junit", "same", "--markdown", "same"]) == 2
    assert "--markdown same would overwrite the report of --junit" in capsys.readouterr().err
