"""onnxsim's part of benchmarks/prune.py, run in a virtual environment with onnxsim.

    python benchmarks/peer_onnxsim.py SOURCE raw|simplified plain|CALIBRATION.npz FOLDER SPARSITY ...

Structured pruning of channels, by weights or with calibration inputs by Wanda's criterion, then of attention
heads, of the file as it is or simplified first. Writes ``<sparsity>.onnx`` into the folder; the last line of
the output says how long each took.
"""

# mypy: warn-return-any=False

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxsim

# What its default, 8 samples, is to be replaced by.
SAMPLES = 64


def prune(model: onnx.ModelProto, sparsity: float, batches: list[dict[str, Any]]) -> onnx.ModelProto:
    """Channels, then heads."""
    if batches:
        model = onnxsim.apply_structured_wanda_pruning(model, calibration_data=batches, sparsity=sparsity)
        return onnxsim.apply_attention_head_wanda_pruning(model, calibration_data=batches, sparsity=sparsity)
    model = onnxsim.apply_structured_pruning(model, sparsity=sparsity)
    return onnxsim.apply_attention_head_pruning(model, sparsity=sparsity)


def main() -> None:
    """Prune one file at every sparsity."""
    source, form, calibration, folder, *sparsities = sys.argv[1:]
    batches = []
    if calibration != "plain":
        arrays = np.load(calibration)
        batches = [{name: arrays[name][:SAMPLES] for name in arrays.files}]
    seconds = []
    for sparsity in sparsities:
        model = onnx.load(source)
        start = time.perf_counter()
        if form == "simplified":
            model = onnxsim.simplify(model)[0]
        result = prune(model, float(sparsity), batches)
        seconds.append(time.perf_counter() - start)
        onnx.save(result, Path(folder) / f"{sparsity}.onnx")
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
