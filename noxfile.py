"""Sessions for every check: `nox -l` lists them, `nox` runs lint, types and tests.

`.ci/run` is the full gate; these are its steps one by one.
"""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_existing_virtualenvs = True


@nox.session
def lint(session: nox.Session) -> None:
    """Style and formatting."""
    session.install("-e", ".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types."""
    session.install("-e", ".[dev]")
    session.run("mypy", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Tests; words after `--` go to pytest."""
    session.install("-e", ".[dev]")
    session.run("pytest", *session.posargs)


@nox.session
def oldest(session: nox.Session) -> None:
    """The node suite and the rows of operators on the oldest onnx and ONNX Runtime that may be installed."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    least = [*project["dependencies"], *project["optional-dependencies"]["cpu"]]
    pins = [
        f"{word.replace('>=', '==')}.*" for word in least if word.split(">=")[0] in ("onnx", "onnxruntime")
    ]
    session.install("-e", ".[test]", *pins)
    session.run("pytest", "tests/test_conformance.py", "tests/ops", *session.posargs)


@nox.session(python=["3.10", "3.11", "3.12", "3.13", "3.14"])
def python(session: nox.Session) -> None:
    """The fast part of the tests on every Python that is here; words after `--` go to pytest."""
    session.install("-e", ".[cpu,test]")
    session.run("pytest", "-m", "not slow and not zoo and not conformance", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The site, in build/html; links that lead nowhere fail. `-- serve` shows it."""
    session.install(".[docs]")
    session.run("python", "docs/site.py", "build/site")
    session.run("mkdocs", *(session.posargs or ["build"]))


@nox.session
def wheel(session: nox.Session) -> None:
    """Build a wheel and run the demo from it, away from the checkout."""
    folder = Path(session.create_tmp()).resolve()
    session.install("build")
    session.run("python", "-m", "build", "--wheel", "--outdir", str(folder), ".")
    built = max(folder.glob("*.whl"), key=lambda path: path.stat().st_mtime)
    session.install("--force-reinstall", "--no-deps", str(built))
    session.install(f"{built}[cpu]")
    session.chdir(folder)
    session.run("onnxslim", "demo", "--model", "all")


@nox.session
def train(session: nox.Session) -> None:
    """What learns, with PyTorch; words after `--` go to pytest."""
    session.install("-e", ".[cpu,train,test,zoo]")
    files = ("tests/passes/test_distill.py", "tests/passes/test_quantize_train.py")
    session.run("pytest", "-m", "train", "tests/learn", *files, *session.posargs)


@nox.session
def cluster(session: nox.Session) -> None:
    """Searches on workers of Dask and of Ray, started on this machine, and the loggers of trials."""
    session.install("-e", ".[cpu,dask,ray,test]", "mlflow-skinny", "wandb")
    session.run("pytest", "-n", "0", "-m", "cluster", "tests/search", *session.posargs)


def _required(session: nox.Session, provider: str) -> None:
    """Fail where the wheel does not bring what the session is about, instead of skipping every test."""
    code = f"import onnxruntime; assert {provider!r} in onnxruntime.get_available_providers()"
    session.run("python", "-c", code)


@nox.session
def openvino(session: nox.Session) -> None:
    """The bundled networks on OpenVINO's plugin; it takes processors by Intel only, and skips elsewhere."""
    session.install("-e", ".[openvino,test]")
    session.run("onnxslim", "providers")
    session.run(
        "pytest", "tests/runtime/test_providers.py", "tests/runtime/test_plugins.py", *session.posargs
    )


def _software_card(session: nox.Session) -> dict[str, str]:
    """The environment in which Vulkan finds a graphics card made of software."""
    folder = str(Path(session.create_tmp()) / "chromium")
    told = session.run("python", "tests/swiftshader.py", folder, silent=True)
    return dict(line.split("=", 1) for line in str(told).splitlines() if "=" in line)


@nox.session
def webgpu(session: nox.Session) -> None:
    """The bundled networks on WebGPU, MiniLM if it was exported: on a graphics card, or else SwiftShader."""
    session.install("-e", ".[webgpu,test,zoo]")
    _required(session, "WebGpuExecutionProvider")
    session.run("python", "models/zoo.py", "fetch")
    card = any(Path("/sys/class/drm").glob("card*"))
    env = {} if card else _software_card(session)
    session.run("onnxslim", "providers", env=env)
    files = [f"tests/runtime/test_{name}.py" for name in ("webgpu", "providers", "plugins")]
    session.run("pytest", *files, *session.posargs, env=env)


@nox.session
def openvino_wheel(session: nox.Session) -> None:
    """The same on the last wheel of ONNX Runtime with OpenVINO inside, which takes all processors."""
    session.install("-e", ".[test]", "onnxruntime-openvino")
    _required(session, "OpenVINOExecutionProvider")
    session.run("pytest", "tests/runtime/test_providers.py", *session.posargs)


@nox.session
def gpu_fallback(session: nox.Session) -> None:
    """What onnxruntime-gpu does on a machine without a GPU: it must refuse. With one, the GPU tests run."""
    session.install("-e", ".[gpu,test]")
    _required(session, "CUDAExecutionProvider")
    session.run("pytest", "tests/runtime/test_providers.py", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Look for inputs that break something; a word after `--` is the time to spend, in seconds (300)."""
    session.install("-e", ".[dev]")
    seconds = session.posargs[0] if session.posargs else "300"
    session.run("pytest", "-m", "fuzz", "tests/test_fuzz.py", env={"FUZZ_SECONDS": seconds})


@nox.session
def bench(session: nox.Session) -> None:
    """Calibration beside ONNX Runtime's; words after `--` go to the script, such as `--images 16`."""
    session.install("-e", ".[dev]")
    session.run("python", "benchmarks/calibration.py", *session.posargs)
