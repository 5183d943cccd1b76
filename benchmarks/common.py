"""What several benchmarks share: virtual environments of other tools, and the folder of exported networks."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENVS = Path.home() / ".cache" / "onnxslim" / "venvs"
# The runtime is the same for all tools.
RUNTIME = "onnxruntime==1.31.1"


def environment(home: Path, requirements: Sequence[str], alone: Sequence[str] = ()) -> Path:
    """The Python of a virtual environment, which is made unless it is there.

    Args:
        home: its folder.
        requirements: what pip installs, beside the runtime.
        alone: what it installs without the packages that these ask for.
    """
    wanted = "\n".join((*requirements, RUNTIME, *alone))
    mark = home / "installed.txt"
    python = home / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not (mark.is_file() and mark.read_text(encoding="utf-8") == wanted):
        print(f"making {home}", file=sys.stderr)
        venv.create(home, with_pip=True, clear=True)
        install = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, *requirements, RUNTIME], check=True, stdout=sys.stderr)
        if alone:
            subprocess.run([*install, "--no-deps", *alone], check=True, stdout=sys.stderr)
        mark.write_text(wanted, encoding="utf-8")
    return python


def architectures() -> Path:
    """The folder of the networks that benchmarks/architectures.py exports; it need not exist yet."""
    folder = os.environ.get("ONNXSLIM_ARCHITECTURES")
    return Path(folder) if folder else Path.home() / ".cache" / "onnxslim" / "architectures"
