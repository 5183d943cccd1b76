"""Small networks of many architectures, exported with both PyTorch exporters, for the pruning benchmark.

    pip install -e . torch==2.13.0 onnxscript
    python benchmarks/architectures.py [NAME ...]

Writes ``<name>.torchscript.onnx`` (opset 17) and ``<name>.dynamo.onnx`` (opset 20) into
``$ONNXSLIM_ARCHITECTURES`` or ``~/.cache/onnxslim/architectures``, with a dynamic batch axis, dynamic tokens
for text and dynamic height and width for super-resolution. Each file is compared with PyTorch in ONNX Runtime
at two batch sizes. Exit code 1 if one of them could not be exported or differs; the others are written.

Weights are random: He or Xavier initialization, affine parameters drawn around one and zero, and batch
normalization's statistics measured on random inputs. The same seed gives the same weights.
"""

# PyTorch's annotations are incomplete, and where it is not installed its classes are Any.
# mypy: warn-return-any=False, disallow-untyped-calls=False

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import attention, common, convnets

SEED = 2026
EXPORTERS = ("torchscript", "dynamo")
OPSETS = {"torchscript": 17, "dynamo": 20}
TOLERANCE = 1e-4
MEASURED = (2, 5)  # batch sizes of the comparison with PyTorch; the exporters see the first

Inputs = dict[str, Tensor]
Axes = dict[str, dict[int, str]]


@dataclass(frozen=True)
class Architecture:
    """How one network is built, fed and exported.

    Attributes:
        build: makes the module with PyTorch's own initialization.
        inputs: makes example inputs of a batch size.
        axes: names of the dynamic axes of each input.
        heads: names of the layers whose outputs are the network's: their channels are the caller's.
        outputs: names of the network's outputs.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    axes: Axes
    heads: tuple[str, ...] = ("head",)
    outputs: tuple[str, ...] = ("output",)


def _image(size: int) -> Callable[[int], Inputs]:
    return lambda batch: {"image": torch.randn(batch, 3, size, size)}


def _length(batch: int) -> int:
    """Another batch size comes with another number of tokens."""
    return 10 + batch


def _tokens(batch: int) -> Tensor:
    return torch.randint(1, attention.VOCABULARY, (batch, _length(batch)))


def _mask(batch: int) -> Tensor:
    """Every sample is shorter than the one before, none is empty."""
    lengths = _length(batch) - torch.arange(batch) % 8
    return (torch.arange(_length(batch))[None] < lengths[:, None]).long()


BATCH = {0: "batch"}
TEXT = {0: "batch", 1: "tokens"}
IMAGE: Axes = {"image": BATCH}


def _vision(build: Callable[[], nn.Module], size: int = 32, **more: Any) -> Architecture:
    return Architecture(build, _image(size), **{"axes": IMAGE, **more})


ARCHITECTURES: dict[str, Architecture] = {
    "resnet": _vision(convnets.resnet, 64),
    "resnext": _vision(convnets.resnext),
    "vgg": _vision(convnets.VGG),
    "mobilenetv2": _vision(convnets.mobilenetv2),
    "mobilenetv3": _vision(convnets.MobileNetV3),
    "efficientnet": _vision(convnets.efficientnet),
    "densenet": _vision(convnets.densenet),
    "inception": _vision(convnets.inception),
    "squeezenet": _vision(convnets.SqueezeNet, 64),
    "shufflenetv2": _vision(convnets.shufflenetv2),
    "yolov8": _vision(convnets.YOLOv8, 64, heads=("detect.boxes.*.2", "detect.scores.*.2", "detect.mean")),
    "unet_bn": _vision(convnets.unet_bn),
    "unet_gn": _vision(convnets.unet_gn),
    "convnext": _vision(convnets.ConvNeXt, 64),
    "prelu": _vision(convnets.PReluNet),
    "superresolution": Architecture(
        convnets.SuperResolution,
        lambda batch: {"image": torch.randn(batch, 3, 12 + 2 * batch, 20)},
        {"image": {0: "batch", 2: "height", 3: "width"}},
    ),
    "vit": _vision(attention.ViT),
    "deit": _vision(attention.DeiT, heads=("head", "head_dist")),
    "swin": _vision(attention.Swin),
    "mixer": _vision(attention.Mixer),
    "detr": _vision(attention.Detr, heads=("corners", "classes"), outputs=("boxes", "scores")),
    "bert": Architecture(
        attention.Bert,
        lambda batch: {"input_ids": _tokens(batch), "attention_mask": _mask(batch)},
        {"input_ids": TEXT, "attention_mask": TEXT},
    ),
    "decoder": Architecture(
        attention.Decoder, lambda batch: {"input_ids": _tokens(batch)}, {"input_ids": TEXT}
    ),
    "einsum": Architecture(
        attention.EinsumNet, lambda batch: {"features": torch.randn(batch, 12, 48)}, {"features": BATCH}
    ),
    "lstm": Architecture(
        attention.Recurrent,
        lambda batch: {"features": torch.randn(batch, _length(batch), 40)},
        {"features": TEXT},
    ),
    "gru": Architecture(
        attention.GatedRecurrent, lambda batch: {"input_ids": _tokens(batch)}, {"input_ids": TEXT}
    ),
    "shared": Architecture(
        attention.SharedNet,
        lambda batch: {
            "features": torch.randn(batch, _length(batch), 48),
            "mask": _mask(batch).float(),
        },
        {"features": TEXT, "mask": TEXT},
    ),
}


# --------------------------------------------------------------------------------------------- weights


def build(name: str) -> nn.Module:
    """The network in evaluation mode, the same for the same name."""
    torch.manual_seed(SEED)
    row = ARCHITECTURES[name]
    net = row.build()
    net.apply(_initialize)
    _measure_statistics(net, row.inputs)
    return net.eval()


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.weight.requires_grad:
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)
    elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm | attention.RMSNorm):
        nn.init.uniform_(module.weight, 0.5, 1.5)
    if isinstance(getattr(module, "bias", None), nn.Parameter):
        nn.init.normal_(module.bias, std=0.1)


def _measure_statistics(net: nn.Module, inputs: Callable[[int], Inputs]) -> None:
    """Batch normalization's statistics over a few random batches, so that activations keep their scale."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the plain average over batches
    net.train()
    with torch.no_grad():
        for _ in range(4 if norms else 0):
            net(**inputs(8))


