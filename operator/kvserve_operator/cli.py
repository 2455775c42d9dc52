"""The command ``kvserve operator``."""

import asyncio
import logging
import os
import re
import sys
from pathlib import Path
from typing import Final

import click

from kvserve_api.errors import KVServeError, SpecError
from kvserve_api.names import ExitCode
from kvserve_api.otel import configure
from kvserve_operator import config
from kvserve_operator.runtime import Options, run

_NAMESPACE: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


def _namespaces(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        if not _NAMESPACE.fullmatch(value):
            raise click.BadParameter(f"{value!r} is no name of a namespace")
    return tuple(dict.fromkeys(values))


def _namespace(context: click.Context, parameter: click.Parameter, value: str) -> str:
    return _namespaces(context, parameter, (value,))[0]


def _address(_: click.Context, __: click.Parameter, value: str) -> str:
    host, separator, port = value.rpartition(":")
    if not separator or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise click.BadParameter(f"{value!r} is not HOST:PORT")
    return f"{host.strip('[]')}:{port}"


@click.command()
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    default=Path("/etc/kvserve/operator.yaml"),
    show_default=True,
    help="What profiling Jobs are made of (YAML).",
)
@click.option(
    "--namespace",
    "namespaces",
    multiple=True,
    callback=_namespaces,
    help="Serve this namespace only; may be given several times. Without it, serve the cluster.",
)
@click.option(
    "--lease-namespace",
    envvar="POD_NAMESPACE",
    default="default",
    show_default=True,
    callback=_namespace,
    help="Where the Lease of the leader is [env POD_NAMESPACE].",
)
@click.option(
    "--health",
    metavar="HOST:PORT",
    default="0.0.0.0:8081",
    show_default=True,
    callback=_address,
    help="Where /healthz and /readyz answer (HTTP).",
)
def operator(
    config_path: Path, namespaces: tuple[str, ...], lease_namespace: str, health: str
) -> None:
    """Turn KVServePolicies into profiling Jobs, Pareto sets and conditions.

    Needs a Kubernetes API server: the pod's own, or the one KUBECONFIG names.
    """
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    # kopf logs every event of every object, and at the end lists all objects it did not get to
    logging.getLogger("kopf").setLevel(logging.ERROR)
    options = Options(
        profiler=config.load(config_path, os.environ),
        namespaces=namespaces,
        lease_namespace=lease_namespace,
        health=health,
    )
    close = configure("kvserve-operator")
    try:
        asyncio.run(run(options))
    finally:
        close()


def main() -> None:
    """Run the command alone; an error raised on purpose is one line and an exit code."""
    try:
        operator()
    except KVServeError as error:
        click.echo(f"error: {error}", err=True)
        bad_input = isinstance(error, SpecError)
        sys.exit(int(ExitCode.BAD_INPUT if bad_input else ExitCode.FAILED))
