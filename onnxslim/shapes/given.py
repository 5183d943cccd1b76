"""Sizes that users give inputs: read from words, and put in place of free axes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from onnxslim.errors import UsageError, nearest
from onnxslim.ir.graph import Dim
from onnxslim.ir.model import InputSpec

InputShapes: TypeAlias = Mapping[str, tuple[int, ...]]


def sizes_of(text: str, name: str) -> tuple[int, ...]:
    """The sizes in `1,3,224,224`; none at all for a scalar.

    Raises:
        UsageError: it is something else; names the input.
    """
    try:
        sizes = tuple(int(word) for word in text.split(",")) if text else ()
    except ValueError:
        raise UsageError(f"'{name}:{text}' is not of the form name:1,3,224,224") from None
    if any(size < 0 for size in sizes):
        raise UsageError(f"'{name}:{text}': sizes are not negative")
    return sizes


def by_name(given: str | Iterable[Any]) -> dict[str, tuple[int, ...]]:
    """Sizes by name from words `name:1,3,224,224`, of which a comma may have made several.

    Raises:
        UsageError: a word is of another form.
    """
    words: list[str] = []
    for word in [given] if isinstance(given, str) else map(str, given):
        if words and ":" not in word:
            words[-1] += f",{word}"
        else:
            words.append(word)
    named = [word.rpartition(":") for word in words]
    for word, (_, colon, _) in zip(words, named, strict=True):
        if not colon:
            raise UsageError(f"'{word}' is not of the form name:1,3,224,224")
    return {name: sizes_of(text, name) for name, _, text in named}


def require_rank(spec: InputSpec, sizes: tuple[int, ...]) -> None:
    """Raise UsageError if an input has another number of axes."""
    if spec.shape is not None and len(spec.shape) != len(sizes):
        text = ",".join(map(str, sizes))
        raise UsageError(f"'{spec.name}:{text}': the input has {len(spec.shape)} axes, not {len(sizes)}")


def with_sizes(specs: Sequence[InputSpec], given: InputShapes) -> list[InputSpec]:
    """Inputs of the sizes given for some; free axes of one name have one size in all of them.

    Raises:
        UsageError: there is no such input, or it has other axes or fixed sizes.
    """
    known = {spec.name: spec for spec in specs}
    found: dict[Dim, int] = {}
    for name, sizes in given.items():
        if name not in known:
            raise UsageError(f"there is no input '{name}'; {nearest(name, known)}")
        spec = known[name]
        require_rank(spec, sizes)
        for axis, (dim, size) in enumerate(zip(spec.shape or (), sizes, strict=False)):
            if isinstance(dim, int) and dim != size:
                text = ",".join(map(str, sizes))
                raise UsageError(f"'{name}:{text}': the input has {dim} along axis {axis}, not {size}")
            if isinstance(dim, str):
                found[dim] = size
        known[name] = replace(spec, shape=sizes)
    return [
        replace(spec, shape=None if spec.shape is None else tuple(found.get(dim, dim) for dim in spec.shape))
        for spec in (known[spec.name] for spec in specs)  # a broken file may declare one twice
    ]


def sized_by(specs: Sequence[InputSpec], bound: Sequence[InputSpec]) -> frozenset[str]:
    """Names of the inputs that `with_sizes` gave other shapes."""
    return frozenset(spec.name for spec, other in zip(specs, bound, strict=True) if spec.shape != other.shape)


def one_sample(
    specs: Sequence[InputSpec], bound: Sequence[InputSpec], fed: InputShapes | None = None
) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs for one sample.

    Args:
        specs: the inputs as declared; fixed sizes stay, a free batch is one.
        bound: the same with the sizes that somebody gave, see `with_sizes`.
        fed: shapes in a run, which tell the sizes that nobody gave; those that nothing tells are 1.
    """
    batch = {spec.shape[0] for spec in specs if spec.shape and isinstance(spec.shape[0], str)}
    found = {}
    for spec, given in zip(specs, bound, strict=True):
        run = (fed or {}).get(spec.name)
        shape = given.shape if run is None or given.shape is not None else (None,) * len(run)
        if shape is None:
            continue
        declared = spec.shape if spec.shape is not None else (None,) * len(shape)
        sizes = list(shape)
        for axis, dim in enumerate(declared):
            if not isinstance(dim, int) and (axis == 0 or dim in batch):
                sizes[axis] = 1
        found[spec.name] = tuple(
            dim if isinstance(dim, int) else 1 if run is None else run[axis] for axis, dim in enumerate(sizes)
        )
    return found
