"""Lay out what the site is built from: `python docs/site.py FOLDER`, then `mkdocs build` (`nox -s docs`).

Pages keep their places in the repository, so that the links between them hold there and here.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "docs",
    "benchmarks/README.md",
    "models/README.md",
    "models/fashion/README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
)
# What pages link to that is no page.
FILES = ("examples", "models/tasks/stamps.py", "models/tasks/__init__.py")
# The first page stands at the root of the site.
FIRST = "docs/index.md"
HEADING = re.compile(r"^# (.+)$", re.MULTILINE)


def lay_out(folder: Path) -> None:
    """Copy the pages, and list the decisions on one of their own."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in (*PAGES, *FILES):
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    (folder / "docs" / "decisions" / "index.md").write_text(_decisions(), encoding="utf-8")
    first = (folder / FIRST).read_text(encoding="utf-8")
    links = re.sub(r"\]\((?!https?:|#)", "](docs/", first).replace("](docs/../", "](")
    (folder / "index.md").write_text(links, encoding="utf-8")
    (folder / FIRST).unlink()
    contributing = folder / "CONTRIBUTING.md"
    text = contributing.read_text(encoding="utf-8").replace("](docs/decisions)", "](docs/decisions/index.md)")
    contributing.write_text(text, encoding="utf-8")


def _decisions() -> str:
    rows = []
    for page in sorted((ROOT / "docs" / "decisions").glob("*.md")):
        (heading, *_) = HEADING.findall(page.read_text(encoding="utf-8"))
        rows.append(f"- [{heading}]({page.name})")
    return "# Decisions\n\n" + "\n".join(rows) + "\n"


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]))
