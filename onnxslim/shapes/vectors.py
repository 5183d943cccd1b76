"""Short vectors of sizes, and what the rules about shapes may ask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from onnxslim.ir.graph import Array, Tensor
from onnxslim.shapes.symbols import Term

# Longer vectors than any shape computation needs are not followed.
MAX_LENGTH = 64
INTEGERS = (np.dtype(np.int64), np.dtype(np.int32), np.dtype(np.bool_))


@dataclass(frozen=True)
class Vector:
    """A scalar or a vector of integers.

    Attributes:
        terms: its elements; None where nothing is known.
        dtype: int64, int32 or bool.
        scalar: whether it has no axis, rather than one.
    """

    terms: tuple[Term | None, ...]
    dtype: np.dtype[Any] = INTEGERS[0]
    scalar: bool = False

    @property
    def numbers(self) -> tuple[int, ...] | None:
        """The elements if all of them are numbers."""
        found = tuple(term for term in self.terms if isinstance(term, int))
        return found if len(found) == len(self.terms) else None

    @property
    def only(self) -> Term | None:
        """The element, if there is only one."""
        return self.terms[0] if len(self.terms) == 1 else None

    def array(self) -> Array | None:
        """The tensor, if all elements are numbers."""
        numbers = self.numbers
        if numbers is None:
            return None
        return np.array(numbers[0] if self.scalar else numbers, self.dtype)


class KnownShapes(Protocol):
    """What is known of a model so far; `Dims` of the whole of it."""

    opset: int

    def dtype(self, tensor: Tensor) -> np.dtype[Any] | None:
        """Type of a tensor's elements, if it is certain."""

    def shape(self, tensor: Tensor | None) -> tuple[Term, ...] | None:
        """Size of each axis of a tensor; None if its rank is not certain."""

    def sizes(self, tensor: Tensor) -> tuple[int, ...] | None:
        """Shape of a tensor if all of it is known."""

    def value(self, tensor: Tensor | None) -> Vector | None:
        """What is known of the elements of a short integer tensor."""
