"""A report as Markdown, for the summary of a build or a comment on a pull request.

Names come from model files: whatever Markdown or HTML would read as more than text is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from string import punctuation

from onnxslim.engine.pipeline import Report, Step
from onnxslim.formats import clean
from onnxslim.report.text import (
    OUTPUT_HEAD,
    SIZE_HEAD,
    STEP_HEAD,
    output_cells,
    provider_lines,
    size_rows,
    step_cells,
)
from onnxslim.validation.verdict import Checked, ProviderVerdict, Verdict

# All that means something in Markdown, but for what only does at the start of a line, where no name stands.
_ESCAPED = str.maketrans({mark: f"\\{mark}" for mark in punctuation if mark not in ",.:;/'\"%+-=?()"})


def page(title: str, report: Report, verdict: Verdict | None, checks: Sequence[Checked]) -> str:
    """What was asked for and whether it is met, what the model became, and what each pass did."""
    return "\n".join(_lines(title, report, verdict, checks)) + "\n"


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    shown = clean(text).translate(_ESCAPED)
    return shown.replace("://", ":\\//").replace("www.", "www\\.")  # else GitHub makes links of them


def _lines(title: str, report: Report, verdict: Verdict | None, checks: Sequence[Checked]) -> Iterator[str]:
    yield f"### {escaped(title)}"
    if checks:
        yield ""
        yield from (line for each in checks for line in _check(each))
    if verdict is not None:
        yield from _table(SIZE_HEAD, size_rows(verdict))
        for provider in verdict.providers:
            yield from _provider(provider, verdict)
    if report.steps:
        yield from _table((*STEP_HEAD, ""), map(_step, report.steps))
    notes = (*report.warnings, *report.notes, *(verdict.notes if verdict else ()))
    if notes:
        yield ""
        yield from (f"* {escaped(note)}" for note in dict.fromkeys(notes))


def _check(checked: Checked) -> Iterator[str]:
    mark = "❌" if checked.failures else "✅"
    yield f"* {mark} {escaped(checked.name)} {escaped(checked.bound)}"
    yield from (f"  * {escaped(failure)}" for failure in checked.failures)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield ""
    yield "| " + " | ".join(head) + " |"
    yield "| --- |" + " ---: |" * (len(head) - 1)
    yield from ("| " + " | ".join(map(escaped, row)) + " |" for row in rows)


def _provider(provider: ProviderVerdict, verdict: Verdict) -> Iterator[str]:
    yield ""
    yield f"**{escaped(provider.target)}**, {escaped(verdict.looked_at)}"
    yield from _table(OUTPUT_HEAD, map(output_cells, provider.outputs))
    told = list(provider_lines(provider, verdict))
    if told:
        yield ""
        yield from (f"* {escaped(line.strip())}" for line in told)


def _step(step: Step) -> Sequence[str]:
    return *step_cells(step), step.outcome or str(step.kept or "")
