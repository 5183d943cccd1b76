"""Cluster on the bundled nets and on real models: bytes, accuracy and fidelity, beside a peer's k-means.

    python benchmarks/cluster.py bits [NET ...]     4, 3 and 2 bits: with data, without, chosen, and the peer
    python benchmarks/cluster.py sent [NET ...]     beside int8: what is sent, once deflated
    python benchmarks/cluster.py priced [NET ...]   int8 whose codes are chosen by error and bits
    python benchmarks/cluster.py real [NAME ...]    real models in 4 bits; see models/zoo.py

The peer is scikit-learn's KMeans on each weight by itself, stored as ours are, so that bytes are equal; rows
of it are left out where it is not installed. "chosen" has bits for each weight, in no more bytes than the
same for all takes. The nets are fitted to their 512 calibration images and judged on 2000 others, real models
to 64 samples and judged on 64 others. Latency is interleaved with the slimmed float model's, on one thread.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

FASHION = Path(__file__).resolve().parent.parent / "models" / "fashion"
NETS = ("resnet", "mobilenet", "vit")
REAL = ("efficientnet_lite0.dynamo",)
HEAD = ("net", "codes", "bytes", "of float", "deflated", "SQNR dB", "latency", "CPU s")


def by_peer(model: Any, bits: int) -> Any:
    """The model with codes and tables of scikit-learn."""
    from sklearn.cluster import KMeans  # type: ignore[import-not-found]

    from onnxslim.engine.base import Log
    from onnxslim.passes.cluster.weights import find
    from onnxslim.passes.codes.storing import CodeWriter
    from onnxslim.passes.codes.tables import Codebook
    from onnxslim.passes.fold.weights import store_weights

    made = model.copy()
    store_weights(made)
    writer = CodeWriter(made)
    for weight in find(made, (), Log()):
        values = weight.constant.values
        kmeans = KMeans(1 << bits, n_init=1, random_state=0).fit(values.reshape(-1, 1))
        order = np.argsort(kmeans.cluster_centers_[:, 0])
        codes = np.argsort(order)[kmeans.labels_].astype(np.uint8).reshape(values.shape)
        writer.write(weight.constant, Codebook(codes, kmeans.cluster_centers_[order].T.astype(values.dtype)))
    writer.finish()
    return made


def ways(model: Any, data: Any, bits: int) -> Iterator[tuple[str, Any, float]]:
    """What is made of a slimmed model in several ways: how, the result, CPU seconds."""
    from onnxslim import Pipeline
    from onnxslim.passes import Cluster

    def made(data: Any, **options: Any) -> tuple[Any, float]:
        start = time.process_time()
        result = Pipeline(Cluster(**options), on_error="raise")(model, data=data)
        return result.model, time.process_time() - start

    if find_spec("sklearn") is not None:
        start = time.process_time()
        yield f"{bits} bits, scikit-learn", by_peer(model, bits), time.process_time() - start
    yield (f"{bits} bits, no data", *made(None, bits=bits))
    alike, seconds = made(data, bits=bits)
    yield f"{bits} bits", alike, seconds
    share = alike.stats().bytes / model.stats().bytes
    yield (f"chosen, as {bits} bits", *made(data, size=share))


def told(model: Any, found: Any, feeds: dict[str, Any]) -> str:
    """Bytes, and time of one run."""
    import zlib

    from onnxslim import Target
    from onnxslim.runtime.timing import compare

    written = found.to_proto().SerializeToString()
    ratio = compare((model, found), feeds, Target.cpu(threads=1), rounds=200, seconds=5)[1][1]
    sizes = f"{len(written) / 1e3:.1f} kB | {len(written) / model.stats().bytes:.3f}"
    return f"{sizes} | {len(zlib.compress(written, 9)) / 1e3:.1f} kB | {{}} | {ratio:.2f}"


def bits(names: tuple[str, ...]) -> Iterator[str]:
    """The bundled nets."""
    import onnxslim
    from onnxslim import CalibrationData, Pipeline
    from onnxslim.calibration.noise import sqnr
    from onnxslim.passes import Slim
    from onnxslim.runtime.session import Session

    yield from _head(*HEAD, "accuracy, %")
    test = np.load(FASHION / "test.npz")
    feeds = {"image": test["image"][:1]}
    for net in names or NETS:
        data = CalibrationData.from_npz(FASHION / "calibration.npz", batch_size=64)
        model = Pipeline(Slim(), on_error="raise")(onnxslim.load(FASHION / f"{net}.onnx")).model
        expected = Session(model).run({"image": test["image"]})["logits"]
        before = 100 * float((expected.argmax(1) == test["label"]).mean())
        for width in (4, 3, 2):
            for way, found, seconds in ways(model, data, width):
                logits = Session(found).run({"image": test["image"]})["logits"]
                after = 100 * float((logits.argmax(1) == test["label"]).mean())
                row = told(model, found, feeds).format(f"{sqnr(expected, logits):.1f}")
                yield f"| {net} | {way} | {row} | {seconds:.0f} | {after:.2f} ({after - before:+.2f}) |"


def sent(names: tuple[str, ...]) -> Iterator[str]:
    """What is sent: int8 files, and codes in 80 and 50 % of what these are once they are deflated.

    Beside them, bits by weight in as many bytes: the largest `size` that is sent as small, by halving.
    """
    import onnxslim
    from onnxslim import CalibrationData, Pipeline
    from onnxslim.calibration.noise import sqnr
    from onnxslim.ir.download import download
    from onnxslim.passes import Cluster, Quantize, Slim
    from onnxslim.runtime.session import Session

    yield from _head("net", "how", "deflated", "of int8", "SQNR dB", "CPU s")
    image = np.load(FASHION / "test.npz")["image"]
    for net in names or NETS:
        data = CalibrationData.from_npz(FASHION / "calibration.npz", batch_size=64)
        model = Pipeline(Slim(), on_error="raise")(onnxslim.load(FASHION / f"{net}.onnx")).model
        expected = Session(model).run({"image": image})["logits"]
        whole, start = download(model).deflate, time.process_time()
        int8 = Pipeline(Quantize(), on_error="raise")(model, data=data).model
        wanted = download(int8).deflate

        def made(step: Any, model: Any = model, data: Any = data) -> Any:
            return Pipeline(step, on_error="raise")(model, data=data).model

        def row(
            how: str, found: Any, start: float, wanted: int = wanted, told: tuple[Any, ...] = (net, expected)
        ) -> str:
            seconds, size = time.process_time() - start, download(found).deflate
            noise = sqnr(told[1], Session(found).run({"image": image})["logits"])
            sizes = f"{size / 1e3:.0f} kB | {size / wanted:.2f}"
            return f"| {told[0]} | {how} | {sizes} | {noise:.1f} | {seconds:.0f} |"

        yield row("int8", int8, start)
        for share in (0.8, 0.5):
            start = time.process_time()
            codes = made(Cluster(download=share * wanted / whole))
            yield row(f"codes, {share:.0%}", codes, start)
            start, least, most, best = time.process_time(), 0.02, 0.5, int8
            for _ in range(6):
                middle = (least + most) / 2
                found = made(Cluster(size=middle))
                small = download(found).deflate <= share * wanted
                least, most, best = (middle, most, found) if small else (least, middle, best)
            yield row(f"bits by weight, {share:.0%}", best, start)


def priced(names: tuple[str, ...]) -> Iterator[str]:
    """int8 files, as they are and with `download=`."""
    import onnxslim
    from onnxslim import CalibrationData, Pipeline
    from onnxslim.calibration.noise import sqnr
    from onnxslim.ir.download import download
    from onnxslim.passes import Quantize, Slim
    from onnxslim.runtime.session import Session

    yield from _head("net", "download", "deflated", "of int8", "SQNR dB", "accuracy, %", "CPU s")
    test = np.load(FASHION / "test.npz")
    for net in names or NETS:
        data = CalibrationData.from_npz(FASHION / "calibration.npz", batch_size=64)
        model = Pipeline(Slim(), on_error="raise")(onnxslim.load(FASHION / f"{net}.onnx")).model
        expected = Session(model).run({"image": test["image"]})["logits"]
        whole = 0
        for share in (None, 0.9, 0.8, 0.7):
            start = time.process_time()
            found = Pipeline(Quantize(download=share), on_error="raise")(model, data=data).model
            seconds, size = time.process_time() - start, download(found).deflate
            whole = whole or size
            logits = Session(found).run({"image": test["image"]})["logits"]
            right = 100 * float((logits.argmax(1) == test["label"]).mean())
            row = f"{size / 1e3:.0f} kB | {size / whole:.2f} | {sqnr(expected, logits):.1f} | {right:.2f}"
            yield f"| {net} | {share or '–'} | {row} | {seconds:.0f} |"


def real(names: tuple[str, ...]) -> Iterator[str]:
    """Real models."""
    import onnxslim
    from benchmarks.real import agreement
    from onnxslim import CalibrationData, Pipeline
    from onnxslim.calibration.noise import sqnr
    from onnxslim.models import zoo
    from onnxslim.passes import Slim
    from onnxslim.runtime.session import Session

    yield from _head(*HEAD, "same class")
    for name in names or REAL:
        data = CalibrationData(zoo.inputs(name, 64, seed=0))
        model = Pipeline(Slim(), on_error="raise")(onnxslim.load(zoo.path(name)), data=data).model
        feeds = zoo.inputs(name, 64, seed=1)
        session = Session(model)
        expected = [session.run(batch) for batch in feeds]
        for way, found, seconds in ways(model, data, 4):
            session = Session(found)
            outputs = [session.run(batch) for batch in feeds]
            row = told(model, found, feeds[0]).format(f"{sqnr(expected, outputs):.1f}")
            yield f"| {name} | {way} | {row} | {seconds:.0f} | {agreement(name, expected, outputs)} |"


def _head(*names: str) -> Iterator[str]:
    yield "| " + " | ".join(names) + " |"
    yield "|" + "---|" * len(names)


PARTS = {"bits": bits, "real": real, "sent": sent, "priced": priced}


def main() -> None:
    """Print one table."""
    part = sys.argv[1] if len(sys.argv) > 1 else "bits"
    for line in PARTS[part](tuple(sys.argv[2:])):
        print(line, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
