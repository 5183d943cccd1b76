"""True scores: what any chain of passes, any file and any peer leave of what a network is for.

    python models/zoo.py fetch && python models/export.py     # once; the export needs PyTorch
    python models/stage.py fetch                       # once; needs apt-get with the lists of Debian 12
    python benchmarks/stage.py TASK [--model NAME] [-p PASS[:OPTION=VALUE,…] ...] [--chain "PASS PASS" ...]
                                    [--blind "PASS PASS" ...] [--file other.onnx ...]
                                    [--auto "latency=0.5 effort=quick time_limit=600" ...]
                                    [--peer "ONNX Runtime, best practice" ...]

`-p`, repeated, is one chain; `--chain` are others, with spaces between passes; `--blind` those that get no
data; `--auto` searches within goals. Peers are those of benchmarks/quantize.py, each in a virtual environment
of its own. All have the
same samples to calibrate on, none of which is in the test, and all are scored in one run. Columns: each
score in %, with its 95 % interval; in the first of them the change from the float model, pair by pair, with
an interval of its own, in bold where 0 is not in it; SQNR of the outputs in dB; size of the file, of its
download (deflate) and latency (first sample of the test, one thread, all in turn), relative to the float
model; CPU seconds of making it. Beside the table is said how often classes are those of the float model,
where outputs are scores of classes.
"""

from __future__ import annotations

import argparse
import math
import pickle
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from benchmarks.quantize import TOOLS, quantize
from onnxslim import CalibrationData, Goals, Pipeline, load, optimize, passes
from onnxslim.calibration.noise import sqnr
from onnxslim.errors import OnnxSlimError
from onnxslim.ir.download import download
from onnxslim.models import tasks
from onnxslim.models.tasks import Estimate, Outcomes, Task
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target
from onnxslim.runtime.timing import latencies

THREAD = Target.cpu(threads=1)
# First scores of tasks whose first output has a score for each class.
CLASSIFIED = ("top-1", "accuracy")


@dataclass(frozen=True)
class Entrant:
    """Something to score: its name, its file, what it took to make, and why there is no file."""

    name: str
    path: Path
    seconds: float = math.nan
    problem: str = ""


@dataclass(frozen=True)
class Scored:
    """What an entrant is worth."""

    session: Session
    scores: tuple[Outcomes, ...]
    fidelity: float


def entrants(task: Task, given: argparse.Namespace, folder: Path) -> Iterator[Entrant]:
    """The float model, then what chains and peers make of it, then other files."""
    yield Entrant("float", task.path())
    samples = task.calibration(given.samples)
    for number, chain in enumerate(filter(None, [" ".join(given.passes), *given.chain, *given.blind])):
        data = None if chain in given.blind else CalibrationData(samples)
        yield chained(task, chain, data, folder / f"chain{number}.onnx")
    for number, words in enumerate(given.auto):
        yield searched(task, words, CalibrationData(samples), folder / f"auto{number}.onnx")
    feeds = folder / "samples.pickle"
    feeds.write_bytes(pickle.dumps(samples))
    for number, tool in enumerate(given.peer):
        home = given.venvs / tool.replace(" ", "-").replace(",", "")
        python = common.environment(home, TOOLS[tool].requirements)
        path = folder / f"peer{number}.onnx"
        made = quantize(python, TOOLS[tool], task.path(), path, feeds)
        yield Entrant(tool, path, made.seconds, made.problem)
    for file in given.file:
        yield Entrant(str(file), file)


def chained(task: Task, chain: str, data: CalibrationData | None, path: Path) -> Entrant:
    """Run passes on the float model."""
    run, start = [passes.parse(word) for word in chain.split()], time.process_time()
    result = Pipeline(*run, on_error="raise")(load(task.path()), data=data)
    result.save(path)
    return Entrant(chain if data else f"{chain} (no data)", path, time.process_time() - start)


def searched(task: Task, words: str, data: CalibrationData, path: Path) -> Entrant:
    """Search within goals, in words such as `latency=0.5 effort=quick`; `work=FOLDER` goes on from there."""
    given: dict[str, Any] = dict(word.split("=") for word in words.split())
    effort, limit = given.pop("effort", "normal"), float(given.pop("time_limit", math.inf))
    work, start = given.pop("work", None), time.process_time()
    goals = Goals(**{name: float(value) for name, value in given.items()})
    found = optimize(task.path(), data, goals, effort=effort, time_limit=limit, work=work)
    seconds = time.process_time() - start
    found.model.save(path)
    for trial in found.trials:
        print(f"{trial.label}: {trial.error or trial.figures}", file=sys.stderr, flush=True)
    name = " ".join(("auto", words)).strip()
    told = f"{name}: {found.best.label}" if found.best is not None else ""
    return Entrant(told or name, path, seconds, found.problem)


