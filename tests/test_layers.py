"""What import-linter's contracts, in pyproject.toml, do not see: patches and names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def imported(path: Path) -> Iterator[tuple[str, set[str]]]:
    """Modules that a file imports from, each with the names it takes."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, set()


def test_patches_rest_on_randomness_launch_inputs_and_errors_alone():
    allowed = {"randomness", "launch", "errors", "inputs"}
    for path in sorted((ROOT / "patches").glob("*.py")):
        for module, taken in imported(path):
            if module.startswith("crypten_espn"):
                names = set(module.split(".")[1:2]) or taken
                assert names <= allowed, f"{path.name} imports {names}"


def test_only_the_package_and_the_doctor_import_patches():
    for path in sorted((ROOT / "crypten_espn").rglob("*.py")):
        for module, taken in imported(path):
            if "patches" in module.split(".") or "patches" in taken:
                assert path.name in ("__init__.py", "doctor.py"), path


def test_what_is_received_is_decoded_by_decoders_made_at_import():
    """Two threads that decode a type for the first time crash msgspec."""
    for path in sorted((ROOT / "crypten_espn").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called.startswith("msgspec.") and called.endswith(".decode"):
                # Messages' types are decoded at import, and then together.
                named = {keyword.arg for keyword in node.keywords}
                assert "type" not in named or path.name == "messages.py", path


def test_no_file_is_a_drawer():
    drawers = {"utils", "util", "common", "helpers", "helper", "core", "misc"}
    for folder in ("crypten_espn", "patches", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            assert path.stem not in drawers, path
