"""Plugins of ONNX Runtime: found by name or by file, really used, or refused. What they do is played here."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from onnxslim import cli
from onnxslim.errors import LoadError, TargetError, UsageError, ValidationError
from onnxslim.recipes.recipe import Recipe
from onnxslim.runtime import native, plugins, profile, vulkan
from onnxslim.runtime.native import CPU, onnxruntime
from onnxslim.runtime.session import Session
from onnxslim.runtime.targets import REGISTRY, Target, known
from tests.helpers import parse

ACME = "AcmeExecutionProvider"
PRODUCT = "g (float[N,2] x) => (float[N,2] y) <float[2,2] w = {1,2,3,4}> { p = MatMul(x, w)  y = Relu(p) }"
X = {"x": np.ones((3, 2), np.float32)}
PACKAGE = """
def get_ep_names():
    return [{!r}]

def get_library_path():
    return {!r}
"""


class PlayedRuntime:
    """ONNX Runtime with plugins: it computes on the processor, and says what a plugin would make it say.

    Attributes:
        offered: kinds of devices, by the file of the plugin.
        uses: whether sessions really use the plugin that they are asked for.
        has_half: whether the device of plugins computes in float16.
        registered: names that plugins were loaded under, by their files.
        asked: the device and the options of the last session.
    """

    def __init__(self) -> None:
        self.offered: dict[str, tuple[str, ...]] = {}
        self.uses = self.has_half = True
        self.registered: dict[str, str] = {}
        self.asked: tuple[Any, dict[str, str]] | None = None
        self._devices: list[Any] = list(onnxruntime().get_ep_devices())
        runtime = self

        class Options(onnxruntime().SessionOptions):  # type: ignore[misc]
            def add_provider_for_devices(self, devices: list[Any], options: dict[str, str]) -> None:
                runtime.asked = devices[0], options

        self.SessionOptions = Options

    def __getattr__(self, name: str) -> Any:
        return getattr(onnxruntime(), name)

    def register_execution_provider_library(self, name: str, path: str) -> None:
        assert path not in self.registered, "ONNX Runtime refuses a second time"
        if path not in self.offered:
            raise RuntimeError("/a/b.cc:1 void f(int) cannot open shared object file")
        self.registered[path] = name
        for kind in self.offered[path]:
            device = SimpleNamespace(type=SimpleNamespace(name=kind), vendor="Acme")
            self._devices.append(SimpleNamespace(ep_name=name, ep_metadata={"version": "9"}, device=device))

    def get_ep_devices(self) -> list[Any]:
        return list(self._devices)

    def get_available_providers(self) -> list[str]:
        """Newer versions list what plugins offer, too; what else the wheel brings is no part in this play."""
        return list(dict.fromkeys((CPU, *self._named())))

    def _named(self) -> list[str]:
        return [device.ep_name for device in self._devices]

    def InferenceSession(self, source: Any, options: Any, providers: Any, **_: Any) -> Any:
        real = onnxruntime().InferenceSession(source, options, providers=providers or [CPU])
        if providers is None and self.uses:
            assert self.asked is not None
            named = [self.asked[0].ep_name, CPU]

            def run(names: list[str], feeds: dict[str, Any], *options: Any) -> Any:
                types = {array.dtype for array in (*feeds.values(), *real.run(names, feeds))}
                if np.dtype(np.float16) in types and not self.has_half:
                    raise RuntimeError(
                        "/a/b.cc:1 void f(int) Program Mul requires f16 but the device has none."
                    )
                return real.run(names, feeds, *options)

            return SimpleNamespace(
                get_providers=lambda: named,
                get_inputs=real.get_inputs,
                get_outputs=real.get_outputs,
                run=run,
                end_profiling=lambda: self._profiled(real.end_profiling()),
            )
        return real

    def _profiled(self, path: str) -> str:
        assert self.asked is not None
        file = Path(path)
        file.write_text(file.read_text("utf-8").replace(CPU, self.asked[0].ep_name), "utf-8")
        return path


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedRuntime]:
    played = PlayedRuntime()
    monkeypatch.setattr(native, "onnxruntime", lambda: played)
    monkeypatch.setattr(native, "_PLUGGED", {})
    monkeypatch.setenv("ONNXSLIM_ISOLATE", "0")  # workers have the real one
    targets = dict(REGISTRY)
    yield played
    REGISTRY.clear()
    REGISTRY.update(targets)
    profile.unusable.cache_clear()


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of Python packages, three of which are plugins, one of these broken."""
    for name, code in {
        "onnxruntime_ep_acme": PACKAGE.format(ACME, "/acme.so"),
        "onnxruntime_qnn": PACKAGE.format("QNNExecutionProvider", "/qnn.so"),
        "onnxruntime_ep_broken": "raise RuntimeError('no\\ndriver')",
        "onnxruntime_of_others": "raise AssertionError('not a plugin')",
    }.items():
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    plugins.packages.cache_clear()
    yield tmp_path
    plugins.packages.cache_clear()


