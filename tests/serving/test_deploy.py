"""The examples in docs/deploy say nothing that the commands do not take."""

from __future__ import annotations

import configparser
import sys
from pathlib import Path

import pytest
import typer
import yaml

from crypten_espn import cli
from crypten_espn.serving.link import Limits
from crypten_espn.sidecar.limits import SidecarLimits

DEPLOY = Path(__file__).parents[2] / "docs" / "deploy"
PREFIX = "CRYPTEN_ESPN_"


def names(command: str) -> set[str]:
    """Options and arguments of a command."""
    group = typer.main.get_command(cli.app())
    found = group.commands[command].params  # type: ignore[attr-defined]
    return {str(parameter.name) for parameter in found}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is of Python 3.11")
@pytest.mark.parametrize("command", ["serve", "deal", "sidecar"])
def test_a_configuration_names_options_of_its_command(command: str) -> None:
    import tomllib

    table = tomllib.loads((DEPLOY / f"{command}.toml").read_text())[command]
    assert {name.replace("-", "_") for name in table} <= names(command)
    (SidecarLimits if command == "sidecar" else Limits)(**table["limit"])


@pytest.mark.parametrize("command", ["serve", "deal", "sidecar"])
def test_a_unit_runs_its_command_with_its_configuration(command: str) -> None:
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string((DEPLOY / f"crypten-espn-{command}.service").read_text())
    service = unit["Service"]
    program, what, *options = service["ExecStart"].split()
    assert program.endswith("bin/crypten-espn") and what == command
    assert options == ["--config", f"/etc/crypten-espn/{command}.toml"]
    # A sidecar reads its certificate again when the file changes.
    assert "-HUP" in service.get("ExecReload", "") or command == "sidecar"
    assert int(service["TimeoutStopSec"]) > 30


def test_the_compose_file_names_options_of_its_commands() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert set(services) == {"dealer", "server"}
    for service in services.values():
        taken = names(service["command"][0])
        for name in service["environment"]:
            assert name.removeprefix(PREFIX).lower() in taken, name
