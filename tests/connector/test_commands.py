"""What a consumer says: read as it was written, and nothing else is accepted."""

from dataclasses import replace

import pytest

from kvserve_api.errors import WireError, WireReason
from kvserve_connector.commands import PARTS, Pull, Release, Renew
from kvserve_connector.protocol import HEADER_BYTES, Kind, pack_message, parse_header, parse_message
from transfer_messages import LAYOUT, PULL

COMMANDS = {
    "pull": PULL,
    "pull-with-bundles": replace(PULL, bundles=frozenset({"sha256:" + "b" * 64})),
    "pull-of-a-busy-engine": replace(PULL, decode_delays=2.5),
    "pull-of-whole-blocks": replace(
        PULL, blocks="sha256:" + "c" * 64, layout=replace(LAYOUT, dtype="uint8")
    ),
    "pull-of-a-transfer": replace(PULL, transfer=True, engine_id=""),
    "pull-of-a-worker": replace(PULL, rank=1, ranks=2),
    "pull-without-trace": replace(PULL, traceparent=None),
    "pull-by-nixl": replace(PULL, nixl=True),
    "release": Release(engine_id="e", request_id="r"),
    "release-of-a-transfer": Release(engine_id="", request_id="x", transfer=True),
    "renew": Renew(names=("r", "x")),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_commands_come_back(command: Pull | Release | Renew) -> None:
    """Every command is read as it was written."""
    frame = command.pack()
    header = parse_header(frame[:HEADER_BYTES])
    assert header.length == len(frame) - HEADER_BYTES
    assert type(command).parse(frame[HEADER_BYTES:]) == command


@pytest.mark.parametrize(
    ("key", "value"),
    [
        pytest.param("tokens", [5, 5], id="empty-range"),
        pytest.param("tokens", [0, 1 << 40], id="huge-range"),
        pytest.param("tokens", [True, 9], id="boolean"),
        pytest.param("budget_s", -1, id="negative"),
        pytest.param("decode_delays", -1, id="negative-delay"),
        pytest.param("stages", ["x" * 65], id="long-stage"),
        pytest.param("stages", [3], id="stage-number"),
        pytest.param("bundles", ["sha256:1"], id="short-digest"),
        pytest.param("bundles", ["sha256:" + "b" * 64] * 65, id="too-many-bundles"),
        pytest.param("layout", {"layers": 0, "kv_heads": 1, "head_dim": 1, "dtype": "float32"}, id="layers"),
        pytest.param("request_id", "r" * 513, id="long-id"),
        pytest.param("surprise", 1, id="unknown"),
        pytest.param("engine_id", None, id="missing"),
    ],
)  # fmt: skip
def test_wrong_wishes_are_refused(key: str, value: object) -> None:
    """A PULL with anything wrong in it is refused as malformed."""
    content = parse_message(PULL.pack()[HEADER_BYTES:]) | {key: value}
    with pytest.raises(WireError) as caught:
        Pull.parse(pack_message(Kind.PULL, content)[HEADER_BYTES:])
    assert caught.value.reason == WireReason.MALFORMED


def test_who_takes_parts_says_so_among_the_stages() -> None:
    """A name that older producers pass over tells that a consumer understands an END with parts."""
    assert not PULL.takes_parts
    assert replace(PULL, stages=PULL.stages | {PARTS}).takes_parts


def test_a_consumer_without_bundles_speaks_of_none() -> None:
    """Producers that know no bundles, or no opaque caches, understand consumers that have none."""
    content = parse_message(PULL.pack()[HEADER_BYTES:])
    assert "bundles" not in content
    assert "blocks" not in content
