"""Random chains of operators that rules look at, with taps in the middle: outputs stay what they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import onnx
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim.engine.base import Context
from onnxslim.ir.model import Model, load
from onnxslim.passes.eliminate import Eliminate
from onnxslim.passes.fuse import Fuse
from onnxslim.passes.slim import Slim
from tests.helpers import apply, feeds_for, same_outputs
from tests.traps.chains import random_chain

Option = TypeVar("Option")
RANDOM = np.random.default_rng(1)


@dataclass(frozen=True)
class Searched:
    """Choices that hypothesis makes, and makes simpler where one fails."""

    data: st.DataObject

    def integer(self, low: int, high: int) -> int:
        """One of these or between them."""
        return self.data.draw(st.integers(low, high))

    def one_of(self, options: Sequence[Option]) -> Option:
        """One of these."""
        return self.data.draw(st.sampled_from(options))

    def order(self, count: int) -> list[int]:
        """The numbers below, in some order."""
        return self.data.draw(st.permutations(range(count)))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_random_graphs(data: st.DataObject) -> None:
    before = random_chain(Searched(data), RANDOM).model()
    after = before.copy()
    for _ in range(3):
        Eliminate().run(after, Context())
        Fuse().run(after, Context())
    slim, _ = apply(Slim(), before)
    for flag in (True, False):
        feeds = feeds_for(before) | {"flag": np.array(flag)}
        for result in (after, slim):
            same_outputs(before, result, feeds)
    written = _bytes(slim)
    assert written == _bytes(apply(Slim(), before)[0]), "another run makes another file"
    again, changes = apply(Slim(), load(onnx.load_from_string(written)))
    assert not changes, "there was more to do"
    assert _bytes(again) == written
    assert len(written) <= len(_bytes(before)), "the file has grown"


def _bytes(model: Model) -> bytes:
    return model.to_proto().SerializeToString(deterministic=True)
