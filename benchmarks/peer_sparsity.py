"""onnxsim's part of benchmarks/share.py, run in a virtual environment with onnxsim.

    python benchmarks/peer_sparsity.py SOURCE CALIBRATION.npz FOLDER

Zeros by magnitude, and by its SparseGPT with all calibration samples: half, 80 %, and 2 of 4. Writes
``<way> <zeros>.onnx`` into the folder; the last line of the output says how long each took.
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

ZEROS: dict[str, dict[str, Any]] = {
    "50 %": {"sparsity": 0.5},
    "80 %": {"sparsity": 0.8},
    "2:4": {"n": 2, "m": 4},
}
BATCH = 64


def main() -> None:
    """Thin one file in every way."""
    source, calibration, folder = sys.argv[1:]
    arrays = np.load(calibration)
    samples = {name: arrays[name] for name in arrays.files}
    count = len(next(iter(samples.values())))
    batches = [
        {name: array[at : at + BATCH] for name, array in samples.items()} for at in range(0, count, BATCH)
    ]
    seconds = {}
    for zeros, options in ZEROS.items():
        for way in ("magnitude", "sparsegpt"):
            model = onnx.load(source)  # anew: it may be edited in place
            start = time.process_time()
            if way == "magnitude":
                made = onnxsim.apply_magnitude_pruning(model, **options)
            else:
                made = onnxsim.apply_sparsegpt_pruning(model, calibration_data=batches, **options)
            seconds[f"{way} {zeros}"] = time.process_time() - start
            onnx.save(made, Path(folder) / f"{way} {zeros}.onnx")
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
