"""Plans: what a pass chose for a model, as data to look at, keep, compare and replay without a search.

A file is JSON: `kind`, the pass that the plan is of, `version` of the format of that kind, and the fields of
the plan. Entries of lists of objects are on lines of their own, so that a diff tells which layers differ.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated
from pydantic_core import CoreSchema, PydanticCustomError, core_schema
from typing_extensions import Self, dataclass_transform

from onnxslim.errors import UsageError, nearest
from onnxslim.formats import plain

# What files say that were written when only pruning had plans, and none said whose it is.
_FIRST = "prune"
C = TypeVar("C")


@dataclass_transform(frozen_default=True)
def strict(cls: type[C]) -> type[C]:
    """Make a class a frozen dataclass that takes values of just the types of its fields, and no others."""
    checked = validated(frozen=True, repr=False, config=ConfigDict(strict=True, extra="forbid"))
    return checked(cls)  # type: ignore[return-value]


class PassPlan:
    """A plan of one pass; subclasses are dataclasses made by `strict`, which add these two fields last.

    Attributes:
        kind: name of the pass.
        version: of the format; rises when older code would read a plan wrongly.
    """

    kind: str
    version: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in the file."""
        return {"kind": self.kind, "version": self.version, **plain(self)}

    def to_json(self) -> str:
        """Readable JSON, the same for the same plan."""
        lines = [f"  {json.dumps(key)}: {_text(value)}" for key, value in self.to_dict().items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The plan in JSON text.

        Raises:
            UsageError: it is not a plan of this kind and version; says why.
        """
        try:
            document = json.loads(text, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise cls._refused(f"not JSON: {error}") from None
        if not isinstance(document, dict):
            raise cls._refused("not an object with keys")
        kind, version = document.pop("kind", _FIRST), document.pop("version", None)
        if kind != cls.kind:
            raise cls._refused(f"it is of pass {kind!r}")
        if version != cls.version or isinstance(version, bool):
            raise cls._refused(f"it has version {version!r}, and this onnxslim reads {cls.version}")
        try:
            return TypeAdapter(cls).validate_json(json.dumps(document))
        except ValidationError as error:
            found = error.errors(include_url=False)[0]
            where = ".".join(map(str, found["loc"]))
            unknown = found["type"] == "unexpected_keyword_argument"
            raise cls._refused(f"{where}: {'there is no such key' if unknown else found['msg']}") from None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The plan in a file.

        Raises:
            UsageError: the file cannot be read, or is not such a plan; names it.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the plan '{path}': {error}") from error
        try:
            return cls.from_json(text)
        except UsageError as error:
            raise UsageError(f"'{path}' is {error}") from error

    def joined(self, other: Self) -> Self:
        """What two plans of one model do together, where no layer or family is in both."""
        raise NotImplementedError

    @classmethod
    def given(cls, plan: Path | Self) -> Self:
        """The plan that is the option of a pass: in Python the plan itself, or a file of it.

        Raises:
            UsageError: see `load`.
        """
        return cls.load(plan) if isinstance(plan, Path) else plan

    def __repr__(self) -> str:
        """Short, and the same for the same plan: reports and messages name passes with their options."""
        return f"<{self.kind} plan {hashlib.sha256(self.to_json().encode()).hexdigest()[:8]}>"

    @classmethod
    def _refused(cls, why: str) -> UsageError:
        return UsageError(f"not a plan of pass '{cls.kind}': {' '.join(why.split())}")


@dataclass(frozen=True)
class PlanOf:
    """Annotation of an option that is a plan of one pass: a file, as a `Path`, or the plan itself."""

    plan: type[PassPlan]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._checked)

    def _checked(self, value: Any) -> Any:
        if value is None or isinstance(value, self.plan):
            return value
        if isinstance(value, str | os.PathLike):
            return Path(value)
        raise PydanticCustomError("plan", f"input should be a file or a {self.plan.__name__}")


def require_fit(
    kind: str, what: str, wanted: Mapping[str, Sequence[int]], there: Mapping[str, Sequence[int]]
) -> None:
    """Insist that a model has the layers of a plan.

    Args:
        kind: of the plan.
        what: layers are called in messages, such as "layer".
        wanted: by name of a layer, the shape of its weight when the plan was made.
        there: the same of the model.

    Raises:
        UsageError: a layer is not there, or has another weight; names it.
    """
    problem = f"the plan of pass '{kind}' does not fit the model: "
    for name, shape in wanted.items():
        if name not in there:
            raise UsageError(f"{problem}there is no {what} '{name}'; {nearest(name, there)}")
        if tuple(shape) != tuple(there[name]):
            found, planned = ("x".join(map(str, each)) for each in (there[name], shape))
            raise UsageError(f"{problem}the weight of {what} '{name}' is {found}, not {planned}")


def distinct(names: Iterable[str]) -> None:
    """Raise ValueError if something is named twice."""
    seen = set[str]()
    for name in names:
        if name in seen:
            raise ValueError(f"'{name}' is named twice")
        seen.add(name)


def _text(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        return "[\n    " + ",\n    ".join(map(json.dumps, value)) + "\n  ]"
    return json.dumps(value)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    try:
        distinct(key for key, _ in pairs)
    except ValueError as error:
        raise ValueError(f"key {error}") from None
    return dict(pairs)
