"""Structured pruning beside Torch-Pruning and onnxsim, in one run.

    python benchmarks/architectures.py          # once, for coverage; needs PyTorch
    python benchmarks/prune.py coverage [NAME ...]
    python benchmarks/prune.py accuracy [NET ...]
    python models/zoo.py fetch && python models/export.py     # once, for real
    python benchmarks/prune.py real [NAME ...]

Peers run in virtual environments of their own, made on the first run. Torch-Pruning prunes the PyTorch module
by group L2 norm, told the output layers and the numbers of heads, and the result is exported as the original
was. onnxsim prunes channels, then heads, of the ONNX file, as it is and simplified first; the better counts,
and inner shapes that it left wrong in the file are dropped. Ours is Slim, then Prune.

coverage: half of the channels, without data or repair. Outcomes: "ok"; "nothing" (less than 1 % of the
parameters gone); "crash" (an exception, or more than 120 s of CPU); "invalid" (onnx.checker or ONNX Runtime
objects, or outputs have other shapes or are not finite). A cell holds parameters and MACs removed in %,
seconds of the call, latency relative to the original's and, for ours, the oracle's relative error.

accuracy: the three Fashion-MNIST networks at 75, 50 and 35 % of their MACs, on 2000 test images, no training.
The peers' ratio is the one of a grid whose MACs come nearest. MACs are relative to those of the file as it
is, of which Slim alone saves a sixth in vit. Ours repairs with 512 unlabelled images.

real: exported models at 80 % of their MACs: how far outputs are from the original's with and without repair,
on 64 inputs that were not used for calibration.

Latency: one thread, the shortest of many runs, both models in turn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from benchmarks.real import agreement
from onnxslim import CalibrationData, Pipeline, Target, load
from onnxslim.calibration.noise import sqnr
from onnxslim.engine.check import broken, wellformed
from onnxslim.errors import OnnxSlimError
from onnxslim.ir.model import Model
from onnxslim.models import zoo
from onnxslim.passes import Prune, Slim
from onnxslim.passes.prune import PruneFigures
from onnxslim.runtime.probe import make_feeds
from onnxslim.runtime.session import Session
from onnxslim.runtime.timing import latencies
from onnxslim.shapes import cost

ROOT = common.ROOT
FASHION = ROOT / "models" / "fashion"
CPU_S = 120
NOTHING = 0.01
REACHED = 0.04
RATIO = 0.5
SHARES = (0.75, 0.5, 0.35)
GRID = tuple(round(0.04 + 0.02 * step, 2) for step in range(39))
ERROR = re.compile(r"[\w.]*(Error|Exception|Fail)\b")
REAL = ("ppocr_det", "efficientnet_lite0.dynamo", "minilm.dynamo")

Feeds = dict[str, Any]


class PeerError(Exception):
    """A peer's process failed; says how."""


# ----------------------------------------------------------------------------------------------- peers


