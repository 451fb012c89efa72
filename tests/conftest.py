"""Shared by all tests: our import comes first, and two-party runs have a time limit.

With --in-process, which is what `make test-fast` gives, a test is skipped at the moment
it would start a process: what is left needs none, and no list has to be kept.
"""

from __future__ import annotations

import multiprocessing.process
import os
import subprocess
from typing import Any

import pytest
import torch
from hypothesis import settings

# Read when torch is imported, here and in what tests start: on tensors as small as
# theirs a second thread costs more than it does.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import crypten_espn  # noqa: F401 - CrypTen cannot be imported before its patches
from crypten_espn import launch

launch.timeout_s = 120
# Every party that runs a test module's function imports it, and so this.
launch.preloaded.append("pytest")

# A gate should not depend on luck: the examples are the same every time, but for
# `make test-random`, which names hypothesis' own profile.
settings.register_profile("gate", derandomize=True)
settings.load_profile("gate")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--in-process", action="store_true", help="skip tests that start a process"
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    """What a test draws without a seed of its own hangs on no test before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.config.getoption("--in-process"):
        return
    popen = subprocess.Popen.__init__

    def skip(*_: Any, **__: Any) -> None:
        pytest.skip("starts a process")

    def start(self: Any, args: Any, *others: Any, **options: Any) -> None:
        if args[0] != "git":  # a benchmark's rows name the commit
            skip()
        popen(self, args, *others, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", start)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", skip)
    monkeypatch.setattr(os, "fork", skip)
