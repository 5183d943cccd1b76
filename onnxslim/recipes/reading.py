"""Recipe files read: plain YAML of a known form, by somebody who may not be trusted."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

import yaml

from onnxslim import passes
from onnxslim.engine.base import Pass
from onnxslim.errors import OnnxSlimError, UsageError, nearest, one_line
from onnxslim.recipes.data import Data

MAX_BYTES = 1 << 20
# Nodes of the YAML document, with every alias counted as often as it is used.
MAX_NODES = 10_000

T = TypeVar("T")


def read(cls: type[T], file: Path, trust: bool) -> T:
    """What a file says, as an object whose fields are the keys.

    Args:
        cls: has the fields `passes`, `data`, `test` and `target`, and others of plain data.
        file: in YAML.
        trust: whether it may name files outside its own folder.

    Raises:
        UsageError: it cannot be read, or says something that means nothing; names the key.
    """
    try:
        document, place = _parsed(file), _RecipeFolder(file.absolute().parent, trust)
        _require_known(document, cls.__dataclass_fields__, "")  # type: ignore[attr-defined]
        given = {**document, "passes": tuple(_passes(document.get("passes"), place))}
        for key in ("data", "test"):
            if given.get(key) is not None:
                given[key] = _data(given[key], place, key)
        if "target" in given and not isinstance(given["target"], str):
            raise UsageError("'target' is the name of an execution provider")
        return _made(cls, given, "")
    except UsageError as error:
        raise UsageError(f"recipe '{file}': {error}") from None


def files_of(each: Pass) -> dict[str, Path]:
    """The options of a pass that are files."""
    return {key: value for key, value in vars(each).items() if isinstance(value, Path)}


class _Loader(yaml.SafeLoader):
    """Plain data only; a key that is there twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise _at(key, "a key is not text")
            if key.value in seen:
                raise _at(key, f"key '{key.value}' is there twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parsed(file: Path) -> Mapping[str, Any]:
    try:
        with open(file, "rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(error.strerror or str(error)) from None
    if len(content) > MAX_BYTES:
        raise UsageError(f"larger than {MAX_BYTES} bytes")
    try:
        loader = _Loader(content)
        node = loader.get_single_node()
        if node is None:
            raise UsageError("it is empty")
        _require_small(node)
        document = loader.construct_document(node)
    except RecursionError:
        raise UsageError("nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # a bad date or number is a ValueError
        raise UsageError(f"not plain YAML: {one_line(error)}") from None
    if not isinstance(document, dict):
        raise UsageError("expected keys such as 'passes', found a " + type(document).__name__)
    return document


def _require_small(root: yaml.Node) -> None:
    """Refuse a document that its aliases make large, or endless."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, above: frozenset[int]) -> int:
        if id(node) in above:
            raise _at(node, "it contains itself")
        if id(node) not in sizes:
            inner = above | {id(node)}
            sizes[id(node)] = 1 + sum(size(each, inner) for each in _children(node))
        if sizes[id(node)] > MAX_NODES:
            raise _at(node, f"more than {MAX_NODES} values, aliases counted as often as they are used")
        return sizes[id(node)]

    size(root, frozenset())


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    for item in node.value if isinstance(node, yaml.CollectionNode) else ():
        yield from item if isinstance(item, tuple) else (item,)


def _at(node: yaml.Node, problem: str) -> UsageError:
    return UsageError(f"line {node.start_mark.line + 1}: {problem}")


def _passes(given: Any, place: _RecipeFolder) -> Iterator[Pass]:
    if not isinstance(given, list):
        raise UsageError("'passes' is a list of names, or of `name: {option: value}`")
    for index, item in enumerate(given):
        where = f"passes[{index}]"
        if isinstance(item, str):
            item = {item: {}}
        if not isinstance(item, dict) or len(item) != 1:
            raise UsageError(f"{where}: expected a name, or `name: {{option: value}}`")
        ((name, settings),) = item.items()
        if not isinstance(settings or {}, dict):
            raise UsageError(f"{where}: the options of '{name}' are `option: value`, not {settings!r}")
        try:
            made = passes.create(name, settings or {})
            inside = {key: place.find(str(path)) for key, path in files_of(made).items()}
            yield passes.create(name, {**(settings or {}), **inside}) if inside else made
        except OnnxSlimError as error:
            raise UsageError(f"{where}: {error}") from None


def _data(given: Any, place: _RecipeFolder, key: str) -> Data:
    settings = {"path": given} if isinstance(given, str) else given
    if not isinstance(settings, dict):
        raise UsageError(f"'{key}' is a path or `path: …` and its settings, not {given!r}")
    _require_known(settings, [item.name for item in fields(Data)], f"{key}: ")
    made = _made(Data, settings, f"{key}: ")
    return _made(Data, {**settings, "path": str(place.find(made.path))}, f"{key}: ")


@dataclass(frozen=True)
class _RecipeFolder:
    """Where a recipe lies, and whether it may name files elsewhere."""

    folder: Path
    trusted: bool

    def find(self, path: str) -> Path:
        """A path of the recipe as a file; outside paths are not even looked at without trust."""
        if "\0" in path or not (self.trusted or self._stays(path)):
            raise UsageError(f"'{path}' leaves the folder of the recipe, which takes trust in it (--trust)")
        found = (self.folder / path).resolve()
        if not found.exists():
            raise UsageError(f"there is no '{path}' in the folder of the recipe")
        return found

    def _stays(self, path: str) -> bool:
        """Whether it is below the folder, links followed."""
        windows, posix = PureWindowsPath(path), PurePosixPath(path)
        if windows.drive or windows.root or posix.is_absolute() or ".." in (*windows.parts, *posix.parts):
            return False
        return (self.folder / path).resolve().is_relative_to(self.folder.resolve())


def _made(cls: type[T], given: Mapping[str, Any], where: str) -> T:
    try:
        return cls(**given)
    except UsageError as error:
        raise UsageError(f"{where}{error}") from None


def _require_known(given: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise UsageError(f"{where}there is no key '{key}'; {nearest(key, known)}")
