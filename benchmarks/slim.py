"""Slim beside other simplifiers, on the same models, in one run.

    python models/zoo.py fetch && python models/export.py     # once; the export needs PyTorch
    python benchmarks/slim.py [--venvs FOLDER] [--tools TOOL ...] [MODEL ...]

Every tool runs with its defaults in a virtual environment of its own, made in FOLDER on the first run: two of
them have one import name. Models are those of the zoo, the Fashion-MNIST networks, the untrained ones that
`benchmarks/untrained.py` exports, and the light models that come with onnx, whose weights are ConstantOfShape
nodes.

A cell holds, in this order: nodes, those of nested graphs included, Constant nodes not; size of the file
relative to the original's; CPU seconds of the call itself, in a fresh process, imports done, any checks the
tool makes by itself included; largest difference of an output relative to its largest magnitude ("=" where
every bit is equal), ONNX Runtime's optimizations off for both; latency relative to the original's, on one
thread, optimizations on, all tools in turn. The last rows sum up the models that all tools can do: nodes and
seconds are added, sizes and latencies averaged geometrically.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common

ROOT = common.ROOT
TIMEOUT_S = 900
ERROR = re.compile(r"[\w.]+(Error|Exception|Fail)\b")

# What each tool's own process runs. Imports come first: only the call is timed.
WORKER = """
import json, sys, time
import onnx, onnxruntime
{imports}
model = onnx.load(sys.argv[1])
start = time.process_time()
result = {call}
seconds = time.process_time() - start
onnx.save(result, sys.argv[2])
print(json.dumps(seconds))
"""


@dataclass(frozen=True)
class Tool:
    """A simplifier: what pip installs, and how it is called on `model`."""

    requirements: tuple[str, ...]
    imports: str
    call: str


TOOLS = {
    "ours": Tool(("-e", str(ROOT)), "import onnxslim\nonnxslim.slim", "onnxslim.slim(model)"),
    "OnnxSlim 0.1.98": Tool(
        ("onnxslim==0.1.98",), "import onnxslim, onnxslim.core, onnxslim.utils", "onnxslim.slim(model)"
    ),
    "onnxsim 0.8.1": Tool(("onnxsim==0.8.1",), "import onnxsim", "onnxsim.simplify(model)[0]"),
    "onnxscript 0.7.2": Tool(
        ("onnxscript==0.7.2",), "from onnxscript import optimizer", "optimizer.optimize(model)"
    ),
}

Feeds = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """What one tool made of one model; `problem` says why there are no figures."""

    nodes: int = 0
    size: float = math.nan
    seconds: float = math.nan
    difference: float = math.nan
    latency: float = math.nan
    problem: str = ""

    def __str__(self) -> str:
        if self.problem:
            return self.problem
        difference = "=" if self.difference == 0 else f"{self.difference:.0e}"
        latency = "–" if math.isnan(self.latency) else f"{self.latency:.2f}"
        return f"{self.nodes} · {self.size:.2f} · {self.seconds:.2f} · {difference} · {latency}"


# ---------------------------------------------------------------------------------------------- models


def models() -> dict[str, tuple[Path, Feeds]]:
    """File and inputs of every model that is there."""
    return {**dict(_zoo()), **dict(_fashion()), **dict(_untrained()), **dict(_light())}


def _zoo() -> Iterator[tuple[str, tuple[Path, Feeds]]]:
    from onnxslim.models import zoo

    for name in zoo.MODELS:
        if zoo.available(name):
            yield name, (zoo.path(name), zoo.inputs(name, 1)[0])
        else:
            print(f"{name} is not in the cache of the zoo", file=sys.stderr)


def _fashion() -> Iterator[tuple[str, tuple[Path, Feeds]]]:
    folder = ROOT / "models" / "fashion"
    image = np.load(folder / "test.npz")["image"][:1]
    for path in sorted(folder.glob("*.onnx")):
        yield f"fashion {path.stem}", (path, {"image": image})


def _untrained() -> Iterator[tuple[str, tuple[Path, Feeds]]]:
    from onnxslim.ir.model import load
    from onnxslim.models import zoo
    from onnxslim.runtime.probe import make_feeds

    for path in sorted((zoo.cache() / "untrained").glob("*.onnx")):
        yield f"untrained {path.stem}", (path, make_feeds(load(path).inputs(), batch=1, size=16))


def _light() -> Iterator[tuple[str, tuple[Path, Feeds]]]:
    from onnxslim.ir.model import load
    from onnxslim.runtime.probe import make_feeds

    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    for path in sorted(folder.glob("*.onnx")):
        yield path.stem, (path, make_feeds(load(path).inputs(), batch=1, size=1))


# ----------------------------------------------------------------------------------------------- tools


def environment(name: str, folder: Path) -> Path:
    """The Python of a tool's virtual environment."""
    return common.environment(folder / name.replace(" ", "-"), TOOLS[name].requirements)


