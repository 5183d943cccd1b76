"""The exceptions of onnxslim, the exit codes they stand for, and the cure for a misspelt name.

OnnxSlimError
├─ LoadError          3  the input is not a model we can read
├─ SaveError          6  the result could not be written; what was there before is untouched
├─ UsageError         2  an option, a pass name or a value that does not exist
├─ PassError          3  a pass could not do its work; names the pass and, where known, the node
│   ├─ InvalidGraph   3  the check after a pass failed
│   └─ TimeUp         3  the time that was given is over
├─ CalibrationError   5  calibration or test data that does not fit the model
├─ TargetError        7  an execution provider or data type that is not available
└─ ValidationError    4  the result is not as good as was required; carries the verdict
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import ClassVar

SHOWN_NAMES = 40


def closest(word: str, known: Iterable[str]) -> str | None:
    """The name that a word may be a misspelling of, if there is one."""
    return next(iter(get_close_matches(word, list(known), n=1)), None)


def nearest(word: str, known: Iterable[str]) -> str:
    """What a message says after a name that does not exist: the name that was meant, or those there are."""
    names = list(known)
    meant = closest(word, names)
    shown = ", ".join(names[:SHOWN_NAMES]) + (", …" if len(names) > SHOWN_NAMES else "")
    return f"did you mean '{meant}'?" if meant else f"known are: {shown or 'none'}"


def one_line(error: BaseException) -> str:
    """What an error of another package says, on one line and whole: the reason often stands at its end."""
    return " ".join(str(error).split()) or type(error).__name__


# What would end a line, or steer a terminal.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class OnnxSlimError(Exception):
    """Base of every error raised on purpose; its text is one line for the user.

    Attributes:
        exit_code: what the command line returns when the error reaches it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: object = "") -> None:
        # Names out of a model may hold anything.
        super().__init__(_CONTROL.sub(lambda found: repr(found[0])[1:-1], str(message)))


class LoadError(OnnxSlimError):
    """The input is missing, is not an ONNX model, or is one that cannot be run."""

    exit_code = 3


class SaveError(OnnxSlimError):
    """The result could not be written."""

    exit_code = 6


class UsageError(OnnxSlimError):
    """An unknown option, pass or value."""

    exit_code = 2


class PassError(OnnxSlimError):
    """A pass could not do its work.

    Attributes:
        pass_name: the pass that failed.
        node: name of the node it failed at, or None.
        done: names of the passes that had finished before.
    """

    exit_code = 3

    def __init__(
        self, message: str, *, pass_name: str = "", node: str | None = None, done: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message)
        self.pass_name = pass_name
        self.node = node
        self.done = done


class TimeUp(PassError):
    """The time that was given is over; a pass takes what it has found by then, or is reverted."""


class InvalidGraph(PassError):
    """The check after a pass found that the model is broken or no longer the same."""


class CalibrationError(OnnxSlimError):
    """Calibration or test data is unusable or does not match the model's inputs."""

    exit_code = 5


class TargetError(OnnxSlimError):
    """An execution provider is not available, or fell back to another one."""

    exit_code = 7


class ValidationError(OnnxSlimError):
    """The result does not meet what was required of it.

    Attributes:
        verdict: the `onnxslim.Verdict` with every measured figure; None if nothing could be measured.
    """

    exit_code = 4

    def __init__(self, message: str, verdict: object = None) -> None:
        super().__init__(message)
        self.verdict = verdict
