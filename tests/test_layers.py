"""Imports follow the data: a file imports only what stands above it in this list."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "crypten_espn"
# The order in which the README's picture presents the files.
ORDER = [
    "errors",
    "table",
    "inputs",
    "array_file",
    "polynomial",
    "compiled",
    "pillar.elementwise",
    "pillar.activation",
    "pillar.tracing",
    "pillar.operation",
    "pillar.surgery",
    "pillar.penalty",
    "pillar.data.splits",
    "pillar.data.fashion",
    "pillar.data.cifar",
    "pillar.data.imagenet",
    "pillar.data",
    "pillar.networks.network",
    "pillar.networks.plain",
    "pillar.networks.residual",
    "pillar.networks",
    "pillar.storage",
    "pillar.recipe",
    "pillar.result",
    "pillar.checkpoint",
    "pillar.preparation",
    "pillar.watch",
    "pillar.run",
    "pillar.training",
    "pillar.recipes",
    "pillar.command",
    "pillar",
    "graph.network",
    "graph.trace",
    "graph.read",
    "graph.attributes",
    "graph.passes.constants",
    "graph.passes.shapes",
    "graph.passes.weights",
    "graph.passes.pads",
    "graph.passes.selections",
    "graph.passes.pools",
    "graph.passes.affine",
    "graph.passes.activations",
    "graph.passes",
    "graph.reals",
    "graph.compare",
    "graph",
    "cost",
    "randomness",
    "launch",
    "channel",
    "correlated",
    "protocols.truncation",
    "protocols.espn",
    "protocols.opened_mask",
    "protocols.beaver",
    "protocols",
    "nn",
    "masked.kernels",
    "masked.plan",
    "masked.planning.precision",
    "masked.planning.builder",
    "masked.planning",
    "masked.offline",
    "masked.material",
    "masked.online",
    "masked.in_crypten",
    "masked",
    "findings",
    "convert",
    "explanation",
    "simulator",
    "processor",
    "projection",
    "estimate",
    "session",
    "patches",
    "doctor",
    "demo",
    "cli",
]
ALONE = {
    "protocols.espn",
    "protocols.opened_mask",
    "protocols.beaver",
    "protocols.truncation",
}
WITHOUT_CRYPTEN = ("errors", "polynomial", "pillar", "graph", "randomness")


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if parts:
            found[".".join(parts)] = path
    return found


def imported(name: str, path: Path) -> set[str]:
    """Every module a file imports, ours as dotted names below crypten_espn."""
    is_package = path.name == "__init__.py"
    here = name.split(".") if is_package else name.split(".")[:-1]
    known = modules()
    result = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = here[: len(here) - (node.level - 1)]
                base = ".".join([*parent, *([base] if base else [])])
            elif base.split(".")[0] == "crypten_espn":
                base = ".".join(base.split(".")[1:])
            else:
                result.add(base)
                continue
            for alias in node.names:
                inner = f"{base}.{alias.name}" if base else alias.name
                result.add(inner if inner in known or inner == "patches" else base)
    return result


def test_the_list_is_complete():
    assert set(modules()) <= set(ORDER)
    assert set(ORDER) - set(modules()) <= {"patches"}


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_upwards(name):
    rank = ORDER.index(name)
    for target in imported(name, modules()[name]):
        if target in ORDER and target != name:
            assert ORDER.index(target) < rank, f"{name} imports {target} from below"
        if name in ALONE:
            assert target not in ALONE, f"{name} imports its neighbour {target}"


@pytest.mark.parametrize("name", sorted(modules()))
def test_training_never_imports_crypten(name):
    if not name.startswith(WITHOUT_CRYPTEN):
        return
    for target in imported(name, modules()[name]):
        assert target.split(".")[0] != "crypten", f"{name} imports crypten"


def test_patches_rest_on_randomness_launch_inputs_and_errors_alone():
    for path in sorted((ROOT / "patches").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "crypten_espn"
            ):
                allowed = {"randomness", "launch", "errors", "inputs"}
                names = set((node.module or "").split(".")[1:2]) or {
                    alias.name for alias in node.names
                }
                assert names <= allowed, f"{path.name} imports {names}"


def test_only_the_package_and_the_doctor_import_patches():
    for name, path in modules().items():
        if any(
            t == "patches" or t.startswith("patches.") for t in imported(name, path)
        ):
            assert name == "doctor", f"{name} imports patches"


def test_no_file_is_a_drawer():
    drawers = {"utils", "util", "common", "helpers", "helper", "core", "misc"}
    for folder in ("crypten_espn", "patches", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            assert path.stem not in drawers, path
