"""Look at what can be pruned, prune, keep the plan, and replay it on the model in half precision."""

from __future__ import annotations

from pathlib import Path

import onnxslim
from onnxslim import CalibrationData, Pipeline
from onnxslim.passes import Half, Prune, Slim
from onnxslim.passes.prune import PruneFigures, PruningPlan

FASHION = Path(onnxslim.__file__).parent / "models" / "fashion"


def main() -> None:
    """Everything on the bundled MobileNet."""
    model = Pipeline(Slim())(onnxslim.load(FASHION / "mobilenet.onnx")).model
    analysis = onnxslim.analyze(model)
    for family in analysis.families[:3]:
        print(
            f"{family.name}: {family.size} units, read by {', '.join(each.node for each in family.consumers)}"
        )
    print(analysis.explain("head.weight")[0])

    data = CalibrationData.from_npz(FASHION / "calibration.npz", batch_size=64)
    result = Pipeline(Prune(macs=0.9))(model, data=data)
    figures = PruneFigures.of(result.report.steps[0].changes)
    before, after = figures.macs
    print(f"{after / before:.2f} of the MACs, proof within {figures.oracle:.0e}")

    plan = PruningPlan.from_json(figures.plan.to_json())
    half = Pipeline(Half(weights_only=True))(model).model
    families = onnxslim.analyze(half)
    print(f"the plan fits the half-precision model: {len(plan.removal(families).counts)} families")


if __name__ == "__main__":
    main()
