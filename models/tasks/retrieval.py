"""Does a search by sentence embeddings find what it should."""

from __future__ import annotations

import ast
import re
import sysconfig
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from onnxslim.ir.graph import Array
from onnxslim.models import stage, zoo
from onnxslim.models.inputs import Feed, tokenizer, tokens
from onnxslim.models.tasks.base import Outputs, Task, first
from onnxslim.models.tasks.estimates import Outcomes

# Longer texts are cut.
TOKENS = 128


class Encoding(Task):
    """What sentence encoders are for. Texts are batches of their own, unpadded."""

    models = ("minilm.dynamo", "minilm.torchscript", "mpnet.dynamo")

    def feeds(self, texts: Sequence[str]) -> list[Feed]:
        """One feed of the tokens of each text."""
        encoder = tokenizer(self.model.split(".")[0])
        encoder.enable_truncation(TOKENS)
        return [tokens(line) for line in encoder.encode_batch(list(texts))]


def unit_rows(outputs: Sequence[Outputs]) -> Array:
    """Embeddings of length one, float64 [texts, size]."""
    rows = np.concatenate([first(found) for found in outputs]).astype(np.float64)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


class Retrieval(Encoding):
    """Recall at 1 and the mean of 1 / rank: queries, each with one passage among all that it should find."""

    @abstractmethod
    def pairs(self) -> list[tuple[str, str]]:
        """Queries and their passages."""

    def _make_test(self) -> Sequence[Feed]:
        queries, passages = zip(*self.pairs(), strict=True)
        return self.feeds([*queries, *passages])

    def judge(self, outputs: Sequence[Outputs]) -> tuple[Outcomes, ...]:
        """Recall at 1 and the mean reciprocal rank, of cosine similarities."""
        ranks = ranked(*np.split(unit_rows(outputs), 2))
        return Outcomes.of("recall@1", ranks == 1), Outcomes.of("MRR", 1 / ranks)


def ranked(queries: Array, passages: Array) -> Array:
    """The rank of each query's own passage, from 1; what is as near as it comes before it."""
    likeness = queries @ passages.T
    return np.asarray((likeness >= np.diag(likeness)[:, None]).sum(axis=1))


class Entry(NamedTuple):
    """A meaning in WordNet: its first word and its gloss, without examples."""

    word: str
    gloss: str


class Glosses(Retrieval):
    """WordNet: a gloss should find the noun that it explains, among a thousand.

    Calibrated on other glosses, with words among them; `unlabelled` has others still.
    """

    name = "glosses"
    sources = ("wordnet",)
    tested, calibrated = 1000, 4096

    def pairs(self) -> list[tuple[str, str]]:
        """Glosses and their words."""
        return [(entry.gloss, entry.word) for entry in self._entries()[: self.tested]]

    def calibration(self, samples: int) -> list[Feed]:
        """Glosses, and every fourth time a word."""
        if samples > self.calibrated:
            raise ValueError(f"{self.name} has {self.calibrated} samples to calibrate on, not {samples}")
        return self._mixed(self.tested, samples)

    def unlabelled(self, samples: int) -> list[Feed]:
        """The same of other entries, 20,000 and more of them."""
        return self._mixed(self.tested + self.calibrated, samples)

    def _mixed(self, start: int, samples: int) -> list[Feed]:
        entries = self._entries()[start : start + samples]
        if len(entries) < samples:
            raise ValueError(f"{self.name} has {len(entries)} such samples, not {samples}")
        return self.feeds([e.word if i % 4 == 3 else e.gloss for i, e in enumerate(entries)])

    @classmethod
    def texts(cls) -> list[str]:
        """All glosses, in the same order."""
        return [entry.gloss for entry in cls._entries()]

    @staticmethod
    @cache
    def _entries() -> list[Entry]:
        """All that serve, in an order that has nothing to do with their meaning; no word, no gloss twice."""
        text = (stage.folder("wordnet") / "data.noun").read_text("ascii")
        words: dict[str, Entry] = {}
        for entry in entries(text):
            words.setdefault(entry.word.lower(), entry)
        found = list({entry.gloss: entry for entry in words.values()}.values())
        return [found[index] for index in np.random.default_rng(0).permutation(len(found))]


def entries(text: str) -> Iterator[Entry]:
    """Meanings in a data file of WordNet, but names, short glosses and those that say the word itself."""
    for line in text.splitlines():
        if line.startswith("  "):  # the licence
            continue
        fields, _, explained = line.partition(" | ")
        word = fields.split()[4].replace("_", " ")
        gloss = re.split(r'[;:] "', explained)[0].strip()
        if word.islower() and len(gloss.split()) >= 5 and not set(_stems(word)) & set(_stems(gloss)):
            yield Entry(word, gloss)


def _stems(text: str) -> list[str]:
    return [word[:5] for word in re.findall(r"[a-z]+", text.lower()) if len(word) > 3]


class Docstrings(Retrieval):
    """Python's own library: the first line of a docstring should find what follows it. Nothing is fetched.

    Calibrated on sentences of another kind; `unlabelled` are docstrings that the test leaves out.
    """

    name = "docstrings"
    tested = 500

    def pairs(self) -> list[tuple[str, str]]:
        """First lines and what follows them, evenly spread over the library."""
        known = _docstrings()
        return [known[index] for index in self._chosen(len(known))]

    def _chosen(self, known: int) -> list[int]:
        return [int(index) for index in np.linspace(0, known - 1, min(self.tested, known)).astype(int)]

    def calibration(self, samples: int) -> list[Feed]:
        """Sentences, one to three at a time."""
        return zoo.inputs(self.model, samples, seed=0)

    def unlabelled(self, samples: int) -> list[Feed]:
        """What follows other first lines."""
        known = _docstrings()
        chosen = set(self._chosen(len(known)))
        texts = [rest for index, (_, rest) in enumerate(known) if index not in chosen][:samples]
        if len(texts) < samples:
            raise ValueError(f"{self.name} has {len(texts)} such samples, not {samples}")
        return self.feeds(texts)


@cache
def _docstrings() -> list[tuple[str, str]]:
    """First lines of docstrings and what follows them, each first line once."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in sorted(folder.rglob("*.py")) if not {"test", "site-packages"} & set(file.parts)]
    return list(dict(pair for file in files for pair in _in_file(file)).items())


def _in_file(file: Path) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
            line, _, rest = (ast.get_docstring(node) or "").partition("\n")
            if len(line.split()) >= 4 and len(rest.split()) >= 15:
                yield line, " ".join(rest.split())
