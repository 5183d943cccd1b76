"""What is asked of the quantizer: its options, and what they mean together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from onnxslim.engine.base import Effort, Pass, PassWork, options
from onnxslim.engine.demands import KEPT, LeastSqnr, MostDrop
from onnxslim.engine.matching import GLOBS
from onnxslim.engine.plans import PlanOf
from onnxslim.errors import UsageError
from onnxslim.learn import door
from onnxslim.passes.learning.lessons import RUNS
from onnxslim.passes.quantize.choices import (
    SIMULATED,
    Activations,
    Algorithm,
    Bits,
    StorageChoice,
)
from onnxslim.passes.quantize.dynamic import Dynamic
from onnxslim.passes.quantize.recorded import LayoutName, QuantizationPlan, QuantizeOptions
from onnxslim.passes.quantize.search import ENOUGH
from onnxslim.passes.quantize.static import Static
from onnxslim.passes.quantize.strategy import Strategy
from onnxslim.passes.quantize.train import BATCH, RATE
from onnxslim.passes.quantize.weight_only import WeightOnly, WeightOnlyBlocks, WeightOnlyBytes

WORK: Mapping[Effort, PassWork] = {
    "quick": PassWork(0.3, 2e-3, 15.0, 1e-7),
    "normal": PassWork(0.3, 5e-3, 60.0, 5e-7),
    "thorough": PassWork(0.3, 2e-2, 130.0, 1e-6),
}
EFFORTS = (
    "how much to try: quick takes the nearest integers by one way to choose ranges, and all layers, unless "
    "require_sqnr or max_drop is given and takes fewer; normal "
    f"searches where that keeps less than {ENOUGH:g} dB; thorough always does"
)
ObserverName = Literal["auto", "minmax", "percentile", "kl", "mse"]


@options
class QuantizeWish(Pass):
    """Options of `onnxslim.passes.Quantize`."""

    name: ClassVar[str] = "quantize"
    beside_plan: ClassVar[tuple[str, ...]] = ("train", "lr", "features", "checkpoint")

    weights: Bits = Field(
        "int8",
        description="integer type of weights; int4 halves the file again, and is computed with as int8 or, "
        "where activations are not integers, in blocks of 32 with a scale each, "
        "on processors a zero point, too; int3 (stored as int4) and int2 (-1, 0 and 1, in opset 25) are "
        "computed with as int8, too",
    )
    activations: Activations = Field(
        "auto",
        description="integer type of activations: that of the target, or another one; uint4 and int4: a "
        "simulation for processors, of what weighted operators read alone; dynamic: only matrix "
        "products by constants, and on processors LSTMs, run in integers, and ranges of their data are those "
        "of every single input, without calibration; none: weights of matrix products and embeddings are "
        "stored as integers",
    )
    storage: StorageChoice = Field(
        "auto",
        description="with activations=none, how such weights are written: DequantizeLinear in front of the "
        "product, which any runtime reads (qdq), or ONNX Runtime's own MatMulNBits, with accuracy_level 4 "
        "(matmulnbits), which it makes of the former itself; auto: qdq, unless the file has the latter, the "
        "target runs only that (webgpu) or, on processors, that is not possible (a table that is looked up "
        "and multiplied by) or slow (a Relu or Clip alone reads a product)",
    )
    download: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of the bytes of 8-bit weights to keep once they are deflated, as when they are "
        "sent: with data, codes are chosen by error and bits; without, channels with small weights get "
        "fewer of them",
    )
    block_size: int | None = Field(
        None,
        ge=16,
        le=256,
        description="with activations=none, inputs of an output that share a scale, a power of two. By "
        "default 32 in four bits; in eight, all of them, or 128 in MatMulNBits",
    )
    size: float | None = Field(
        None,
        gt=0,
        le=1,
        description="with weights of fewer than eight bits, bytes of the constants to keep, of 1: as far as "
        "there is room, the layers are in eight bits that gain most by it",
    )
    observer: ObserverName = Field(
        "auto",
        description="how ranges of activations are chosen: exact min/max, a percentile, least KL divergence, "
        "least mean squared error, or whichever does best on the samples to choose by",
    )
    percentile: float = Field(99.99, gt=0, le=100, description="percent of the values kept by `percentile`")
    exclude: tuple[str, ...] = Field((), description=f"{GLOBS} to keep in float")
    classifier: bool = Field(False, description="quantize the last matrix product before an output too")
    bias_correction: bool = Field(
        True, description="adjust biases so that rounding the weights leaves the mean of every channel alone"
    )
    per_channel: bool = Field(True, description="one weight scale per output channel")
    require_sqnr: LeastSqnr = Field(
        None,
        description=f"{KEPT}; layers that cost too much of it stay in float (0: none does). By default 25, "
        "or 0 where max_drop, size or train is given",
    )
    max_drop: MostDrop = None
    algorithm: Algorithm = Field(
        "auto",
        description="how weights are rounded: to the nearest code (rtn), for the least error of a layer's "
        "outputs by coordinate descent (cd), the same from what GPTQ finds (gptq), or by descent where that "
        "matters and helps (auto)",
    )
    equalization: bool = Field(
        True,
        description="scale channels, in what makes and reads them, to make even use of the ranges of "
        "activations, where the outputs get better by it",
    )
    sequential: bool = Field(
        True,
        description="fit weights, before they are rounded, to the inputs that the layers before make of "
        "integers, where the outputs get better by it",
    )
    optimize_for: Literal["accuracy", "latency"] = Field(
        "accuracy",
        description="latency: leave the smallest layers in float where that is measured to be faster",
    )
    layout: LayoutName = Field(
        "target",
        description="for which target the graph is laid out, if not for the one that it is judged on",
    )
    train: int | None = Field(
        None,
        ge=1,
        description="learn scales, weights and biases through the rounding, from what the original makes of "
        "the data, in so many steps of 64 samples; with integer activations and PyTorch",
    )
    lr: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="with train, largest step, relative to the size of each weight and scale "
        f"[default: {RATE:g}]",
    )
    features: tuple[str, ...] = Field(
        (),
        description="with train, names of tensors inside the model that are to come close to the original's, "
        "too",
    )
    checkpoint: Path | None = Field(
        None,
        description="with train, file to keep the state in, once a minute; goes on from it, if it is there",
    )
    effort: Effort = Field("normal", description=EFFORTS)
    layers: bool = Field(
        False,
        description="measure what every layer alone does to the outputs, even where enough is kept anyway",
    )
    plan: Annotated[Path | QuantizationPlan | None, PlanOf(QuantizationPlan)] = Field(
        None, description="file of a plan to replay, instead of choosing"
    )

    def __post_init__(self) -> None:
        """Refuse a choice beside a plan, and options that mean nothing with others."""
        if self.plan is not None:
            self.require_alone()
        if self.activations not in (None, "none"):
            for option, given in (("storage", self.storage != "auto"), ("block_size", self.block_size)):
                if given:
                    raise UsageError(f"pass 'quantize': {option} goes with activations=none")
        if self.size is not None and (self.weights == "int8" or self.way is Dynamic):
            raise UsageError("pass 'quantize': size goes with weights=int4, int3 or int2, and not dynamic")
        if self.download is not None and (self.weights != "int8" or self.activations == "none"):
            raise UsageError("pass 'quantize': download goes with weights=int8 and integer activations")
        if self.weights in ("int3", "int2") and not self.way.calibrated:
            raise UsageError(
                f"pass 'quantize': {self.weights} weights go with integer activations that are calibrated"
            )
        if self.train is not None and not self.way.calibrated:
            raise UsageError("pass 'quantize': train goes with integer activations that are calibrated")
        if self.optimize_for == "latency" and self.activations in SIMULATED:
            raise UsageError(
                f"pass 'quantize': activations={self.activations} is a simulation, which nothing runs faster"
            )
        for option in ("lr", "features", "checkpoint"):
            if self.train is None and getattr(self, option):
                raise UsageError(f"pass 'quantize': {option} goes with train")
        if (size := self.block_size or 16) & (size - 1):
            raise UsageError(f"pass 'quantize': block_size is a power of two, not {size}")

    @property
    def work(self) -> PassWork:
        """See `Pass.work`."""
        work = WORK[self.effort if self.way.calibrated else "quick"]
        return replace(work, samples=RUNS * BATCH * (self.train or 0))

    @property
    def learns(self) -> bool:
        """See `Pass.learns`."""
        return self.train is not None

    def require_installed(self) -> None:
        """See `Pass.require_installed`."""
        if self.train is not None:
            door.require(f"pass '{self.name}' with train")

    @property
    def needs_data(self) -> bool:
        """For ranges, and to rank layers on."""
        if (plan := self.planned()) is not None:
            return plan.needs_data or self.of_plan(plan).needs_data
        return self.way.calibrated or self.max_drop is not None or self.size is not None

    def planned(self) -> QuantizationPlan | None:
        """The plan that was asked for."""
        return None if self.plan is None else QuantizationPlan.given(self.plan)

    @classmethod
    def of_plan(cls, plan: QuantizationPlan) -> QuantizeWish:
        """The pass with the options that a plan was made with."""
        return cls(**{item.name: getattr(plan.options, item.name) for item in fields(plan.options)})

    @property
    def way(self) -> type[Strategy]:
        """How to quantize."""
        if self.activations == "dynamic":
            return Dynamic
        if self.activations not in (None, "none"):
            return Static
        if self.weights == "int4":
            return WeightOnlyBlocks
        return WeightOnly if self.block_size is None else WeightOnlyBytes

    def kept_options(self) -> QuantizeOptions:
        """Those that a plan keeps."""
        return QuantizeOptions(**{item.name: getattr(self, item.name) for item in fields(QuantizeOptions)})
