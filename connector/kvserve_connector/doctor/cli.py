"""The command ``kvserve doctor``."""

import asyncio
import importlib.util
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvserve_api.errors import SpecError
from kvserve_connector.doctor.finding import (
    Finding,
    Level,
    exit_code,
    fail,
    judge_transfer_config,
    ok,
)

if TYPE_CHECKING:
    from kvserve_connector.config import ConnectorConfig

for _package in ("torch", "grpc", "obstore"):
    # the command line tells from this which extra is missing, without importing what takes seconds
    if importlib.util.find_spec(_package) is None:
        raise ModuleNotFoundError(f"No module named {_package!r}", name=_package)

_COLOURS = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "red"}


def _peer(
    _context: click.Context, _parameter: click.Parameter, value: str | None
) -> tuple[str, int] | None:
    if value is None:
        return None
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise click.BadParameter(f"must be HOST:PORT, got {value!r}")
    return host, int(port)


@click.command()
@click.option(
    "--config",
    metavar="JSON|FILE",
    default="{}",
    help="What vLLM is given as --kv-transfer-config, or its kv_connector_extra_config.",
)
@click.option(
    "--model", type=click.Path(path_type=Path), help="The model's folder, to tell its KV layout."
)
@click.option("--bundle", metavar="DIGEST", help="Calibration bundle to fetch and verify.")
@click.option("--peer", metavar="HOST:PORT", callback=_peer, help="A prefill pod to reach.")
@click.option(
    "--status",
    metavar="URL",
    help="The controller's HTTP port; without it, port 8081 of control_endpoint's host.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0.1, 60),
    default=5.0,
    show_default=True,
    help="Seconds that each check may wait for others.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(
    config: str,
    model: Path | None,
    bundle: str | None,
    peer: tuple[str, int] | None,
    status: str | None,
    timeout_s: float,
    as_json: bool,
) -> None:
    """Check this pod: versions, kernels, settings, credentials, transport, controller, store, peers.

    Prints a line for each check, OK, WARN or FAIL with what to do, and ends with 1 if anything fails. Changes nothing.
    """
    findings = []
    for finding in _examine(config, model, bundle, peer, status, timeout_s):
        findings.append(finding)
        if not as_json:
            level = click.style(f"{finding.level:<4}", fg=_COLOURS[finding.level])
            click.echo(f"{level}{str(finding)[4:]}")
    if as_json:
        click.echo(json.dumps({"findings": [finding.to_json() for finding in findings]}, indent=2))
    raise SystemExit(exit_code(findings))


def _examine(
    config: str,
    model: Path | None,
    bundle: str | None,
    peer: tuple[str, int] | None,
    status: str | None,
    timeout_s: float,
) -> Iterator[Finding]:
    from kvserve_connector.doctor import local, remote
    from kvserve_connector.doctor.nixl import check_nixl

    yield from local.check_versions()
    yield local.check_kernels()
    yield local.check_files_limit()
    if model is not None:
        yield local.check_model(model)[0]
    try:
        given = _parse(config)
        extra = given
        if "kv_connector" in given or "kv_role" in given:
            yield from judge_transfer_config(given)
            extra = given.get("kv_connector_extra_config") or {}
        settings = _read(extra)
    except SpecError as error:
        yield fail("settings", str(error), "Correct it: vLLM would not start (docs/connector.md).")
        return
    yield ok("settings", f"pod {settings.namespace}/{settings.pod}")
    yield from local.check_credentials(settings)
    yield from check_nixl(settings, os.environ, timeout_s)
    yield asyncio.run(remote.check_controller(settings, timeout_s))
    if status is None and settings.control_endpoint is not None:
        status = f"http://{settings.control_endpoint.rpartition(':')[0]}:8081"
    if status is not None:
        yield from remote.check_status(status.rstrip("/"), settings.policy, timeout_s)
    yield remote.check_store(settings, bundle, timeout_s)
    if peer is not None:
        yield remote.check_peer(settings, *peer, timeout_s)
    yield remote.check_otlp(os.environ, timeout_s)


def _parse(config: str) -> dict[str, Any]:
    """Read JSON, or the file of this name."""
    from kvserve_connector.doctor.local import read_json

    if not config.lstrip().startswith("{"):
        return read_json(Path(config))
    try:
        value: dict[str, Any] = json.loads(config)
    except (ValueError, RecursionError) as error:
        raise SpecError("--config", f"is not JSON: {error}") from error
    return value


def _read(extra: dict[str, Any]) -> "ConnectorConfig":
    from kvserve_connector.config import ConnectorConfig

    return ConnectorConfig.read(extra, os.environ, socket.gethostname())