def saved(folder: Path) -> str:
    parse(PRODUCT).save(folder / "a.onnx")
    return str(folder / "a.onnx")


# ------------------------------------------------------------------------------------------ by name


def test_packages_are_found_by_their_names(packages: Path) -> None:
    found = {each.name: each for each in plugins.packages()}
    assert found["onnxruntime_ep_acme"].providers == (ACME,)
    assert found["onnxruntime_ep_broken"].problem == "no driver"
    assert "onnxruntime_of_others" not in found
    acme = Target.named("acme")
    assert acme == Target.named(ACME) == Target.named("ACME")
    assert acme in known()
    assert not acme.layout.kernels
    assert Target.named("qnn") is REGISTRY["qnn"], "what it wants is known"
    assert [each.provider for each in known()].count("QNNExecutionProvider") == 1
    with pytest.raises(TargetError, match=r"known are: .*cpu, .*acme"):
        Target.named("acne")


def test_a_plugin_is_used(packages: Path, runtime: PlayedRuntime) -> None:
    runtime.offered["/acme.so"] = ("CPU", "NPU")
    acme = Target.named("acme")
    for _ in range(2):
        assert Session(parse(PRODUCT), acme).run(X)["y"].shape == (3, 2)
    assert runtime.registered == {"/acme.so": ACME}, "some plugins call their provider as they are told"
    assert runtime.asked is not None
    assert runtime.asked[0].device.type.name == "CPU"
    assert Session(parse(PRODUCT), Target("acme", ACME, device="NPU")).target.device == "NPU"
    assert runtime.asked[0].device.type.name == "NPU"
    assert profile.available()[-1] == acme
    assert not profile.unusable(acme)


def test_what_a_plugin_is_told(packages: Path, runtime: PlayedRuntime) -> None:
    runtime.offered["/acme.so"] = ("CPU",)
    told = Target.openvino()
    acme = Target("acme", ACME, options=told.options, plugin_options=told.plugin_options, device="CPU")
    Session(parse(PRODUCT), acme.with_threads(3))
    assert runtime.asked is not None
    (value,) = runtime.asked[1].values()
    assert json.loads(value) == {"CPU": {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 3}}


def test_a_provider_of_the_wheel_needs_no_plugin(runtime: PlayedRuntime) -> None:
    Session(parse(PRODUCT), Target("cpu2", CPU, plugin="/nowhere.so"))
    assert runtime.registered == {}


# ---------------------------------------------------------------------------------------- or refused


@pytest.mark.parametrize("words", [["validate", "{0}", "{0}", "--provider"], ["slim", "{0}", "--target"]])
def test_a_plugin_that_falls_back_silently_is_refused(
    words: list[str], packages: Path, runtime: PlayedRuntime, capsys: pytest.CaptureFixture[str]
) -> None:
    runtime.offered["/acme.so"] = ("NPU",)
    runtime.uses = False
    acme = Target.named("acme")
    with pytest.raises(TargetError, match=f"{ACME} was asked for, .* ONNX Runtime fell back to {CPU}"):
        Session(parse(PRODUCT), acme)
    assert acme not in profile.available()
    assert cli.main([*(word.format(saved(packages)) for word in words), "acme"]) == TargetError.exit_code
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"fell back to {CPU}" in err


