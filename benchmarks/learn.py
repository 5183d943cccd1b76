"""Learning with PyTorch: what can be computed, what distilling is worth, and what a step costs.

    pip install -e '.[train]' && apt-get install dataset-fashion-mnist
    python benchmarks/learn.py coverage [NAME ...]
    python benchmarks/learn.py distill [NET ...] [--images 10000] [--learn distill:steps=300] [--seeds 3]
    python benchmarks/learn.py student NET TEACHER [--learn …] [--seeds 3] [--starts own random]
    python benchmarks/learn.py task TASK [--chain prune:macs=0.6] [--samples 512] [--images 10000] [--learn …]
    python benchmarks/learn.py qat [NET ...] [--images 10000] [--steps 300] [--seeds 3] [--weights int4 ...]
        [--activations auto] [--lr 0.001 ...]
    python benchmarks/learn.py speed [NET ...]

coverage: every model of the zoo, the bundled networks and the exports of `benchmarks/architectures.py` that
are there, at one batch: the largest difference from ONNX Runtime by the largest magnitude, and the share of
the floating-point numbers in the file that can be learnt.

distill: the bundled networks pruned to 25 or 35 % of their MACs on the 512 images that ship with them, then
distilled on unlabelled images of the training split, drawn at random by the seed: accuracy on the 2,000 test
images of the original, of the pruned and of the distilled network, SQNR against the original, and seconds of
CPU of both. One thread. `--learn` is what learns, in words as on the command line, such as
distill:steps=300,augment=mirror,shift,copies=8; its teacher is the original unless it names one.

student: a bundled network that learns from another one, of another architecture, on unlabelled images: from
the weights in its file, or from random ones (normal, of variance 2 by the inputs of an output; biases zero).

task: true scores of a task of `benchmarks/stage.py` (see there for what to fetch): of the network, of what a
chain of passes makes of it on samples to calibrate on, and of that distilled on unlabelled samples.

qat: the bundled networks quantized on the 512 images that ship with them, all layers in integers that can be,
and the same with training, at each rate, on so many unlabelled images of the training split: accuracy on the
2,000 test images, SQNR against the original, and seconds of CPU of both. One thread.

speed: milliseconds of CPU for one image of a step, beside a loop written by hand around the same network as a
module of PyTorch (`models/fashion/train.py`), with torch.optim.Adam and mean squared error, in turn, one
thread, batches of 64, channels last in both.
"""

# PyTorch's annotations are incomplete, and where it is not installed its classes are Any.
# mypy: warn-return-any=False, disallow-untyped-calls=False

from __future__ import annotations

import argparse
import gzip
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common, stage
from onnxslim import CalibrationData, Pipeline, Target, load, passes
from onnxslim.calibration.noise import sqnr
from onnxslim.engine.base import Context, Log
from onnxslim.errors import LoadError
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.learn.door import FLOATS, UnknownError, to_numpy, to_torch, torch
from onnxslim.learn.losses import Aim, loss_of
from onnxslim.learn.net import Net
from onnxslim.learn.optimizer import RelativeAdam
from onnxslim.learn.weights import weights
from onnxslim.models import tasks, zoo
from onnxslim.ops import view_of
from onnxslim.passes import Distill, Prune, Quantize, Slim
from onnxslim.passes.fold.edits import Edits
from onnxslim.passes.fold.literals import lower_constants
from onnxslim.passes.learning.apart import taken_apart
from onnxslim.runtime.probe import make_feeds
from onnxslim.runtime.session import Session

FASHION = Path(__file__).resolve().parent.parent / "models" / "fashion"
SPLIT = Path("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz")
# The share of the multiply-accumulates that each network is pruned to.
SHARES = {"resnet": 0.25, "mobilenet": 0.25, "vit": 0.35}
BATCH = 64


# -------------------------------------------------------------------------------------------- coverage


def coverage(names: list[str]) -> Iterator[str]:
    """One row per file."""
    yield "| file | largest difference | learnt | weights |\n|---|---|---|---|"
    for file in files():
        if not names or any(name in file.name for name in names):
            yield f"| {file.stem} | {computed(file)} |"


