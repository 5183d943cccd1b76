"""The command that makes a small model of a large one on which a command goes wrong."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onnxslim.cli import terminal
from onnxslim.cli.running import require_writable
from onnxslim.cli.words import Debug, Json, Quiet
from onnxslim.errors import UsageError

if TYPE_CHECKING:
    from onnxslim.ir.model import Model

MODEL = "{}"
# What a command may take longer on a smaller model before it counts as hung: so many times, and seconds.
PATIENCE, GRACE = 10, 10
_NUMBER = re.compile(r"\d+(\.\d+)?(e[-+]?\d+)?")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("reduce")(_reduce)


def _reduce(
    source: Annotated[Path, typer.Argument(metavar="IN", readable=False, help="the model")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="where to save the smallest that shows it")],
    command: Annotated[
        str,
        typer.Option(
            metavar="'WORDS {}'",
            help="what goes wrong; {} stands for the model. No shell reads it",
        ),
    ],
    exit_code: Annotated[
        int | None, typer.Option(metavar="N", help="with which code it goes wrong [default: as on IN]")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="what it prints then [default: unless --exit-code is given, the last line, whatever numbers "
            "are in it]",
        ),
    ] = None,
    time_limit: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="take the smallest so far after that")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make the smallest model that still shows what is wrong, to file a bug with.

    Parts are left out as long as the command ends as it does on IN. Weights become inputs, or random, where
    that changes nothing, and the rest is named.

    For example: onnxslim reduce IN OUT --command 'onnxslim slim {} --on-error raise'
    """
    if output.resolve() == source.resolve():
        raise UsageError(f"'{output}' is the model itself")
    require_writable(output)
    from onnxslim.formats import names, size
    from onnxslim.ir.model import load
    from onnxslim.reduction import reduce

    model = load(source)
    shown = Symptom.of(_words(command), source, exit_code, text)
    terminal.note(f"looking for the smallest model with {shown}", quiet)
    with terminal.progress(quiet) as progress:
        found = reduce(model, shown, time_limit=time_limit, progress=progress)
    found.model.save(output)
    before, after = model.stats(), found.model.stats()
    if json:
        terminal.show_json({"before": before, "after": after, "tried": found.tried, "kept": found.kept})
    why = "" if found.complete else ", when the time was over"
    left = f"{after.nodes} of {before.nodes} nodes, {size(after.bytes)} of {size(before.bytes)}"
    terminal.note(f"saved {output}: {left}, after {found.tried} models{why}", quiet)
    if found.kept:
        terminal.log(f"warning: these hold values of the original: {names(found.kept)}")
    else:
        terminal.note("no values of the original's weights are in it; names of nodes and tensors are", quiet)


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"--command {command}: {error}") from None
    if not any(MODEL in word for word in words):
        raise UsageError(f"--command {command}: it has to name the model, as {MODEL}")
    # Whatever is called so elsewhere.
    return [sys.executable, "-m", *words] if words[0] == "onnxslim" else words


@dataclass(frozen=True)
class Symptom:
    """How a command ends on a model on which it goes wrong.

    Attributes:
        words: of the command.
        name: of the file, which messages may tell.
        exit_code: negative where a signal ends it.
        text: what it prints.
        line: what it prints last, numbers left out; None where nobody asks for that.
        seconds: after which it counts as hung, which is something else.
    """

    words: list[str]
    name: str
    exit_code: int | None
    text: str = ""
    line: str | None = None
    seconds: float | None = None

    @classmethod
    def of(cls, words: list[str], path: Path, exit_code: int | None, text: str | None) -> Symptom:
        """That of a file.

        Raises:
            UsageError: nothing is wrong, or not this; or there is no such command.
        """
        start = time.monotonic()
        code, said = _ran(words, path, None)
        limit = GRACE + PATIENCE * (time.monotonic() - start)
        named = exit_code is not None or text is not None
        if not (code or named):
            raise UsageError("on the whole model, the command ends with 0: give --text or --exit-code")
        plain = cls(words, path.name, code if exit_code is None else exit_code, text or "", None, limit)
        if not plain.is_met(code, said):
            raise UsageError(f"on the whole model, the command ends with {code} and '{_last(said)}'")
        return plain if named else replace(plain, line=_last(said))

    def __str__(self) -> str:
        what = f" and '{self.text or self.line}'" if self.text or self.line else ""
        return f"exit code {self.exit_code}{what}"

    def __call__(self, model: Model) -> bool:
        """Whether a model has it."""
        with tempfile.TemporaryDirectory(prefix="onnxslim-") as folder:
            path = Path(folder) / self.name
            model.save(path)
            return self.is_met(*_ran(self.words, path, self.seconds))

    def is_met(self, code: int | None, said: str) -> bool:
        """Whether this is how it ends."""
        return code == self.exit_code and self.text in said and self.line in (None, _last(said))


def _last(said: str) -> str:
    """The last line, without its numbers."""
    return _NUMBER.sub("#", next((line for line in reversed(said.splitlines()) if line.strip()), "").strip())


def _ran(words: list[str], path: Path, seconds: float | None) -> tuple[int | None, str]:
    """How a command ends on a file, None if it has to be stopped; and what it prints, errors last."""
    called = [word.replace(MODEL, str(path)) for word in words]
    nothing, pipe = subprocess.DEVNULL, subprocess.PIPE
    try:
        process = subprocess.Popen(called, stdin=nothing, stdout=pipe, stderr=pipe, start_new_session=True)
    except OSError as error:
        raise UsageError(f"--command: cannot run '{called[0]}': {error.strerror}") from None
    with process:
        try:
            out, err = process.communicate(timeout=seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # and all that it has started
            if isinstance(error, subprocess.TimeoutExpired):
                return None, ""
            raise
    return process.returncode, (out + b"\n" + err).decode(errors="replace").replace(str(path), MODEL)
