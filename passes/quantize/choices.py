"""What the candidates of one run have in common, and what they differ in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from onnxslim.engine.matching import excluded
from onnxslim.ir.graph import Node
from onnxslim.ops import Role, spec_of
from onnxslim.passes.quantize.recurrent import is_recurrent
from onnxslim.passes.quantize.tables import table_of

Bits = Literal["int8", "int4", "int3", "int2"]
StorageForm = Literal["qdq", "matmulnbits"]
StorageChoice = Literal["auto", "qdq", "matmulnbits"]
Activations = Literal["auto", "uint8", "int8", "uint16", "uint4", "int4", "dynamic", "none"] | None
# Activations of fewer bits than a type that kernels know: that type, and the bits.
SIMULATED = {"uint4": ("uint8", 4), "int4": ("int8", 4)}
Algorithm = Literal["auto", "rtn", "cd", "gptq"]
Observer = Literal["minmax", "percentile", "kl", "mse"]
ObserverChoice: TypeAlias = tuple[Observer, float]  # with the percentile, if it is one
Refusal: TypeAlias = Callable[[Node], "str | None"]


@dataclass(frozen=True)
class Settings:
    """What holds for every candidate; see the options of `Quantize`.

    Attributes:
        exclude: globs of nodes that stay in floating point.
        weights: their integer type; int4 has a scale for every few inputs where activations are not integers.
        algorithm: how weights are rounded; see `Quantize`.
        storage: how weights of matrix products are written where activations are no integers.
        block_size: inputs of an output that share a scale there; None for what suits their bits.
        floor: least scale of a channel, by the root mean square of its weight; see `weights.floored`.
        price: what a bit of the codes is worth, where there is data; see `rate`.
        ties: by name of a weight, that of the table that it is the same as; see `tables.untie`.
    """

    exclude: tuple[str, ...] = ()
    classifier: bool = False
    bias_correction: bool = True
    per_channel: bool = True
    weights: Bits = "int8"
    algorithm: Algorithm = "auto"
    storage: StorageForm = "qdq"
    block_size: int | None = None
    floor: float = 0.0
    price: float = 0.0
    ties: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """What one candidate differs in.

    Attributes:
        observer: how ranges are chosen, and the percentile if it is one.
        special: the same for single tensors, by name, and those that share their scale.
        kept: labels of nodes that stay in floating point, and why.
        refused: labels of nodes whose weights stay in floating point as well, and why.
        wide: labels of nodes whose weights have eight bits where those of others have fewer, and why.
        eight: whether all weights have eight bits, whatever was asked for.
        only: if given, labels of the only weighted nodes to quantize.
        refined: whether weights are rounded for the least error of outputs; see `rounding`.
    """

    observer: ObserverChoice = ("mse", 0.0)
    special: Mapping[str, ObserverChoice] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    wide: Mapping[str, str] = field(default_factory=dict)
    eight: bool = False
    only: frozenset[str] | None = None
    refined: bool = False

    def observer_of(self, group: tuple[str, ...]) -> ObserverChoice:
        """How the range of tensors on one scale is chosen, by their names."""
        return next((self.special[name] for name in group if name in self.special), self.observer)


def refusal(settings: Settings, variant: Variant) -> Refusal:
    """Why a node must not be quantized, whatever its operator."""

    def refuse(node: Node) -> str | None:
        if reason := excluded(settings.exclude, node) or variant.refused.get(node.label):
            return reason
        others = variant.only is not None and node.label not in variant.only
        chosen = settings.storage == "matmulnbits" and table_of(node) is not None
        if others and (chosen or is_recurrent(node) or spec_of(node).role is Role.LINEAR):
            return "another one is looked at"
        return None

    return refuse
