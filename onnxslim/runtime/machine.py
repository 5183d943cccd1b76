"""The machine that this runs on, and the packages it runs with."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from onnxslim.runtime.native import onnxruntime

# Results depend on these.
PACKAGES = ("onnx", "numpy", "scipy")


@dataclass(frozen=True)
class Machine:
    """Where results were made.

    Attributes:
        processor: its name, or its kind where the system tells no name.
        cores: that the system has.
        system: the operating system.
        versions: of Python, ONNX Runtime and other packages, by name.
    """

    processor: str
    cores: int
    system: str
    versions: Mapping[str, str]

    def __str__(self) -> str:
        told = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{self.processor}, {self.cores} cores, {self.system}; {told}"


def machine() -> Machine:
    """This one."""
    names = sorted(_told("model name"))
    versions = {"Python": platform.python_version(), "ONNX Runtime": onnxruntime().__version__}
    versions |= {name: metadata.version(name) for name in PACKAGES}
    return Machine(
        names[0] if names else platform.processor() or platform.machine(),
        os.cpu_count() or 1,
        f"{platform.system()} {platform.machine()}",
        versions,
    )


@functools.cache
def fingerprint() -> str:
    """A hash of the processor, as far as the system tells: of machines with the same one."""
    names = sorted(_told("model name") | _told("flags"))
    told = (platform.machine(), platform.processor(), *names, str(os.cpu_count()))
    return hashlib.sha256("|".join(told).encode()).hexdigest()


@functools.cache
def _told(key: str) -> frozenset[str]:
    """What Linux tells of its processors under a key."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return frozenset()
    return frozenset(line.partition(":")[2].strip() for line in lines if line.startswith(key))
