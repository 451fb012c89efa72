"""Shared by all tests: our import comes first, and two-party runs have a time limit."""

from __future__ import annotations

import os

from hypothesis import settings

import crypten_espn  # noqa: F401 - CrypTen cannot be imported before its patches
from crypten_espn import launch

launch.timeout_s = 120

# A gate should not depend on luck: there the examples are the same every time.
settings.register_profile("gate", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("gate")
