"""A graphics card made of software, for tests of WebGPU: SwiftShader, from Debian's Chromium.

python tests/swiftshader.py FOLDER

downloads the package into the folder, unpacks it there without installing it, and prints the environment that
a process needs from its start, one NAME=VALUE a line. Where the package cannot be had, it says why and fails.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# Where the driver is, newer version first.
PACKAGES = ("chromium-common", "chromium")
DRIVER = "usr/lib/chromium/vk_swiftshader_icd.json"


def environment(folder: Path) -> dict[str, str]:
    """What has to be set for Vulkan to find the driver, and Dawn the loader beside it.

    Raises:
        RuntimeError: the package cannot be had; says why.
    """
    driver = _driver(folder.resolve())
    # Older loaders know the first name, newer ones the second.
    return {
        "VK_ICD_FILENAMES": str(driver),
        "VK_DRIVER_FILES": str(driver),
        "LD_LIBRARY_PATH": str(driver.parent),
    }


def _driver(folder: Path) -> Path:
    if (folder / DRIVER).is_file():
        return folder / DRIVER
    folder.mkdir(parents=True, exist_ok=True)
    why = ""
    for package in PACKAGES:
        try:
            _download(package, folder)
            for file in folder.glob(f"{package}_*.deb"):
                _run("dpkg-deb", "-x", str(file), str(folder), folder=folder)
                file.unlink()
        except (OSError, subprocess.SubprocessError) as error:
            why = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1]
        if (folder / DRIVER).is_file():
            return folder / DRIVER
    raise RuntimeError(f"no SwiftShader: {why or 'no package of Chromium has it'}")


def _download(package: str, folder: Path) -> None:
    """Get a package; a system that was just made does not know yet which there are."""
    try:
        _run("apt-get", "download", package, folder=folder)
    except subprocess.SubprocessError:
        _run("apt-get", "update", folder=folder)
        _run("apt-get", "download", package, folder=folder)


def _run(*words: str, folder: Path) -> None:
    subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True, timeout=120)


if __name__ == "__main__":
    try:
        found = environment(Path(sys.argv[1]))
    except RuntimeError as problem:
        sys.exit(str(problem))
    print("\n".join(f"{name}={value}" for name, value in found.items()))
