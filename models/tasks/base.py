"""A task: inputs for a network, some of them with the truth, and how good an answer is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from onnxslim.models import stage, zoo
from onnxslim.models.inputs import Feed
from onnxslim.models.tasks.estimates import Outcomes
from onnxslim.runtime.metric import Run

Outputs: TypeAlias = Mapping[str, Any]
"""What a model makes of one feed, by name."""


class Task(ABC):
    """What a network is for, as data.

    Samples to calibrate on, samples without truth and those of the test come from different sources: none of
    them sees a picture, text, font, speaker or file of another. All are the same in every run.

    Args:
        model: one of `models`; the first by default.

    Raises:
        ValueError: it is none of them.
    """

    name: ClassVar[str]
    models: ClassVar[tuple[str, ...]]
    """Networks it is a task for, by their names in the zoo."""
    sources: ClassVar[tuple[str, ...]] = ()
    """What it reads of `onnxslim.models.stage`."""

    def __init__(self, model: str = "") -> None:
        self.model = model or self.models[0]
        if self.model not in self.models:
            raise ValueError(f"task {self.name} is not for {self.model!r}, but for {', '.join(self.models)}")

    def missing(self) -> list[str]:
        """Commands that fetch what is not in the cache yet; none if everything is there."""
        lacking = [name for name in self.sources if not stage.available(name)]
        fetch = [f"python models/stage.py fetch {' '.join(lacking)}"] if lacking else []
        return fetch if self.path().is_file() else [*fetch, f"python models/{self._maker()} {self.model}"]

    def _maker(self) -> str:
        return "export.py" if zoo.MODELS[self.model].exporter else "zoo.py fetch"

    def path(self) -> Path:
        """The file of the network, which need not be there yet."""
        return zoo.cache() / f"{self.model}.onnx"

    @abstractmethod
    def calibration(self, samples: int) -> list[Feed]:
        """So many feeds of one sample each, to calibrate on.

        Raises:
            FileNotFoundError: a source was not fetched; the text says which command does.
            ValueError: there are not so many.
        """

    @abstractmethod
    def unlabelled(self, samples: int) -> list[Feed]:
        """So many other feeds of one sample each, to repair or to distil on; raises as `calibration`."""

    def test(self) -> Sequence[Feed]:
        """The feeds of the test, in order; made once.

        Raises:
            FileNotFoundError: a source was not fetched; the text says which command does.
        """
        return self._test

    @cached_property
    def _test(self) -> Sequence[Feed]:
        return self._make_test()

    @abstractmethod
    def _make_test(self) -> Sequence[Feed]: ...

    @abstractmethod
    def judge(self, outputs: Sequence[Outputs]) -> tuple[Outcomes, ...]:
        """How good the outputs for `test` are, feed by feed; the first of the scores is what counts."""

    def metric(self, run: Run) -> float:
        """The score that counts, of a model run on the test; for `max_drop` and the like. More is better."""
        return self.judge([run(feeds) for feeds in self.test()])[0].value


def first(outputs: Outputs) -> Any:
    """The first output of a model."""
    return next(iter(outputs.values()))