def scored(task: Task, found: Sequence[Entrant]) -> dict[str, Scored | str]:
    """Each entrant by name, or why it has no score."""
    expected: list[dict[str, Any]] = []
    table: dict[str, Scored | str] = {}
    for entrant in found:
        if entrant.problem:
            table[entrant.name] = entrant.problem
            continue
        try:
            session = Session(entrant.path, THREAD)
            outputs = [session.run(feeds) for feeds in task.test()]
        except OnnxSlimError as error:
            table[entrant.name] = f"does not run: {str(error)[:60]}"
            continue
        expected = expected or outputs
        scores = task.judge(outputs)
        table[entrant.name] = Scored(session, scores, sqnr(expected, outputs))
        told = ", ".join(f"{score.name} {score.estimate.told()}" for score in scores)
        if outputs is not expected and scores[0].name in CLASSIFIED:
            told += f", same class {same_class(expected, outputs):.1%}"
        print(f"{entrant.name}: {told}", file=sys.stderr, flush=True)
    return table


def same_class(expected: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]) -> float:
    """How often the largest of the first output is where the float model's is."""
    pairs = [(next(iter(a.values())), next(iter(b.values()))) for a, b in zip(expected, found, strict=True)]
    return float(np.mean(np.concatenate([a.argmax(-1).ravel() == b.argmax(-1).ravel() for a, b in pairs])))


def rows(task: Task, found: Sequence[Entrant], table: dict[str, Scored | str]) -> Iterator[str]:
    """Lines of the table."""
    running = {name: each for name, each in table.items() if isinstance(each, Scored)}
    base = next(iter(running.values()))
    names = [score.name for score in base.scores]
    _, ratios = latencies([each.session for each in running.values()], task.test()[0], rounds=40, seconds=30)
    yield f"| {task.name}, {task.model} | {' | '.join(names)} | SQNR | file | download | latency | CPU s |"
    yield "|---" * (len(names) + 6) + "|"
    source = found[0].path
    sent = download(load(source)).deflate
    for entrant in found:
        each = table[entrant.name]
        if isinstance(each, str):
            yield f"| {entrant.name} | {each} |"
            continue
        size = entrant.path.stat().st_size / source.stat().st_size
        share = download(load(entrant.path)).deflate / sent
        ratio = ratios[list(running).index(entrant.name)]
        cells = [score.estimate.told() for score in each.scores]
        if each is not base:
            cells[0] += f", {change(each.scores[0].change(base.scores[0]))}"
        costs = "" if math.isnan(entrant.seconds) else f"{entrant.seconds:.0f}"
        yield (
            f"| {entrant.name} | {' | '.join(cells)} | {'' if each is base else f'{each.fidelity:.1f}'} "
            f"| {size:.2f} | {share:.2f} | {ratio:.2f} | {costs} |"
        )


def change(found: Estimate) -> str:
    """A change in points, in bold where it is certain."""
    value, low, high = (100 * each for each in found)
    text = f"{value:+.1f} ({low:+.1f} to {high:+.1f})"
    return f"**{text}**" if found.certain else text


def arguments() -> argparse.Namespace:
    """The words of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", choices=sorted(tasks.TASKS))
    parser.add_argument("--model", default="", help="of the zoo; by default the task's first")
    parser.add_argument("-p", "--pass", dest="passes", action="append", default=[], metavar="PASS")
    parser.add_argument("--chain", action="append", default=[], metavar='"PASS PASS"')
    parser.add_argument("--blind", action="append", default=[], metavar='"PASS PASS"')
    parser.add_argument("--auto", action="append", default=[], metavar='"GOAL=VALUE effort=quick"')
    parser.add_argument("--file", action="append", default=[], type=Path)
    parser.add_argument("--peer", action="append", default=[], choices=sorted(TOOLS))
    parser.add_argument("--samples", type=int, default=128, help="to calibrate on (128)")
    parser.add_argument("--venvs", type=Path, default=common.VENVS)
    return parser.parse_args()


def main() -> None:
    """Print a table."""
    given = arguments()
    try:
        task = tasks.create(given.task, given.model)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if lacking := task.missing():
        sys.exit(f"error: not everything was fetched: {'; '.join(lacking)}")
    with tempfile.TemporaryDirectory() as folder:
        found = list(entrants(task, given, Path(folder)))
        for line in rows(task, found, scored(task, found)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
