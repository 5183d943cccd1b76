"""The documents: examples run, generated pages are up to date, and links and pointers into the code hold."""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT

DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"])
EXAMPLES = {
    "custom_operator.py": "with a row: 48 MACs, 2 nodes after dedupe",
    "custom_pass.py": "changed /Div: multiplies instead of dividing",
    "ort_reader.py": "in integers: 12 Conv",
    "transformers_js.py": "onnx/model_q4.onnx: 0.21 of the bytes",
    "ultralytics_hook.py": "int8: 0.5",
    "chain.py": "accuracy 93.60 %",
    "pruning.py": "the plan fits the half-precision model: ",
    "mlflow_trials.py": " runs, the best is '",
    "wandb_trials.py": " steps, the best is '",
}
# What examples need that tests do not bring.
NEEDS = {"mlflow_trials.py": "mlflow", "wandb_trials.py": "wandb"}
# Names that stand for files of a newcomer.
PACKAGES = ("onnxslim", "passes", "calibration")
# Rooms of which each module is a row or a rule like its neighbours.
RULES = ("onnxslim/ops", "passes/eliminate", "passes/fuse")
PLACEHOLDERS = ("passes/name.py", "tests/passes/test_name.py")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
POINTER = re.compile(r"`([\w/.]+\.py)(?:::([\w.]+))?`")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def pages() -> list[pytest.param]:  # type: ignore[valid-type]
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES]


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_examples_run(name: str, tmp_path: Path) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / name)]
    if name == "chain.py":
        command.append(str(tmp_path / "out.onnx"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    place = tmp_path if name in NEEDS else None
    done = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", env=environment, cwd=place
    )
    assert done.returncode == 0, done.stderr
    assert EXAMPLES[name] in done.stdout
    assert (tmp_path / "out.onnx").is_file() == (name == "chain.py")


def test_a_custom_pass_that_breaks_its_promise_is_reverted(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxslim import Pipeline, load
    from onnxslim.engine.editor import Editor
    from onnxslim.ir.graph import Node

    example = runpy.run_path(str(ROOT / "examples" / "custom_pass.py"))

    def forget_the_reciprocal(self: object, match: tuple[Node, object], edit: Editor) -> str:
        edit.replace_node(match[0], "Mul", list(match[0].inputs))
        return "wrong"

    monkeypatch.setattr(example["Divide"], "rewrite", forget_the_reciprocal)
    model = load(ROOT / "models" / "fashion" / "resnet.onnx")
    result = Pipeline(example["Reciprocal"]())(model)
    assert "output 'logits' differs" in result.report.steps[0].error
    assert result.model is model


def test_passes_page_is_up_to_date() -> None:
    generator = runpy.run_path(str(DOCS / "generate.py"))
    written = (DOCS / "passes.md").read_text(encoding="utf-8")
    assert written == generator["page"](), "run: python docs/generate.py"


def test_code_in_the_guides_is_code_of_the_project() -> None:
    sources = [*(ROOT / "examples").glob("*.py"), *(ROOT / "onnxslim" / "ops").glob("*.py")]
    code = [path.read_text(encoding="utf-8") for path in sources]
    blocks = [
        body
        for page in DOCS.glob("adding-*.md")
        for language, body in FENCED.findall(page.read_text(encoding="utf-8"))
        if language in ("python", "text")
    ]
    assert blocks
    for block in blocks:
        assert any(block in text for text in code), block


def test_every_room_has_a_row_that_names_its_modules() -> None:
    page = (DOCS / "architecture.md").read_text("utf-8")
    told = dict(re.findall(r"^\| `([\w/]+)/__init__\.py` \| (.*) \|$", page, re.MULTILINE))
    rooms = [path.parent for package in PACKAGES for path in (ROOT / package).rglob("__init__.py")]
    assert told.keys() == {str(room.relative_to(ROOT)) for room in rooms} - {"onnxslim/ops/channels"}
    for room, row in told.items():
        if room in RULES:
            continue
        for path in (ROOT / room).glob("*.py"):
            assert path.stem.startswith("__") or f"`{path.stem}`" in row, f"{room}: {path.stem} is not told"


@pytest.mark.parametrize("page", pages())
def test_pointers_into_the_code_hold(page: Path) -> None:
    for file, name in POINTER.findall(page.read_text(encoding="utf-8")):
        if "/" not in file or file in PLACEHOLDERS:
            continue
        assert (ROOT / file).is_file(), file
        if name:
            assert name in set(_names(ast.parse((ROOT / file).read_text(encoding="utf-8")))), (
                f"{file}::{name}"
            )


def _names(tree: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[str]:
    """Dotted names that a file defines."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from _names(node, f"{prefix}{node.name}.")
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        file, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in headings}, (
                link
            )


def test_every_page_is_in_the_contents_of_the_site() -> None:
    contents = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w/.-]+\.md", contents.split("nav:\n")[-1]))
    own = {str(page.relative_to(ROOT)) for page in DOCS.rglob("*.md") if page.parent.name != "decisions"}
    assert own - {"docs/index.md"} == {name for name in listed if name.startswith("docs/")} - {
        "docs/decisions/index.md"
    }
    site = runpy.run_path(str(DOCS / "site.py"))
    assert {name for name in listed if not name.startswith("docs/")} <= {"index.md", *site["PAGES"]}
