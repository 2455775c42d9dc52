"""What belongs to one instance: its folder, ports, addresses and names, all from its slot number."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

SLOTS = 32
"""How many instances one user can run at once on one machine."""

_FIRST_PORT = 21000
_FIRST_SUBNET = 160
_NODES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where an instance keeps things and under which names.

    A full node lives in network, mount and process namespaces of its own, so that only the slot's
    link, its address range and its control groups must differ from other instances'. A control
    plane alone listens on loopback ports of its own.

    Attributes:
        slot: From 0 to ``SLOTS`` - 1; held by a lock as long as the instance lives.
        run_dir: The instance's folder; it goes with the instance.
        nodes: Number of nodes; 0 is a control plane alone.
    """

    slot: int
    run_dir: Path
    nodes: int

    def __post_init__(self) -> None:
        if not 0 <= self.slot < SLOTS:
            raise ValueError(f"slot: must be from 0 to {SLOTS - 1}, got {self.slot}")
        if not 0 <= self.nodes <= _NODES:
            raise ValueError(f"nodes: must be from 0 to {_NODES}, got {self.nodes}")

    @property
    def name(self) -> str:
        """Name of the link to the host; prefix of nodes' and control groups' names."""
        return f"kvtc{self.slot}"

    @property
    def pki_dir(self) -> Path:
        """Folder of keys and certificates."""
        return self.run_dir / "pki"

    @property
    def log_dir(self) -> Path:
        """Folder of all logs, pods' included."""
        return self.run_dir / "log"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's configuration."""
        return self.run_dir / "admin.kubeconfig"

    @property
    def ports(self) -> tuple[int, int, int]:
        """Ports of the API server, of etcd and of etcd's peers."""
        first = _FIRST_PORT + 4 * self.slot
        return first, first + 1, first + 2

    @property
    def subnet_prefix(self) -> str:
        """First two numbers of all the instance's addresses."""
        return f"10.{_FIRST_SUBNET + self.slot}"

    @property
    def subnet(self) -> str:
        """All the instance's addresses."""
        return f"{self.subnet_prefix}.0.0/16"

    @property
    def bridge_subnet(self) -> str:
        """Addresses of nodes and pods, which hang on one bridge."""
        return f"{self.subnet_prefix}.0.0/17"

    @property
    def service_subnet(self) -> str:
        """Addresses of Services."""
        return f"{self.subnet_prefix}.128.0/20"

    @property
    def kubernetes_ip(self) -> str:
        """Address of the Service ``kubernetes``: always the first."""
        return f"{self.subnet_prefix}.128.1"

    @property
    def dns_ip(self) -> str:
        """Address of the cluster's name server."""
        return f"{self.subnet_prefix}.128.10"

    @property
    def host_ip(self) -> str:
        """Address under which pods reach the host."""
        return f"{self.subnet_prefix}.255.1"

    @property
    def uplink_ip(self) -> str:
        """The cluster's end of the link to the host."""
        return f"{self.subnet_prefix}.255.2"

    @property
    def api_ip(self) -> str:
        """Where the API server listens: the first node, or loopback."""
        return self.node_ip(0) if self.nodes else "127.0.0.1"

    @property
    def api_url(self) -> str:
        """The API server's URL."""
        return f"https://{self.api_ip}:{self.ports[0]}"

    def node_name(self, index: int) -> str:
        """Return the name of a node, counted from 0."""
        return f"{self.name}-n{index + 1}"

    def node_ip(self, index: int) -> str:
        """Return the address of a node, counted from 0."""
        return f"{self.subnet_prefix}.0.{index + 1}"

    def node_dir(self, index: int) -> Path:
        """Return the folder of a node, counted from 0."""
        return self.run_dir / f"n{index + 1}"

    def save(self, **more: object) -> None:
        """Write the layout, and what else describes the instance, as ``instance.json``."""
        document = {**asdict(self), "run_dir": str(self.run_dir), **more}
        partial = self.run_dir / "instance.json.partial"
        partial.write_text(json.dumps(document))
        partial.rename(self.run_dir / "instance.json")

    @classmethod
    def load(cls, run_dir: Path) -> "Layout":
        """Read the layout that ``save`` wrote."""
        document = json.loads((run_dir / "instance.json").read_text())
        return cls(slot=document["slot"], run_dir=run_dir, nodes=document["nodes"])
