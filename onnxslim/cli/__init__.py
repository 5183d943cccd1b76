"""The command line: words in, a pipeline run, words out. Everything heavy is imported when it is needed."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import typer

from onnxslim.cli import terminal
from onnxslim.cli.commands import app
from onnxslim.cli.guard import guarded
from onnxslim.errors import OnnxSlimError, SaveError, UsageError, closest
from onnxslim.runtime import isolated

INTERRUPTED = 130
IO_ERROR = SaveError.exit_code
INTERNAL_ERROR = 1

# Typer brings a click of its own or uses the installed one; either way this is its UsageError.
_ClickUsageError: type[Exception] = typer.BadParameter.__bases__[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: words after the program's name; those of the process by default.

    Returns:
        The exit code: 0 ok, 2 usage, 3 bad model, 4 validation failed, 5 calibration data, 6 files,
        7 provider, 130 interrupted, 1 for a mistake of ours.
    """
    isolated.alone = arguments is None
    if arguments is not None:
        return _main(list(arguments))
    words = sys.argv[1:]
    return _main(words) if "--debug" in words else guarded(lambda: _main(words))


def _main(words: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to fail
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            # Typer may itself turn an interruption into this code.
            command = typer.main.get_command(app)
            code = command.main(words or ["--help"], prog_name="onnxslim", standalone_mode=False)
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except Exception as error:
            if "--debug" in words:
                traceback.print_exc()
            return _failed(error)
    if code == INTERRUPTED:
        terminal.log("interrupted")
    return (code or 0) if words else UsageError.exit_code


def _failed(error: Exception) -> int:
    """Say in one line what went wrong; returns the exit code."""
    if isinstance(error, OnnxSlimError):
        code, message = error.exit_code, str(error)
    elif isinstance(error, _ClickUsageError):
        code, message = UsageError.exit_code, _usage_message(error)
    elif isinstance(error, MemoryError):
        code, message = INTERNAL_ERROR, f"not enough memory: {error}"
    elif isinstance(error, OSError):
        code, message = IO_ERROR, f"{error.filename or 'file'}: {error.strerror or error}"
    else:
        code = INTERNAL_ERROR
        message = f"internal error, {type(error).__name__}: {error} (run with --debug for the traceback)"
    terminal.log(f"error: {message}")
    return code


def _usage_message(error: Any) -> str:
    name = getattr(error, "option_name", "")
    if not hasattr(error, "possibilities"):
        return str(error.format_message())
    # Dashes, which all have, make none of them alike.
    words = {each.lstrip("-"): each for each in error.possibilities or ()}
    meant = closest(name.lstrip("-"), words)
    return f"no such option: {name}; {f'did you mean {words[meant]}?' if meant else '--help lists them'}"


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    terminal.log(f"warning: {message}")
