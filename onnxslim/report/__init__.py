"""What was done and found, as text, HTML, JSON, Markdown and JUnit's XML."""

from pathlib import Path

from onnxslim.errors import UsageError

# Files that a report may be kept in.
FORMS = (".html", ".json", ".md", ".xml")


def require_form(path: Path, form: str) -> None:
    """Raise UsageError if there is no form of a report called so; the file is named."""
    if form not in FORMS:
        raise UsageError(f"'{path}': a report is a file in {', '.join(FORMS[:-1])} or {FORMS[-1]}")
