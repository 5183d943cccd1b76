"""What passes take, told beforehand: more for more samples, more nodes, more effort, and nothing unknown."""

from __future__ import annotations

import pytest

from onnxslim.calibration.data import CalibrationData
from onnxslim.engine import forecast
from onnxslim.engine.base import Effort
from onnxslim.engine.forecast import Forecast
from onnxslim.ir.model import Model
from onnxslim.passes.factorize import Factorize
from onnxslim.passes.prune import Prune
from onnxslim.passes.quantize import Quantize
from onnxslim.passes.slim import Slim
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import Target
from tests.helpers import normal, parse


def net(width: int = 256) -> Model:
    text = (
        f"g (float[N,{width}] x) => (float[N,{width}] y) {{ a = MatMul(x, w) r = Relu(a) y = MatMul(r, w) }}"
    )
    return parse(text, {"w": normal(width, width)})


def data(samples: int, width: int = 256) -> CalibrationData:
    return CalibrationData([{"x": normal(8, width)}] * (samples // 8))


def seconds(effort: Effort = "normal", samples: int = 64) -> dict[str, float]:
    passes = Slim(), Prune(macs=0.5, effort=effort), Factorize(effort=effort), Quantize(effort=effort)
    found = Forecast.of(passes, net(), data(samples), Target.cpu())
    assert found is not None
    assert found.names == ("slim", "prune", "factorize", "quantize")
    assert found.total == sum(found.seconds)
    return dict(zip(found.names, found.seconds, strict=True))


def test_more_samples_and_more_effort_take_longer() -> None:
    some, many, quick, thorough = seconds(), seconds(samples=6400), seconds("quick"), seconds("thorough")
    assert some["slim"] == many["slim"] < 1
    for name in ("prune", "factorize", "quantize"):
        assert 0 < quick[name] < thorough[name]
        assert some[name] < many[name]
    assert quick["quantize"] < some["quantize"] < thorough["quantize"]


def test_nothing_is_run_where_no_pass_takes_long_or_the_data_does_not_fit() -> None:
    found = Forecast.of((Slim(),), net(), data(8, 3), Target.cpu())
    assert found is not None
    assert found.total < 1
    assert Forecast.of((Quantize(),), net(), data(8, 3), Target.cpu()) is None


def test_a_model_is_run_where_its_end_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[bool] = []

    def session(model: Model, target: Target, *, once: bool = False, spin: bool = True) -> Session:
        opened.append(once)
        return Session(model, target, once=once, spin=spin)

    monkeypatch.setattr(forecast, "Session", session)
    assert Forecast.of((Quantize(),), net(), data(8), Target.cpu()) is not None
    assert opened == [True]
