"""Quantize beside other quantizers, on the same models and calibration data, in one run.

    python models/zoo.py fetch && python models/export.py     # once; the export needs PyTorch
    python benchmarks/quantize.py [--venvs FOLDER] [--tools TOOL ...] [MODEL ...]

Every tool runs in a virtual environment of its own, made in FOLDER on the first run. 32 calibration samples
and 64 others, from photographs, sentences and files (see models/inputs.py). A cell holds, in this order: SQNR
of the outputs in dB, as ONNX Runtime runs the file; what it scores at its task, where there is one and its
data was fetched (benchmarks/stage.py), or for classifiers the share of samples with the same largest output;
size of the file and latency (one sample, one thread, all tools in turn) relative to the float model; CPU
seconds and peak MB of the process that quantizes, imports included.
"""

from __future__ import annotations

import argparse
import math
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from benchmarks.real import agreement
from onnxslim.calibration.noise import sqnr

if TYPE_CHECKING:
    from onnxslim.models.tasks import Task
    from onnxslim.runtime.session import Session

MODELS = ("efficientnet_lite0.dynamo", "ppocr_det", "minilm.dynamo", "magika")
TASKS = {
    "efficientnet_lite0.dynamo": "photographs",
    "minilm.dynamo": "docstrings",
    "magika": "files",
    "ppocr_rec": "lines",
}

HEAD = """
import pickle, sys
import onnx
source, target, samples = sys.argv[1:]
with open(samples, "rb") as file:
    feeds = pickle.load(file)
"""
# A process is charged with what the one that started it held, but for this figure.
TAIL = """
with open("/proc/self/status") as status, open(target + ".peak", "w") as peak:
    peak.write(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""
ORT = """
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
class Reader(CalibrationDataReader):
    def __init__(self):
        self.left = iter(feeds)
    def get_next(self):
        return next(self.left, None)
"""


@dataclass(frozen=True)
class Tool:
    """A quantizer: what pip installs, and the program that makes `target` of `source` and `feeds`."""

    requirements: tuple[str, ...]
    program: str


TOOLS = {
    "onnxslim": Tool(
        ("-e", str(common.ROOT)),
        """
import onnxslim
from onnxslim import CalibrationData, Pipeline
from onnxslim.calibration.noise import sqnr
from onnxslim.passes import Quantize, Slim
Pipeline(Slim(), Quantize())(onnxslim.load(source), data=CalibrationData(feeds)).save(target)
""",
    ),
    "onnxslim, quick": Tool(
        ("-e", str(common.ROOT)),
        """
import onnxslim
from onnxslim import CalibrationData, Pipeline
from onnxslim.passes import Quantize, Slim
Pipeline(Slim(), Quantize(effort="quick"))(onnxslim.load(source), data=CalibrationData(feeds)).save(target)
""",
    ),
    "onnxslim, dynamic": Tool(
        ("-e", str(common.ROOT)),
        """
import onnxslim
from onnxslim import Pipeline
from onnxslim.passes import Quantize, Slim
Pipeline(Slim(), Quantize(activations="dynamic"))(onnxslim.load(source)).save(target)
""",
    ),
    "ONNX Runtime, defaults": Tool(("onnx==1.23.2",), ORT + "quantize_static(source, target, Reader())"),
    "ONNX Runtime, best practice": Tool(
        ("onnx==1.23.2", "sympy"),
        ORT
        + """
from onnxruntime.quantization.shape_inference import quant_pre_process
prepared = target + ".prepared.onnx"
try:
    quant_pre_process(source, prepared)
except Exception:
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
quantize_static(prepared, target, Reader(), per_channel=True, activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8)
""",
    ),
    "ONNX Runtime, dynamic": Tool(
        ("onnx==1.23.2",),
        "from onnxruntime.quantization import quantize_dynamic\nquantize_dynamic(source, target)",
    ),
    "ONNX Runtime, dynamic per channel": Tool(
        ("onnx==1.23.2",),
        "from onnxruntime.quantization import quantize_dynamic\n"
        "quantize_dynamic(source, target, per_channel=True)",
    ),
    "Olive 0.13, defaults": Tool(
        ("olive-ai==0.13.0", "requests", "onnx==1.23.2"),
        ORT
        + """
import shutil
from olive.data.config import DataConfig
from olive.model import ONNXModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.onnx import quantization
quantization.get_calibration_dataloader = lambda *args, **words: Reader()
given = {"data_config": DataConfig(name="given")}
run = create_pass_from_dict(quantization.OnnxStaticQuantization, given, disable_search=True)
shutil.copy(run.run(ONNXModelHandler(source), target + ".olive").model_path, target)
""",
    ),
    "onnxsim 0.8.1": Tool(
        ("onnxsim==0.8.1",),
        """
import onnxsim
model, _ = onnxsim.simplify(onnx.load(source))
onnx.save(onnxsim.quantize_static(model, feeds), target)
""",
    ),
    "AMD Quark 0.13, A8W8": Tool(
        ("amd-quark==0.13", "torch==2.13.0"),
        ORT
        + """
