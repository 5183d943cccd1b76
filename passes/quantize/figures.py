"""What quantization has to tell of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnxslim.engine.base import Figures, captioned
from onnxslim.engine.plans import PassPlan
from onnxslim.learn.fit import Look


@dataclass(frozen=True)
class LayerFigures:
    """What quantizing one layer alone does.

    Attributes:
        node, op: the layer, and its operator.
        sqnr: of the model's outputs, in dB.
        kept: whether it stays in floating point.
    """

    node: str
    op: str
    sqnr: float
    kept: bool

    def __str__(self) -> str:
        return f"{self.node} {self.sqnr:.1f} dB{' (kept in float)' if self.kept else ''}"


@dataclass(frozen=True)
class QuantizeFigures(Figures):
    """What was measured on the way to a quantized model, as far as it was.

    Attributes:
        trained: numbers of tensors and of constants that were in integers when the model came in.
        nearest: SQNR of the outputs, in dB, with all in integers and weights rounded to the nearest.
        everything: the same with weights rounded, and ranges chosen, by the outputs.
        layers: what single layers do, the worst first.
        tightened: output channels that were changed so that sums cannot saturate, by layer.
        corrected: how many biases take in what rounding the weights does.
        sqnr: of the result, in dB.
        metric: before and after.
        latency: time of one run, relative to that before.
        beside_floats: SQNR of the result, in dB, beside its own integers multiplied in floating point; of
            weights that alone are integers.
        parts: SQNR by output, or part of one.
        observer: how ranges were chosen.
        shared: weights in integers that are looked up in tables.
        fused: operators that ONNX Runtime runs in integers, by type.
        total: all operators of these types.
        plan: a `QuantizationPlan`: what was chosen, to keep and to replay.
        unfused: names of nodes that were quantized and run in floating point all the same.
        learnt: SQNR beside the model that training learnt from, in dB, before it and after, on fresh samples.
        distance: how far outputs were from the teacher's before training and after, on unseen samples.
        examples: what was learnt from, and by what it was judged.
        threads: of PyTorch.
        looks: at all states that were judged; the first is the start.
    """

    trained: tuple[int, int] | None = captioned(
        "tensors and constants that were in integers already, and keep their scales"
    )
    nearest: float | None = captioned(
        "SQNR on the samples to choose by, in dB, with all in integers and weights rounded to the nearest"
    )
    everything: float | None = captioned(
        "SQNR with all in integers, in dB, weights rounded and ranges chosen by the outputs"
    )
    sqnr: float | None = captioned("SQNR of the result, in dB")
    beside_floats: float | None = captioned(
        "SQNR of the result beside its own integers multiplied in floating point, in dB: kernels of ONNX "
        "Runtime round data to int8 by blocks"
    )
    parts: Mapping[str, float] | None = captioned("SQNR of the result by output or part of one, in dB")
    layers: tuple[LayerFigures, ...] | None = captioned(
        "what single layers alone leave of the signal, the worst first"
    )
    tightened: Mapping[str, int] | None = captioned(
        "channels whose sums would saturate without VNNI, tightened"
    )
    corrected: int | None = captioned("biases corrected for the rounding of weights")
    metric: tuple[float, float] | None = captioned("metric, before and after")
    latency: float | None = captioned("time of one run, relative to that before")
    learnt: tuple[float, float] | None = captioned(
        "SQNR before training and after, in dB, on samples that nothing was fitted to"
    )
    distance: str | None = captioned("distance from the teacher on unseen samples, by training")
    examples: str | None = captioned("trained from")
    threads: int | None = captioned("threads of training")
    looks: tuple[Look, ...] = ()
    observer: str | None = captioned("way to choose ranges")
    shared: int | None = captioned("weights whose integers are looked up in tables")
    fused: Mapping[str, int] | None = captioned("run in integers by ONNX Runtime")
    total: Mapping[str, int] | None = captioned("of such operators in the model")
    plan: PassPlan | None = None
    unfused: tuple[str, ...] | None = captioned("quantized, but run in floating point all the same")
