"""The state of learning in a file, from which it goes on where it was interrupted."""

from __future__ import annotations

import time
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from onnxslim.errors import UsageError
from onnxslim.ir.files import commit, staging
from onnxslim.ir.graph import Array

# Seconds between two states.
EVERY = 60.0
_KEY = "key"


class Checkpoint:
    """A file with the last state.

    Args:
        path: of the file; made when the first state is due, removed when learning has come to its end.
        key: of what is learnt; a file with another one is of something else.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        self._last = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time for another state."""
        return time.monotonic() - self._last >= EVERY

    def write(self, state: Mapping[str, Array]) -> None:
        """Put a state in the place of the one before.

        Raises:
            SaveError: it cannot be written.
        """
        with staging(self._path) as folder:
            staged = folder / "state.npz"
            np.savez(staged, **{_KEY: np.array(self._key)}, **state)  # type: ignore[arg-type]
            commit(staged, self._path)
        self._last = time.monotonic()

    def read(self) -> dict[str, Array] | None:
        """The last state; None if there is none.

        Raises:
            UsageError: the file is not one, or of something else.
        """
        if not self._path.exists():
            return None
        try:
            with np.load(self._path, allow_pickle=False) as file:
                state = dict(file)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise UsageError(f"'{self._path}' is no checkpoint: remove it, or name another file") from error
        if _KEY not in state or str(state.pop(_KEY)) != self._key:
            raise UsageError(
                f"the checkpoint '{self._path}' is of another model, data or options: remove it, or name "
                "another file"
            )
        return state

    def remove(self) -> None:
        """Nothing is left to go on with."""
        self._path.unlink(missing_ok=True)
