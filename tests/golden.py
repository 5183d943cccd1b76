"""A record of what the passes make, byte for byte: whether a change of the code changes any of it.

    python tests/golden.py record FILE.json [--full] [--only GLOB] [--jobs N]
    python tests/golden.py compare FILE.json [--only GLOB] [--jobs N]
    python tests/golden.py diff FIRST.json SECOND.json

A case is a model, passes in the words of the command line, and a number of calibration samples; what it makes
is saved, and the files are hashed. `compare` makes the cases of a record again and, like `diff`, ends with 1
if any differs. Take the record just before the change, on the same machine and with the same packages:
kernels differ from processor to processor. It takes four minutes of CPU, with --full half an hour.

Each case runs in a process of its own, on one thread, with clocks that only count bytes (`count_bytes`), so
that neither their order nor a busy machine matters.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

if TYPE_CHECKING:
    from onnxslim import CalibrationData, Model, Result

ROOT = Path(__file__).resolve().parent.parent
FASHION = ROOT / "models" / "fashion"
NETS = ("resnet", "mobilenet", "vit")
# Images in the batches of the fashion networks; samples for them, and for models of the zoo.
BATCH, IMAGES, FEW = 8, 32, 8

# What every model gets, without data and with data. `replay` makes a plan without data and prunes by that.
PLAIN = (
    "prune:macs=0.6",
    "factorize:macs=0.6",
    "quantize:activations=dynamic",
    "quantize:activations=none",
    "quantize:activations=none,weights=int4",
    "half",
)
CALIBRATED = (*PLAIN, "slim", "replay:ratio=0.3", "quantize", "quantize:weights=int4")
# The other ways of the passes, for some networks, with data.
OPTIONS = (
    *(f"prune:ratio=0.3,importance={name}" for name in ("l1", "l2", "fpgm", "lamp", "energy", "thinet")),
    "prune:params=0.6,steps=2,importance=l1",
    "prune:ratio=0.3,repair=bias",
    "factorize:params=0.5,fitted=no",
    "factorize:energy=0.95,schemes=svd,repair=no",
    "factorize:speedup=1.3,schemes=svd",
    *(f"quantize:observer={name}" for name in ("minmax", "percentile", "kl", "mse")),
    *(f"quantize:algorithm={name}" for name in ("rtn", "cd", "gptq")),
    *(f"quantize:layout={name}" for name in ("openvino", "cuda", "tensorrt", "qnn")),
    "quantize:activations=int8,classifier=yes",
    "quantize:activations=uint16",
    "quantize:per_channel=no,bias_correction=no,equalization=no,sequential=no",
    "quantize:require_sqnr=50,layers=yes",
    "quantize:optimize_for=latency",
    "quantize quantize",
    "half:dtype=bfloat16",
    "half:weights_only=yes",
    "slim prune:macs=0.7 quantize",
)
OPTIONED = ("resnet", "vit")


@dataclass(frozen=True)
class Case:
    """What is done to which model; `samples` is 0 for no data."""

    model: str
    passes: str
    samples: int = 0

    @property
    def name(self) -> str:
        return f"{self.model} {self.passes}" + (f" +{self.samples}" if self.samples else "")


class Outcome(NamedTuple):
    """How a case ended: "changed", "unchanged", "reverted", "crashed" or the class of an error.

    Attributes:
        sha256: of the files that were saved; empty if there are none.
        seconds: of CPU, not compared.
    """

    ended: str
    sha256: str = ""
    seconds: float = 0.0


# ---------------------------------------------------------------------------------------------- cases


def cases(full: bool) -> Iterator[Case]:
    """All cases, or those that take minutes in total and not half an hour."""
    from onnxslim.models import zoo
    from tests.traps.test_traps import TRAPS

    for net in NETS:
        yield Case(f"fashion/{net}", "slim")
        yield from (Case(f"fashion/{net}", passes) for passes in PLAIN)
        yield from (Case(f"fashion/{net}", passes, IMAGES) for passes in CALIBRATED)
    for net in OPTIONED:
        yield from (Case(f"fashion/{net}", passes, IMAGES) for passes in OPTIONS)
    yield from (Case(f"trap/{trap.name}", "slim") for trap in TRAPS)
    fetched = [f"zoo/{name}" for name in zoo.usual() if zoo.available(name)]
    yield from (Case(name, "slim") for name in fetched)
    if full:
        yield from (Case(name, passes) for name in fetched for passes in PLAIN)
        yield from (Case(name, passes, FEW) for name in fetched for passes in CALIBRATED)


def model_of(case: Case) -> Model:
    """The model of a case."""
    import onnxslim
    from onnxslim.models import zoo
    from tests.traps.test_traps import TRAPS

    group, _, name = case.model.partition("/")
    if group == "trap":
        return next(trap for trap in TRAPS if trap.name == name).model()
    return onnxslim.load(zoo.path(name) if group == "zoo" else FASHION / f"{name}.onnx")


def data_of(case: Case) -> CalibrationData | None:
    """The calibration data of a case, if it has any."""
    import numpy as np

    from onnxslim import CalibrationData
    from onnxslim.models import zoo

    group, _, name = case.model.partition("/")
    if not case.samples:
        return None
    if group == "zoo":
        return CalibrationData(zoo.inputs(name, case.samples))
    with np.load(FASHION / "calibration.npz") as file:
        images = file["image"][: case.samples]
    return CalibrationData([{"image": images[at : at + BATCH]} for at in range(0, len(images), BATCH)])


# -------------------------------------------------------------------------------------------- running


def count_bytes() -> None:
    """Have clocks say how many bytes the models had that ONNX Runtime ran so far, one a second.

    What is chosen by latency is then chosen by size, the same each time, and five turns are enough for it.
    """
    from onnxruntime import InferenceSession, SessionOptions

    run, beside, count = InferenceSession.run, SessionOptions.add_external_initializers, 0
    weights: dict[int, tuple[Any, int]] = {}  # by id of the options, these and how many bytes go with them

    def counted(session: Any, *args: Any, **options: Any) -> Any:
        nonlocal count
        path = session._model_path
        count += os.path.getsize(path) if path else len(session._model_bytes)
        count += weights.get(id(session._sess_options_initial), (None, 0))[1]
        return run(session, *args, **options)

    def noted(options: Any, names: list[str], values: list[Any]) -> None:
        weights[id(options)] = options, sum(value.tensor_size_in_bytes() for value in values)
        beside(options, names, values)

    mock.patch.object(InferenceSession, "run", counted).start()
    mock.patch.object(SessionOptions, "add_external_initializers", noted).start()
    mock.patch.multiple(time, perf_counter=lambda: float(count), thread_time=lambda: float(count)).start()


def made(case: Case, folder: Path) -> Result:
    """What the passes make of the model; a plan that is replayed is left in the folder."""
    from onnxslim import Pipeline, Target
    from onnxslim.passes import parse
    from onnxslim.passes.prune import PruneFigures

    model, target, words = model_of(case), Target.cpu(threads=1), case.passes.split()
    if case.passes.startswith("replay:"):
        pipeline = Pipeline(parse(case.passes.replace("replay", "prune", 1)))
        (step,) = pipeline(model, target=target).report.steps
        plan = folder / "plan.json"
        plan.write_text(
            json.dumps(PruneFigures.of(step.changes).plan.to_dict(), sort_keys=True), encoding="utf-8"
        )
        words = [f"prune:plan={plan}"]
    return Pipeline(*map(parse, words))(model, data=data_of(case), target=target)


def outcome(case: Case, folder: Path) -> Outcome:
    """How the case ends, in this process."""
    from onnxslim import OnnxSlimError

    os.environ["ONNXSLIM_CACHE"] = str(folder / "cache")
    (kept := folder / "kept").mkdir()
    try:
        result = made(case, kept)
        result.save(kept / "model.onnx")
    except OnnxSlimError as error:
        return Outcome(type(error).__name__, "", time.process_time())
    steps = result.report.steps
    ended = "changed" if any(step.changes for step in steps) else "unchanged"
    ended = "reverted" if any(step.error for step in steps) else ended
    digest = hashlib.sha256()
    for path in sorted(kept.iterdir()):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return Outcome(ended, digest.hexdigest(), time.process_time())


def _child(case: Case, answer: Connection) -> None:
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        answer.send(outcome(case, Path(folder)))


def isolated(case: Case) -> Outcome:
    """How the case ends, in a process of its own."""
    context = multiprocessing.get_context("fork")  # nothing has run here yet; imports are what takes time
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(case, sender))
    child.start()
    sender.close()
    try:
        found: Outcome = receiver.recv()
    except EOFError:
        found = Outcome("crashed")
    child.join()
    return found


def record(full: bool, only: str, jobs: int) -> dict[str, Outcome]:
    """Outcomes of cases by name, told as they come."""
    count_bytes()  # before a clock becomes the default of some argument
    from onnxslim import passes

    for name in passes.names():
        passes.get(name)
    chosen = [case for case in cases(full) if fnmatchcase(case.name, only)]
    found = dict[str, Outcome]()
    with ThreadPoolExecutor(jobs) as pool:
        for case, ended in zip(chosen, pool.map(isolated, chosen), strict=True):
            found[case.name] = ended
            print(f"{ended.sha256[:12]:12} {ended.seconds:6.1f} s {ended.ended:12} {case.name}", flush=True)
    print(f"{len(found)} cases, {sum(each.seconds for each in found.values()):.0f} s of CPU")
    return found


# ----------------------------------------------------------------------------------------- comparing


def told(before: dict[str, Outcome], after: dict[str, Outcome]) -> int:
    """Tell which cases are new, missing or end otherwise; the exit status."""
    differ = [
        name for name in sorted({*before, *after}) if before.get(name, ())[:2] != after.get(name, ())[:2]
    ]
    for name in differ:
        how = "missing" if name not in after else "changed" if name in before else "new"
        print(f"{how:8} {name}")
    print(f"{len(differ)} of {len({*before, *after})} cases differ")
    return int(bool(differ))


def read(path: Path) -> tuple[bool, dict[str, Outcome]]:
    """Whether all cases were recorded there, and how they ended."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["full"], {name: Outcome(*fields) for name, fields in content["cases"].items()}


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("record", "compare", "diff"):
        command = commands.add_parser(name)
        command.add_argument("file", type=Path)
        if name == "diff":
            command.add_argument("second", type=Path)
            continue
        command.add_argument("--only", default="*", help="a glob on names of cases")
        command.add_argument("--jobs", type=int, default=1, help="cases at a time")
        if name == "record":
            command.add_argument("--full", action="store_true", help="every pass on models of the zoo too")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Record, compare or diff; 1 if something differs."""
    args = _arguments(words)
    # Before NumPy is imported, which reads them.
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
    if args.command == "record":
        content = {"full": args.full, "cases": record(args.full, args.only, args.jobs)}
        args.file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return 0
    full, before = read(args.file)
    if args.command == "diff":
        return told(before, read(args.second)[1])
    before = {name: ended for name, ended in before.items() if fnmatchcase(name, args.only)}
    return told(before, record(full, args.only, args.jobs))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
