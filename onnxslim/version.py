"""Which version this is."""

from __future__ import annotations

from importlib import metadata


def version() -> str:
    """The version of the installed distribution."""
    try:
        return metadata.version("onnx-slimkit")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "0+unknown"
