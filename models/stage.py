"""Photographs, texts and sounds whose truth is known, out of packages of Debian: a pinned manifest.

    python models/stage.py list
    python models/stage.py fetch [NAME ...]

``fetch`` asks apt-get for packages, without being root and without installing them, and keeps in the cache of
the zoo what the tasks in ``models/tasks`` read. The lists of a Debian 12 have to be there (`apt-get update`).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from onnxslim.models import sources
from onnxslim.models.sources import Debian, PackagedFolder


@dataclass(frozen=True)
class Source:
    """One row of the manifest.

    Attributes:
        licence: SPDX identifier that covers the files.
        content: which files of which package.
    """

    licence: str
    content: PackagedFolder


SOURCES: dict[str, Source] = {
    "stamps": Source(
        "GPL-2.0-only",
        PackagedFolder(
            Debian("tuxpaint-stamps-default", "2022.06.04-1"),
            "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
            "usr/share/tuxpaint/stamps",
            ("*.png",),
        ),
    ),
    "mate": Source(
        "GPL-2.0-or-later",
        PackagedFolder(
            Debian("mate-backgrounds", "1.26.0-1"),
            "7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04",
            "usr/share/backgrounds/mate",
            ("nature/*.jpg",),
        ),
    ),
    "plasma": Source(
        "GPL-2.0-or-later",
        PackagedFolder(
            Debian("plasma-workspace-wallpapers", "4:5.27.5-2"),
            "32cd18b71c8c938a18b3b351f217c02ac590e323caa3cf322fbb875ce8892f8b",
            "usr/share/wallpapers",
            ("*/contents/images/2560x1600.jpg",),
        ),
    ),
    "wordnet": Source(
        "WordNet-3.0",
        PackagedFolder(
            Debian("wordnet-base", "1:3.0-37"),
            "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
            "usr/share/wordnet",
            ("data.*",),
        ),
    ),
}


def _row(name: str) -> Source:
    if name not in SOURCES:
        raise ValueError(f"unknown source {name!r}; known: {', '.join(SOURCES)}")
    return SOURCES[name]


def folder(name: str) -> Path:
    """The files of a source in the cache.

    Raises:
        FileNotFoundError: it was not fetched; the text says which command does.
        ValueError: the manifest has no such row.
    """
    if not available(name):
        raise FileNotFoundError(
            f"{name} is not in {_at(name).parent}: run `python models/stage.py fetch {name}`"
        )
    return _at(name)


def available(name: str) -> bool:
    """Whether a source is in the cache.

    Raises:
        ValueError: the manifest has no such row.
    """
    return _row(name).content.is_at(_at(name))


def _at(name: str) -> Path:
    return sources.cache() / "stage" / name


def fetch(names: list[str] | None = None) -> None:
    """Put sources (all by default) into the cache.

    Raises:
        RuntimeError: a client is missing or could not download a package.
        ValueError: the manifest has no such row, or an archive is not the pinned one.
    """
    sources.fetch({f"stage/{name}": _row(name).content for name in names or SOURCES})


def main() -> None:
    """The ``list`` and ``fetch`` commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="show every source and whether it is in the cache")
    fetching = commands.add_parser("fetch", help="download sources into the cache")
    fetching.add_argument("name", nargs="*", help=f"of {', '.join(SOURCES)}; by default all of them")
    args = parser.parse_args()
    try:
        if args.command == "fetch":
            fetch(args.name)
        for name, row in SOURCES.items() if args.command == "list" else ():
            state = "cached" if available(name) else "missing"
            print(f"{name:12}{state:9}{row.content.package.requirement:48}{row.licence}")
    except (RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
