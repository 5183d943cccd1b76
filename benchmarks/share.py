"""All kinds of compression side by side on the bundled nets: bytes, download, latency, fidelity, accuracy.

    python benchmarks/share.py kinds [NET ...]      a row for each chain of passes
    python benchmarks/share.py sparse [NET ...]     zeros: ours with and without data, beside onnxsim's
    python benchmarks/share.py steps [NET ...]      one round, and several on the way

A row is a chain in the words of recipes (`CHAINS`): add one, and it is measured. Everything is made of the
slimmed network, fitted to 512 calibration images without labels, and judged on 2000 others. Latency is that
of one image on one thread, interleaved with the slimmed float network's; the download is deflated.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FASHION = Path(__file__).resolve().parent.parent / "models" / "fashion"
NETS = ("resnet", "mobilenet", "vit")
CHAINS = (
    "quantize",
    "half",
    "cluster:bits=4",
    "cluster:bits=3",
    "cluster:bits=2",
    "sparsify:sparsity=0.5",
    "sparsify:sparsity=0.8",
    "sparsify:pattern=2:4",
    "sparsify:sparsity=0.5 quantize",
    "sparsify:sparsity=0.8 quantize",
    "cluster:bits=4 quantize",
    "sparsify:sparsity=0.8 cluster:bits=4",
    "sparsify:sparsity=0.8 cluster:bits=4 quantize",
    "prune:macs=0.5",
    "prune:macs=0.5,what=branches",
    "prune:latency=0.5",
    "prune:macs=0.5 quantize",
    "prune:macs=0.5 cluster:bits=4 quantize",
    "prune:latency=0.5 quantize",
    "factorize:macs=0.5",
    "factorize:macs=0.5,schemes=separable",
    "prune:macs=0.5 sparsify:sparsity=0.5 quantize",
)
ZEROS = ("sparsity=0.5", "sparsity=0.8", "pattern=2:4")
HEAD = ("net", "how", "file, kB", "of float", "deflated, kB", "latency", "SQNR dB", "accuracy, %", "CPU s")


@dataclass(frozen=True)
class Bench:
    """One slimmed network, and what it is judged by.

    Attributes:
        net: its name.
        model: the network.
        expected: its logits of the test images.
    """

    net: str
    model: Any
    expected: Any

    @classmethod
    def of(cls, net: str) -> Bench:
        """A bundled network."""
        import onnxslim
        from onnxslim import Pipeline
        from onnxslim.passes import Slim
        from onnxslim.runtime.session import Session

        model = Pipeline(Slim(), on_error="raise")(onnxslim.load(FASHION / f"{net}.onnx")).model
        return cls(net, model, Session(model).run({"image": _test()["image"]})["logits"])

    def made(self, chain: str, *, fitted: bool = True) -> tuple[Any, float]:
        """What a chain makes of it, and CPU seconds."""
        from onnxslim import CalibrationData, Pipeline, passes

        data = CalibrationData.from_npz(FASHION / "calibration.npz", batch_size=64) if fitted else None
        start = time.process_time()
        steps = [passes.parse(words) for words in chain.split()]
        result = Pipeline(*steps, on_error="raise")(self.model, data=data)
        return result.model, time.process_time() - start

    def row(self, how: str, found: Any, seconds: float) -> str:
        """A line of the table."""
        from onnxslim import Target
        from onnxslim.calibration.noise import sqnr
        from onnxslim.runtime.session import Session
        from onnxslim.runtime.timing import compare

        test = _test()
        one = {"image": test["image"][:1]}
        written = found.to_proto().SerializeToString()
        latency = compare((self.model, found), one, Target.cpu(threads=1), rounds=200, seconds=5)[1][1]
        logits = Session(found).run({"image": test["image"]})["logits"]
        before, after = (
            100 * float((each.argmax(1) == test["label"]).mean()) for each in (self.expected, logits)
        )
        sizes = f"{len(written) / 1e3:.0f} | {len(written) / self.model.stats().bytes:.2f}"
        kept = f"{sqnr(self.expected, logits):.1f} | {after:.2f} ({after - before:+.2f})"
        sent = f"{len(zlib.compress(written)) / 1e3:.0f}"
        return f"| {self.net} | {how} | {sizes} | {sent} | {latency:.2f} | {kept} | {seconds:.0f} |"


def kinds(bench: Bench) -> Iterator[str]:
    """All chains."""
    yield bench.row("float", bench.model, 0.0)
    for chain in CHAINS:
        yield bench.row(f"`{chain}`", *bench.made(chain))


def sparse(bench: Bench) -> Iterator[str]:
    """Zeros, ours and the peer's."""
    for options in ZEROS:
        yield bench.row(f"`sparsify:{options}`, no data", *bench.made(f"sparsify:{options}", fitted=False))
        for more in ("",) if options.startswith("pattern") else ("", ",shares=same"):
            chain = f"sparsify:{options}{more}"
            yield bench.row(f"`{chain}`", *bench.made(chain))
    yield from _peer(bench)


