"""Candidates that were measured."""

from __future__ import annotations

from dataclasses import dataclass

from onnxslim.calibration.fidelity import Score
from onnxslim.passes.quantize.build import Builder, Candidate
from onnxslim.passes.quantize.choices import Variant


@dataclass(frozen=True, eq=False)
class Trial:
    """A candidate that was measured.

    Attributes:
        variant: of the candidate.
        build: what made it.
        candidate: it.
        score: what it keeps of the outputs.
    """

    variant: Variant
    build: Builder
    candidate: Candidate
    score: Score

    @property
    def held(self) -> int:
        """Weighted nodes that are more exact than the others."""
        return len(self.build.strategy.held_back(self.variant))
