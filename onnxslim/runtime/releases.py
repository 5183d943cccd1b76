"""Releases of ONNX Runtime: what each is made for, as its table of compatibility has it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from onnxslim.errors import UsageError

# Of operators as they were in this opset or before, ONNX Runtime has kernels, or functions of such; some of
# what came later it reads and has none for.
SETTLED = 21


@dataclass(frozen=True)
class Release:
    """What a release reads.

    Attributes:
        opset: the newest version of the standard operators.
        ir_version: the newest version of the file format.
    """

    opset: int
    ir_version: int


# From which minor release on. Measured: a model of one Identity in each opset and IR version, opened by each
# release (decision 76). That a release reads an opset does not say that it has kernels for all of it.
_RELEASES = {
    15: Release(18, 9),
    16: Release(19, 9),
    17: Release(20, 9),
    18: Release(21, 10),
    21: Release(22, 10),
    23: Release(23, 11),
    24: Release(25, 13),
    25: Release(26, 13),
    32: Release(28, 14),
}
_FIRST, _LAST = min(_RELEASES), max(_RELEASES)


def release(version: str) -> Release:
    """What a release of ONNX Runtime reads.

    Args:
        version: "1.15" or "1.15.1".

    Raises:
        UsageError: it is none that is known.
    """
    found = re.fullmatch(r"1\.(\d+)(\.\d+)?", version)
    minor = int(found[1]) if found else 0
    if not _FIRST <= minor <= _LAST:
        raise UsageError(
            f"what ONNX Runtime {version} reads is not known, but of 1.{_FIRST} to 1.{_LAST}: "
            "give the opset instead"
        )
    return _RELEASES[max(each for each in _RELEASES if each <= minor)]
