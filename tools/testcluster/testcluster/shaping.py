"""Limits the rate from one pod to another, and changes the limit while data flows.

Only packets from the sender's address are limited; they pass through a class of their own (htb) on
the receiver's link. What the API server, kubelet probes and other pods send goes past it, and so
does what comes through a Service's address, which is then the packets' source.
"""

import ipaddress
import json
import math
from dataclasses import dataclass
from pathlib import Path

from testcluster.errors import ClusterError
from testcluster.layout import Layout
from testcluster.process import run

# smaller buckets starve at rates of hundreds of Mbit/s: one segment of the sender is up to 64 kB
_BURST_BYTES = 128 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """The way from one pod to another.

    Attributes:
        device: The receiver's link on the node's side.
        sender_ip: The sender's address.
    """

    device: str
    sender_ip: str

    @property
    def number(self) -> int:
        """Number of the class and preference of the filter: unique among a receiver's senders."""
        return int(ipaddress.ip_address(self.sender_ip)) & 0xFFFF

    @property
    def class_id(self) -> str:
        """Identity of the class, as tc writes it."""
        return f"1:{self.number:x}"


def find_link(layout: Layout, sender_ip: str, receiver_ip: str) -> Link:
    """Return the way between two pods of the cluster.

    Raises:
        ClusterError: The receiver is no pod on the pods' network.
    """
    for path in sorted((layout.run_dir / "cni" / "results").glob(f"{layout.name}-*")):
        result = json.loads(path.read_text())["result"]
        if any(ip["address"].split("/")[0] == receiver_ip for ip in result["ips"]):
            device = next(i["name"] for i in result["interfaces"] if i["name"].startswith("veth"))
            return Link(device=device, sender_ip=sender_ip)
    raise ClusterError(f"no pod on this cluster's network has the address {receiver_ip}")


def shape(init_pid: int, link: Link, megabits_per_s: float) -> None:
    """Set the rate of a link, first or anew.

    Args:
        init_pid: A process in the cluster's network namespace.
        link: From ``find_link``.
        megabits_per_s: Rate on the wire in 10^6 bit/s, headers included.

    Raises:
        ClusterError: The rate is no positive number, or tc failed.
    """
    if not (megabits_per_s > 0 and math.isfinite(megabits_per_s)):
        raise ClusterError(f"megabits_per_s: must be positive, got {megabits_per_s}")
    rate = f"{round(megabits_per_s * 1e6)}bit"
    rates = ("htb", "rate", rate, "burst", str(_BURST_BYTES), "cburst", str(_BURST_BYTES))
    device = ("dev", link.device)
    entry = ("parent", "1:", "classid", link.class_id)
    if is_shaped(init_pid, link):
        _tc(init_pid, "class", "change", *device, *entry, *rates)
        return
    if " htb 1: " not in _tc(init_pid, "qdisc", "show", *device):
        _tc(init_pid, "qdisc", "replace", *device, "root", "handle", "1:", "htb")
    _tc(init_pid, "class", "add", *device, *entry, *rates)
    match = ("u32", "match", "ip", "src", f"{link.sender_ip}/32", "flowid", link.class_id)
    place = ("parent", "1:", "protocol", "ip", "prio", str(link.number))
    _tc(init_pid, "filter", "add", *device, *place, *match)


def unshape(init_pid: int, link: Link) -> None:
    """Take the limit of a link away; a link without one is left alone."""
    if not is_shaped(init_pid, link):
        return
    device = ("dev", link.device)
    place = ("parent", "1:", "protocol", "ip", "prio", str(link.number))
    _tc(init_pid, "filter", "delete", *device, *place)
    _tc(init_pid, "class", "delete", *device, "classid", link.class_id)


def is_shaped(init_pid: int, link: Link) -> bool:
    """Return whether a link has a limit."""
    return f" {link.class_id} " in _tc(init_pid, "class", "show", "dev", link.device)


def init_pid_of(layout: Layout) -> int:
    """Return a process in the cluster's network namespace."""
    return int(json.loads(Path(layout.run_dir / "instance.json").read_text())["init_pid"])


def _tc(init_pid: int, *args: str) -> str:
    """Run tc in the cluster's network namespace."""
    return run("nsenter", "--target", str(init_pid), "--net", "tc", *args)
