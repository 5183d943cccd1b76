"""Models and pipelines nobody thought of: a few always, more for as long as `nox -s fuzz` is given."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers import ROOT

SECONDS = float(os.environ.get("FUZZ_SECONDS", "60"))
# The numbers of the cases; others every day, so that the search goes on.
TODAY = int(time.time()) // 86_400 * 1_000_000
MEMORY = 8 << 30

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory and time are Linux's")


# What lands is judged on the same cases every time; looking for new ones is for `nox -s fuzz`.
SEARCHING = pytest.mark.skipif("FUZZ_SECONDS" not in os.environ, reason="FUZZ_SECONDS is not set")


def limited() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def tried(kind: str, first: int, count: int, folder: Path) -> Counter[str]:
    """Run cases in a process of their own; returns how often each ending occurred."""
    command = [sys.executable, "-m", "tests.fuzz", kind, str(first), str(count), str(folder)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        preexec_fn=limited,
        check=False,
    )
    last = "\n".join(done.stdout.splitlines()[-3:])
    assert done.returncode == 0, f"{kind} died with {done.returncode} at\n{last}\n{done.stderr[-3000:]}"
    endings = [line.strip().split(":")[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    return Counter(endings)


def test_damaged_models_end_in_a_result_or_an_error_of_ours(tmp_path: Path) -> None:
    endings = tried("models", 0, 60, tmp_path)
    assert endings["saved"] >= 5, "some damage is harmless"
    assert endings["LoadError"] >= 5


def test_random_passes_over_random_graphs_end_in_a_result_or_an_error_of_ours(tmp_path: Path) -> None:
    endings = tried("chains", 0, 12, tmp_path)
    assert endings["done"] >= 3


# How many cases share a process, by kind: importing takes a second, making up the node suite several.
TOGETHER = {"models": 50, "nodes": 500, "pipelines": 1, "chains": 20}


@pytest.mark.fuzz
@SEARCHING
@pytest.mark.parametrize("kind", TOGETHER)
def test_more_of_everything(kind: str, tmp_path: Path) -> None:
    end, number = time.monotonic() + SECONDS / len(TOGETHER), TODAY
    while time.monotonic() < end:
        tried(kind, number, TOGETHER[kind], tmp_path)
        number += TOGETHER[kind]
