"""Each trial of a search as a run of MLflow, in a local folder of files.

pip install mlflow-skinny
python examples/mlflow_trials.py && mlflow ui
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import mlflow

import onnxslim
from onnxslim import Goals
from onnxslim.search import SearchTrial

FASHION = Path(onnxslim.__file__).parent / "models" / "fashion"


def log(trial: SearchTrial) -> None:
    """A run with what was done as parameters, and the figures as metrics."""
    with mlflow.start_run(run_name=trial.label):
        mlflow.log_params({"encoding": trial.encoding, "structure": trial.structure, "cut": trial.cut})
        figures = asdict(trial.figures) if trial.figures else {}
        mlflow.log_metrics({name: value for name, value in figures.items() if isinstance(value, float)})
        mlflow.set_tag("error", trial.error)


def main() -> None:
    """The smallest file of the bundled ResNet, without leaving anything away."""
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # servers and databases need no such word
    mlflow.set_tracking_uri(Path("mlruns").absolute().as_uri())
    mlflow.set_experiment("onnxslim")
    found = onnxslim.optimize(
        FASHION / "resnet.onnx",
        str(FASHION / "calibration.npz"),
        Goals(size=0.3),
        effort="quick",
        time_limit=10,
        on_trial=log,
    )
    print(f"{len(found.trials)} runs, the best is '{found.best.label if found.best else None}'")


if __name__ == "__main__":
    main()
