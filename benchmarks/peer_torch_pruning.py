"""Torch-Pruning's part of benchmarks/prune.py, run in a virtual environment with PyTorch and Torch-Pruning.

    python benchmarks/peer_torch_pruning.py coverage NAME EXPORTER RATIO TARGET

Prunes the module and exports the result as ``benchmarks/architectures.py`` exports the original. The last line
of the output says how long ``step()`` took with the tracing before it. What a user has to say about a network
is said: output layers and frozen parameters to leave alone, numbers of heads, and the modules' own records of
head widths are put right afterwards.
"""

# PyTorch's annotations are incomplete, and where it is not installed its classes are Any.
# mypy: warn-return-any=False, disallow-untyped-calls=False

from __future__ import annotations

import fnmatch
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import architectures


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
        if hasattr(module, "heads"):
            found |= module.heads()
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


def coverage(name: str, exporter: str, ratio: float, target: Path) -> float:
    """Prune and export one of the architectures."""
    row = architectures.ARCHITECTURES[name]
    net = architectures.build(name)
    torch.manual_seed(architectures.SEED)
    seconds = prune(net, row.inputs(architectures.MEASURED[0]), row.heads, ratio)
    architectures.export(net, name, exporter, target)
    return seconds


def main() -> None:
    """Do one job."""
    logging.disable(logging.WARNING)
    _, name, exporter, ratio, target = sys.argv[1:]
    print(json.dumps(coverage(name, exporter, float(ratio), Path(target))))


if __name__ == "__main__":
    main()
