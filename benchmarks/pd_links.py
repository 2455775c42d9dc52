"""Two network namespaces with a link between them whose rate can be set, each reached from here by a wire of its own.

The prefill engine lives in one, the decode engine in the other. Only what they exchange passes the shaped link;
requests, answers and the control channel come by the wires. Needs root and Linux.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from testcluster.process import system_env

UNSHAPED_MBIT: Final = 100_000.0
"""More than a pair of veths carries: the class stays, so that nothing that waits in it is lost."""
WIRE: Final = "wire"
"""What a namespace calls its end of the wire to here."""
BURST_BYTES: Final = 128 * 1024
"""Smaller buckets starve at rates of hundreds of Mbit/s: one segment of the sender is up to 64 kB."""


class LinkError(Exception):
    """The link can't be had."""


@dataclass(frozen=True, slots=True)
class End:
    """One namespace.

    Attributes:
        name: Of the namespace.
        device: Its end of the shaped link.
        address: On the shaped link.
        here: This side's address on the wire to it.
        there: Its address on that wire.
    """

    name: str
    device: str
    address: str
    here: str
    there: str


@dataclass(frozen=True, slots=True)
class Link:
    """Two ends and what is between them."""

    left: End
    right: End

    @property
    def ends(self) -> tuple[End, End]:
        """Both ends."""
        return (self.left, self.right)

    def shape(self, mbit: float | None) -> None:
        """Set the rate between the ends, in both directions.

        Args:
            mbit: 10^6 bit/s, headers included; None for as fast as it goes.
        """
        for end in self.ends:
            _shape(("-n", end.name), end.device, mbit)

    def shape_wires(self, mbit: float | None) -> None:
        """Set the rate of the wires between here and the ends, in both directions.

        Args:
            mbit: As of `shape`.
        """
        for end in self.ends:
            _shape(("-n", end.name), WIRE, mbit)
            _shape((), f"{end.device}w", mbit)

    def sent_bytes(self) -> int:
        """Return the bytes that both ends have sent, headers included."""
        return sum(
            json.loads(_run("ip", "-n", end.name, "-s", "-j", "link", "show", "dev", end.device))[
                0
            ]["stats64"]["tx"]["bytes"]
            for end in self.ends
        )


def inside(end: End, *command: str) -> list[str]:
    """Return a command that runs in a namespace."""
    return ["ip", "netns", "exec", end.name, *command]


@contextmanager
def laid(name: str = "kvsbench") -> Iterator[Link]:
    """Lay a link, and take it away at the end.

    Args:
        name: What names of namespaces and devices begin with, at most 9 characters.

    Raises:
        LinkError: Not root, or the kernel lacks what this needs.
    """
    if os.geteuid() != 0:
        raise LinkError("network namespaces need root")
    ends = [
        End(f"{name}-{side}", f"{name}-{side}", f"10.77.0.{n}", f"10.77.{n}.1", f"10.77.{n}.2")
        for n, side in enumerate("pd", start=1)
    ]
    link = Link(*ends)
    _remove(link)
    try:
        for end in ends:
            _run("ip", "netns", "add", end.name)
            _run("ip", "-n", end.name, "link", "set", "lo", "up")
        left, right = ends
        _run(
            *("ip", "-n", left.name, "link", "add", left.device, "type", "veth"),
            *("peer", "name", right.device, "netns", right.name),
        )
        for end in ends:
            wire = f"{end.device}w"
            _run(
                *("ip", "link", "add", wire, "type", "veth"),
                *("peer", "name", WIRE, "netns", end.name),
            )
            _run("ip", "addr", "add", f"{end.here}/24", "dev", wire)
            _run("ip", "link", "set", wire, "up")
            for device, address in ((WIRE, end.there), (end.device, end.address)):
                _run("ip", "-n", end.name, "addr", "add", f"{address}/24", "dev", device)
                _run("ip", "-n", end.name, "link", "set", device, "up")
            for where, device in (
                (("-n", end.name), end.device),
                (("-n", end.name), WIRE),
                ((), wire),
            ):
                root = ("dev", device, "root", "handle", "1:", "htb", "default", "1")
                _run("tc", *where, "qdisc", "replace", *root)
        link.shape(None)
        link.shape_wires(None)
        yield link
    finally:
        _remove(link)


def _shape(where: tuple[str, ...], device: str, mbit: float | None) -> None:
    rate = f"{round((mbit or UNSHAPED_MBIT) * 1e6)}bit"
    _run(
        *("tc", *where, "class", "replace", "dev", device),
        *("parent", "1:", "classid", "1:1", "htb", "rate", rate),
        *("burst", str(BURST_BYTES), "cburst", str(BURST_BYTES)),
    )


def _remove(link: Link) -> None:
    for end in link.ends:
        with suppress(LinkError):
            _run("ip", "netns", "del", end.name)
        with suppress(LinkError):
            _run("ip", "link", "del", f"{end.device}w")


def _run(*command: str) -> str:
    try:
        done = subprocess.run(
            command, env=system_env(), capture_output=True, text=True, timeout=60, check=False
        )
    except OSError as error:
        raise LinkError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        raise LinkError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