def files() -> list[Path]:
    """What there is."""
    fetched = [zoo.path(name) for name in sorted(zoo.MODELS) if zoo.available(name)]
    return [*sorted(FASHION.glob("*.onnx")), *fetched, *sorted(common.architectures().glob("*.onnx"))]


def computed(file: Path) -> str:
    """How a file is computed, or why it is not."""
    model = load(file)
    twin = taken_apart(model, Context())
    lower_constants(Edits(twin, Log()), 0)
    try:
        learnt = weights(twin)
        net = Net(twin, learnt)
        feeds = inputs(file.stem, model)
        with torch.no_grad():
            found = net({name: to_torch(array) for name, array in feeds.items()})
    except UnknownError as why:
        return f"{why} | | "
    worst = max(apart(each, found[name]) for name, each in Session(model, optimize="none").run(feeds).items())
    numbers = sum(each.size for each in twin.constants() if each.dtype in FLOATS)
    return f"{worst:.1e} | {sum(each.size for each in learnt) / numbers:.2%} | {len(learnt)}"


def apart(expected: Array, found: Any) -> float:
    """The largest difference, by the largest magnitude."""
    wide = expected.astype(np.float64)
    return float(np.abs(wide - to_numpy(found)).max() / max(np.abs(wide).max(), 1e-30))


def inputs(name: str, model: Model) -> Mapping[str, Array]:
    """A batch: real inputs where the zoo has some."""
    return (
        zoo.inputs(name, 2, seed=5)[0] if name in zoo.MODELS else make_feeds(model.inputs(), batch=2, size=32)
    )


# -------------------------------------------------------------------------------------------- distilling


def images(count: int, seed: int) -> Array:
    """Images of the training split, float32 [count, 1, 28, 28], in a random order."""
    raw = np.frombuffer(gzip.decompress(SPLIT.read_bytes())[16:], np.uint8).reshape(-1, 1, 28, 28)
    chosen = np.random.default_rng(seed).permutation(len(raw))[:count]
    return raw[chosen].astype(np.float32)


def distill(names: list[str], count: int, words: str, seeds: int) -> Iterator[str]:
    """One row per network and seed."""
    yield "| network | MACs | seed | original | pruned | distilled | SQNR, dB | CPU s, prune and distill |"
    yield "|---|---|---|---|---|---|---|---|"
    for name in names or list(SHARES):
        for seed in range(seeds):
            yield row(name, images(count, seed), words, seed)


def learning(words: str, original: Path) -> Distill:
    """What learns, from the original if it names no other teacher."""
    found = passes.parse(words)
    assert isinstance(found, Distill)
    return found if found.teacher is not None else replace(found, teacher=original)


def row(name: str, unlabelled: Array, words: str, seed: int) -> str:
    """What comes of a network."""
    with np.load(FASHION / "test.npz") as test, np.load(FASHION / "calibration.npz") as bundled:
        feeds, labels, few = {"image": test["image"]}, test["label"], bundled["image"]
    original, times = load(FASHION / f"{name}.onnx"), [time.process_time()]
    models = [original]
    for steps, data in (
        ((Slim(), Prune(macs=SHARES[name])), few),
        ((learning(words, FASHION / f"{name}.onnx"),), unlabelled),
    ):
        batches = CalibrationData.from_arrays({"image": data}, 64)
        made = Pipeline(*steps, count=False)(models[-1], data=batches, target=Target.cpu(1), seed=seed)
        models.append(made.model)
        times.append(time.process_time())
    results = [Session(each).run(feeds)["logits"] for each in models]
    right = [f"{np.mean(each.argmax(1) == labels):.2%}" for each in results]
    noise = " → ".join(f"{sqnr(results[0], each):.1f}" for each in results[1:])
    seconds = " and ".join(f"{end - start:.0f}" for start, end in pairwise(times))
    return f"| {name} | {SHARES[name]} | {seed} | {' | '.join(right)} | {noise} | {seconds} |"


