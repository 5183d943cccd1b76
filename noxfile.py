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
def bench(session: nox.Session) -> None:
    """Calibration beside ONNX Runtime's; words after `--` go to the script, such as `--images 16`."""
    session.install("-e", ".[dev]")
    session.run("python", "benchmarks/calibration.py", *session.posargs)
