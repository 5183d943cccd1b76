"""A report as JUnit's XML, which servers that build things show as tests.

A suite for what was asked for, one for the passes, and one for each execution provider. What fails are
requirements and outputs that could not be compared. A pass that was undone counts as skipped, as the model is
right without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from onnxslim.engine.pipeline import Report, Step
from onnxslim.formats import clean
from onnxslim.report.text import OUTPUT_HEAD, output_cells, provider_lines
from onnxslim.validation.verdict import Checked, OutputRow, Verdict


def suites(title: str, report: Report, verdict: Verdict | None, checks: Sequence[Checked]) -> str:
    """The XML."""
    root = Element("testsuites", name=clean(title))
    root.extend(_suites(report, verdict, checks))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _suites(report: Report, verdict: Verdict | None, checks: Sequence[Checked]) -> Iterator[Element]:
    if checks:
        yield _suite("requirements", [_check(each) for each in checks])
    if report.steps:
        yield _suite("passes", [_step(step) for step in report.steps])
    if verdict is not None:
        for provider in verdict.providers:
            lines = [line.strip() for line in provider_lines(provider, verdict)]
            yield _suite(provider.target, [_output(row) for row in provider.outputs], lines)


def _suite(name: str, cases: Sequence[Element], said: Iterable[str] = ()) -> Element:
    suite = Element("testsuite", name=clean(name), tests=str(len(cases)))
    for what, tag in (("failures", "failure"), ("skipped", "skipped")):
        suite.set(what, str(sum(case.find(tag) is not None for case in cases)))
    suite.extend(cases)
    _say(suite, said)
    return suite


def _say(to: Element, lines: Iterable[str]) -> None:
    told = "\n".join(map(clean, lines))
    if told:
        ElementTree.SubElement(to, "system-out").text = told


def _case(name: str, why: str = "", tag: str = "failure") -> Element:
    """A test that passed or, where there is a reason, did not."""
    case = Element("testcase", classname="onnxslim", name=clean(name))
    if why:
        ElementTree.SubElement(case, tag, message=clean(why))
    return case


def _check(checked: Checked) -> Element:
    return _case(f"{checked.name} {checked.bound}", "; ".join(checked.failures))


def _step(step: Step) -> Element:
    case = _case(step.description, step.error and step.outcome, "skipped")
    case.set("time", f"{step.seconds:.3f}")
    _say(case, [str(step.kept)] if step.kept else [])
    return case


def _output(row: OutputRow) -> Element:
    case = _case(f"output {row.name}", row.problem)
    figures = zip(OUTPUT_HEAD[1:], output_cells(row)[1:], strict=True)
    _say(case, [] if row.problem else [f"{name} {value}" for name, value in figures if value])
    return case
