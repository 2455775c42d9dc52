"""Command line: ``python -m testcluster {build,up,down,status,load-image,env}``."""

import argparse
import shlex
import signal
import sys
from pathlib import Path

from testcluster import build, cleanup, packages, slots
from testcluster.cluster import Cluster, existing_cluster
from testcluster.errors import ClusterError, UnavailableHereError
from testcluster.launch import ClusterSpec, attach, start, stop_instance


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except ClusterError as error:
        print(f"testcluster: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(prog="testcluster", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("build", help="build binaries, install packages: ~10 min once")
    command.set_defaults(run=_build)

    command = commands.add_parser("up", help="start a cluster that stays until `down`")
    command.add_argument("--nodes", type=int, default=1, help="0: control plane only; default 1")
    command.set_defaults(run=_up)

    command = commands.add_parser("down", help="end the cluster started by `up`")
    command.add_argument("--all", action="store_true", help="all started by `up`, and leftovers")
    command.add_argument("--slot", type=int, help="which, if there are several")
    command.set_defaults(run=_down)

    command = commands.add_parser("status", help="list all clusters on this machine")
    command.set_defaults(run=_status)

    command = commands.add_parser("load-image", help="import a docker-archive into all nodes")
    command.add_argument("archive", type=Path)
    command.add_argument("--slot", type=int, help="which, if there are several")
    command.set_defaults(run=_load_image)

    command = commands.add_parser("env", help='print shell exports: eval "$(... env)"')
    command.add_argument("--slot", type=int, help="which, if there are several")
    command.set_defaults(run=_env)
    return parser


def _build(arguments: argparse.Namespace) -> None:
    """Build the binaries; install packages where a full node can run at all."""
    if existing_cluster() is not None:
        build.say_to_stderr("nothing to build: KVSERVE_EXISTING_CLUSTER names a cluster")
        return
    print(build.build())
    try:
        packages.install(build.say_to_stderr)
    except UnavailableHereError as error:
        build.say_to_stderr(f"control planes only: {error}")


def _up(arguments: argparse.Namespace) -> None:
    """Start a cluster that outlives this command."""
    if arguments.nodes:
        packages.install(build.say_to_stderr)
    cluster = start(ClusterSpec(nodes=arguments.nodes, detached=True))
    build.say_to_stderr(f"ready after {cluster.started_s:.1f} s")
    _print_env(cluster)


def _down(arguments: argparse.Namespace) -> None:
    """End clusters started by ``up``; never one that a running process owns."""
    chosen = _stoppable()
    if not chosen and arguments.slot is None:
        build.say_to_stderr("no cluster started by `up` is running")
    elif not arguments.all:
        chosen = [_chosen(arguments.slot)]
    for instance in chosen:
        stop_instance(instance)
        build.say_to_stderr(f"instance {instance.slot} ended")
    if arguments.all:
        count = slots.sweep_dead(cleanup.sweep)
        build.say_to_stderr(f"{count} dead instances swept")


def _status(arguments: argparse.Namespace) -> None:
    """Print one line for each instance."""
    for instance in slots.instances():
        state = "running" if instance.alive else "dead: `down --all` sweeps it"
        owner = "`up`" if instance.owner_pid is None else f"process {instance.owner_pid}"
        print(f"{instance.slot}\tnodes={instance.nodes}\tby {owner}\t{instance.run_dir}\t{state}")


def _load_image(arguments: argparse.Namespace) -> None:
    """Import an image archive."""
    attach(_chosen(arguments.slot)).load_image(arguments.archive)


def _env(arguments: argparse.Namespace) -> None:
    """Print how to reach a cluster from a shell."""
    _print_env(attach(_chosen(arguments.slot)))


def _print_env(cluster: Cluster) -> None:
    """Print shell exports."""
    print(f"export KUBECONFIG={shlex.quote(str(cluster.kubeconfig))}")
    print(f'export PATH={shlex.quote(str(cluster.bin_dir))}:"$PATH"')


def _stoppable() -> list[slots.Instance]:
    """Return the live instances that no process owns."""
    return [i for i in slots.instances() if i.alive and i.owner_pid is None and i.guard_pid]


def _chosen(slot: int | None) -> slots.Instance:
    """Return the instance that a command means.

    Raises:
        ClusterError: There is none, or several and no slot was given.
    """
    found = [i for i in _stoppable() if slot is None or i.slot == slot]
    if not found:
        raise ClusterError("no such cluster is running: see `status`, start one with `up`")
    if len(found) > 1:
        raise ClusterError("several clusters are running: choose with --slot, see `status`")
    return found[0]


if __name__ == "__main__":
    sys.exit(main())
