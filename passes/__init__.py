"""The passes by name, one file or folder each, loaded when they are first used.

A pass is a frozen dataclass. What the command line, recipes and `onnxslim passes` know of its options is read
from its fields.
"""

from __future__ import annotations

if __name__ != "onnxslim.passes":
    raise ImportError(f"import onnxslim.passes, not {__name__}: a second copy would not share its types")

import dataclasses
import importlib
import json
from collections.abc import Mapping
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from onnxslim.errors import UsageError, nearest

if TYPE_CHECKING:
    from onnxslim.engine.base import Pass
    from onnxslim.passes.cheapen import Cheapen
    from onnxslim.passes.cluster import Cluster
    from onnxslim.passes.dead import Dead
    from onnxslim.passes.dedupe import Dedupe
    from onnxslim.passes.distill import Distill
    from onnxslim.passes.eliminate import Eliminate
    from onnxslim.passes.extract import Extract
    from onnxslim.passes.factorize import Factorize
    from onnxslim.passes.fold import Fold
    from onnxslim.passes.fuse import Fuse
    from onnxslim.passes.half import Half
    from onnxslim.passes.inline import Inline
    from onnxslim.passes.legalize import Legalize
    from onnxslim.passes.prune import Prune
    from onnxslim.passes.quantize import Quantize
    from onnxslim.passes.shapes import FixShapes
    from onnxslim.passes.single import Single
    from onnxslim.passes.slim import Slim
    from onnxslim.passes.sparsify import Sparsify
    from onnxslim.passes.unfuse import Unfuse

__all__ = [
    "Cheapen",
    "Cluster",
    "Dead",
    "Dedupe",
    "Distill",
    "Eliminate",
    "Extract",
    "Factorize",
    "FixShapes",
    "Fold",
    "Fuse",
    "Half",
    "Inline",
    "Legalize",
    "Option",
    "Prune",
    "Quantize",
    "Single",
    "Slim",
    "Sparsify",
    "Unfuse",
    "create",
    "get",
    "names",
    "options_of",
    "parse",
    "summary",
]

REGISTRY: tuple[tuple[str, str], ...] = (
    ("slim", "Slim"),
    ("inline", "Inline"),
    ("fold", "Fold"),
    ("eliminate", "Eliminate"),
    ("fuse", "Fuse"),
    ("dedupe", "Dedupe"),
    ("dead", "Dead"),
    ("prune", "Prune"),
    ("factorize", "Factorize"),
    ("cheapen", "Cheapen"),
    ("quantize", "Quantize"),
    ("cluster", "Cluster"),
    ("sparsify", "Sparsify"),
    ("half", "Half"),
    ("distill", "Distill"),
    ("extract", "Extract"),
    ("shapes", "FixShapes"),
    ("single", "Single"),
    ("unfuse", "Unfuse"),
    ("legalize", "Legalize"),
)


def __getattr__(attribute: str) -> Any:
    for name, class_name in REGISTRY:
        if attribute == class_name:
            return get(name)
    raise AttributeError(f"module '{__name__}' has no attribute '{attribute}'")


def names() -> tuple[str, ...]:
    """Names of all passes."""
    return tuple(name for name, _ in REGISTRY)


def get(name: str) -> type[Pass]:
    """The class of a pass.

    Raises:
        UsageError: there is no such pass; names the nearest.
    """
    class_name = dict(REGISTRY).get(name)
    if class_name is None:
        raise UsageError(f"there is no pass '{name}'; {nearest(name, names())}")
    found: type[Pass] = getattr(importlib.import_module(f"onnxslim.passes.{name}"), class_name)
    return found


def summary(cls: type[Pass]) -> str:
    """First paragraph of a pass's documentation, on one line."""
    return " ".join((cls.__doc__ or "").split("\n\n")[0].split())


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a pass, read from its field.

    Attributes:
        name: of the field.
        type: what values look like, for people.
        default: its default, for people; empty if it has to be given.
        help: what it means.
        flag: whether it is true or false.
        many: whether it takes any number of values.
    """

    name: str
    type: str
    default: str
    help: str
    flag: bool
    many: bool


def options_of(cls: type[Pass]) -> tuple[Option, ...]:
    """The options of a pass, in order."""
    found = []
    for name, info in _fields(cls).items():
        default = "" if info.is_required() else _shown(info.get_default(call_default_factory=True))
        many = get_origin(info.annotation) in (tuple, list, frozenset, dict)
        found.append(
            Option(
                name,
                _words(info) or _type_text(info.annotation),
                default,
                info.description or "",
                info.annotation is bool,
                many,
            )
        )
    return tuple(found)


def create(name: str, given: Mapping[str, Any]) -> Pass:
    """A pass with these options, each of its own type or as text.

    Raises:
        UsageError: there is no such pass or option, or a value is not one it takes.
    """
    cls = get(name)
    known = _fields(cls)
    values = {
        key: _value(known[key].annotation, value) if key in known else value for key, value in given.items()
    }
    return cls(**values)


def parse(text: str) -> Pass:
    """A pass from the words of the command line: `name` or `name:option=value,option=value`.

    An option that takes any number of values takes the words up to the next option:
    `quantize:exclude=/head/*,/stem/*,observer=kl`.

    Raises:
        UsageError: as for `create`.
    """
    name, _, rest = text.partition(":")
    given: dict[str, list[str]] = {}
    key = ""
    for word in rest.split(",") if rest else ():
        left, equals, right = word.partition("=")
        if equals:
            key = left.strip().replace("-", "_")
        elif not key:
            raise UsageError(f"pass '{name}': '{word}' is not of the form option=value")
        given.setdefault(key, []).append(right if equals else word)
    return create(name, {key: values if len(values) > 1 else values[0] for key, values in given.items()})


def _fields(cls: type[Pass]) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = cls.__pydantic_fields__  # type: ignore[attr-defined]
    return fields


def _value(annotation: Any, given: Any) -> Any:
    """The value a text stands for, as far as its type does not read texts itself."""
    if get_origin(annotation) in (tuple, list, frozenset) and isinstance(given, str):
        given = [given]
    if not isinstance(given, str) or _takes(annotation, given):
        return given
    try:
        decoded = json.loads(given)
    except ValueError:
        return given
    return decoded if _takes(annotation, decoded) else given


def _takes(annotation: Any, value: Any) -> bool:
    from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

    try:
        TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except (ValidationError, PydanticUserError):
        return False
    return True


def _words(info: Any) -> str:
    """What an option is one of, if that can grow."""
    from onnxslim.engine.base import OneOf

    return "|".join(word for each in info.metadata if isinstance(each, OneOf) for word in each.words())


def _type_text(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(str(value) for value in arguments)
    if origin in (Union, UnionType):
        # Objects of Python, which no words make, are left out.
        words = (each for each in arguments if each is not type(None) and not dataclasses.is_dataclass(each))
        return "|".join(map(_type_text, words))
    if origin is dict:
        return f"name:{_type_text(arguments[1])}"
    if origin in (tuple, list, frozenset):
        return f"{_type_text(arguments[0])},…"
    name = getattr(annotation, "__name__", str(annotation))
    return {"str": "text", "bool": "yes|no", "Path": "file"}.get(name, name)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (tuple, list, frozenset, dict)):
        return ",".join(str(item) for item in value) or "none"
    return "none" if value is None else str(value)
