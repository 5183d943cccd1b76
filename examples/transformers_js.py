"""Write a model under the names that transformers.js and Optimum look for.

    python examples/transformers_js.py model.onnx FOLDER [samples.npz]

    FOLDER/onnx/model.onnx             fp32, slimmed      dtype: "fp32"
    FOLDER/onnx/model_fp16.onnx        half precision     dtype: "fp16"
    FOLDER/onnx/model_quantized.onnx   8-bit integers     dtype: "q8"
    FOLDER/onnx/model_q4.onnx          4-bit weights      dtype: "q4"

Optimum takes the same names (`file_name="model_quantized.onnx", subfolder="onnx"`). With samples, 8-bit
ranges are calibrated; without, they are those of each input (`activations="dynamic"`). Configuration and
tokenizer go beside the folder `onnx`, as the exporter left them. Without words, it shows itself on a model
that comes along.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnxslim
from onnxslim import CalibrationData, Pass, Pipeline
from onnxslim.passes import Half, Quantize, Slim

FASHION = Path(onnxslim.__file__).parent / "models" / "fashion"


def layout(model: Path, folder: Path, data: CalibrationData | None = None) -> dict[str, int]:
    """Write all variants; returns bytes by name of the file. One that a pass could not make is left out."""
    target = folder / "onnx"
    target.mkdir(parents=True, exist_ok=True)
    integers = Quantize(effort="quick") if data is not None else Quantize(activations="dynamic")
    variants: Mapping[str, Sequence[Pass]] = {
        "model": (),
        "model_fp16": (Half(),),
        "model_quantized": (integers,),
        "model_q4": (Quantize(weights="int4", activations="none"),),
    }
    slim = Pipeline(Slim())(model).model
    written = {}
    for name, passes in variants.items():
        result = Pipeline(*passes)(slim, data=data)
        if passes and not result.report.steps[-1].changes:
            print(f"{name}: {result.report.steps[-1].outcome}")
            continue
        result.save(target / f"{name}.onnx")
        written[f"{name}.onnx"] = result.model.stats().bytes
    return written


def main(words: Sequence[str]) -> None:
    """What the command line says, or the bundled ViT."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(words[0]) if words else FASHION / "vit.onnx"
        data = CalibrationData.from_npz(words[2]) if len(words) > 2 else None
        written = layout(model, Path(words[1] if words else folder), data)
    for name, size in written.items():
        print(f"onnx/{name}: {size / written['model.onnx']:.2f} of the bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
