"""How large a model is when it is sent."""

from __future__ import annotations

import importlib
import zlib
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnxslim.engine.pipeline import Pipeline
from onnxslim.ir import download as sent
from onnxslim.ir.download import Download, download
from onnxslim.ir.model import Model
from onnxslim.passes.half import Half
from onnxslim.passes.slim import Slim
from tests.helpers import normal, parse


@pytest.fixture
def net() -> Model:
    weight = np.round(normal(64, 64) * 4) / 4  # few values, so that there is something to compress
    return parse("g (float[N,64] x) => (float[N,64] y) { y = MatMul(x, w) }", {"w": weight})


def test_it_is_what_the_file_takes_once_deflated(net: Model) -> None:
    written = net.to_proto().SerializeToString()
    assert download(net).deflate == pytest.approx(len(zlib.compress(written, 6)), rel=0.02)
    assert download(net).deflate < 0.5 * len(written)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("float", np.float32), ("int8", np.int8), ("int4", ml_dtypes.int4)]
)
def test_of_large_constants_some_blocks_are_enough(kind: str, dtype: type[np.generic]) -> None:
    values = np.clip(np.round(normal(1 << 11, 1 << 11) * 2), -8, 7)
    values[: 1 << 10] *= 0.5  # the first half has fewer values
    text = f"g (int64[N] i) => ({kind}[N,2048] y) {{ y = Gather(w, i) }}"
    large = parse(text, {"w": values.astype(dtype)}, opset=21)
    written = large.to_proto().SerializeToString()
    assert download(large).deflate == pytest.approx(len(zlib.compress(written, 6)), rel=0.03)
    assert sum(len(part) for part, _ in sent._parts(large)) < 0.2 * len(written)


def test_zstd_is_told_where_there_is_a_library(net: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    class Compressor:
        """Halves everything."""

        def __init__(self, level: int) -> None:
            self.level = level

        def compress(self, data: bytes) -> bytes:
            return data[::2]

        def flush(self) -> bytes:
            return b"end"

    known: dict[str, Any] = {"compression.zstd": SimpleNamespace(ZstdCompressor=Compressor)}

    def imported(name: str) -> Any:
        if name not in known:
            raise ImportError(name)
        return known[name]

    monkeypatch.setattr(importlib, "import_module", imported)
    size = sum(len(part) for part, _ in sent._parts(net))
    assert download(net).zstd == pytest.approx(size / 2 + 3, abs=2)
    known.clear()
    assert download(net).zstd is None


def test_reports_of_lossy_passes_tell_it(net: Model) -> None:
    report = Pipeline(Slim(), Half(weights_only=True))(net).report
    assert report.download is not None
    before, after = report.download
    assert before == download(net)
    assert before.deflate > after.deflate
    assert f"download: {before.told(after)}" in str(report)
    assert report.to_dict()["download"][0]["deflate"] == before.deflate
    assert (report + report).download == report.download
    assert Pipeline(Slim())(net).report.download is None


def test_words() -> None:
    assert Download(2000, 1000).told(Download(1000, 500)) == (
        "2.0 kB → 1.0 kB with deflate, 1.0 kB → 500 bytes with zstd"
    )
    assert Download(2000).told(Download(1000, 500)) == "2.0 kB → 1.0 kB with deflate"
