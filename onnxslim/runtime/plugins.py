"""Plugins of ONNX Runtime that are installed: execution providers in packages of their own.

Nothing here loads ONNX Runtime or a library; `onnxslim.runtime.native` does, when a provider is asked for.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from dataclasses import dataclass
from importlib import metadata

from onnxslim.errors import one_line

# Modules of packages that bring a provider begin with the first, or are named so.
PREFIX = "onnxruntime_ep_"
NAMES = ("onnxruntime_qnn",)


@dataclass(frozen=True)
class PluginPackage:
    """An installed package with execution providers.

    Attributes:
        name: of the package, with its version.
        library: the file that ONNX Runtime loads.
        providers: ONNX Runtime's names of what is in it.
        problem: why it cannot tell these; empty if it can.
    """

    name: str
    library: str = ""
    providers: tuple[str, ...] = ()
    problem: str = ""


@functools.cache
def packages() -> tuple[PluginPackage, ...]:
    """All that are installed, by the names of their modules. They are imported, which is to trust them."""
    found = {each.name for each in pkgutil.iter_modules()}
    return tuple(_package(name) for name in sorted(found) if name.startswith(PREFIX) or name in NAMES)


def package_of(provider: str) -> PluginPackage | None:
    """The package that has a provider."""
    return next((each for each in packages() if provider in each.providers), None)


def short_name(provider: str) -> str:
    """What a provider is called for short, in small letters."""
    return provider.lower().removesuffix("executionprovider")


def _package(module: str) -> PluginPackage:
    name = _versioned(module)
    try:
        code = importlib.import_module(module)
        return PluginPackage(name, str(code.get_library_path()), tuple(code.get_ep_names()))
    except Exception as error:  # whatever it does when it is imported
        return PluginPackage(name, problem=one_line(error))


def _versioned(module: str) -> str:
    try:
        owner = metadata.distribution(module)
    except metadata.PackageNotFoundError:
        owners = metadata.packages_distributions().get(module, ())
        return f"{owners[0]} {metadata.version(owners[0])}" if owners else module
    return f"{owner.metadata['Name']} {owner.version}"
