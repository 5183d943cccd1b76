"""Settings of all tests."""

from __future__ import annotations

import os

from hypothesis import settings

# What lands is judged on the same examples every time; everybody else looks for new ones.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("local", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")
