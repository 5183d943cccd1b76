"""Weights of four and eight bits beside ONNX Runtime's own tool, at equal bits and block size.

    python models/zoo.py fetch && python models/export.py     # once; the export needs PyTorch
    python benchmarks/few_bits.py [--venvs FOLDER] [--models NAME ...] [--ways WAY ...] [--seconds S]

A made-up decoder of 21 M parameters, whose table is its head too (benchmarks/decoders.py), and MiniLM. Every
way runs in a process of its own; ONNX Runtime's tool in a virtual environment, made in FOLDER on the first
run. Columns: size of what it writes, relative to the float model; SQNR of the outputs in dB on 16 samples
not seen; CPU time of 1 and of 64 tokens on one thread, in turn with the float model and relative to that; CPU
seconds of the whole process.
"""

from __future__ import annotations

import argparse
import pickle
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common, decoders
from benchmarks.quantize import Tool, quantize
from onnxslim import CalibrationData, Target, load
from onnxslim.calibration.fidelity import Judge
from onnxslim.ir.graph import Array
from onnxslim.models import zoo
from onnxslim.runtime.session import Session
from onnxslim.runtime.timing import latencies

JUDGED = 16
OURS = """
import onnxslim
from onnxslim import CalibrationData, Pipeline
from onnxslim.passes import Quantize, Slim
step = Quantize(activations="none", {options})
Pipeline(Slim(), step)(onnxslim.load(source), data={data}).save(target)
"""
THEIRS = """
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=32, {options})
quantizer.process()
quantizer.model.save_model_to_file(target, use_external_data_format=False)
"""
DATA = "CalibrationData(feeds)"
NBITS = 'storage="matmulnbits", require_sqnr=0'


def _ours(options: str, data: str = "None") -> Tool:
    return Tool((), OURS.format(options=options, data=data))


def _theirs(options: str) -> Tool:
    return Tool(("onnx==1.23.2", "onnx_ir"), THEIRS.format(options=options))


TABLES = 'op_types_to_quantize=("MatMul", "Gather")'
WAYS = {
    "4 bits": _ours(f'weights="int4", {NBITS}'),
    "4 bits, qdq": _ours('weights="int4", storage="qdq", require_sqnr=0'),
    "4 bits, data": _ours(f'weights="int4", {NBITS}', DATA),
    "4 and 8 bits, data, 20 dB": _ours('weights="int4", storage="matmulnbits", require_sqnr=20', DATA),
    "size=0.2, data": _ours('weights="int4", storage="matmulnbits", size=0.2', DATA),
    "8 bits": _ours(f'weights="int8", block_size=32, {NBITS}'),
    "8 bits, qdq, blocks": _ours('weights="int8", storage="qdq", block_size=32, require_sqnr=0'),
    "8 bits, qdq": _ours('weights="int8", storage="qdq", require_sqnr=0'),
    "ONNX Runtime, 4 bits": _theirs("bits=4, is_symmetric=True, accuracy_level=4"),
    "ONNX Runtime, 4 bits, zero points": _theirs("bits=4, is_symmetric=False, accuracy_level=4"),
    "ONNX Runtime, 4 bits, with tables": _theirs(f"bits=4, is_symmetric=True, accuracy_level=4, {TABLES}"),
    "ONNX Runtime, 4 bits, as by default": _theirs("bits=4, is_symmetric=True"),
    "ONNX Runtime, 8 bits": _theirs("bits=8, is_symmetric=True, accuracy_level=4"),
    "ONNX Runtime, 8 bits, as by default": _theirs("bits=8, is_symmetric=True"),
}
Feeds = list[dict[str, Array]]


def decoder(folder: Path) -> tuple[Path, Feeds, Feeds, Feeds]:
    """Its file; samples to calibrate on and to judge on, 1 and 64 tokens."""
    path, size = folder / "decoder.onnx", decoders.SIZES["21M"]
    decoders.save(size, path, free=True)
    given, judged = (decoders.inputs_of(size, JUDGED, seed) for seed in (0, 1))
    return path, given, judged, [{"tokens": judged[0]["tokens"][:, :count]} for count in (1, 64)]


def minilm(folder: Path) -> tuple[Path, Feeds, Feeds, Feeds]:
    """The same of it; its sentences are shorter than 64 tokens."""
    path = folder / "minilm.onnx"
    shutil.copy(zoo.path("minilm.dynamo"), path)
    given, judged = (list(zoo.inputs("minilm.dynamo", JUDGED, seed=seed)) for seed in (0, 1))
    words = np.concatenate([feeds["input_ids"] for feeds in judged], axis=1)
    timed = [
        {"input_ids": words[:, :count], "attention_mask": np.ones((1, count), np.int64)} for count in (1, 64)
    ]
    return path, given, judged, timed


MODELS = {"decoder": decoder, "minilm": minilm}


def bytes_of(path: Path) -> int:
    """Of a file and the data beside it."""
    beside = [path.with_suffix(".data"), path.with_name(f"{path.name}.data")]
    return sum(each.stat().st_size for each in (path, *beside) if each.is_file())


def rows(name: str, ways: list[str], venvs: Path, seconds: float) -> None:
    """Print the lines of a model."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        source, given, judged, timed = MODELS[name](folder)
        samples = folder / "samples.pickle"
        samples.write_bytes(pickle.dumps(given))
        single = Target.cpu(threads=1)
        judge = Judge(load(source), CalibrationData(judged), single, samples=JUDGED)
        made: dict[str, tuple[Path, float]] = {}
        for index, way in enumerate(ways):
            tool, target = WAYS[way], folder / f"{index}.onnx"
            python = Path(sys.executable)
            if tool.requirements:
                python = common.environment(venvs / "ONNX-Runtime-few-bits", tool.requirements)
            cell = quantize(python, tool, source, target, samples)
            if cell.problem:
                print(f"| {name} | {way} | {cell.problem} | | | | |", flush=True)
            else:
                made[way] = target, cell.seconds
        sessions = [Session(path, single) for path in (source, *(path for path, _ in made.values()))]
        spent = [
            latencies(sessions, feeds, rounds=60, seconds=seconds, clock=time.process_time)[1]
            for feeds in timed
        ]
        for index, (way, (path, cpu)) in enumerate(made.items()):
            size = bytes_of(path) / bytes_of(source)
            kept = judge(load(path)).sqnr
            one, many = (ratios[index + 1] for ratios in spent)
            figures = f"{size:.3f} | {kept:.2f} | {one:.2f} | {many:.2f} | {cpu:.1f}"
            print(f"| {name} | {way} | {figures} |", flush=True)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--venvs", type=Path, default=common.VENVS)
    parser.add_argument("--seconds", type=float, default=30.0)
    given = parser.parse_args()
    print("| model | way | size | dB | 1 token | 64 tokens | CPU s |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in given.models:
        rows(name, given.ways, given.venvs, given.seconds)


if __name__ == "__main__":
    main()
