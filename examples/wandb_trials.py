"""Each trial of a search as a step of a run of Weights & Biases, offline.

pip install wandb
python examples/wandb_trials.py && wandb sync wandb/offline-run-*
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import wandb

import onnxslim
from onnxslim import Goals

FASHION = Path(onnxslim.__file__).parent / "models" / "fashion"


def main() -> None:
    """The smallest file of the bundled ResNet, without leaving anything away."""
    with wandb.init(project="onnxslim", mode="offline") as run:
        found = onnxslim.optimize(
            FASHION / "resnet.onnx",
            str(FASHION / "calibration.npz"),
            Goals(size=0.3),
            effort="quick",
            time_limit=10,
            on_trial=lambda trial: run.log({"trial": trial.label, **(asdict(trial)["figures"] or {})}),
        )
    print(f"{len(found.trials)} steps, the best is '{found.best.label if found.best else None}'")


if __name__ == "__main__":
    main()