def student(names: list[str], count: int, words: str, seeds: int, starts: list[str]) -> Iterator[str]:
    """One row per start and seed."""
    name, teacher = names
    yield "| student | teacher | start | seed | teacher's | at first | learnt | agrees with teacher | CPU s |"
    yield "|---|---|---|---|---|---|---|---|---|"
    with np.load(FASHION / "test.npz") as test:
        feeds, labels = {"image": test["image"]}, test["label"]
    step = learning(words, FASHION / f"{teacher}.onnx")
    wanted = Session(load(FASHION / f"{teacher}.onnx")).run(feeds)["logits"].argmax(1)
    for start in starts:
        for seed in range(seeds):
            model = Pipeline(Slim())(load(FASHION / f"{name}.onnx")).model
            if start == "random":
                renew(model, seed)
            data, began = CalibrationData.from_arrays({"image": images(count, seed)}, 64), time.process_time()
            made = Pipeline(step, count=False)(model, data=data, target=Target.cpu(1), seed=seed).model
            seconds = time.process_time() - began
            found = [Session(each).run(feeds)["logits"].argmax(1) for each in (model, made)]
            right = [f"{np.mean(each == labels):.2%}" for each in (wanted, *found)]
            same = " → ".join(f"{np.mean(each == wanted):.2%}" for each in found)
            yield f"| {name} | {teacher} | {start} | {seed} | {' | '.join(right)} | {same} | {seconds:.0f} |"


def renew(model: Model, seed: int) -> None:
    """Random numbers in place of what was learnt (He et al., 2015)."""
    random = np.random.default_rng(seed)
    for weight in weights(model):
        layer = view_of(weight.outputs[0]) if weight.values.ndim > 1 else None
        scale = 0.0 if layer is None else np.sqrt(2 / layer.matrix().shape[2])
        weight.values = (scale * random.normal(size=weight.shape)).astype(np.float32)


# ------------------------------------------------------------------------------------------------- tasks


def true_scores(name: str, chain: str, samples: int, count: int, words: str) -> Iterator[str]:
    """The table of `benchmarks/stage.py`, for a network, what is made of it, and that distilled."""
    task = tasks.create(name)
    if missing := task.missing():
        raise LoadError(f"not there yet: {'; '.join(missing)}")
    with tempfile.TemporaryDirectory() as folder:
        small, learnt = (Path(folder) / f"{each}.onnx" for each in ("small", "learnt"))
        found = [stage.Entrant("float", task.path())]
        found.append(stage.chained(task, chain, CalibrationData(task.calibration(samples)), small))
        start, step = time.process_time(), learning(words, task.path())
        made = Pipeline(step, count=False)(
            small, data=CalibrationData(task.unlabelled(count)), target=Target.cpu(1)
        )
        print(made.report, file=sys.stderr)
        made.model.save(learnt)
        found.append(stage.Entrant(f"{chain}, {words}", learnt, time.process_time() - start))
        yield from stage.rows(task, found, stage.scored(task, found))


# ------------------------------------------------------------------------------- quantization-aware