def _peer(bench: Bench) -> Iterator[str]:
    import onnxslim
    from benchmarks import common

    python = common.environment(common.VENVS / "onnxsim-0.8.1", ("onnxsim==0.8.1",))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "slimmed.onnx"
        bench.model.save(source)
        script = Path(__file__).with_name("peer_sparsity.py")
        command = [str(python), str(script), str(source), str(FASHION / "calibration.npz"), folder]
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        for way, seconds in json.loads(told.splitlines()[-1]).items():
            yield bench.row(f"onnxsim 0.8.1, {way}", onnxslim.load(Path(folder) / f"{way}.onnx"), seconds)


def steps(bench: Bench) -> Iterator[str]:
    """Rounds of compressing and refitting on the way: as Prune has them, and zeros in the same way."""
    for count in (1, 3):
        words = f"prune:macs=0.35,steps={count}"
        yield bench.row(f"`{words}`", *bench.made(words))
    for share in (0.5, 0.8):
        for count in (1, 2, 4):
            yield bench.row(f"{share:.0%} zeros, in {count}", *_in_steps(bench, share, count))


def _in_steps(bench: Bench, share: float, count: int) -> tuple[Any, float]:
    """Layers get their zeros in several rounds, each fitted to the float network, all behind sparse ones."""
    from dataclasses import replace

    from onnxslim import CalibrationData, Pipeline
    from onnxslim.calibration.samples import Samples
    from onnxslim.engine.base import Context, Log
    from onnxslim.passes import Sparsify
    from onnxslim.passes.fold.weights import stored_weights
    from onnxslim.passes.repair import in_turn
    from onnxslim.passes.sparsify import SparsifyFigures
    from onnxslim.passes.sparsify.fit import Thinning
    from onnxslim.passes.sparsify.patterns import Pattern

    data = CalibrationData.from_npz(FASHION / "calibration.npz", batch_size=64)
    first = Pipeline(Sparsify(sparsity=share), on_error="raise")(bench.model, data=data)
    plan = SparsifyFigures.of(first.report.steps[0].changes).plan
    assert plan is not None
    student, samples = bench.model.copy(), Samples(data, bench.model)
    weights = {weight.name: weight for weight in stored_weights(student, (), 256, Log())}
    chosen = plan.choice(weights, Thinning(share, Pattern(), "surgeon"))
    start = time.process_time()
    for step in range(1, count + 1):
        hows = {
            weight.name: replace(how, share=1.0 - (1.0 - how.share) ** (step / count))
            for weight, how in chosen.items()
        }

        def store(layer: Any, wanted: Any, gram: Any, corrected: bool, hows: Any = hows) -> Any:
            how = hows[layer.node.inputs[1].name]
            return how.fitted(layer, wanted, gram, corrected=corrected) if how.share else wanted

        names = [weight.layer.node.outputs[0].name for weight in chosen if weight.layer is not None]
        in_turn(student, bench.model, samples, names, store, target=Context().target)
    return student, time.process_time() - start


def _test() -> Any:
    return np.load(FASHION / "test.npz")


PARTS: dict[str, Callable[[Bench], Iterator[str]]] = {"kinds": kinds, "sparse": sparse, "steps": steps}


def main(part: str = "kinds", *names: str) -> None:
    """Print one table."""
    print("| " + " | ".join(HEAD) + " |")
    print("|" + "---|" * len(HEAD))
    nets: Sequence[str] = names or NETS
    for net in nets:
        for line in PARTS[part](Bench.of(net)):
            print(line, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main(*sys.argv[1:])
