"""The command ``kvserve controller``."""

import math
from pathlib import Path

import click
import uvloop

from kvserve_api.credentials import CredentialFiles
from kvserve_api.errors import KVServeError, SpecError
from kvserve_controller import logs
from kvserve_controller.server import Address, Options, run

BYTES_PER_S_PER_MBIT = 125_000


def _address(_context: click.Context, _parameter: click.Parameter, value: str) -> Address:
    try:
        return Address.parse(value)
    except SpecError as error:
        raise click.BadParameter(error.problem) from error


def _number(_context: click.Context, _parameter: click.Parameter, value: float) -> float:
    if math.isnan(value):  # which click's ranges let through
        raise click.BadParameter("must be a number")
    return value


_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command()
@click.option("--policies", type=_DIRECTORY, help="Directory of KVServePolicy files (YAML).")
@click.option("--profiles", type=_DIRECTORY, help="Directory of Pareto sets (JSON).")
@click.option("--kubernetes", is_flag=True, help="Watch a cluster instead of directories.")
@click.option("--namespace", default="", help="With --kubernetes: watch this namespace only.")
@click.option(
    "--listen",
    callback=_address,
    metavar="HOST:PORT",
    default="0.0.0.0:7443",
    show_default=True,
    help="Where pods connect (gRPC).",
)
@click.option(
    "--health",
    callback=_address,
    metavar="HOST:PORT",
    default="0.0.0.0:8081",
    show_default=True,
    help="Where /healthz, /readyz and /status answer (HTTP).",
)
@click.option(
    "--prior-mbit",
    type=click.FloatRange(min=0.001, max=1e7),
    callback=_number,
    default=1000.0,
    show_default=True,
    help="Mbit/s to assume for a link that nobody has measured yet.",
)
@click.option(
    "--state",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File in which what was learned survives a restart.",
)
@click.option("--secret-file", type=_FILE, help="Secrets that pods must hold too, one a line.")
@click.option("--tls-cert-file", type=_FILE, help="Certificate chain (PEM): pods connect by TLS.")
@click.option("--tls-key-file", type=_FILE, help="Its private key (PEM).")
@click.option(
    "--tls-ca-file",
    type=_FILE,
    help="Authorities (PEM) whose certificates pods must show.",
)
def controller(
    policies: Path | None,
    profiles: Path | None,
    kubernetes: bool,
    namespace: str,
    listen: Address,
    health: Address,
    prior_mbit: float,
    state: Path | None,
    secret_file: Path | None,
    tls_cert_file: Path | None,
    tls_key_file: Path | None,
    tls_ca_file: Path | None,
) -> None:
    """Decide which compression profiles serving pods may use, and push that to them.

    Policies and profiles come either from two directories, which may change while it runs, or from a Kubernetes
    cluster (in a pod, or as KUBECONFIG says).
    """
    if kubernetes == (policies is not None or profiles is not None):
        raise click.UsageError("give either --kubernetes, or --policies and --profiles")
    if not kubernetes and (policies is None or profiles is None):
        raise click.UsageError("--policies and --profiles go together")
    if namespace and not kubernetes:
        raise click.UsageError("--namespace needs --kubernetes")
    logs.configure()
    options = Options(
        listen=listen,
        health=health,
        policies=policies,
        profiles=profiles,
        namespace=namespace,
        prior_bytes_per_s=prior_mbit * BYTES_PER_S_PER_MBIT,
        state=state,
        credentials=CredentialFiles(
            secret_file=secret_file,
            tls_cert_file=tls_cert_file,
            tls_key_file=tls_key_file,
            tls_ca_file=tls_ca_file,
        ),
    )
    try:
        uvloop.run(run(options))
    except KVServeError as error:
        raise click.ClickException(str(error)) from error