def qat(
    names: list[str],
    count: int,
    steps: int,
    seeds: int,
    bits: list[str],
    activations: str,
    rates: list[float],
) -> Iterator[str]:
    """One row per network, weights, seed and rate."""
    yield (
        "| network | weights, activations | images | steps, rate | seed | original | untrained | trained "
        "| SQNR, dB | CPU s |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    with np.load(FASHION / "calibration.npz") as bundled:
        few = bundled["image"]
    for name in names or list(SHARES):
        for weights_type in bits:
            for seed in range(seeds):
                data = few if count <= len(few) else images(count, seed)
                chain = Quantize(weights=weights_type, activations=activations, require_sqnr=0)  # type: ignore[arg-type]
                ways = [replace(chain, train=steps, lr=rate) for rate in rates] if steps else [chain]
                results = quantized(name, few, data, chain, ways, seed)
                for rate, told in zip(rates if steps else (0.0,), results, strict=True):
                    which = f"{name} | {weights_type}, {activations} | {len(data)} | {steps}, {rate:g}"
                    yield f"| {which} | {seed} | {told} |"


def quantized(
    name: str, few: Array, many: Array, untrained: Quantize, trained: list[Quantize], seed: int
) -> Iterator[str]:
    """What comes of a network without training and with it, in one way or another."""
    with np.load(FASHION / "test.npz") as test:
        feeds, labels = {"image": test["image"]}, test["label"]
    original = load(FASHION / f"{name}.onnx")

    def result(step: Quantize, data: Array) -> tuple[Array, float]:
        batches, start = CalibrationData.from_arrays({"image": data}, 64), time.process_time()
        chain = Pipeline(Slim(), step, count=False)
        made = chain(original, data=batches, target=Target.cpu(1), seed=seed).model
        return Session(made).run(feeds)["logits"], time.process_time() - start

    wanted = Session(original).run(feeds)["logits"]
    before, took = result(untrained, few)
    for step in trained:
        after, seconds = result(step, many)
        right = [f"{np.mean(each.argmax(1) == labels):.2%}" for each in (wanted, before, after)]
        noise = " → ".join(f"{sqnr(wanted, each):.1f}" for each in (before, after))
        yield f"{' | '.join(right)} | {noise} | {took:.0f} and {seconds:.0f}"


# ------------------------------------------------------------------------------------------------- speed


def speed(names: list[str]) -> Iterator[str]:
    """One row per network: ours, by hand, and the ratio of the two."""
    from onnxslim.models.fashion import train

    torch.set_num_threads(1)
    yield "| network | ours, ms | by hand, ms | ratio |\n|---|---|---|---|"
    x = images(BATCH, 0)
    for name in names or ["resnet", "mobilenet", "vit", "vgg"]:
        steps = ours(name, x), by_hand(train.RECIPES[name].build(), x)
        times: list[list[float]] = [[], []]
        for _ in range(8):
            for step, taken in zip(steps, times, strict=True):
                start = time.process_time()
                for _ in range(3):
                    step()
                taken.append((time.process_time() - start) / 3 / BATCH * 1e3)
        mine, other = (sorted(each)[len(each) // 2] for each in times)
        yield f"| {name} | {mine:.2f} | {other:.2f} | {mine / other:.2f} |"


def ours(name: str, x: Array) -> Callable[[], None]:
    """A step of `onnxslim/learn/fit.py`."""
    from onnxslim.calibration.fidelity import OutputPart

    model = Pipeline(Slim())(load(FASHION / f"{name}.onnx")).model
    net = Net(model, weights(model), torch.float32)
    optimizer = RelativeAdam(net.parameters)
    wanted = [Aim(OutputPart("logits", "logits"), "relative", 1.0)]
    goal = {"logits": torch.zeros(len(x), 10)}

    def step() -> None:
        loss_of(wanted, net({"image": to_torch(x)}), goal, None).backward()
        optimizer.step(1e-4)

    return step


def by_hand(module: Any, x: Array) -> Callable[[], None]:
    """What somebody would write who has the module."""
    module = module.eval().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(module.parameters(), 1e-4)
    goal = torch.zeros(len(x), 10)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(module(torch.from_numpy(x)), goal).backward()
        optimizer.step()

    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("what", choices=("coverage", "distill", "student", "qat", "task", "speed"))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--learn", default="distill:steps=300")
    parser.add_argument("--starts", nargs="+", default=["own", "random"], choices=("own", "random"))
    parser.add_argument("--chain", default="prune:macs=0.6")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300, help="of qat; 0: closed forms alone")
    parser.add_argument("--activations", default="auto", help="of qat")
    parser.add_argument("--lr", nargs="+", type=float, default=[1e-3], help="of qat")
    parser.add_argument("--weights", nargs="+", default=["int8", "int4", "int3", "int2"], help="of qat")
    args = parser.parse_args()
    rows = {
        "coverage": lambda: coverage(args.names),
        "distill": lambda: distill(args.names, args.images, args.learn, args.seeds),
        "student": lambda: student(args.names, args.images, args.learn, args.seeds, args.starts),
        "task": lambda: true_scores(args.names[0], args.chain, args.samples, args.images, args.learn),
        "qat": lambda: qat(
            args.names, args.images, args.steps, args.seeds, args.weights, args.activations, args.lr
        ),
        "speed": lambda: speed(args.names),
    }
    try:
        for line in rows[args.what]():
            print(line, flush=True)
    except LoadError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
