"""The page on which routers look up a producer."""

import json
import urllib.error
import urllib.request

import pytest

from kvserve_api.errors import SpecError
from kvserve_connector.bootstrap import BootstrapServer, page
from kvserve_connector.remote import engine_name, parse_engine_name


def test_router_finds_the_engine() -> None:
    """The page names the engine of each rank, as routers in Mooncake mode expect; nothing else is there."""
    name = engine_name("e-1", "10.0.0.7", [7790, 7791])
    server = BootstrapServer(
        "127.0.0.1", 0, page(0, name, {0: "10.0.0.7:7790", 1: "10.0.0.7:7791"})
    )
    try:
        where = f"http://127.0.0.1:{server.port}"
        with urllib.request.urlopen(f"{where}/query", timeout=5) as answer:
            found = json.loads(answer.read())
        assert found == {
            "0": {
                "engine_id": "e-1@10.0.0.7:7790,7791",
                "worker_addr": {
                    "0": {"0": "tcp://10.0.0.7:7790"},
                    "1": {"0": "tcp://10.0.0.7:7791"},
                },
            }
        }
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{where}/", timeout=5)
    finally:
        server.close()


@pytest.mark.parametrize("host", ["10.0.0.7", "pod.example", "fe80::1"])
def test_engine_name_holds_the_address(host: str) -> None:
    """What goes into the name comes out again."""
    for ports in ((7790,), (7790, 7791)):
        assert parse_engine_name(engine_name("a@b:c", host, ports)) == ("a@b:c", host, ports)


@pytest.mark.parametrize("name", ["", "e-1", "e@:1", "e@h:", "e@h:x", "e@h:70000", "e@h:1,"])
def test_other_names_are_refused(name: str) -> None:
    """The name of another connector's engine is an error that says what is wanted."""
    with pytest.raises(SpecError, match="ID@HOST:PORT"):
        parse_engine_name(name)
