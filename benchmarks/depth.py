"""Whole branches dropped, beside units alone: accuracy, retrieval and measured latency.

    python benchmarks/depth.py fashion [NET ...] [--shares 0.5 0.4]
    python benchmarks/depth.py minilm [--calibration 192] [--task glosses]
    python benchmarks/depth.py convnet [--calibration 64]

fashion: the Fashion-MNIST networks, Slim and then Prune with a budget of latency, relative to the file as it
is; 512 unlabelled images, 2000 test images. minilm: MiniLM at two thirds of its multiply-accumulates by
branches alone, calibrated on docstrings of Python's library, or glosses of WordNet, and tested on others
(tasks of benchmarks/stage.py). convnet: EfficientNet-Lite0 at 80 % of its multiply-accumulates.

Latency: one thread, models in turn, the median of ratios of times of this thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxslim import CalibrationData, Pipeline, load
from onnxslim.calibration.noise import sqnr
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.models import tasks, zoo
from onnxslim.passes import Prune, Slim
from onnxslim.passes.prune import PruneFigures
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target
from onnxslim.runtime.timing import compare

FASHION = Path(__file__).resolve().parent.parent / "models" / "fashion"
ONE = Target.cpu(threads=1)


def ratio(first: Model, second: Model, feeds: Mapping[str, Array]) -> float:
    """Time of the second model in that of the first."""
    return compare([first, second], feeds, ONE, rounds=200, seconds=6.0)[1][1]


def pruned(model: Model, data: CalibrationData, **options: Any) -> tuple[Model, str]:
    """A pruned model, and what went."""
    start = time.process_time()
    result = Pipeline(Prune(**options), on_error="raise")(model, data=data, target=ONE)
    taken = time.process_time() - start
    step = result.report.steps[-1]
    if not step.changes:
        return result.model, "nothing"
    figures = PruneFigures.of(step.changes)
    gone = ", ".join(f"{label} ({kind})" for label, kind in (figures.branches or {}).items()) or "none"
    macs, params = (after / before for before, after in (figures.macs, figures.params))
    return result.model, f"{macs:.2f} | {params:.2f} | {gone} | {taken:.0f}"


def fashion(nets: Sequence[str], shares: Sequence[float]) -> None:
    """The bundled networks at shares of their latency."""
    test = np.load(FASHION / "test.npz")
    data = CalibrationData.from_npz(FASHION / "calibration.npz", batch_size=64)
    one = {"image": test["image"][:1]}

    def accuracy(model: Model) -> float:
        session = Session(model, ONE)
        logits = [session.run({"image": part})["logits"] for part in np.split(test["image"], 8)]
        return 100 * float((np.concatenate(logits).argmax(1) == test["label"]).mean())

    print(
        "| net | wanted | what goes | accuracy | latency | MACs, of slimmed | parameters | branches | CPU s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for net in nets:
        original = load(FASHION / f"{net}.onnx")
        slimmed = Pipeline(Slim(), on_error="raise")(original).model
        whole = ratio(original, slimmed, one)
        print(f"| {net} | | slimmed | {accuracy(original):.2f} | {whole:.2f} | 1 | 1 | | |", flush=True)
        for share in shares:
            for what in ("units", "both"):
                model, told = pruned(slimmed, data, latency=min(share / whole, 1.0), what=what)
                found = f"{accuracy(model):.2f} | {ratio(original, model, one):.2f}"
                print(f"| {net} | {share:g} | {what} | {found} | {told} |", flush=True)


def minilm(calibration: int, name: str) -> None:
    """MiniLM without the branches that a third of its multiply-accumulates are."""
    task = tasks.create(name)
    slimmed = Pipeline(Slim(), on_error="raise")(load(task.path())).model
    data = CalibrationData(task.unlabelled(calibration))
    print("| what | recall@1 % | MRR % | latency | MACs | parameters | branches | CPU s |")
    print("|---|---|---|---|---|---|---|---|")

    def scores(model: Model) -> str:
        session = Session(model, ONE)
        found = task.judge([session.run(feeds) for feeds in task.test()])
        return " | ".join(f"{100 * each.value:.1f}" for each in found)

    print(f"| as it is | {scores(slimmed)} | 1 | 1 | 1 | | |", flush=True)
    made, told = pruned(slimmed, data, macs=0.667, what="branches")
    print(f"| branches | {scores(made)} | {ratio(slimmed, made, task.test()[0]):.2f} | {told} |", flush=True)


def convnet(calibration: int) -> None:
    """EfficientNet-Lite0 at 80 % of its multiply-accumulates."""
    name = "efficientnet_lite0.dynamo"
    slimmed = Pipeline(Slim(), on_error="raise")(load(zoo.path(name))).model
    data = CalibrationData(zoo.inputs(name, calibration, seed=0))
    feeds = zoo.inputs(name, 64, seed=1)
    reference = Session(slimmed, ONE)
    expected = [reference.run(batch) for batch in feeds]
    print("| what | SQNR dB | same class | latency | MACs | parameters | branches | s |")
    print("|---|---|---|---|---|---|---|---|")
    for what in ("units", "both", "branches"):
        made, told = pruned(slimmed, data, macs=0.8, what=what)
        session = Session(made, ONE)
        first, second = (
            np.concatenate([next(iter(each.values())) for each in outputs])
            for outputs in (expected, [session.run(batch) for batch in feeds])
        )
        same = float((first.argmax(1) == second.argmax(1)).mean())
        found = f"{sqnr(first, second):.1f} | {same:.1%} | {ratio(slimmed, made, feeds[0]):.2f}"
        print(f"| {what} | {found} | {told} |", flush=True)


def main() -> None:
    """Print one of the tables, row by row as it is measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=["fashion", "minilm", "convnet"])
    parser.add_argument("net", nargs="*", default=["resnet", "mobilenet", "vit"])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.4])
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--task", choices=["docstrings", "glosses"], default="docstrings")
    words = parser.parse_args()
    if words.table == "fashion":
        fashion(words.net, words.shares)
    elif words.table == "minilm":
        minilm(words.calibration, words.task)
    else:
        convnet(words.calibration)


if __name__ == "__main__":
    main()
