"""Whole branches dropped, beside units alone: accuracy, retrieval and measured latency.

    python benchmarks/depth.py fashion [NET ...] [--shares 0.5 0.4]
    python benchmarks/depth.py minilm [--calibration 192] [--task glosses]
    python benchmarks/depth.py convnet [--calibration 64]
    python benchmarks/depth.py tokens

fashion: the Fashion-MNIST networks, Slim and then Prune with a budget of latency, relative to the file as it
is; 512 unlabelled images, 2000 test images. minilm: MiniLM at two thirds of its multiply-accumulates by
branches alone, calibrated on docstrings of Python's library, or glosses of WordNet, and tested on others
(tasks of benchmarks/stage.py). convnet: EfficientNet-Lite0 at 80 % of its multiply-accumulates. tokens: the
last one, two or three attentions over all tokens of the ViT replaced by a linear map of each token x, which
is M x + c, or with the mean over tokens besides, M x + W mean(x) + c; all layers repaired then.

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
from onnxslim.calibration.gram import TensorPair, joint
from onnxslim.calibration.noise import sqnr
from onnxslim.calibration.samples import Samples
from onnxslim.families.branches import Branch, branches
from onnxslim.ir import graph as ir
from onnxslim.ir.graph import Array, Constant, Node, Tensor, Variable
from onnxslim.ir.model import Model
from onnxslim.models import tasks, zoo
from onnxslim.passes import Dead, Prune, Slim
from onnxslim.passes.prune import PruneFigures
from onnxslim.passes.prune.standin import sum_of
from onnxslim.passes.repair import repair
from onnxslim.passes.repair.solve import fit
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


def tokens() -> None:
    """What the mean over tokens is worth in place of an attention."""
    test = np.load(FASHION / "test.npz")
    data = CalibrationData.from_npz(FASHION / "calibration.npz", batch_size=64)
    slimmed = Pipeline(Slim(), on_error="raise")(load(FASHION / "vit.onnx")).model
    softmax = {node.outputs[0].name for node in slimmed.graph.nodes if node.op == "Softmax"}
    found = [each for each in branches(slimmed).found if softmax.intersection(each.nodes)][:3]
    expected = Session(slimmed, ONE).run({"image": test["image"]})["logits"]
    print("| attentions gone | of each token | SQNR dB | accuracy | latency, of slimmed |")
    print("|---|---|---|---|---|")
    for count in (1, 2, 3):
        for mean in (False, True):
            model, samples = slimmed, Samples(data, slimmed)
            for branch in found[-count:]:
                model = _without_attention(model, branch, samples, mean=mean)
            repair(model, slimmed, samples)
            logits = Session(model, ONE).run({"image": test["image"]})["logits"]
            right = 100 * float((logits.argmax(1) == test["label"]).mean())
            kept, latency = sqnr(expected, logits), ratio(slimmed, model, {"image": test["image"][:1]})
            how = "M x + W mean(x) + c" if mean else "M x + c"
            print(f"| {count} | {how} | {kept:.1f} | {right:.2f} | {latency:.2f} |", flush=True)


def _without_attention(model: Model, branch: Branch, samples: Samples, *, mean: bool) -> Model:
    """The model with a regression on the skip, and on its mean over tokens, in place of a branch."""
    made = model.copy()
    graph, node = made.graph, sum_of(made, branch)
    skip, end = (
        next(each for each in node.inputs if each.name == name) for name in (branch.skip, branch.end)
    )

    def add(op: str, *inputs: Tensor, **attrs: int) -> Variable:
        found = Variable(f"{branch.sum}_{len(graph.nodes)}", np.dtype(np.float32))
        graph.nodes.append(Node(op, found.name, attrs, inputs, [found]))
        return found

    def constant(values: Array) -> Constant:
        return Constant(f"{branch.sum}_{len(graph.nodes)}_{values.ndim}", values)

    seen: Tensor = skip
    wanted = end
    if mean:
        pooled = add("ReduceMean", skip, constant(np.array([1], np.int64)), keepdims=1)
        everywhere = add("Add", add("Mul", skip, constant(np.float32(0)[None])), pooled)
        seen, wanted = (add("Concat", *each, axis=-1) for each in ((skip, everywhere), (end, end)))
    ir.sort(graph)
    pair = TensorPair(seen.name, wanted.name, -1)
    found = fit(*(joint(made, part, [pair], target=ONE)[pair] for part in (samples.fit, samples.tune)))
    assert found.weight is not None
    channels = found.weight.shape[1] // (1 + mean)
    maps = [each[:channels].T.astype(np.float32) for each in np.split(found.weight[0], 1 + mean, axis=1)]
    shift: Tensor = constant(found.bias[0, :channels].astype(np.float32))
    if mean:
        shift = add("Add", add("MatMul", pooled, constant(maps[1])), shift)
    node.inputs = [add("MatMul", skip, constant(maps[0] + np.eye(channels, dtype=np.float32))), shift]
    ir.sort(graph)
    return Pipeline(Dead(), on_error="raise")(made).model


def main() -> None:
    """Print one of the tables, row by row as it is measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=["fashion", "minilm", "convnet", "tokens"])
    parser.add_argument("net", nargs="*", default=["resnet", "mobilenet", "vit"])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.4])
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--task", choices=["docstrings", "glosses"], default="docstrings")
    words = parser.parse_args()
    if words.table == "fashion":
        fashion(words.net, words.shares)
    elif words.table == "minilm":
        minilm(words.calibration, words.task)
    elif words.table == "convnet":
        convnet(words.calibration)
    else:
        tokens()


if __name__ == "__main__":
    main()
