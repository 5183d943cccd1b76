"""Does a quantized file give the same results on processors with and without VNNI?

    apt-get install qemu-user
    python benchmarks/saturation.py

Without VNNI, x86 kernels add two uint8·int8 products in 16 bits and clip the sum. Each file is run on this
processor and on an emulated one with AVX2 only (QEMU's Haswell), and compared with the float model: SQNR in
dB over 16 test images. Two models are compared, ours and ONNX Runtime's recommended U8S8 per-channel file,
with 8 and with 7 bits (`reduce_range`).
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from onnxslim.calibration.noise import sqnr

NETS = ("resnet", "mobilenet", "vit")
FASHION = Path(__file__).resolve().parent.parent / "models" / "fashion"
EMULATOR = ("qemu-x86_64", "-cpu", "Haswell")
# Run under the emulator, which should load as little as possible.
RUN = """
import json, sys
import numpy as np, onnxruntime as ort
images = np.load(sys.argv[1])["image"][:16]
results = {}
for path in sys.argv[2:]:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    results[path] = session.run(None, {"image": images})[0].tolist()
print(json.dumps(results))
"""


def quantize_ours(net: str, out: Path) -> None:
    """Slim and Quantize with their defaults, and the classifier too, as the others do it."""
    import onnxslim
    from onnxslim.passes import Quantize, Slim

    data = onnxslim.CalibrationData.from_npz(FASHION / "calibration.npz", batch_size=32)
    pipeline = onnxslim.Pipeline(Slim(), Quantize(classifier=True))
    pipeline(onnxslim.load(FASHION / f"{net}.onnx"), data=data).save(out)


def quantize_ort(net: str, out: Path, *, reduce_range: bool) -> None:
    """ONNX Runtime's preprocessing and static quantization."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            images = np.load(FASHION / "calibration.npz")["image"]
            self._batches = iter([{"image": images[i : i + 32]} for i in range(0, len(images), 32)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._batches, None)

    prepared = out.with_suffix(".prepared.onnx")
    quant_pre_process(FASHION / f"{net}.onnx", prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        out,
        Reader(),
        per_channel=True,
        reduce_range=reduce_range,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def outputs(paths: list[Path], emulator: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Logits of each model, here or under an emulator."""
    command = [*emulator, sys.executable, "-c", RUN, str(FASHION / "test.npz"), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {path: np.array(values) for path, values in json.loads(done.stdout).items()}


def main() -> None:
    """Print a table."""
    if shutil.which(EMULATOR[0]) is None:
        raise SystemExit("this needs QEMU: apt-get install qemu-user")
    logging.disable(logging.WARNING)
    print("| net | file | this processor | AVX2 without VNNI |\n|---|---|---|---|")
    for net in NETS:
        with tempfile.TemporaryDirectory() as folder:
            original = FASHION / f"{net}.onnx"
            files = {name: Path(folder) / f"{name}.onnx" for name in ("onnxslim", "ort", "ort-7bit")}
            quantize_ours(net, files["onnxslim"])
            quantize_ort(net, files["ort"], reduce_range=False)
            quantize_ort(net, files["ort-7bit"], reduce_range=True)
            paths = [original, *files.values()]
            here, there = outputs(paths), outputs(paths, EMULATOR)
            for name, path in files.items():
                figures = [sqnr(run[str(original)], run[str(path)]) for run in (here, there)]
                print(f"| {net} | {name} | {figures[0]:.1f} | {figures[1]:.1f} |", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
