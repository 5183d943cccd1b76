"""Passes, what they may know, and what they tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import wraps
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar

from pydantic import ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic.dataclasses import dataclass as validated
from pydantic_core import CoreSchema, PydanticKnownError, core_schema
from typing_extensions import Self, dataclass_transform

from onnxslim.calibration.samples import Samples
from onnxslim.engine.judging import Kept
from onnxslim.engine.moves import Move
from onnxslim.errors import CalibrationError, UsageError, nearest
from onnxslim.ir.graph import Array
from onnxslim.ir.model import Model
from onnxslim.runtime.metric import Metric
from onnxslim.runtime.targets import Target

Shapes: TypeAlias = dict[str, tuple[int, ...]]
# How much work a pass may take to find something better: the option `effort` of those that search.
Effort: TypeAlias = Literal["quick", "normal", "thorough"]
Progress: TypeAlias = Callable[[str, int, "int | None"], None]
InterfacePart: TypeAlias = Literal["inputs", "outputs", "types", "shapes"]
P = TypeVar("P")
T = TypeVar("T")
_CAPTION = "caption"


@dataclass_transform(frozen_default=True)
def options(cls: type[P]) -> type[P]:
    """Make a class a frozen dataclass whose fields are checked when it is made: what every pass is.

    Making one raises UsageError for a field that does not exist, is not given, or cannot have that value.
    """
    checked = validated(frozen=True, config=ConfigDict(extra="forbid", arbitrary_types_allowed=True))(cls)
    make, name = checked.__init__, getattr(cls, "name", None)
    whose = f"pass '{name}': " if isinstance(name, str) else ""

    @wraps(make)
    def init(self: P, *args: Any, **given: Any) -> None:
        known = [item.name for item in fields(checked)]
        for key in given:
            if key not in known:
                raise UsageError(f"{whose}there is no option '{key}'; {nearest(key, known)}")
        try:
            make(self, *args, **given)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(str(part) for part in problem["loc"])
            text = problem["msg"][:1].lower() + problem["msg"][1:]
            raise UsageError(f"{whose}option '{where}': {text}, not {problem['input']!r}") from None

    checked.__init__ = init  # type: ignore[method-assign,assignment]
    return checked  # type: ignore[return-value]


def several(value: Any) -> Any:
    """A word alone as the only one of several: `BeforeValidator` of options that are tuples of words."""
    return (value,) if isinstance(value, str) else value


@dataclass(frozen=True)
class OneOf:
    """Annotation of an option: one of some words that registries may add to; others are a `Literal`."""

    words: Callable[[], Iterable[str]]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def _checked(self, word: str) -> str:
        *most, last = map(repr, self.words())
        if word not in self.words():
            raise PydanticKnownError("literal_error", {"expected": f"{', '.join(most)} or {last}"})
        return word


@dataclass(frozen=True)
class Change:
    """Something a pass did: to which node, what, and why."""

    node: str
    action: str
    reason: str = ""


@dataclass(frozen=True)
class Skip:
    """Something a pass could have done but did not: at which node, and why not.

    Attributes:
        warning: whether it is because the user asked for something that means nothing, as a misspelt name.
    """

    node: str
    reason: str
    warning: bool = False


def captioned(caption: str, default: T | None = None) -> T | None:
    """A field of `Figures` that people are told of, under this caption, wherever it is not None."""
    made: T | None = field(default=default, metadata={_CAPTION: caption})
    return made


@dataclass(frozen=True)
class Figures:
    """What a pass counted and measured of the whole model, for the report.

    A pass that has figures derives a frozen dataclass from this one, beside itself. Programs get every field
    under its own name; people get those with a caption (`captioned`), in the order of the fields.
    """

    @classmethod
    def of(cls, changes: Changes) -> Self:
        """The figures of a pass, as what they are.

        Raises:
            TypeError: the pass reported others, or none: it changed nothing, or it failed.
        """
        if not isinstance(changes.figures, cls):
            raise TypeError(f"the pass reported {type(changes.figures).__name__}, not {cls.__name__}")
        return changes.figures

    def captions(self) -> Iterator[tuple[str, Any]]:
        """What people are told: captions, and values that are not None."""
        for each in fields(self):
            value = getattr(self, each.name)
            if _CAPTION in each.metadata and value is not None:
                yield each.metadata[_CAPTION], value


@dataclass(frozen=True)
class Changes:
    """What a pass did and what it left alone; true if it changed anything.

    Attributes:
        figures: of the whole model; a pass with parts has its own, those of its parts are not added up.
    """

    changed: tuple[Change, ...] = ()
    skipped: tuple[Skip, ...] = ()
    figures: Figures = field(default_factory=Figures)

    def __bool__(self) -> bool:
        return bool(self.changed)


class Log:
    """Collects what a pass does while it does it."""

    def __init__(self) -> None:
        self._changed: list[Change] = []
        self._skipped: dict[tuple[str, str], Skip] = {}

    def change(self, node: str, action: str, reason: str = "") -> None:
        """Note something done."""
        self._changed.append(Change(node, action, reason))

    def skip(self, node: str, reason: str) -> None:
        """Note something not done; the same note twice counts once."""
        self._skipped[node, reason] = Skip(node, reason)

    def warn(self, asked: str, reason: str) -> None:
        """Note that what the user asked for means nothing."""
        self._skipped[asked, reason] = Skip(asked, reason, warning=True)

    def add(self, changes: Changes) -> None:
        """Take over the notes of a part."""
        self._changed.extend(changes.changed)
        self._skipped.update({(skip.node, skip.reason): skip for skip in changes.skipped})

    def done(self, figures: Figures | None = None) -> Changes:
        """The notes so far, with the figures of the pass if it has any."""
        return Changes(tuple(self._changed), tuple(self._skipped.values()), figures or Figures())


@dataclass(frozen=True)
class Context:
    """What passes may know and use besides the model.

    Attributes:
        target: where the result is to run.
        data: calibration samples: `data.fit` to fit on, `data.tune` to choose by, `data.held` to judge by,
            each batches of one array per input; None if there are none.
        seed: of everything random.
        jobs: processes that may work in parallel.
        progress: called with (what, done, total) by long steps.
        sample: inputs of one run, real ones where there are data, to count and time on; None if the model
            does not run on any.
        metric: how good a model is, for passes that are to keep that; None if nobody said.
        judge: what a model keeps of the outputs of the one that came in, on samples that no pass has seen
            where there are such; for reports, not to choose by.
        teacher: the model that came in, or what it was since its interface last changed; None outside a
            pipeline.
    """

    target: Target = field(default_factory=Target.cpu)
    data: Samples | None = None
    seed: int = 0
    jobs: int = 1
    progress: Progress | None = None
    sample: Mapping[str, Array] | None = None
    metric: Metric | None = None
    judge: Callable[[Model], Kept | None] = lambda _: None
    teacher: Model | None = None

    def one_run(self) -> Mapping[str, Array] | None:
        """Inputs of one run, those of the check or else the first batch; None if there are neither."""
        if self.sample is not None or self.data is None:
            return self.sample
        return next((dict(feeds) for feeds in self.data.fit), None)

    @property
    def given(self) -> Samples:
        """The data, for steps that are only taken where there is some."""
        assert self.data is not None
        return self.data


@dataclass(frozen=True)
class PassWork:
    """What a pass takes, about; measured, see `benchmarks/forecast.py`.

    Attributes:
        seconds: on any model.
        per_node: seconds for every node.
        runs: of the model on all samples that take as long.
        per_parameter: seconds for every parameter, with data.
        samples: runs of the model on one sample, however many there are.
    """

    seconds: float = 0.0
    per_node: float = 0.0
    runs: float = 0.0
    per_parameter: float = 0.0
    samples: float = 0.0


class Pass:
    """A step that rewrites a model in place.

    A subclass is a frozen dataclass (use `@options`): its fields are its options everywhere, on the command
    line, in recipes and in Python, and its docstring is their help.

    Attributes:
        name: how it is called everywhere.
        lossless: whether outputs stay what they are, up to rounding.
        prepares: whether it says what the model is, instead of making it smaller: data, checks and reports
            refer to what it makes, and without it there is no use in going on.
        beside_plan: of a pass that takes a plan, the options to which that leaves something to say.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool] = False
    prepares: ClassVar[bool] = False
    beside_plan: ClassVar[tuple[str, ...]] = ()

    def run(self, model: Model, ctx: Context) -> Changes:
        """Rewrite the model; says what was done and, where nothing was, why."""
        raise NotImplementedError

    def propose(self, model: Model, ctx: Context) -> Sequence[Move]:
        """What it could do to the model, which stays as it is; nothing by default. Goals are left out.

        Of a group in the order in which moves are conceded, their damage convex; see `Move`.
        """
        return ()

    @property
    def work(self) -> PassWork:
        """What it takes, with these options."""
        return PassWork(seconds=0.1, per_node=1e-3)

    @property
    def needs_data(self) -> bool:
        """Whether, with these options, it cannot do without calibration data."""
        return False

    @property
    def learns(self) -> bool:
        """Whether, with these options, it chooses among states by samples that no other pass sees."""
        return False

    def require_installed(self) -> None:
        """Raise UsageError if it takes something that is not installed; called before any work."""

    def require_data(self, data: object) -> None:
        """Raise CalibrationError if there is no data and it cannot do without."""
        if self.needs_data and data is None:
            raise CalibrationError(
                f"pass '{self.name}' needs calibration data: pass data=, or --data on the command line"
            )

    def require_alone(self) -> None:
        """Raise UsageError if an option is given to which its plan leaves nothing to say."""
        for name in self.given():
            if name not in ("plan", *self.beside_plan):
                raise UsageError(f"pass '{self.name}': a plan says all of it, so {name} has nothing to say")

    @property
    def interface(self) -> frozenset[InterfacePart]:
        """What it may change of the model's interface: nothing, unless somebody asked for it.

        Which tensors are inputs, which are outputs, their types, or their shapes.
        """
        return frozenset()

    def parts(self) -> tuple[Pass, ...]:
        """Smaller passes that do the same when run in turn until nothing changes; () if there are none.

        They are run and checked one by one when the whole fails its check, to keep what is right.
        """
        return ()

    @property
    def behind(self) -> tuple[Pass, ...]:
        """Passes that a pipeline runs right behind it, as steps of their own; none by default."""
        return ()

    def fits(self, before: Model, after: Model) -> bool:
        """Whether what some of the parts make may be as large as it is."""
        return True

    def given(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        defaults = _defaults(type(self))
        return {name: value for name in defaults if (value := getattr(self, name)) != defaults[name]}

    def describe(self) -> str:
        """The pass with the options that differ from their defaults, as in a recipe."""
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in self.given().items())})"


def _defaults(cls: type[Pass]) -> dict[str, Any]:
    """Default values of a pass's options, by name."""
    fields: Mapping[str, Any] = getattr(cls, "__pydantic_fields__", {})
    return {name: info.get_default(call_default_factory=True) for name, info in fields.items()}