def simplify(python: Path, tool: Tool, source: Path, target: Path) -> float | str:
    """CPU seconds of the call that wrote `target`, or why there is no such file."""
    code = WORKER.format(imports=tool.imports, call=tool.call)
    # Isolated, and elsewhere: the checkout must not stand in for an installed package of its name.
    command = [str(python), "-I", "-c", code, str(source), str(target)]
    try:
        done = subprocess.run(command, cwd=target.parent, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"more than {TIMEOUT_S} s"
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        raised = [line for line in done.stderr.splitlines() if ERROR.match(line)]
        return f"crash: {raised[-1].split(':')[0] if raised else f'code {done.returncode}'}"
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


# ------------------------------------------------------------------------------------------- measuring


def measure(source: Path, feeds: Feeds, pythons: Mapping[str, Path]) -> dict[str, Cell]:
    """The original, under the name "before", and what each tool makes of it."""
    from onnxslim.errors import LoadError
    from onnxslim.runtime.session import Session
    from onnxslim.runtime.targets import Target
    from onnxslim.runtime.timing import latencies

    expected = Session(source, optimize="none").run(feeds)
    cells = {"before": Cell(nodes=nodes(source), size=source.stat().st_size / 1e6)}
    target = Target.cpu(threads=1)
    sessions = {"before": Session(source, target)}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, python) in enumerate(pythons.items()):
            made = Path(folder) / str(number) / "model.onnx"
            made.parent.mkdir()
            seconds = simplify(python, TOOLS[name], source, made)
            if isinstance(seconds, str):
                cells[name] = Cell(problem=seconds)
                continue
            try:
                worst = difference(expected, Session(made, optimize="none").run(feeds))
                sessions[name] = Session(made, target)
            except LoadError as error:
                print(f"{name}: {error}", file=sys.stderr)
                cells[name] = Cell(problem="does not run")
                continue
            cells[name] = Cell(nodes(made), made.stat().st_size / source.stat().st_size, seconds, worst)
        _, ratios = latencies(list(sessions.values()), feeds, rounds=100, seconds=10)
    for name, ratio in zip(sessions, ratios, strict=True):
        cells[name] = replace(cells[name], latency=ratio)
    return cells


def nodes(path: Path) -> int:
    """Nodes of a model, those of nested graphs included, Constant nodes not."""
    pending = [onnx.load_model(path, load_external_data=False).graph]
    count = 0
    while pending:
        for node in pending.pop().node:
            count += node.op_type != "Constant"
            pending.extend(item.g for item in node.attribute if item.type == onnx.AttributeProto.GRAPH)
    return count


def difference(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> float:
    """Largest difference of any output relative to its largest magnitude; infinite for other shapes."""
    if list(expected) != list(actual):
        return math.inf
    return max(_relative(reference, actual[name]) for name, reference in expected.items())


def _relative(reference: Any, actual: Any) -> float:
    if reference.shape != actual.shape or reference.dtype != actual.dtype:
        return math.inf
    if np.array_equal(reference, actual, equal_nan=reference.dtype.kind == "f"):
        return 0.0
    wide, other = reference.astype(np.float64), actual.astype(np.float64)
    return float(np.abs(wide - other).max() / np.abs(wide).max())


# -------------------------------------------------------------------------------------------- printing


def totals(title: str, rows: Sequence[Mapping[str, Cell]], tools: Sequence[str]) -> str:
    """Figures of all models that every tool can do: sums of nodes and seconds, geometric means, the worst
    difference."""
    done = [row for row in rows if not any(cell.problem for cell in row.values())]
    if not done:
        return f"| {title} | – |" + " – |" * len(tools)
    cells = [str(_total([row[tool] for row in done])) for tool in tools]
    nodes, size = (sum(getattr(row["before"], name) for row in done) for name in ("nodes", "size"))
    return f"| {len(done)} of {len(rows)} {title} | {nodes}, {size:.2f} | {' | '.join(cells)} |"


def _total(cells: Sequence[Cell]) -> Cell:
    return Cell(
        nodes=sum(cell.nodes for cell in cells),
        size=float(np.exp(np.mean([np.log(cell.size) for cell in cells]))),
        seconds=sum(cell.seconds for cell in cells),
        difference=max(cell.difference for cell in cells),
        latency=float(np.exp(np.mean([np.log(cell.latency) for cell in cells]))),
    )


def main() -> None:
    """Print a table, row by row as it is measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="*", help="all by default")
    parser.add_argument("--venvs", type=Path, default=common.VENVS)
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS))
    words = parser.parse_args()
    known = models()
    unknown = set(words.model) - set(known)
    if unknown:
        parser.error(f"no such model: {', '.join(sorted(unknown))}; known are: {', '.join(known)}")
    pythons = {name: environment(name, words.venvs) for name in words.tools}
    print(f"| model | before: nodes, MB | {' | '.join(pythons)} |")
    print("|---|---|" + "---|" * len(pythons), flush=True)
    rows: dict[str, dict[str, Cell]] = {}
    for name in words.model or known:
        cells = rows[name] = measure(*known[name], pythons)
        before = f"{cells['before'].nodes}, {cells['before'].size:.2f}"
        print(f"| {name} | {before} | {' | '.join(str(cells[tool]) for tool in pythons)} |", flush=True)
    groups = {"untrained ": "untrained models", "light_": "light models", "": "trained models"}
    kinds = {name: next(prefix for prefix in groups if name.startswith(prefix)) for name in rows}
    for prefix, title in reversed(groups.items()):
        chosen = [cells for name, cells in rows.items() if kinds[name] == prefix]
        print(totals(title, chosen, list(pythons)))


if __name__ == "__main__":
    main()
