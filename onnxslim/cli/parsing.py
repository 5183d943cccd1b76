"""How words become the arguments of a command: commands by default, and options read from passes."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from onnxslim.cli.words import DataWords, ModelWords, of_images
from onnxslim.errors import UsageError, closest, nearest

DEFAULT_COMMAND = "slim"
# Options that OnnxSlim takes several values after.
_SEVERAL = (
    "--input-shapes",
    "--inputs",
    "--outputs",
    "--skip-optimizations",
    "--skip-fusion-patterns",
    "--model-check-inputs",
)


class Commands(TyperGroup):
    """A first word that is no command belongs to the default command: `onnxslim in.onnx out.onnx`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {*self.commands, *(name for param in self.get_params(ctx) for name in param.opts)}
        if "--inspect" in args and (args[0] == DEFAULT_COMMAND or args[0] not in own):
            # As OnnxSlim spells it.
            models = args[1:] if args[0] == DEFAULT_COMMAND else args
            args = ["inspect", *(word for word in models if word != "--inspect")]
        if args and args[0] not in own:
            self._require_no_typo(args[0])
            args = [DEFAULT_COMMAND, *args]
        return super().parse_args(ctx, args)

    def _require_no_typo(self, word: str) -> None:
        if closest(word, self.commands) and not os.path.exists(word):
            raise UsageError(f"there is no command or file '{word}'; {nearest(word, self.commands)}")


# Options that commands have in common, under headings of their own and behind those of the command alone.
_SHARED = (
    ("Data", frozenset(DataWords.__dataclass_fields__)),
    ("Options that commands share", frozenset(ModelWords.__dataclass_fields__)),
)


class GroupedCommand(TyperCommand):
    """A command whose help tells what it alone can do first."""

    def options_shown(self, ctx: Any) -> Iterator[tuple[Any, str]]:
        """Its options, in order, and what there is to add to the help of each."""
        yield from ((param, "") for param in self.get_params(ctx))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the help of arguments and options."""
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        groups |= {title: [] for title, _ in _SHARED}
        for param, note in self.options_shown(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                groups[_heading(param)].append((record[0], record[1] + note))
        for title, records in groups.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def _heading(param: Any) -> str:
    if param.param_type_name == "argument":
        return "Arguments"
    return next((title for title, names in _SHARED if param.name in names), "Options")


class PassCommand(GroupedCommand):
    """A command named after a pass, with the fields of the pass as options; they are read when it is used."""

    _generated: tuple[Any, ...] = ()

    def get_params(self, ctx: Any) -> list[Any]:
        if not self._generated:
            self._generated = tuple(_pass_params(str(self.name)))
            self.params = [*self._generated, *self.params]
        return super().get_params(ctx)

    def options_shown(self, ctx: Any) -> Iterator[tuple[Any, str]]:
        """All but those of images where data only serves to check; data that cannot be left out is marked."""
        from onnxslim import passes

        cls = passes.get(str(self.name))
        fitted = not (cls.lossless or cls.prepares)
        for param, note in super().options_shown(ctx):
            if fitted or not of_images(param.name):
                required = param.name == "data" and _needs_data(str(self.name))
                yield param, "  [required unless other options do without]" if required else note

    def invoke(self, ctx: Any) -> Any:
        given = {param.name: ctx.params.pop(param.name) for param in self._generated}
        ctx.obj = {name: value for name, value in given.items() if value not in (None, (), [])}
        return super().invoke(ctx)


class SlimCommand(PassCommand):
    """Options that take several values take them one after the other too: `--inputs a b`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_one_by_one(args)))


class RunCommand(GroupedCommand):
    """A recipe may come first, before the model: `onnxslim run recipe.yaml in.onnx out.onnx`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for index, word in enumerate(args):
            if word.endswith((".yaml", ".yml")) and args[index - 1] not in ("--recipe", "--save-recipe"):
                args = [*args[:index], "--recipe", *args[index:]]
                break
        return super().parse_args(ctx, args)


def _needs_data(name: str) -> bool:
    """Whether a pass cannot do without data, unless its options say otherwise."""
    from onnxslim import passes

    try:
        return passes.create(name, {}).needs_data
    except UsageError:  # it needs options
        return False


def _one_by_one(words: Sequence[str]) -> Iterator[str]:
    """Repeat the name of an option before each of its values."""
    option = ""
    for index, word in enumerate(words):
        if word in _SEVERAL and index + 1 < len(words):
            option = word
        elif word.startswith("-"):
            option = ""
            yield word
        else:
            yield from (option, word) if option else (word,)


def _pass_params(name: str) -> list[Any]:
    """The options of a pass as parameters of a command. None of them has a default: the pass has."""
    from onnxslim import passes

    def holder(**_: Any) -> None: ...

    parameters = []
    for option in passes.options_of(passes.get(name)):
        kind: Any = bool if option.flag else list[str] if option.many else str
        shown = "" if option.default == "none" else f" [default: {option.default}]"
        shown = shown if option.default else "  [required]"
        word = typer.Option(metavar=None if option.flag else option.type, help=option.help + shown)
        parameters.append(
            inspect.Parameter(
                option.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[kind | None, word],
            )
        )
    holder.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    scratch = typer.Typer(add_completion=False)
    scratch.command()(holder)
    return list(typer.main.get_command(scratch).params)