def run_peer(python: Path, script: str, *words: object) -> Any:
    """What the last line of a peer's output says. CPU time is limited, as the machine may be busy."""
    command = [str(python), str(ROOT / "benchmarks" / script), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=_limit_cpu_time)
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise PeerError(f"more than {CPU_S} s")
    if done.returncode:
        raised = [line for line in done.stderr.splitlines() if ERROR.match(line)]
        raise PeerError(raised[-1][:160] if raised else f"exit code {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _limit_cpu_time() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))


def torch_pruning() -> Path:
    """The Python of Torch-Pruning's environment."""
    wanted = ("torch==2.13.0", "onnxscript==0.7.2")
    return common.environment(common.VENVS / "torch-pruning-1.6.1", wanted, alone=("torch-pruning==1.6.1",))


def onnxsim() -> Path:
    """The Python of onnxsim's environment."""
    return common.environment(common.VENVS / "onnxsim-0.8.1", ("onnxsim==0.8.1",))


# -------------------------------------------------------------------------------------------- coverage


@dataclass(frozen=True)
class Outcome:
    """What a tool made of a model: shares removed, seconds, and the oracle's error where there is one."""

    kind: str
    parameters: float = math.nan
    macs: float = math.nan
    seconds: float = math.nan
    latency: float = math.nan
    oracle: float = math.nan
    reason: str = ""

    def __str__(self) -> str:
        if self.kind != "ok":
            return self.kind
        macs = "–" if math.isnan(self.macs) else f"{100 * self.macs:.1f}"
        cell = f"{100 * self.parameters:.1f} · {macs} · {self.seconds:.2f} · {self.latency:.2f}"
        return cell if math.isnan(self.oracle) else f"{cell} · {self.oracle:.0e}"


def feeds_of(model: Model, batch: int) -> Feeds:
    """Inputs of a network of benchmarks/architectures.py."""
    specs = model.inputs()
    image = any(len(spec.shape or ()) == 4 for spec in specs)
    return make_feeds(specs, batch=batch, size=32 if image else 12, ids=99, seed=batch)


def macs_of(model: Model, feeds: Mapping[str, Any]) -> float:
    """Multiply-accumulates of one sample; where computed sizes hide some shapes, after Slim."""
    sizes = {name: (1, *array.shape[1:]) for name, array in feeds.items()}
    count = cost.macs(model, sizes) or cost.macs(Pipeline(Slim())(model).model, sizes)
    return float(count or math.nan)


def judge(original: Model, made: Model, seconds: float) -> Outcome:
    """Whether a pruned model is valid, and how much smaller it is."""
    feeds = [feeds_of(original, batch) for batch in (2, 3)]
    try:
        wellformed(made)
        before, after = (Session(model, Target.cpu(threads=1)) for model in (original, made))
        problems = [problem for batch in feeds for problem in _problems(before, after, batch)]
    except OnnxSlimError as error:
        problems = [str(error)]
    if problems:
        return Outcome("invalid", reason=problems[0][:200])
    share = 1 - made.stats().parameters / original.stats().parameters
    if share < NOTHING:
        return Outcome("nothing", share)
    macs = 1 - macs_of(made, feeds[0]) / macs_of(original, feeds[0])
    return Outcome("ok", share, macs, seconds, relative_latency(before, after, feeds[0]))


def relative_latency(before: Session, after: Session, feeds: Feeds) -> float:
    """Ratio of the shortest times: a busy machine interrupts long runs more often than short ones."""
    (first, second), _ = latencies([before, after], feeds, rounds=100, seconds=1)
    return second.minimum / first.minimum


def _problems(original: Session, made: Session, feeds: Feeds) -> Iterator[str]:
    expected, found = original.run(feeds), made.run(feeds)
    for name, reference in expected.items():
        problem = broken(reference, found.get(name))
        if problem:
            yield f"output '{name}' {problem}"


def ours(path: Path) -> Outcome:
    """Slim and Prune."""
    original = load(path)
    start = time.perf_counter()
    try:
        result = Pipeline(Slim(), Prune(ratio=RATIO, repair="none"), on_error="raise")(original)
    except OnnxSlimError as error:
        return Outcome("crash", reason=str(error)[:200])
    outcome = judge(original, result.model, time.perf_counter() - start)
    figures = result.report.steps[-1].changes.figures
    oracle = figures.oracle if isinstance(figures, PruneFigures) else None
    return replace(outcome, oracle=math.nan if oracle is None else oracle)


def with_torch_pruning(name: str, paths: Mapping[str, Path]) -> dict[str, Outcome]:
    """Torch-Pruning prunes once and exports with every exporter."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            seconds = run_peer(torch_pruning(), "peer_torch_pruning.py", "coverage", name, folder, RATIO)
        except PeerError as error:
            return dict.fromkeys(paths, Outcome("crash", reason=str(error)))
        return {
            exporter: judge(load(path), load(Path(folder) / f"{exporter}.onnx"), seconds)
            for exporter, path in paths.items()
        }


def with_onnxsim(path: Path) -> Outcome:
    """The better outcome of the file as it is and simplified first."""
    outcomes = [_with_onnxsim(path, form) for form in ("raw", "simplified")]
    order = ("ok", "nothing", "invalid", "crash")
    return min(outcomes, key=lambda outcome: (order.index(outcome.kind), -outcome.parameters))


def _with_onnxsim(path: Path, form: str) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        try:
            (seconds,) = run_peer(onnxsim(), "peer_onnxsim.py", path, form, "plain", folder, RATIO)
            made = load(_unannotated(Path(folder) / f"{RATIO}.onnx"))
        except PeerError as error:
            return Outcome("crash", reason=str(error))
        except OnnxSlimError as error:
            return Outcome("invalid", reason=str(error)[:200])
        return judge(load(path), made, seconds)


def _unannotated(path: Path) -> onnx.ModelProto:
    model = onnx.load(path)
    model.graph.ClearField("value_info")
    return model


def coverage(names: Sequence[str]) -> None:
    """Every tool on every architecture and exporter."""
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(common.architectures().glob("*.*.onnx")):
        name, exporter = path.name.split(".")[:2]
        found.setdefault(name, {})[exporter] = path
    print("| architecture | exporter | parameters, MACs | ours | Torch-Pruning 1.6.1 | onnxsim 0.8.1 |")
    print("|---|---|---|---|---|---|", flush=True)
    rows: list[dict[str, Outcome]] = []
    for name in names or found:
        theirs = with_torch_pruning(name, found[name])
        for exporter, path in sorted(found[name].items(), reverse=True):
            row = {"ours": ours(path), "Torch-Pruning": theirs[exporter], "onnxsim": with_onnxsim(path)}
            rows.append(row)
            original = load(path)
            macs = macs_of(original, feeds_of(original, 2))
            size = f"{original.stats().parameters / 1e6:.2f} M, {macs / 1e6:.1f} M"
            print(f"| {name} | {exporter} | {size} | {' | '.join(map(str, row.values()))} |", flush=True)
            for tool, outcome in row.items():
                if outcome.reason:
                    print(f"{name}.{exporter}, {tool}: {outcome.kind}: {outcome.reason}", file=sys.stderr)
    summarize(rows)


def summarize(rows: Sequence[Mapping[str, Outcome]]) -> None:
    """Outcomes counted by tool."""
    kinds = ("ok", "nothing", "crash", "invalid")
    print(f"\n| tool | {' | '.join(kinds)} | median of parameters removed where ok, % | lowest |")
    print("|---|---|---|---|---|---|---|")
    for tool in rows[0]:
        outcomes = [row[tool] for row in rows]
        counts = [sum(outcome.kind == kind for outcome in outcomes) for kind in kinds]
        shares = [100 * outcome.parameters for outcome in outcomes if outcome.kind == "ok"] or [math.nan]
        cells = " | ".join(map(str, counts))
        print(f"| {tool} | {cells} | {np.median(shares):.1f} | {min(shares):.1f} |")


# -------------------------------------------------------------------------------------------- accuracy


@dataclass(frozen=True)
class Point:
    """A pruned network: share of the MACs left, accuracy, latency relative to the original's."""

    macs: float
    accuracy: float
    latency: float
    seconds: float

    def __str__(self) -> str:
        return f"{100 * self.accuracy:.1f} · {100 * self.macs:.0f} · {self.latency:.2f} · {self.seconds:.1f}"


def point(original: Model, made: Model, seconds: float) -> Point:
    """Measure a Fashion-MNIST network on the test images."""
    test = np.load(FASHION / "test.npz")
    first, second = (Session(model, Target.cpu(threads=1)) for model in (original, made))
    images = np.split(test["image"], 8)
    logits = np.concatenate([second.run({"image": part})["logits"] for part in images])
    feeds = {"image": test["image"][:1]}
    share = macs_of(made, feeds) / macs_of(original, feeds)
    latency = relative_latency(first, second, feeds)
    return Point(share, float((logits.argmax(1) == test["label"]).mean()), latency, seconds)


@dataclass(frozen=True)
class Candidate:
    """A file that a peer wrote."""

    path: Path
    macs: float
    seconds: float


def candidates(original: Model, folder: Path, seconds: Sequence[float]) -> Iterator[Candidate]:
    """What a peer made of a Fashion-MNIST network at every ratio of the grid, where it can be loaded."""
    feeds = {"image": np.zeros((1, 1, 28, 28), np.float32)}
    whole = macs_of(original, feeds)
    for ratio, taken in zip(GRID, seconds, strict=True):
        path = folder / f"{ratio}.onnx"
        try:
            yield Candidate(path, macs_of(load(_unannotated(path)), feeds) / whole, taken)
        except OnnxSlimError as error:
            print(f"{path.name}: {error}", file=sys.stderr)


def nearest(original: Model, found: Sequence[Candidate], share: float) -> str:
    """The candidate whose MACs come nearest, measured."""
    best = min(found, key=lambda each: abs(each.macs - share), default=None)
    if best is None or abs(best.macs - share) > REACHED:
        lowest = min((each.macs for each in found), default=1.0)
        return f"not reached ({100 * lowest:.0f})"
    return str(point(original, load(_unannotated(best.path)), best.seconds))


Cells = dict[float, str]


def peers(net: str) -> Iterator[tuple[str, Cells]]:
    """By method and share of the MACs: what the peers reach."""
    path = FASHION / f"{net}.onnx"
    original = load(path)
    calibration = FASHION / "calibration.npz"
    sources = [(path, form) for form in ("raw", "simplified")]
    methods: dict[str, tuple[Path, str, list[tuple[object, ...]]]] = {
        "Torch-Pruning L2": (torch_pruning(), "peer_torch_pruning.py", [("fashion", net)]),
        "onnxsim L2": (onnxsim(), "peer_onnxsim.py", [(*each, "plain") for each in sources]),
        "onnxsim Wanda": (onnxsim(), "peer_onnxsim.py", [(*each, calibration) for each in sources]),
    }
    for method, (python, script, jobs) in methods.items():
        with tempfile.TemporaryDirectory() as folder:
            made: list[Candidate] = []
            for number, job in enumerate(jobs):
                own = Path(folder) / str(number)
                own.mkdir()
                try:
                    made += candidates(original, own, run_peer(python, script, *job, own, *GRID))
                except PeerError as error:
                    print(f"{net}, {method}: {error}", file=sys.stderr)
            yield method, {share: nearest(original, made, share) for share in SHARES}


def ours_at(net: str) -> Iterator[tuple[str, Cells]]:
    """By kind of repair and share of the MACs: what Slim and Prune reach."""
    original = load(FASHION / f"{net}.onnx")
    data = CalibrationData.from_npz(FASHION / "calibration.npz", batch_size=64)
    for repair, steps in (("none", 1), ("bias", 1), ("ridge", 1), ("ridge", 3)):
        name = f"ours, repair={repair}" + (f", steps={steps}" if steps > 1 else "")
        yield name, {share: _our_point(original, data, share, repair, steps) for share in SHARES}


def _our_point(original: Model, data: CalibrationData, share: float, repair: Any, steps: int) -> str:
    start = time.perf_counter()
    try:
        slimmed = Pipeline(Slim(), on_error="raise")(original).model
        feeds = {"image": np.zeros((1, 1, 28, 28), np.float32)}
        goal = share * macs_of(original, feeds) / macs_of(slimmed, feeds)
        pipeline = Pipeline(Prune(macs=goal, repair=repair, steps=steps), on_error="raise")
        result = pipeline(slimmed, data=data)
    except OnnxSlimError as error:
        return f"crash: {str(error)[:120]}"
    return str(point(original, result.model, time.perf_counter() - start))


def accuracy(nets: Sequence[str]) -> None:
    """The Fashion-MNIST networks at three sizes by every method."""
    print("Cells: accuracy in % · MACs left in % · latency relative to the original's · seconds\n")
    print("| net | method | " + " | ".join(f"{share:.0%} of MACs" for share in SHARES) + " |")
    print("|---|---|" + "---|" * len(SHARES), flush=True)
    for net in nets or ("resnet", "mobilenet", "vit"):
        original = load(FASHION / f"{net}.onnx")
        whole = point(original, original, 0.0)
        print(f"| {net} | original | {100 * whole.accuracy:.1f} |" + " |" * (len(SHARES) - 1))
        for method, cells in itertools.chain(ours_at(net), peers(net)):
            print(f"| {net} | {method} | " + " | ".join(cells[share] for share in SHARES) + " |", flush=True)


# ------------------------------------------------------------------------------------------------ real


def real(names: Sequence[str]) -> None:
    """Exported models with and without repair."""
    print("| model | repair | parameters | MACs | latency | SQNR dB | top-1 | s |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name in names or REAL:
        original = load(zoo.path(name))
        slimmed = Pipeline(Slim(), on_error="raise")(original).model
        data = CalibrationData(zoo.inputs(name, 64, seed=0))
        feeds = zoo.inputs(name, 64, seed=1)
        reference = Session(slimmed, Target.cpu(threads=1))
        expected = [reference.run(batch) for batch in feeds]
        for repair in ("none", "bias", "ridge"):
            start = time.perf_counter()
            try:
                result = Pipeline(Prune(macs=0.8, repair=repair), on_error="raise")(slimmed, data=data)
            except OnnxSlimError as error:
                print(f"| {name} | {repair} | {error} |", flush=True)
                continue
            seconds = time.perf_counter() - start
            step = result.report.steps[-1]
            session = Session(result.model, Target.cpu(threads=1))
            found = [session.run(batch) for batch in feeds]
            latency = relative_latency(reference, session, feeds[0])
            macs = math.nan if not step.macs_before else (step.macs_after or 0) / step.macs_before
            print(
                f"| {name} | {repair} | {step.after.parameters / step.before.parameters:.2f} | {macs:.2f} "
                f"| {latency:.2f} | {sqnr(expected, found):.1f} | {agreement(name, expected, found)} "
                f"| {seconds:.0f} |",
                flush=True,
            )


def main() -> None:
    """Print one of the tables, row by row as it is measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tables = {"coverage": coverage, "accuracy": accuracy, "real": real}
    parser.add_argument("table", choices=list(tables))
    parser.add_argument("name", nargs="*", help="models; all by default")
    words = parser.parse_args()
    tables[words.table](words.name)


if __name__ == "__main__":
    main()
