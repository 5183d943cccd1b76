"""How large a model is on its way to a user: compressed, as servers send it and archives hold it."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from onnxslim.formats import arrow, size
from onnxslim.ir import proto
from onnxslim.ir.model import Model, without_data

# What gzip and most servers use; and what zstd uses, unless told otherwise.
DEFLATE_LEVEL, ZSTD_LEVEL = 6, 3


@dataclass(frozen=True)
class Download:
    """Bytes of a model when it is sent.

    Attributes:
        deflate: with deflate, as in gzip, zip and HTTP.
        zstd: with zstd; None where Python has no library for it (`compression.zstd`, or `zstandard`).
    """

    deflate: int
    zstd: int | None = None

    def told(self, after: Download) -> str:
        """This and another one, for people."""
        sizes = f"{arrow(size(self.deflate), size(after.deflate))} with deflate"
        if self.zstd is None or after.zstd is None:
            return sizes
        return f"{sizes}, {arrow(size(self.zstd), size(after.zstd))} with zstd"


class _Compressor(Protocol):
    def compress(self, data: bytes) -> bytes:
        """What is ready of the data so far."""

    def flush(self) -> bytes:
        """The rest."""


def download(model: Model) -> Download:
    """Compress a model, all of its data with it, and count what comes out.

    Args:
        model: not modified; read constant by constant, so that data files may be larger than memory.
    """
    found = [_Counter(zlib.compressobj(DEFLATE_LEVEL))]
    modern = _zstd()
    if modern is not None:
        found.append(_Counter(modern))
    for part in _parts(model):
        for each in found:
            each.add(part)
    return Download(*(each.total() for each in found))


class _Counter:
    """Counts what a compressor makes."""

    def __init__(self, compressor: _Compressor) -> None:
        self._compressor, self._bytes = compressor, 0

    def add(self, data: bytes) -> None:
        """Take in more data."""
        self._bytes += len(self._compressor.compress(data))

    def total(self) -> int:
        """Of all data."""
        return self._bytes + len(self._compressor.flush())


def _parts(model: Model) -> Iterator[bytes]:
    """The bytes of a file, tensors last."""
    yield model.to_proto_with(without_data).SerializeToString()
    for constant in model.constants():
        yield proto.encode_embedded(constant).SerializeToString()


def _zstd() -> _Compressor | None:
    for name in ("compression.zstd", "zstandard"):
        try:
            library = importlib.import_module(name)
        except ImportError:
            continue
        made: _Compressor = (
            library.ZstdCompressor(level=ZSTD_LEVEL)
            if name == "compression.zstd"
            else library.ZstdCompressor(level=ZSTD_LEVEL).compressobj()
        )
        return made
    return None
