"""Recipes: what to do to a model, as a YAML file that can be kept, shared and run again.

passes:
  - slim
  - quantize: {observer: minmax, exclude: [/head/*]}
data: calibration.npz
check: {sqnr: 20}
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, TypeVar

import yaml
from onnx import TensorProto
from pydantic import Field
from pydantic import ValidationError as Invalid

from onnxslim import passes
from onnxslim.calibration.data import CalibrationData
from onnxslim.engine.base import Pass, Progress, options
from onnxslim.engine.pipeline import Pipeline, Report, Result
from onnxslim.errors import OnnxSlimError, UsageError, nearest
from onnxslim.formats import plain
from onnxslim.ir.graph import Array, Constant
from onnxslim.ir.model import Model, Source, load
from onnxslim.ir.proto import encode_embedded
from onnxslim.recipes.data import Batches, Data
from onnxslim.runtime.metric import Metric
from onnxslim.runtime.targets import Target
from onnxslim.validation.compare import validate
from onnxslim.validation.verdict import Verdict, check_limits
from onnxslim.version import version

MAX_BYTES = 1 << 20
# Nodes of the YAML document, with every alias counted as often as it is used.
MAX_NODES = 10_000
SUFFIXES = (".yaml", ".yml")
PREFIX = "onnxslim."

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """What running a recipe gave; `verdict` is None where the recipe has no `check`."""

    model: Model
    report: Report
    verdict: Verdict | None = None

    def save(self, path: str | os.PathLike[str], *, external_data: bool | None = None) -> None:
        """Write the model; see `Model.save`."""
        self.model.save(path, external_data=external_data)


@options
class Recipe:
    """Everything that decides what becomes of a model, except the model itself."""

    passes: tuple[Pass, ...] = Field(description="what to run, in order: names, or `name: {option: value}`")
    data: Data | None = Field(
        None, description="calibration and test data: a path inside the recipe's folder, or its settings"
    )
    target: str = Field("cpu", description="execution provider the result is made for")
    seed: int = Field(0, description="of everything random")
    on_error: Literal["revert", "raise"] = Field(
        "revert", description="what to do with a pass that breaks the model"
    )
    check: dict[str, float] = Field(
        default_factory=dict, description="what the result has to meet, such as `sqnr: 20`"
    )

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if not self.passes:
            raise UsageError("a recipe needs at least one pass")
        check_limits(self.check)
        Target.named(self.target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe file.

        Its data must lie in the folder of the file, or below, and is never code to run.

        Raises:
            UsageError: it cannot be read, or says something that means nothing; names the key.
        """
        file = Path(path)
        try:
            return cls._of(_parsed(file), file.absolute().parent)
        except UsageError as error:
            raise UsageError(f"recipe '{file}': {error}") from None

    @classmethod
    def _of(cls, document: Mapping[str, Any], folder: Path) -> Recipe:
        known = [item.name for item in fields(cls)]
        _require_known(document, known, "")
        given = dict(document)
        given["passes"] = tuple(_passes(document.get("passes"), folder))
        if given.get("data") is not None:
            given["data"] = _data(given["data"], folder)
        if "target" in given and not isinstance(given["target"], str):
            raise UsageError("'target' is the name of an execution provider")
        return _made(cls, given, "")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a recipe file that `load` reads back to an equal recipe.

        Raises:
            UsageError: the data is code, or does not lie in the folder of the file.
            OSError: it cannot be written.
        """
        file = Path(path)
        folder = file.absolute().parent
        document: dict[str, Any] = {"passes": [_written(each, folder) for each in self.passes]}
        if self.data is not None:
            document["data"] = self._data_written(folder)
        for name, default in (("target", "cpu"), ("seed", 0), ("on_error", "revert"), ("check", {})):
            if getattr(self, name) != default:
                document[name] = getattr(self, name)
        text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100)
        file.write_text(text, encoding="utf-8")

    def _data_written(self, folder: Path) -> Any:
        assert self.data is not None
        if self.data.is_function:
            raise UsageError(f"a recipe cannot hold data that is code ('{self.data.path}'); leave it out")
        settings = {**_given(self.data), "path": _relative(self.data.path, folder)}
        return settings if len(settings) > 1 else settings["path"]

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain data, defaults included."""
        return {
            "passes": [{each.name: _all(each)} for each in self.passes],
            "data": None if self.data is None else _all(self.data),
            **{name: plain(getattr(self, name)) for name in ("target", "seed", "on_error", "check")},
        }

    @property
    def sha256(self) -> str:
        """Hash of all settings, defaults included, and of files passes read, but not of where they lie."""
        document = self.to_dict()
        document["passes"] = [{each.name: {**_all(each), **_contents(each)}} for each in self.passes]
        if document["data"]:
            document["data"]["path"] = None
        text = json.dumps(document, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def rewrite(
        self,
        model: Model,
        data: Any = None,
        *,
        libraries: Sequence[str] = (),
        jobs: int = 1,
        progress: Progress | None = None,
        metric: Metric | None = None,
    ) -> Result:
        """Run the passes; a model they changed tells in its metadata which recipe was run on which file.

        Args:
            model: left as it is.
            data: calibration batches.
            libraries: files of custom operators that the model needs to run; see `Target`.
            jobs: processes that may work in parallel; the result does not depend on their number.
            progress, metric: see `Pipeline`.

        Raises:
            PassError, CalibrationError: see `Pipeline`.
        """
        origin = source_sha256(model)
        pipeline = Pipeline(*self.passes, on_error=self.on_error)
        target = Target.named(self.target).with_libraries(libraries)
        result = pipeline(
            model, data=data, target=target, seed=self.seed, jobs=jobs, progress=progress, metric=metric
        )
        if result.model is model:
            return result
        stamps = {"version": version(), "recipe_sha256": self.sha256, "source_sha256": origin}
        marked = result.model.with_metadata({PREFIX + key: value for key, value in stamps.items()})
        return Result(marked, result.report)

    def run(
        self,
        model: Source,
        *,
        data: Any = None,
        labels: Array | None = None,
        libraries: Sequence[str] = (),
        jobs: int = 1,
        progress: Progress | None = None,
        metric: Metric | None = None,
    ) -> Outcome:
        """Run the passes and hold the result to what `check` says.

        Args:
            model: a file, a ModelProto or a Model; left as it is.
            data: batches instead of those the recipe names; see `CalibrationData.of`.
            labels: the class of every sample of `data`.
            libraries: files of custom operators that the model needs to run; see `Target`.
            jobs: processes that may work in parallel.
            progress: called with (what, done, total).
            metric: see `Pipeline`; accuracy if there are labels and it is not given.

        Raises:
            ValidationError: the result does not meet what the recipe asks for.
            OnnxSlimError: whatever else went wrong.
        """
        original = load(model)
        opened = Batches(CalibrationData.of(data), labels) if data is not None else None
        if opened is None and self.data is not None:
            opened = self.data.read(original)
        batches, labels = (opened.data, opened.labels) if opened else (None, None)
        result = self.rewrite(
            original,
            batches,
            libraries=libraries,
            jobs=jobs,
            progress=progress,
            metric=metric or (opened.metric if opened else None),
        )
        if not self.check:
            return Outcome(result.model, result.report)
        verdict = validate(
            original,
            result.model,
            batches,
            [Target.named(self.target).with_libraries(libraries)],
            labels=labels,
            metric=metric,
            rounds=30 if "latency" in self.check else 0,
            progress=progress,
        )
        return Outcome(result.model, result.report, verdict.require(**self.check))


def source_sha256(model: Model) -> str:
    """Hash of the file a model was read from, followed by its data files in order of their names.

    That of `cat model.onnx a.data b.data | sha256sum`. Of a model that is only in memory, the hash of its
    tensors followed by that of everything else.
    """
    digest = hashlib.sha256()
    if model.source is None:
        digest.update(model.to_proto_with(partial(_hashed, digest)).SerializeToString(deterministic=True))
        return digest.hexdigest()
    folder = model.source.resolve().parent
    for file in (model.source, *(folder / name for name in model.data_files)):
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _hashed(digest: Any, constant: Constant) -> TensorProto:
    """Takes in one tensor after the other, so that all of them may be more than a protobuf holds."""
    digest.update(encode_embedded(constant).SerializeToString(deterministic=True))
    return TensorProto(name=constant.name)


# --------------------------------------------------------------------------------------------- reading


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
        raise UsageError(f"not plain YAML: {' '.join(str(error).split())[:200]}") from None
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


def _passes(given: Any, folder: Path) -> Iterator[Pass]:
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
            inside = {key: _inside(str(path), folder) for key, path in _files(made).items()}
            yield passes.create(name, {**(settings or {}), **inside}) if inside else made
        except OnnxSlimError as error:
            raise UsageError(f"{where}: {error}") from None


def _data(given: Any, folder: Path) -> Data:
    settings = {"path": given} if isinstance(given, str) else given
    if not isinstance(settings, dict):
        raise UsageError(f"'data' is a path or `path: …` and its settings, not {given!r}")
    _require_known(settings, [item.name for item in fields(Data)], "data: ")
    made = _made(Data, settings, "data.")
    return _made(Data, {**settings, "path": str(_inside(made.path, folder))}, "data.")


def _inside(path: str, folder: Path) -> Path:
    """A path of the recipe as a file; it may not leave the recipe's folder, links included."""
    windows, posix = PureWindowsPath(path), PurePosixPath(path)
    rooted = "\0" in path or windows.drive or windows.root or posix.is_absolute()
    found = folder if rooted else (folder / path).resolve()
    if rooted or ".." in (*windows.parts, *posix.parts) or not found.is_relative_to(folder.resolve()):
        raise UsageError(f"'{path}' leaves the folder of the recipe")
    if not found.exists():
        raise UsageError(f"there is no '{path}' in the folder of the recipe")
    return found


def _made(cls: type[T], given: Mapping[str, Any], where: str) -> T:
    try:
        return cls(**given)
    except Invalid as error:
        problem = error.errors()[0]
        name = where + ".".join(str(part) for part in problem["loc"])
        text = problem["msg"][:1].lower() + problem["msg"][1:]
        raise UsageError(f"'{name}': {text}, not {problem['input']!r}") from None


def _require_known(given: Mapping[str, Any], known: list[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise UsageError(f"{where}there is no key '{key}'; {nearest(key, known)}")


# --------------------------------------------------------------------------------------------- writing


def _all(value: Any) -> dict[str, Any]:
    return {item.name: plain(getattr(value, item.name)) for item in fields(value)}


def _given(value: Any) -> dict[str, Any]:
    """The fields that differ from their defaults."""
    kept = {}
    for name, info in type(value).__pydantic_fields__.items():
        if getattr(value, name) != info.get_default(call_default_factory=True):
            kept[name] = plain(getattr(value, name))
    return kept


def _files(each: Pass) -> dict[str, Path]:
    """The options of a pass that are files."""
    return {key: value for key, value in vars(each).items() if isinstance(value, Path)}


def _contents(each: Pass) -> dict[str, str]:
    """Hashes of the files that a pass reads."""
    return {key: hashlib.sha256(path.read_bytes()).hexdigest() for key, path in _files(each).items()}


def _relative(path: str | Path, folder: Path) -> str:
    try:
        return Path(path).resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        raise UsageError(
            f"a recipe can only name files in its own folder, '{folder}', not '{path}'"
        ) from None


def _written(each: Pass, folder: Path) -> Any:
    settings = _given(each)
    settings.update({key: _relative(path, folder) for key, path in _files(each).items()})
    return {each.name: settings} if settings else each.name
