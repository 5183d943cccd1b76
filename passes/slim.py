"""Lossless simplification, everything at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, repeat
from typing import ClassVar

from pydantic import Field

from onnxslim import shapes
from onnxslim.engine.base import Changes, Context, Log, Pass, options
from onnxslim.engine.pipeline import MAX_ROUNDS
from onnxslim.errors import UsageError
from onnxslim.ir import proto
from onnxslim.ir.model import Model
from onnxslim.passes import eliminate, fuse
from onnxslim.passes.dead import NOTES, Dead
from onnxslim.passes.dedupe import Dedupe
from onnxslim.passes.eliminate import Eliminate
from onnxslim.passes.fold import Fold
from onnxslim.passes.fold.values import TOO_LARGE
from onnxslim.passes.fuse import Fuse
from onnxslim.passes.inline import Inline, calls
from onnxslim.passes.unfuse import Unfuse, writable


@options
class Slim(Pass):
    """Make a model smaller and faster without changing what it computes.

    Inlines functions, writes ONNX Runtime's own operators in standard ones, folds constants, drops and fuses
    operators, merges duplicates and removes what nothing reads, in turn until nothing changes any more.
    Functions and operators of ONNX Runtime's own stay if the model would be larger without them.
    """

    name: ClassVar[str] = "slim"
    lossless: ClassVar[bool] = True

    skip: tuple[str, ...] = Field((), description="parts (fold, eliminate, …) or single rules to leave out")
    max_growth: int = Field(0, ge=0, description="bytes by which folding may make the model larger")

    drop_notes: bool = Field(False, description=NOTES)

    def __post_init__(self) -> None:
        """Refuse names of nothing."""
        known = {*_PARTS, *_ELIMINATE, *_FUSE, *_DEDUPE}
        for name in self.skip:
            if name not in known:
                listed = ", ".join(sorted(known))
                raise UsageError(f"there is no part or rule '{name}' to skip; known are: {listed}")

    def parts(self) -> tuple[Pass, ...]:
        """The passes it consists of, in order."""
        every: tuple[Pass, ...] = (
            Inline(),
            Unfuse(which="free"),
            Fold(max_growth=self.max_growth),
            Eliminate(skip=self._skipped(_ELIMINATE)),
            Fuse(skip=self._skipped(_FUSE)),
            Dedupe(constants="equal-constants" not in self.skip, nodes="equal-nodes" not in self.skip),
            Dead(drop_notes=self.drop_notes),
        )
        return tuple(part for part in every if part.name not in self.skip)

    def fits(self, before: Model, after: Model) -> bool:
        """Whether the model has not grown by more than it may."""
        return _size(after) <= _size(before) + self.max_growth

    def _skipped(self, rules: frozenset[str]) -> tuple[str, ...]:
        return tuple(name for name in self.skip if name in rules)

    def run(self, model: Model, ctx: Context) -> Changes:
        """Run the parts in turn until each has left the model as it is."""
        limit = _size(model) + self.max_growth
        for left_out in self._ways(model):
            twin, log = model.copy(), Log()
            log.add(replace(self, skip=(*self.skip, *left_out))._run(twin, ctx, limit))
            for name in left_out:
                log.skip(name, "left out: the model would be larger for it")
            changes = log.done()
            if not changes:
                return changes
            if _size(twin) <= limit:
                break
        model.become(twin)
        return changes

    def _ways(self, model: Model) -> list[tuple[str, ...]]:
        """What to leave out, one after the other until the model does not grow."""
        ways: list[tuple[str, ...]] = [(), _GROWING]
        foreign = next(writable(model, "free"), None) is not None
        for part, pays in ((Unfuse, foreign), (Inline, next(calls(model), None) is not None)):
            if pays and part.name not in self.skip:
                ways += [(part.name, *way) for way in ways]
        return ways

    def _run(self, model: Model, ctx: Context, limit: int) -> Changes:
        """Run the parts, and spend on constants what that has saved."""
        changes = _settle(self.parts(), model, ctx)
        left = limit - _size(model) if any(TOO_LARGE in skip.reason for skip in changes.skipped) else 0
        if left > self.max_growth:
            twin = model.copy()
            more = Fold(max_growth=left).run(twin, ctx)
            shapes.keep(twin)
            rest = _settle(self.parts(), twin, ctx)
            if more and _size(twin) <= limit:
                model.become(twin)
                log = Log()
                for each in (changes, more):
                    log.add(Changes(each.changed))
                log.add(rest)
                return log.done()
        return changes


def _size(model: Model) -> int:
    """Bytes of a model in a file; of a large one without the few it takes to say where a constant begins."""
    if model.nbytes() >= _COUNTED_BYTES:
        return model.stats().bytes
    return model.to_proto_with(proto.encode_embedded).ByteSize()


def _settle(parts: Sequence[Pass], model: Model, ctx: Context) -> Changes:
    log = Log()
    last: dict[str, Changes] = {}
    idle = 0
    for part in chain.from_iterable(repeat(parts, MAX_ROUNDS)):
        last[part.name] = changes = part.run(model, ctx)
        shapes.keep(model)
        log.add(Changes(changes.changed))
        idle = 0 if changes else idle + 1
        if idle == len(parts):
            break
    # What was skipped at first may have been done later.
    for changes in last.values():
        log.add(Changes((), changes.skipped))
    return log.done()


# Up to this many bytes of constants, a model is written to see how large it is.
_COUNTED_BYTES = 1 << 20
# Rules whose result may take more space than what it replaces.
_GROWING = ("transpose-view", "gated-skip")
_PARTS = frozenset(part.name for part in (Inline, Unfuse, Fold, Eliminate, Fuse, Dedupe, Dead))
_ELIMINATE = frozenset(rule.name for rule in eliminate.RULES)
_DEDUPE = frozenset(("equal-constants", "equal-nodes"))
_FUSE = frozenset(rule.name for rule in fuse.RULES)
