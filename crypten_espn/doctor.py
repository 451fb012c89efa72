"""What is installed, what was patched and why, what is missing and its cure."""

from __future__ import annotations

import os
import platform
import sys
import textwrap
import time
from dataclasses import dataclass
from importlib import import_module, metadata

import torch

import crypten_espn.patches as patches

from .errors import DataError, PeerError
from .launch import run_parties
from .pillar.data import fashion_sample, load_dataset

#: Versions this package was tested with, as requirements.txt pins them.
TESTED = {
    "torch": ("2.13.0",),
    "torchvision": ("0.28.0",),
    "crypten": ("0.4.1",),
    "numpy": ("2.4.6", "2.2.6"),
    "onnx": ("1.23.2",),
    "cryptography": ("50.0.2",),
    "numba": ("0.68.1",),
    "safetensors": ("0.8.0",),
    "cloudpickle": ("3.1.2",),
}

_INSTALL = "make install, or pip install -r requirements.txt"


@dataclass(frozen=True)
class Check:
    """One finding.

    Args:
        name: what was looked at.
        found: what is there.
        cure: what to do about it; None if it is as it should be.
        needed: whether anything fails without the cure.
    """

    name: str
    found: str
    cure: str | None = None
    needed: bool = False


def checks() -> list[Check]:
    """Every finding but the patches.

    1. Python, processor, GPU.
    2. The packages: present, importable, of a tested version.
    3. The bundled and the full data set.
    4. Two parties that multiply on this machine.
    """
    return [
        _python(),
        _processor(),
        _gpu(),
        *(_package(name) for name in TESTED),
        _sample(),
        _fashion_mnist(),
        _two_parties(),
    ]


def report() -> str:
    """The findings, the patches in force and why, and what to do, as text."""
    found = checks()
    width = max(len(check.name) for check in found)
    lines = [
        f"  {_mark(check)} {check.name:<{width}}  {check.found}" for check in found
    ]
    applied = patches.applied()
    lines += ["", f"{len(applied)} of {len(patches.PATCHES)} patches applied, because:"]
    for patch in applied:
        lines += _paragraph(f"{patch.name}: {patch.broke} (seen on {patch.seen_on})")
    spare = [patch.name for patch in patches.PATCHES if not patch.applied]
    if spare:
        lines.append(f"not needed here: {', '.join(spare)}")
    for heading, needed in (("to be cured:", True), ("optional:", False)):
        cures = [c for c in found if c.cure is not None and c.needed is needed]
        if cures:
            lines += ["", heading]
        for check in cures:
            lines += _paragraph(f"{check.name}: {check.cure}")
    if not any(check.needed for check in found):
        lines += ["", "Everything that is needed is here."]
    return "\n".join(lines)


def _mark(check: Check) -> str:
    if check.cure is None:
        return "ok     "
    return "MISSING" if check.needed else "note   "


def _paragraph(text: str) -> list[str]:
    head, *rest = text.splitlines()
    wrapped = textwrap.wrap(head, 86, initial_indent="  ", subsequent_indent="    ")
    # What follows the first line are commands to copy: left as they are.
    return wrapped + [f"    {line.strip()}" for line in rest]


def _python() -> Check:
    found = f"{platform.python_version()} at {sys.executable}"
    return Check("python", found)


def _processor() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    cores = cores or os.cpu_count() or 1
    found = f"{cores} cores, {platform.machine()}, {platform.system()}"
    if cores < 2:
        cure = "two parties share one core here: times will be twice as long"
        return Check("processor", found, cure)
    return Check("processor", found)


def _gpu() -> Check:
    if torch.cuda.is_available():
        return Check("CUDA", torch.cuda.get_device_name(0))
    return Check("CUDA", "none; everything runs on the CPU")


def _package(name: str) -> Check:
    try:
        version = metadata.version(name)
        import_module(name)
    except metadata.PackageNotFoundError:
        return Check(name, "not installed", _INSTALL, needed=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        return Check(name, f"does not import: {reason}", _INSTALL, needed=True)
    if version.partition("+")[0] not in TESTED[name]:
        tested = " and ".join(TESTED[name])
        return Check(name, version, f"tested with {tested}; {_INSTALL}")
    return Check(name, version)


def _sample() -> Check:
    name = "bundled images"
    try:
        images = fashion_sample()
    except DataError as error:
        return Check(name, "missing", str(error), needed=True)
    return Check(name, f"{len(images)} test images of Fashion-MNIST")


def _fashion_mnist() -> Check:
    name = "Fashion-MNIST"
    try:
        dataset = load_dataset("fashion-mnist")
    except DataError as error:
        return Check(name, "missing; only training needs it", str(error))
    count = len(dataset.train) + len(dataset.validation)
    return Check(name, f"{count} training images")


def _two_parties() -> Check:
    name = "two parties"
    start = time.monotonic()
    try:
        first, second = run_parties(_product, world_size=2, timeout=60)
    except PeerError as error:
        cure = f"local TCP connections and a writable {_folder()} are needed. {error}"
        return Check(name, "do not run", cure, needed=True)
    found = f"1.5 x 4 = {first:.3f} in private, {time.monotonic() - start:.1f} s"
    if abs(first - 6) > 0.01 or first != second:
        return Check(name, found, "the product is wrong; " + _INSTALL, needed=True)
    return Check(name, found)


def _folder() -> str:
    return os.environ.get("TMPDIR", "/tmp")


def _product() -> float:
    import crypten

    x = crypten.cryptensor(torch.tensor(1.5), src=0)
    y = crypten.cryptensor(torch.tensor(4.0), src=1)
    return float((x * y).get_plain_text())
