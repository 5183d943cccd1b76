"""Torch-Pruning's part of benchmarks/prune.py, run in a virtual environment with PyTorch and Torch-Pruning.

    python benchmarks/peer_torch_pruning.py coverage NAME FOLDER RATIO
    python benchmarks/peer_torch_pruning.py fashion NAME FOLDER RATIO ...

Prunes the module, at every ratio anew, and exports the result as the original was exported. The last line of
the output says how long tracing and pruning took. What a user has to say about a network
is said: output layers and frozen parameters to leave alone, numbers of heads, and the modules' own records of
head widths are put right afterwards.
"""

# PyTorch's annotations are incomplete, and where it is not installed its classes are Any.
# mypy: warn-return-any=False, disallow-untyped-calls=False, disallow-subclassing-any=False

from __future__ import annotations

import fnmatch
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import architectures
from onnxslim.models.fashion import train


def ignored(net: nn.Module, patterns: tuple[str, ...]) -> list[Any]:
    """Layers whose outputs the caller sees, and parameters that belong to positions, not channels."""
    layers = [
        module for name, module in net.named_modules() if any(fnmatch.fnmatch(name, p) for p in patterns)
    ]
    tables = [value for name, value in net.named_parameters() if name.endswith("bias_table")]
    return [*layers, *tables]


def num_heads(net: nn.Module) -> dict[nn.Module, int]:
    """Number of heads of every projection in front of an attention."""
    found: dict[nn.Module, int] = {}
    for module in net.modules():
        if hasattr(module, "num_heads_of"):
            found |= module.num_heads_of()
    return found


def prune(net: nn.Module, examples: dict[str, Any], patterns: tuple[str, ...], ratio: float) -> float:
    """Remove the same share of every group of channels by group L2 norm; seconds that it took."""
    import torch_pruning as tp

    start = time.perf_counter()
    pruner = tp.pruner.BasePruner(
        net,
        examples,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=ignored(net, patterns),
        num_heads=num_heads(net),
    )
    pruner.step()
    seconds = time.perf_counter() - start
    for module in net.modules():
        if hasattr(module, "refit"):
            module.refit()
    return seconds


def coverage(name: str, ratio: float, folder: Path) -> float:
    """Prune one of the architectures and export it with both exporters; seconds that pruning took."""
    row = architectures.ARCHITECTURES[name]
    net = architectures.build(name)
    torch.manual_seed(architectures.SEED)
    seconds = prune(net, row.inputs(architectures.MEASURED[0]), row.heads, ratio)
    for exporter in architectures.EXPORTERS:
        architectures.export(net, name, exporter, folder / f"{exporter}.onnx")
    return seconds


def fashion(name: str, ratios: Sequence[float], folder: Path) -> list[float]:
    """Prune one of the Fashion-MNIST networks at every ratio; seconds that each took."""
    seconds = []
    for ratio in ratios:
        net = trained(name)
        taken = prune(net, {"image": torch.rand(2, 1, 28, 28)}, ("head",), ratio)
        train.export(net, folder / f"{ratio}.onnx", dynamo=False)
        seconds.append(taken)
    return seconds


def trained(name: str) -> nn.Module:
    """The module with the weights of the ONNX file, without batch normalization where the file has none."""
    path = Path(train.__file__).parent / f"{name}.onnx"
    weights = _weights(onnx.load(path).graph)
    net = train.RECIPES[name].build()
    for key, module in list(net.named_modules()):
        parent, _, own = key.rpartition(".")
        if isinstance(module, nn.BatchNorm2d) and f"{key}.weight" not in weights:
            setattr(net.get_submodule(parent), own, nn.Identity())
        elif isinstance(module, nn.Conv2d) and f"{key}.weight_bias" in weights:
            module.bias = nn.Parameter(torch.zeros(module.out_channels))
            weights[f"{key}.bias"] = weights[f"{key}.weight_bias"]
        elif isinstance(module, train.Attention):
            module.__class__ = ResizableAttention
    counters = {key for key in net.state_dict() if key.endswith("num_batches_tracked")}
    known = {key: torch.from_numpy(weights[key].copy()) for key in net.state_dict().keys() - counters}
    net.load_state_dict(known, strict=False)
    return net.eval()


def _weights(graph: onnx.GraphProto) -> dict[str, Any]:
    """Values by PyTorch's names, of equal ones and of transposed matrices in front of a bias too."""
    values = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in values:
            values[node.output[0]] = values[node.input[0]]
        elif node.op_type == "Add":
            for bias, product in (node.input, reversed(node.input)):
                if bias.endswith(".bias") and product in products:
                    values[bias[: -len("bias")] + "weight"] = values[products[product]].T
    return values


class ResizableAttention(train.Attention):
    """The same computation with the head's width read off the layer, not off the width of the input."""

    def num_heads_of(self) -> dict[nn.Module, int]:
        return {self.qkv: self.heads}

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        width = self.qkv.out_features // 3
        packed = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


def main() -> None:
    """Do one job."""
    logging.disable(logging.WARNING)
    job, name, folder, *ratios = sys.argv[1:]
    if job == "coverage":
        print(json.dumps(coverage(name, float(ratios[0]), Path(folder))))
    else:
        print(json.dumps(fashion(name, [float(ratio) for ratio in ratios], Path(folder))))


if __name__ == "__main__":
    main()
