"""A worker: a process that opens and runs one model at a time for another, which may survive it.

Only what it takes for that is imported here: a worker has to be ready soon.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from onnxslim.errors import LoadError, TargetError, one_line
from onnxslim.runtime import native
from onnxslim.runtime.limits import RunLimits
from onnxslim.runtime.native import OrtModel, SessionSettings

_LENGTH = struct.Struct("<Q")


def serve() -> None:
    """What a worker does: answer what comes in, until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C means the one who asks, who will end this process
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    questions: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(questions,), daemon=True).start()
    desk = _Desk()
    with suppress(TargetError):  # who asks for a model is told
        native.onnxruntime()
    send(answers, (True, None))
    while True:
        what, *details = questions.get()
        try:
            answer = True, getattr(desk, what)(*details)
        except Exception as error:
            answer = False, error
        if what != "close":
            _reply(answers, answer)
        del details, answer


class _Desk:
    """What a worker can be asked to do."""

    model: OrtModel | None = None

    def open(self, source: Any, settings: SessionSettings) -> tuple[tuple[str, ...], tuple[str, ...]]:
        self.close()
        model = native.open_model(source if isinstance(source, str) else bytes(source), settings)
        self.model = model
        return model.input_names, model.output_names

    def run(self, names: list[str], feeds: dict[str, Any], limits: RunLimits | None) -> Sequence[Any]:
        assert self.model is not None
        return self.model.run(names, feeds, limits)

    def end_profile(self) -> Path:
        assert self.model is not None
        return self.model.end_profile()

    def close(self) -> None:
        self.model = None


def _listen(questions: queue.SimpleQueue[tuple[Any, ...]]) -> None:
    """Take questions in while another one is worked on, so that the end of who asks is seen at any time."""
    pipe = open(0, "rb", closefd=False)  # noqa: SIM115  # not sys.stdin, which a fork may have read from
    with suppress(EOFError, OSError):
        while True:
            questions.put(receive(pipe))
    os._exit(0)


def _reply(answers: IO[bytes], answer: tuple[bool, Any]) -> None:
    try:
        send(answers, answer)
    except (TypeError, pickle.PicklingError) as error:  # nothing has been sent yet
        reason = f"ONNX Runtime makes what cannot be handed to another process: {one_line(error)}"
        send(answers, (False, LoadError(reason)))


def send(pipe: IO[bytes], what: Any) -> None:
    """Write something, arrays as they lie in memory.

    Raises:
        TypeError, PicklingError: it cannot be written; nothing has been.
    """
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(what, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(head), *(buffer.raw() for buffer in buffers)]
    pipe.write(_LENGTH.pack(len(parts)) + b"".join(_LENGTH.pack(part.nbytes) for part in parts))
    for part in parts:
        pipe.write(part)
    pipe.flush()


def receive(pipe: IO[bytes]) -> Any:
    """Read what was sent.

    Raises:
        EOFError: whoever sends is gone.
    """
    (count,) = _LENGTH.unpack(_read(pipe, _LENGTH.size))
    lengths = struct.unpack(f"<{count}Q", _read(pipe, count * _LENGTH.size))
    head, *buffers = (_read(pipe, length) for length in lengths)
    return pickle.loads(head, buffers=buffers)


def _read(pipe: IO[bytes], length: int) -> bytearray:
    """So many bytes, in memory that arrays may be written to."""
    taken = bytearray(length)
    rest = memoryview(taken)
    while rest:
        count = pipe.readinto(rest)  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        rest = rest[count:]
    return taken