from quark.onnx import A8W8_QCONFIG, ModelQuantizer
ModelQuantizer(A8W8_QCONFIG).quantize_model(source, target, Reader())
""",
    ),
    "NNCF 3.4": Tool(
        ("nncf==3.4.0", "onnx<1.24"),
        """
import nncf
onnx.save(nncf.quantize(onnx.load(source), nncf.Dataset(feeds), subset_size=len(feeds),
                        preset=nncf.QuantizationPreset.MIXED), target)
""",
    ),
}


@dataclass(frozen=True)
class Cell:
    """What one tool made of one model; `problem` says why there are no figures."""

    fidelity: float = math.nan
    agreement: str = "–"
    size: float = math.nan
    latency: float = math.nan
    seconds: float = math.nan
    megabytes: float = math.nan
    problem: str = ""

    def __str__(self) -> str:
        if self.problem:
            return self.problem
        figures = f"{self.fidelity:.1f} · {self.agreement} · {self.size:.2f} · {self.latency:.2f}"
        return f"{figures} · {self.seconds:.0f} · {self.megabytes:.0f}"


def quantize(python: Path, tool: Tool, source: Path, target: Path, samples: Path) -> Cell:
    """Run a tool in a process of its own."""
    script = target.with_suffix(".py")
    script.write_text(HEAD + tool.program + TAIL, encoding="utf-8")
    command = [str(python), str(script), str(source), str(target), str(samples)]
    with target.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=target.parent)
        _, status, usage = os.wait4(process.pid, 0)
    if status or not target.is_file():
        lines = target.with_suffix(".log").read_text(errors="replace").strip().splitlines()
        return Cell(problem=f"fails: {lines[-1][:60]}" if lines else "fails")
    peak = int(Path(f"{target}.peak").read_text("utf-8"))
    return Cell(seconds=usage.ru_utime + usage.ru_stime, megabytes=peak / 1024)


def row(name: str, tools: Sequence[str], venvs: Path) -> dict[str, Cell]:
    """All tools on one model."""
    from onnxslim.models import zoo

    source = Path(zoo.path(name))
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder) / "samples.pickle"
        samples.write_bytes(pickle.dumps(zoo.inputs(name, 32, seed=0)))
        made: dict[str, tuple[Path, Cell]] = {}
        for index, tool in enumerate(tools):
            target = Path(folder) / f"{index}.onnx"
            python = common.environment(
                venvs / tool.replace(" ", "-").replace(",", ""), TOOLS[tool].requirements
            )
            made[tool] = target, quantize(python, TOOLS[tool], source, target, samples)
            print(f"{name}: {tool}: {made[tool][1].problem or 'done'}", file=sys.stderr, flush=True)
        return measured(name, source, made)


def measured(name: str, source: Path, made: dict[str, tuple[Path, Cell]]) -> dict[str, Cell]:
    """Fidelity, size and latency of what the tools wrote."""
    from onnxslim.models import zoo
    from onnxslim.runtime.session import Session
    from onnxslim.runtime.targets import Target
    from onnxslim.runtime.timing import latencies

    target, feeds, task = Target.cpu(threads=1), zoo.inputs(name, 64, seed=1), task_of(name)
    original = Session(source, target)
    if task:
        print(f"{name}: float: {scores(task, original)}", file=sys.stderr, flush=True)
    expected = [original.run(batch) for batch in feeds]
    cells = {tool: cell for tool, (_, cell) in made.items()}
    sessions: dict[str, Session] = {}
    for tool, (path, cell) in made.items():
        if cell.problem:
            continue
        try:
            sessions[tool] = Session(path, target)
            found: list[dict[str, Any]] = [sessions[tool].run(batch) for batch in feeds]
        except Exception as error:
            sessions.pop(tool, None)
            cells[tool] = Cell(problem=f"does not run: {str(error)[:50]}")
            continue
        size = path.stat().st_size / source.stat().st_size
        same = scores(task, sessions[tool]) if task else agreement(name, expected, found)
        cells[tool] = replace(cell, fidelity=sqnr(expected, found), agreement=same, size=size)
    _, ratios = latencies([original, *sessions.values()], feeds[0], rounds=40, seconds=30)
    return {
        tool: replace(cell, latency=dict(zip(sessions, ratios[1:], strict=True)).get(tool, math.nan))
        for tool, cell in cells.items()
    }


def task_of(name: str) -> Task | None:
    """What a model is for, if the data was fetched."""
    from onnxslim.models import tasks

    found = tasks.create(TASKS[name], name) if name in TASKS else None
    return None if found is None or found.missing() else found


def scores(task: Task, session: Session) -> str:
    """How good a model is at what it is for."""
    found = task.judge([session.run(feeds) for feeds in task.test()])
    return ", ".join(f"{score.name} {score.value:.3f}" for score in found)


def main() -> None:
    """Print one row per tool, one column per model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--tools", nargs="*", default=list(TOOLS), choices=list(TOOLS))
    parser.add_argument("--venvs", type=Path, default=common.VENVS)
    given = parser.parse_args()
    columns = {name: row(name, given.tools, given.venvs) for name in given.models}
    print("| | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for tool in given.tools:
        print(f"| {tool} | " + " | ".join(str(column[tool]) for column in columns.values()) + " |")


if __name__ == "__main__":
    main()
