"""What was done and found, as text, HTML, JSON, Markdown and JUnit's XML."""

from pathlib import Path

from onnxslim.errors import UsageError

# Files that a report may be kept in.
FORMS = (".html", ".json", ".md", ".xml")


def require_form(path: Path) -> None:
    """Raise UsageError if a file's name says of no form how a report is to be written."""
    if path.suffix not in FORMS:
        raise UsageError(f"'{path}': a report is a file in {', '.join(FORMS[:-1])} or {FORMS[-1]}")