@pytest.mark.parametrize("words", [["validate", "{0}", "{0}", "--provider"], ["slim", "{0}", "--target"]])
def test_a_plugin_that_takes_no_operator_is_refused(
    words: list[str],
    packages: Path,
    runtime: PlayedRuntime,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its sessions name it first all the same."""
    runtime.offered["/acme.so"] = ("NPU",)
    renamed = runtime._profiled
    monkeypatch.setattr(
        runtime, "_profiled", lambda path: path if "Relu" in Path(path).read_text("utf-8") else renamed(path)
    )
    assert not profile.unusable(Target.named("acme")), "it takes the small product"
    Session(parse(PRODUCT), Target.named("acme"))
    assert cli.main([*(word.format(saved(packages)) for word in words), "acme"]) == TargetError.exit_code
    assert f"{ACME} loads, but runs no operator of the model: {CPU} runs 2" in capsys.readouterr().err


def test_validate_tries_a_provider_before_it_opens_models(
    packages: Path,
    runtime: PlayedRuntime,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a process of its own, where what it prints is nobody's business."""
    runtime.offered["/acme.so"] = ("NPU",)
    monkeypatch.setattr(runtime, "_profiled", lambda path: path)
    model = saved(packages)
    assert cli.main(["validate", model, model, "--provider", "acme"]) == TargetError.exit_code
    assert f"{CPU} runs 1" in capsys.readouterr().err, "the small product, not the model"


def test_a_plugin_without_a_device_says_what_it_needs(packages: Path, runtime: PlayedRuntime) -> None:
    runtime.offered |= {"/acme.so": (), "/qnn.so": ("CPU",)}
    with pytest.raises(TargetError, match=rf"^{ACME} cannot be used here: .*'acme.so' offers no device on"):
        Session(parse(PRODUCT), Target.named("acme"))
    only = "offers no NPU device on this machine, only QNNExecutionProvider on CPU; it needs a neural"
    with pytest.raises(TargetError, match=only):
        Session(parse(PRODUCT), Target.qnn())


def test_what_does_not_work_here_is_simulated_only_if_that_is_asked_for(
    packages: Path, runtime: PlayedRuntime, capsys: pytest.CaptureFixture[str]
) -> None:
    runtime.offered["/acme.so"] = ()
    words = ["slim", saved(packages), str(packages / "b.onnx"), "--target", "acme"]
    assert cli.main(words) == TargetError.exit_code
    assert "offers no device on this machine; to lay the model out" in capsys.readouterr().err
    assert not (packages / "b.onnx").exists()
    assert cli.main([*words, "--simulate"]) == 0
    assert "acme itself has not run" in capsys.readouterr().err
    assert (packages / "b.check.json").exists()
    runtime.offered["/acme.so"], runtime.registered = ("NPU",), {}
    native._PLUGGED.clear()
    profile.unusable.cache_clear()
    assert cli.main(["validate", "--resume", str(packages / "b.check.json"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["providers"][1]["target"] == "acme"
    assert any(f"operators of the second model run: 2 on {ACME}" in note for note in told["notes"])


HALF = "g (float16[N,2] x) => (float16[N,2] y) { y = Mul(x, x) }"


def test_a_run_that_only_the_provider_fails_is_not_the_models_fault(
    packages: Path, runtime: PlayedRuntime, capsys: pytest.CaptureFixture[str]
) -> None:
    runtime.offered["/acme.so"], runtime.has_half = ("GPU",), False
    session = Session(parse(HALF), Target.named("acme"))
    why = (
        r"^AcmeExecutionProvider cannot run the model here: Program Mul requires f16 but the device has none"
    )
    with pytest.raises(TargetError, match=why):
        session.run({"x": np.ones((3, 2), np.float16)})
    with pytest.raises(LoadError, match="fails to run the model"):
        session.run({"x": np.ones((3, 2), np.float32)})
    model = str(packages / "half.onnx")
    parse(HALF).save(model)
    assert cli.main(["validate", model, model, "--provider", "acme"]) == TargetError.exit_code
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)


@pytest.mark.parametrize("more", [[], ["--weights-only", "--on-error", "keep"]])
def test_half_precision_is_asked_of_the_device_first(
    packages: Path, runtime: PlayedRuntime, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    runtime.offered["/acme.so"] = ("GPU",)
    words = ["half", saved(packages), str(packages / "b.onnx"), "--target", "acme", "--quiet", *more]
    assert cli.main(words) == 0
    (packages / "b.onnx").unlink()
    runtime.has_half = False
    capsys.readouterr()
    code, told = cli.main(words), capsys.readouterr().err
    if more:
        assert code == 0, "weights are turned back before the device sees them"
        return
    assert code == TargetError.exit_code
    assert told.startswith("onnxslim: error: acme does not compute in float16 here: ")
    assert told.count("\n") == 1
    assert not (packages / "b.onnx").exists()


def test_a_plugin_that_cannot_be_loaded_is_named(packages: Path, runtime: PlayedRuntime) -> None:
    with pytest.raises(TargetError, match=r"'/acme.so' cannot be loaded: cannot open shared object file"):
        Session(parse(PRODUCT), Target.named("acme"))


# ---------------------------------------------------------------------------- devices made of software


@pytest.mark.parametrize(
    ("devices", "named"),
    [
        ([(4, "Soft")], "Soft"),
        ([(4, "Soft"), (2, "Card")], ""),
        ([(1, "Inside")], ""),
        ([], ""),
    ],
)
def test_a_device_is_made_of_software_if_all_are(
    monkeypatch: pytest.MonkeyPatch, devices: list[tuple[int, str]], named: str
) -> None:
    monkeypatch.setattr(vulkan, "_devices", lambda: devices)
    assert vulkan.software_device.__wrapped__() == named


@pytest.mark.parametrize("software", ["Soft", ""])
def test_times_of_software_are_not_told(
    packages: Path,
    runtime: PlayedRuntime,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    software: str,
) -> None:
    (packages / "site" / "onnxruntime_ep_acme" / "__init__.py").write_text(
        PACKAGE.format("WebGpuExecutionProvider", "/webgpu.so"), encoding="utf-8"
    )
    monkeypatch.delitem(sys.modules, "onnxruntime_ep_acme", raising=False)
    monkeypatch.setattr(vulkan, "software_device", lambda: software)
    runtime.offered["/webgpu.so"] = ("GPU",)
    model = saved(packages)
    words = ["validate", model, model, "--provider", "webgpu", "--json", "--rounds", "2"]
    assert cli.main(words) == 0
    told = json.loads(capsys.readouterr().out)
    (row,) = told["providers"]
    assert (row["latency"] is None) == bool(software)
    note = "webgpu: no latency is told: its device, Soft, is computed by the processor"
    assert (note in told["notes"]) == bool(software)
    if software:
        assert cli.main([*words, "--require", "latency=9"]) == ValidationError.exit_code


# ------------------------------------------------------------------------------------------- by file


def test_a_library_is_named_by_its_file(
    tmp_path: Path, runtime: PlayedRuntime, capsys: pytest.CaptureFixture[str]
) -> None:
    library = tmp_path / "libonnxruntime_providers_zeta.so"
    library.touch()
    runtime.offered[str(library)] = ("GPU",)
    (zeta,) = Target.in_library(str(library))
    assert (zeta.name, zeta.provider, zeta.plugin) == ("zeta", "zeta", str(library))
    model, out = saved(tmp_path), str(tmp_path / "b.onnx")
    recipe = str(tmp_path / "r.yaml")
    words = ["slim", model, out, "--target", "zeta", "--save-recipe", recipe]
    assert cli.main(words) == TargetError.exit_code
    assert "unknown execution provider 'zeta'" in capsys.readouterr().err
    assert cli.main([*words, "--ep-library", str(library)]) == 0
    assert Recipe.load(recipe).target == "zeta"
    capsys.readouterr()
    assert cli.main(["validate", model, out, "--ep-library", str(library), "--json", "--rounds", "0"]) == 0
    ran = {each["target"]: each for each in json.loads(capsys.readouterr().out)["providers"]}
    assert ran["zeta"]["placed"] == [{"zeta": 2}, {"zeta": 2}]


def test_a_library_of_a_known_provider_is_known(tmp_path: Path, runtime: PlayedRuntime) -> None:
    """Some plugins call their provider as they are told: by the name that is known, with what it wants."""
    library = tmp_path / "libonnxruntime_providers_qnn.so"
    library.touch()
    runtime.offered[str(library)] = ("NPU",)
    (qnn,) = Target.in_library(str(library))
    assert qnn == replace(Target.qnn(), plugin=str(library))
    (tmp_path / "link.so").symlink_to(library)
    assert Session(parse(PRODUCT), replace(qnn, plugin=str(tmp_path / "link.so"))).run(X)
    assert runtime.registered == {str(library): "QNNExecutionProvider"}


def test_a_library_comes_from_the_caller_alone(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("passes: [slim]\nep_library: a.so\n", encoding="utf-8")
    for trust in (False, True):
        with pytest.raises(UsageError, match="no key 'ep_library'"):
            Recipe.load(tmp_path / "r.yaml", trust=trust)
    with pytest.raises(UsageError, match="there is no plugin"):
        Target.in_library(str(tmp_path / "a.so"))


# ----------------------------------------------------------------------------------------- all of them


def test_providers_are_listed(
    packages: Path, runtime: PlayedRuntime, capsys: pytest.CaptureFixture[str]
) -> None:
    runtime.offered |= {"/acme.so": ("NPU",), "/qnn.so": ()}
    assert cli.main(["providers", "--json"]) == 0
    found = {each["target"] or each["source"]: each for each in json.loads(capsys.readouterr().out)}
    acme, qnn, tensorrt = found["acme"], found["qnn"], found["tensorrt"]
    assert (acme["source"], acme["devices"]) == ("onnxruntime_ep_acme", ["NPU by Acme, provider 9"])
    assert acme["problem"] == found["cpu"]["problem"] == ""
    assert "offers no NPU device" in qnn["problem"]
    assert (tensorrt["source"], tensorrt["problem"]) == ("", "not installed: pip install onnxruntime-gpu")
    assert found["onnxruntime_ep_broken"]["problem"] == "no driver"
    assert cli.main(["providers"]) == 0
    out = capsys.readouterr().out
    assert "acme: NPU by Acme, provider 9" in out
    assert "onnxruntime_ep_broken: no driver" in out
