"""A limit of time: steps that tell how far they are stop when it is over, and the best so far is taken."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from onnxslim.engine.base import Progress
from onnxslim.errors import TimeUp, UsageError


@dataclass(frozen=True)
class Deadline:
    """When work that begins now has to be done.

    Attributes:
        seconds: from now on.

    Raises:
        UsageError: that is no time at all.
    """

    seconds: float
    _start: float = field(default_factory=lambda: time.monotonic(), init=False)

    def __post_init__(self) -> None:
        """Refuse what nothing can be done in."""
        if not self.seconds > 0:
            raise UsageError(f"a time limit is a number of seconds above 0, not {self.seconds:g}")

    @property
    def passed(self) -> bool:
        """Whether it is over."""
        return time.monotonic() - self._start > self.seconds

    def require(self) -> None:
        """Raise TimeUp if it is over."""
        if self.passed:
            raise TimeUp(f"the time limit of {self.seconds:g} s was over")

    def watching(self, progress: Progress | None) -> Progress:
        """The same callback, which ends the step that calls it once the time is over, by TimeUp."""

        def report(what: str, done: int, total: int | None) -> None:
            if progress is not None:
                progress(what, done, total)
            self.require()

        return report
