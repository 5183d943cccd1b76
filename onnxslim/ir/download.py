"""How large a model is on its way to a user: compressed, as servers send it and archives hold it."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, cast

from onnxslim.formats import arrow, size
from onnxslim.ir import proto
from onnxslim.ir.graph import Constant
from onnxslim.ir.model import Model, without_data

# What gzip and most servers use; and what zstd uses, unless told otherwise.
DEFLATE_LEVEL, ZSTD_LEVEL = 6, 3
# Of a constant of twice as many bytes or more, so many blocks are compressed, or one of every megabyte, of so
# many bytes each: several windows of deflate.
BLOCKS, BLOCK = 4, 1 << 16


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


def deflated(parts: Iterable[bytes]) -> int:
    """Bytes of all together as servers send them."""
    packer, count = _deflate(), 0
    for part in parts:
        count += len(packer.compress(part))
    return count + len(packer.flush())


def download(model: Model) -> Download:
    """Compress a model, all of its data with it, and count what comes out.

    Of a large constant only some blocks are compressed, and counted for all of it.

    Args:
        model: not modified; read constant by constant, so that data files may be larger than memory.
    """
    makers = [_deflate, *filter(None, (_zstd(),))]
    small = [make() for make in makers]
    found = [0.0 for _ in makers]
    for part, share in _parts(model):
        for at, make in enumerate(makers):
            if share == 1:
                found[at] += len(small[at].compress(part))
            else:
                alone = make()
                found[at] += share * (len(alone.compress(part)) + len(alone.flush()))
    return Download(*(round(each + len(rest.flush())) for each, rest in zip(found, small, strict=True)))


def _parts(model: Model) -> Iterator[tuple[bytes, float]]:
    """The bytes of a file, tensors last, and how many bytes each of them stands for."""
    yield model.to_proto_with(without_data).SerializeToString(), 1
    for constant in model.constants():
        if constant.nbytes < 2 * BLOCKS * BLOCK:
            yield proto.encode_embedded(constant).SerializeToString(), 1
            continue
        values, blocks = constant.values.reshape(-1), max(BLOCKS, constant.nbytes >> 20)
        step, length = values.size // blocks, values.size * BLOCK // constant.nbytes
        for start in range(0, blocks * step, step):
            block = Constant(constant.name, values[start : start + length])
            yield proto.encode_embedded(block).SerializeToString(), step / length


def _deflate() -> _Compressor:
    return zlib.compressobj(DEFLATE_LEVEL)


def _zstd() -> Callable[[], _Compressor] | None:
    for name in ("compression.zstd", "zstandard"):
        try:
            library = importlib.import_module(name)
        except ImportError:
            continue
        if name == "compression.zstd":
            return lambda: cast(_Compressor, library.ZstdCompressor(level=ZSTD_LEVEL))
        return lambda: cast(_Compressor, library.ZstdCompressor(level=ZSTD_LEVEL).compressobj())
    return None
