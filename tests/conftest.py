"""Shared by all tests: our import comes first, and two-party runs have a time limit."""

from __future__ import annotations

import crypten_espn  # noqa: F401 - CrypTen cannot be imported before its patches
from crypten_espn import launch

launch.timeout_s = 120
