"""LSTMs in integers beside float and beside ONNX Runtime's `quantize_dynamic`.

    python models/zoo.py fetch
    python benchmarks/recurrent.py

First silero VAD for sequences: bytes and time relative to float, SQNR in dB of each output over 24 batches of
speech-like audio. Then one layer of so many hidden units and inputs, 32 steps. Times are medians of calls in
turn, on one thread.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx.parser
from onnx import numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onnxslim import Pipeline, Target, load
from onnxslim.calibration.noise import sqnr
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.models import zoo
from onnxslim.passes import Quantize
from onnxslim.runtime.session import Session
from onnxslim.runtime.timing import compare

NAME, BATCHES = "silero_vad_16k_sequence", 24
UNITS, STEPS = (32, 64, 128, 256, 512), 32
THEIRS: Mapping[str, dict[str, object]] = {
    "quantize_dynamic, LSTM alone": {"op_types_to_quantize": ["LSTM"]},
    "the same per channel": {"op_types_to_quantize": ["LSTM"], "per_channel": True},
    "the same per channel, reduce_range": {
        "op_types_to_quantize": ["LSTM"],
        "per_channel": True,
        "reduce_range": True,
    },
    "quantize_dynamic, everything": {},
}


def row(name: str, model: Model, made: Model, feeds: Sequence[Mapping[str, Array]]) -> str:
    """A line of a table."""
    outputs = [[Session(each).run(feed) for feed in feeds] for each in (model, made)]
    kept = []
    for output in outputs[0][0]:
        wanted, found = (np.concatenate([run[output].reshape(-1) for run in runs]) for runs in outputs)
        kept.append(f"{sqnr(wanted, found):.1f}")
    _, ratios = compare((model, made), feeds[0], Target.cpu().with_threads(1))
    return (
        f"| {name} | {made.stats().bytes / model.stats().bytes:.2f} | {ratios[1]:.2f} | {', '.join(kept)} |"
    )


def layer(units: int) -> Model:
    """One LSTM with as many inputs as hidden units."""
    text = f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[{STEPS},1,{units}] x) => (float[{STEPS},1,1,{units}] y)
    {{ y = LSTM<hidden_size={units}>(x, w, r) }}"""
    made, random = onnx.parser.parse_model(text), np.random.default_rng(units)
    for name in "wr":
        values = random.normal(0, units**-0.5, (1, 4 * units, units)).astype(np.float32)
        made.graph.initializer.append(numpy_helper.from_array(values, name))
    return load(made)


def main() -> None:
    """Print both tables."""
    from onnxruntime.quantization import quantize_dynamic

    integers = Pipeline(Quantize(activations="dynamic"))
    model, feeds = load(zoo.path(NAME)), list(zoo.inputs(NAME, BATCHES))
    print("| silero VAD | bytes | time | SQNR dB |\n|---|---|---|---|")
    print(row("ours", model, integers(model).model, feeds), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, options in THEIRS.items():
            made = Path(folder) / "made.onnx"
            quantize_dynamic(zoo.path(NAME), made, **options)
            print(row(name, model, load(made), feeds), flush=True)
    print("\n| one layer | bytes | time | SQNR dB |\n|---|---|---|---|")
    for units in UNITS:
        alone = layer(units)
        x = np.random.default_rng(1).standard_normal((STEPS, 1, units)).astype(np.float32)
        print(row(f"{units} units", alone, integers(alone).model, [{"x": x}]), flush=True)


if __name__ == "__main__":
    main()
