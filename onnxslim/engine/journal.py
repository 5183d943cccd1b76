"""Which pass is at work, for somebody who may outlive the process it works in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from onnxslim.errors import PassError


class Journal:
    """Tells which pass of a pipeline is at work, and knows which ones ended a process before.

    Args:
        ended: by position in the pipeline, how the process came to an end in that pass.
    """

    def __init__(self, ended: Mapping[int, str] | None = None) -> None:
        self.ended = dict(ended or {})

    @contextmanager
    def within(self, position: int) -> Iterator[None]:
        """That pass is at work."""
        self.note(position)
        try:
            yield
        finally:
            self.note(None)

    def note(self, position: int | None) -> None:
        """Write down who is at work; nobody reads it here."""

    def failure(self, position: int, name: str) -> PassError | None:
        """What to say of that pass if it ended a process before."""
        how = self.ended.get(position)
        told = f"pass '{name}' ended the process with {how}; please report this with the model"
        return None if how is None else PassError(told, pass_name=name)
