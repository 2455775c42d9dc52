"""Mounts, links and control groups of a full node, made from inside its namespaces."""

import shutil
from pathlib import Path

from testcluster.layout import Layout
from testcluster.process import run

BRIDGE = "cbr0"

_CGROUPS = Path("/sys/fs/cgroup")
_UPLINK = "uplink"

KUBELET_SYSCTLS = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}
"""What kubelet wants to be set for the whole machine, below ``/proc/sys``.

In the namespaces it finds files with these values and is content, so the machine keeps its own.
"""

FIXED_FOLDERS = (Path("/var/lib/cni"), Path("/var/lib/kubelet"))
"""Where CNI notes pods' links and kubelet has a socket, whatever their flags say.

In the namespaces these are ``cni`` and ``kubelet`` of the run folder. They must exist to be covered
and stay on the host as empty folders: removing one would uncover it in other instances.
"""


def hide_host_folders(layout: Layout) -> None:
    """Cover the folders with fixed paths that container programs write to.

    The mounts are seen by this mount namespace only and go with it.
    """
    run("mount", "--make-rshared", "/")
    for cover in ("/run", "/var/log"):
        run("mount", "-t", "tmpfs", "tmpfs", cover)
    for folder in FIXED_FOLDERS:
        own = layout.run_dir / folder.name
        own.mkdir()
        folder.mkdir(exist_ok=True)
        run("mount", "--bind", str(own), str(folder))
    values = layout.run_dir / "sysctl"
    values.mkdir()
    for name, value in KUBELET_SYSCTLS.items():
        file = values / name.replace("/", ".")
        file.write_text(value)
        run("mount", "--bind", str(file), f"/proc/sys/{name}")


def connect(layout: Layout, host_network: str) -> None:
    """Create the bridge of nodes and pods, and the link to the host.

    Args:
        layout: Names and addresses.
        host_network: Path of the host's network namespace.

    Raises:
        ClusterError: A command failed.
    """
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", BRIDGE, "type", "bridge")
    for index in range(layout.nodes):
        run("ip", "address", "add", f"{layout.node_ip(index)}/17", "dev", BRIDGE)
    run("ip", "link", "set", BRIDGE, "up")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    # answers of a Service's pod to a pod on the same bridge must pass the rules that rewrote them
    filtering = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
    if not filtering.exists():
        run("modprobe", "br_netfilter")
    filtering.write_text("1")

    host = ("nsenter", f"--net={host_network}", "ip")
    peer = ("type", "veth", "peer", "name", _UPLINK, "netns", "1")
    run(*host, "link", "add", layout.name, *peer)
    run(*host, "address", "add", f"{layout.host_ip}/30", "dev", layout.name)
    run(*host, "link", "set", layout.name, "up")
    run("ip", "address", "add", f"{layout.uplink_ip}/30", "dev", _UPLINK)
    run("ip", "link", "set", _UPLINK, "up")
    run("ip", "route", "add", "default", "via", layout.host_ip)
    run(*host, "route", "add", layout.subnet, "via", layout.uplink_ip, "dev", layout.name)


def create_cgroups(name: str) -> None:
    """Create a node's control group in each hierarchy, of version 1 or 2."""
    if (_CGROUPS / "cgroup.controllers").exists():
        wanted = {"cpu", "cpuset", "io", "memory", "pids", "hugetlb"}
        available = set((_CGROUPS / "cgroup.controllers").read_text().split())
        enable = " ".join(f"+{controller}" for controller in sorted(wanted & available))
        (_CGROUPS / "cgroup.subtree_control").write_text(enable)
        (_CGROUPS / name).mkdir()
        (_CGROUPS / name / "cgroup.subtree_control").write_text(enable)
        return
    for hierarchy in _CGROUPS.iterdir():
        if hierarchy.is_symlink() or not hierarchy.is_dir():
            continue
        folder = hierarchy / name
        folder.mkdir()
        # a new group of this controller is unusable until it is told its processors
        for file in ("cpuset.cpus", "cpuset.mems"):
            if (folder / file).exists():
                shutil.copyfile(hierarchy / file, folder / file)