# --------------------------------------------------------------------------------------------- exports


def export(net: nn.Module, name: str, exporter: str, path: Path) -> None:
    """Write one network, whole or not at all."""
    row = ARCHITECTURES[name]
    torch.manual_seed(SEED)
    examples = row.inputs(MEASURED[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    common: dict[str, Any] = {
        "input_names": list(examples),
        "output_names": list(row.outputs),
        "opset_version": OPSETS[exporter],
    }
    if exporter == "dynamo":
        common |= {"dynamo": True, "external_data": False, "dynamic_shapes": _dims(row), "verbose": False}
    else:
        common |= {"dynamo": False, "dynamic_axes": row.axes | dict.fromkeys(row.outputs, BATCH)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, tuple(examples.values()), str(temporary), **common)
    os.replace(temporary, path)


def _dims(row: Architecture) -> tuple[dict[int, Any], ...]:
    """Dynamic axes as torch.export wants them; what divides height and width is for it to find out."""
    return tuple(
        {
            axis: torch.export.Dim.DYNAMIC if label in ("height", "width") else torch.export.Dim(label)
            for axis, label in axes.items()
        }
        for axes in row.axes.values()
    )


def difference(net: nn.Module, name: str, path: Path) -> float:
    """Largest difference between ONNX Runtime and PyTorch at any batch size, relative to the output's largest
    magnitude.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return max(_difference_at(net, session, ARCHITECTURES[name].inputs(batch)) for batch in MEASURED)


def _difference_at(net: nn.Module, session: ort.InferenceSession, inputs: Inputs) -> float:
    with torch.no_grad():
        expected = net(**inputs)
    known = {item.name for item in session.get_inputs()}
    actual = session.run(None, {key: value.numpy() for key, value in inputs.items() if key in known})
    references = [expected] if isinstance(expected, Tensor) else list(expected)
    return max(_relative(a.numpy(), b) for a, b in zip(references, actual, strict=True))


def _relative(reference: Any, actual: Any) -> float:
    if reference.shape != actual.shape:
        return float("inf")
    return float(np.abs(reference - actual).max() / np.abs(reference).max())


def attempt(name: str, exporter: str) -> str:
    """Export and compare one network; what went wrong, or nothing."""
    path = common.architectures() / f"{name}.{exporter}.onnx"
    try:
        net = build(name)
        export(net, name, exporter, path)
        worst = difference(net, name, path)
    except Exception as error:  # whatever an exporter raises is its outcome
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    print(f"{path.name}: {path.stat().st_size} bytes, differs by {worst:.0e}", flush=True)
    return "" if worst < TOLERANCE else f"differs from PyTorch by {worst:.0e}"


def main() -> None:
    """Export the named networks (all by default)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="*", help=f"of {', '.join(ARCHITECTURES)}; all by default")
    names = parser.parse_args().name or list(ARCHITECTURES)
    unknown = set(names) - set(ARCHITECTURES)
    if unknown:
        parser.error(f"no such architecture: {', '.join(sorted(unknown))}")
    logging.disable(logging.WARNING)
    failed = 0
    for name in names:
        for exporter in EXPORTERS:
            problem = attempt(name, exporter)
            failed += bool(problem)
            if problem:
                print(f"{name}.{exporter}.onnx: {problem}", file=sys.stderr, flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
