"""Settings of all tests."""

from __future__ import annotations

import gc
import os
import sys

from hypothesis import settings

# Tests run in as many processes as there are cores: threads of BLAS in each would wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Hundreds of commands are run, each a process of its own: the first compiles the product for all of them.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# What lands is judged on the same examples every time; everybody else looks for new ones.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("local", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_collection_finish() -> None:
    """Thousands of tests, once collected, need not be looked through for garbage again and again."""
    gc.collect()
    gc.freeze()
