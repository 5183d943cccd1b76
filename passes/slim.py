"""Lossless simplification, everything at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, repeat
from typing import ClassVar

from pydantic import Field

from onnxslim.errors import UsageError
from onnxslim.model import Model
from onnxslim.passes import eliminate, fuse
from onnxslim.passes.dead import Dead
from onnxslim.passes.dedupe import Dedupe
from onnxslim.passes.eliminate import Eliminate
from onnxslim.passes.fold import Fold
from onnxslim.passes.fuse import Fuse
from onnxslim.passes.inline import Inline, calls
from onnxslim.pipeline import MAX_ROUNDS, Changes, Context, Log, Pass, options


@options
class Slim(Pass):
    """Make a model smaller and faster without changing what it computes.

    Inlines functions, folds constants, drops and fuses operators, merges duplicates and removes what nothing
    reads, in turn until nothing changes any more. Functions stay if the model would be larger without them.
    """

    name: ClassVar[str] = "slim"
    lossless: ClassVar[bool] = True

    skip: tuple[str, ...] = Field((), description="parts (fold, eliminate, …) or single rules to leave out")

    def __post_init__(self) -> None:
        """Refuse names of nothing."""
        known = {*_PARTS, *_ELIMINATE, *_FUSE}
        for name in self.skip:
            if name not in known:
                listed = ", ".join(sorted(known))
                raise UsageError(f"there is no part or rule '{name}' to skip; known are: {listed}")

    def parts(self) -> tuple[Pass, ...]:
        """The passes it consists of, in order."""
        every: tuple[Pass, ...] = (
            Inline(),
            Fold(),
            Eliminate(skip=self._skipped(_ELIMINATE)),
            Fuse(skip=self._skipped(_FUSE)),
            Dedupe(),
            Dead(),
        )
        return tuple(part for part in every if part.name not in self.skip)

    def _skipped(self, rules: frozenset[str]) -> tuple[str, ...]:
        return tuple(name for name in self.skip if name in rules)

    def run(self, model: Model, ctx: Context) -> Changes:
        """Run the parts in turn until each has left the model as it is."""
        parts = self.parts()
        without = [part for part in parts if part.name != Inline.name]
        if len(without) == len(parts) or next(calls(model), None) is None:
            return _settle(without, model, ctx)
        twin = model.copy()
        changes = _settle(parts, twin, ctx)
        if twin.stats().bytes <= model.stats().bytes:
            model.become(twin)
            return changes
        log = Log()
        log.add(_settle(without, model, ctx))
        log.skip(model.graph.name, "functions stay: the model would be larger without them")
        return log.done()


def _settle(parts: Sequence[Pass], model: Model, ctx: Context) -> Changes:
    log = Log()
    last: dict[str, Changes] = {}
    idle = 0
    for part in chain.from_iterable(repeat(parts, MAX_ROUNDS)):
        last[part.name] = changes = part.run(model, ctx)
        log.add(Changes(changes.changed, (), changes.facts))
        idle = 0 if changes else idle + 1
        if idle == len(parts):
            break
    # What was skipped at first may have been done later.
    for changes in last.values():
        log.add(Changes((), changes.skipped))
    return log.done()


_PARTS = frozenset(part.name for part in (Inline, Fold, Eliminate, Fuse, Dedupe, Dead))
_ELIMINATE = frozenset(rule.name for rule in eliminate.RULES)
_FUSE = frozenset(rule.name for rule in fuse.RULES)
