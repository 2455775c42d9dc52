"""What belongs to an instance."""

import ipaddress
from pathlib import Path

import pytest

from testcluster.layout import SLOTS, Layout


def _all() -> list[Layout]:
    """Return a layout for each slot."""
    return [Layout(slot=s, run_dir=Path(f"/run/{s}"), nodes=2) for s in range(SLOTS)]


def test_no_two_instances_share_anything() -> None:
    """Ports, address ranges and names differ between all slots."""
    layouts = _all()
    ports = [port for layout in layouts for port in layout.ports]
    assert len(set(ports)) == 3 * SLOTS
    assert len({layout.name for layout in layouts}) == SLOTS
    assert len({layout.subnet for layout in layouts}) == SLOTS


def test_ports_are_below_those_the_kernel_gives_away() -> None:
    """No port can be taken by an outgoing connection in between."""
    assert max(port for layout in _all() for port in layout.ports) < 32768


def test_ranges_of_one_instance_do_not_overlap() -> None:
    """Pods, Services and the link to the host have ranges of their own inside the instance's."""
    for layout in _all():
        bridge = ipaddress.ip_network(layout.bridge_subnet)
        services = ipaddress.ip_network(layout.service_subnet)
        whole = ipaddress.ip_network(layout.subnet)
        assert not bridge.overlaps(services)
        assert bridge.subnet_of(whole)  # type: ignore[arg-type]
        assert services.subnet_of(whole)  # type: ignore[arg-type]
        for address in (layout.host_ip, layout.uplink_ip):
            assert ipaddress.ip_address(address) in whole
            assert ipaddress.ip_address(address) not in bridge
            assert ipaddress.ip_address(address) not in services
        assert ipaddress.ip_address(layout.dns_ip) in services
        assert ipaddress.ip_address(layout.node_ip(1)) in bridge


def test_save_and_load(tmp_path: Path) -> None:
    """A layout is read back as it was written."""
    layout = Layout(slot=3, run_dir=tmp_path, nodes=1)
    layout.save(guard_pid=1)
    assert Layout.load(tmp_path) == layout


@pytest.mark.parametrize(("slot", "nodes"), [(-1, 0), (SLOTS, 0), (0, -1), (0, 9)])
def test_out_of_range(slot: int, nodes: int) -> None:
    """A slot or a number of nodes that does not exist is refused."""
    with pytest.raises(ValueError, match="must be from 0 to"):
        Layout(slot=slot, run_dir=Path("/run/x"), nodes=nodes)
