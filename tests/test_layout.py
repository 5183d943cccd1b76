"""The layout on disk, the packages in pyproject.toml and what is installed agree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import onnxslim
from tests.helpers import ROOT

tomllib: Any = pytest.importorskip("tomllib", reason="reading pyproject.toml takes Python 3.11")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
LINKED = ("passes", "calibration", "models")


@pytest.mark.parametrize("name", LINKED)
def test_links_point_to_the_folders_at_the_root(name: str) -> None:
    link = ROOT / "onnxslim" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert (ROOT / name / "__init__.py").is_file()


def test_every_package_is_installed() -> None:
    on_disk = {
        ".".join(("onnxslim", *path.parent.relative_to(ROOT / "onnxslim").parts))
        for path in (ROOT / "onnxslim").rglob("__init__.py")
    }
    for name in LINKED:  # rglob does not follow links
        on_disk |= {
            ".".join(("onnxslim", *path.parent.relative_to(ROOT).parts))
            for path in (ROOT / name).rglob("__init__.py")
        }
    assert set(SETUPTOOLS["packages"]) == on_disk
    assert len(SETUPTOOLS["packages"]) == len(on_disk)


def test_every_folder_with_code_is_a_package() -> None:
    for name in ("onnxslim", *LINKED):
        for path in (ROOT / name).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), f"{path.parent} has no __init__.py"


def test_folders_outside_the_package_are_mapped() -> None:
    outside = {
        name: "/".join(name.split(".")[1:])
        for name in SETUPTOOLS["packages"]
        if name.split(".")[1:2] and name.split(".")[1] in LINKED
    }
    assert SETUPTOOLS["package-dir"] == outside


def test_package_data_is_there() -> None:
    for package, patterns in SETUPTOOLS["package-data"].items():
        for pattern in patterns:
            assert list(ROOT.joinpath(*package.split(".")).glob(pattern)), f"{package}: no {pattern}"


def test_the_version_is_stated_once() -> None:
    stated = PROJECT["project"]["version"]
    assert onnxslim.__version__ in (stated, "0+unknown")
    for path in (ROOT / "onnxslim").glob("*.py"):
        assert not re.search(rf"\b{re.escape(stated)}\b", path.read_text(encoding="utf-8")), path


def test_the_command_is_the_one_in_the_package() -> None:
    from onnxslim.cli import main

    assert PROJECT["project"]["scripts"] == {"onnxslim": f"{main.__module__}:{main.__name__}"}


def test_the_source_distribution_has_what_the_repository_has() -> None:
    """What setuptools takes by itself, and what MANIFEST.in adds."""
    lines = [line.split() for line in (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines()]
    added = {name for verb, *names in lines if verb in ("graft", "include") for name in names}
    assert all((ROOT / name).exists() for name in added), "all of it is there"
    alone = {"onnxslim", *LINKED, "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and list(path.rglob("*.py"))}
    left = {name for name in folders if not name.startswith(".")} - alone - added - {"build", "dist"}
    assert left == set()
    assert {path.name for path in ROOT.glob("*.md")} <= alone | added


def test_citations_name_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", text, re.MULTILINE) == [PROJECT["project"]["version"]]
