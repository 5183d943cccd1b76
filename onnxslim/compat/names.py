"""Names of PyPI's OnnxSlim, and the rules and parts here that do the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from onnxslim.errors import UsageError, nearest
from onnxslim.passes import eliminate, fuse
from onnxslim.passes.eliminate import control, noop

# Eliminating rules that drop a node; the others make one node of two.
_DROPPING = frozenset(
    (*(rule.name for rule in (*control.RULES, *noop.RULES)), "same-shape", "transpose", "slice")
)
_ELIMINATING = tuple(rule.name for rule in eliminate.RULES)
_RULES = (
    *("inline", "unfuse", "fold", "eliminate", "fuse", "dedupe", "dead", "equal-constants", "equal-nodes"),
    *_ELIMINATING,
    *(rule.name for rule in fuse.RULES),
)
_THEIRS = ("Fusion", "Elimination")

OPTIMIZATIONS: dict[str, tuple[str, ...]] = {
    "constant_folding": ("fold",),
    "graph_fusion": ("fuse", *(name for name in _ELIMINATING if name not in _DROPPING)),
    "dead_node_elimination": ("dead", *(name for name in _ELIMINATING if name in _DROPPING)),
    "subexpression_elimination": ("equal-nodes",),
    "weight_tying": ("equal-constants",),
}
# The rules that do what OnnxSlim's patterns do; folding does the work of some without a rule of its own.
PATTERNS: dict[str, tuple[str, ...]] = {
    "EliminationConcat": ("concat-concat",),
    "EliminationReshape": ("view-chain", "there-and-back"),
    "EliminationReshapeAs": (),
    "EliminationSlice": ("slice-chain",),
    "EliminationTranspose": ("transpose-back", "transpose-chain"),
    "EliminationTransposeAsReshape": ("transpose-view",),
    "EliminationTransposeViewTranspose": (),
    "EliminationUnsqueeze": ("axes-chain",),
    "FusionConcatReshape": (),
    "FusionConvAdd": ("layer-arithmetic",),
    "FusionConvBN": ("layer-batchnorm",),
    "FusionConvMul": ("layer-arithmetic",),
    "FusionConvTransposeAdd": ("layer-arithmetic",),
    "FusionConvTransposeBN": ("layer-batchnorm",),
    "FusionConvTransposeMul": ("layer-arithmetic",),
    "FusionGemm": ("matmul-arithmetic",),
    "FusionGemmAdd": ("gemm-arithmetic",),
    "FusionGemmMul": ("gemm-arithmetic",),
    "FusionPadConv": ("pad-layer",),
    "FusionReduce": (),
}


def require_known(optimizations: Sequence[str], patterns: Sequence[str]) -> None:
    """Raise UsageError for a name of nothing, theirs or ours."""
    for name in optimizations:
        if name not in OPTIMIZATIONS:
            raise UsageError(f"there is no optimization '{name}' to skip; {nearest(name, OPTIMIZATIONS)}")
    for name in patterns:
        if not name.startswith(_THEIRS) and name not in _RULES:
            raise UsageError(f"there is no pattern '{name}' to skip; {nearest(name, (*PATTERNS, *_RULES))}")


def skipped(optimizations: Sequence[str], patterns: Sequence[str]) -> Iterator[str]:
    """The parts and rules of Slim that these names leave out."""
    for name in optimizations:
        yield from OPTIMIZATIONS[name]
    for name in patterns:
        yield from _of_pattern(name)


def without_counterpart(patterns: Sequence[str]) -> list[str]:
    """The patterns that no rule here does the work of."""
    return [name for name in patterns if not _of_pattern(name)]


def _of_pattern(name: str) -> tuple[str, ...]:
    return (name,) if name in _RULES else PATTERNS.get(name, ())
