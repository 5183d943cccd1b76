"""Candidates that were measured."""

from __future__ import annotations

from dataclasses import dataclass

from onnxslim.calibration.fidelity import Score
from onnxslim.passes.quantize.build import Builder, Candidate, Recipe


@dataclass(frozen=True)
class Trial:
    """A candidate that was measured.

    Attributes:
        recipe: of the candidate.
        build: what made it.
        candidate: it.
        score: what it keeps of the outputs.
    """

    recipe: Recipe
    build: Builder
    candidate: Candidate
    score: Score
