"""Does a search by sentence embeddings still find what it found: docstrings of Python's own library.

    python benchmarks/retrieval.py [--calibration 32] [MODEL.onnx ...]

The query is the first line of a docstring, the passages are what follows it, of all docstrings. Of the float
MiniLM, of what Quantize makes of it (static, on sentences of another kind, and dynamic), and of models given:
the share of queries whose own passage comes first, and the mean of 1 / rank.
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import onnxslim
from onnxslim import CalibrationData, Pipeline
from onnxslim.ir.graph import Array
from onnxslim.models import zoo
from onnxslim.passes import Quantize, Slim
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target

MODEL = "minilm.dynamo"
TOKENS = 128
PAIRS = 500
Run = Callable[[Mapping[str, Array]], Mapping[str, Any]]


class Found(NamedTuple):
    """Recall at 1 and mean reciprocal rank."""

    recall: float
    mrr: float

    def __str__(self) -> str:
        return f"recall@1 {self.recall:.3f}, MRR {self.mrr:.3f}"


def pairs() -> list[tuple[str, str]]:
    """First lines of docstrings and what follows them, evenly spread over the library, each line once."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in sorted(folder.rglob("*.py")) if not {"test", "site-packages"} & set(file.parts)]
    found = dict(pair for file in files for pair in _docstrings(file))
    chosen = np.linspace(0, len(found) - 1, min(PAIRS, len(found))).astype(int)
    return [list(found.items())[index] for index in chosen]


def _docstrings(file: Path) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
            first, _, rest = (ast.get_docstring(node) or "").partition("\n")
            if len(first.split()) >= 4 and len(rest.split()) >= 15:
                yield first, " ".join(rest.split())


def measure(run: Run) -> Found:
    """How well a model that embeds sentences finds passages; each text is a batch of its own, unpadded."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(zoo.asset("minilm.tokenizer.json")))
    tokenizer.no_padding()
    tokenizer.enable_truncation(TOKENS)
    known = pairs()
    queries, passages = (_embedded(run, tokenizer, [pair[side] for pair in known]) for side in (0, 1))
    likeness = queries @ passages.T
    ranks = (likeness > np.diag(likeness)[:, None]).sum(axis=1) + 1
    return Found(float((ranks == 1).mean()), float((1 / ranks).mean()))


def _embedded(run: Run, tokenizer: Any, texts: Sequence[str]) -> Array:
    rows = []
    for line in tokenizer.encode_batch(list(texts)):
        feeds = {"input_ids": line.ids, "attention_mask": line.attention_mask}
        row = next(iter(run({name: np.array([ids], np.int64) for name, ids in feeds.items()}).values()))[0]
        rows.append(row / np.linalg.norm(row))
    return np.stack(rows)


def main() -> None:
    """Print one line per model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--calibration", type=int, default=32)
    given = parser.parse_args()
    model = onnxslim.load(zoo.path(MODEL))
    data = CalibrationData(zoo.inputs(MODEL, given.calibration, seed=0))
    candidates: dict[str, Any] = {
        "float": model,
        "Quantize()": Pipeline(Slim(), Quantize())(model, data=data).model,
        "Quantize(activations='dynamic')": Pipeline(Slim(), Quantize(activations="dynamic"))(model).model,
        "Quantize(activations='dynamic'), with data": Pipeline(Slim(), Quantize(activations="dynamic"))(
            model, data=data
        ).model,
        **{path.name: path for path in given.models},
    }
    print(f"{len(pairs())} pairs")
    for name, candidate in candidates.items():
        print(f"{name}: {measure(Session(candidate, Target.cpu(threads=1)).run)}", flush=True)


if __name__ == "__main__":
    main()
