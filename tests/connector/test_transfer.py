"""Whole transfers over loopback TCP, without an engine around them."""

import contextlib
import socket
import threading
import time
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hostile_proxy import HostileProxy
from kv_loopback import BLOCK, ENGINE, FORM, LAYOUT, LoopbackCache, Pair, make_cache, pair
from kvserve_api.strategy import Part, StrategyConfig
from kvserve_connector.chunks import ahead_layers, plan_ahead, plan_form
from kvserve_connector.coding import ChunkCoder
from kvserve_connector.goodput import Goodput
from kvserve_connector.protocol import HEADER_BYTES, Kind, pack_header
from kvserve_connector.ready import ReadyTable
from kvserve_strategies import PRESETS, Pipeline
from kvserve_strategies.bundle import Bundle
from kvserve_strategies.matrices import matrices_of
from random_bundles import joint_strategy, write_sample
from tables import candidate, table

FROM, TO = (3, 9, 5, 20, 11), (1, 2, 4, 8, 16)
LAYERS = range(LAYOUT.layers)


def same(both: Pair, tokens: range) -> bool:
    """Tell whether the target holds what the source held."""
    ours = both.source.read_tokens(LAYERS, tokens, FROM)
    theirs = both.target.read_tokens(LAYERS, tokens, TO)
    return torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def blank(cache: LoopbackCache, block: int) -> bool:
    """Tell whether a block was never written."""
    tokens = range(block * BLOCK, (block + 1) * BLOCK)
    keys, values = cache.read_tokens(LAYERS, tokens, tuple(range(32)))
    return not keys.any() and not values.any()


@pytest.mark.parametrize(
    "tokens",
    [range(1), range(BLOCK - 1), range(BLOCK), range(5 * BLOCK - 3), range(2 * BLOCK, 70)],
    ids=str,
)
def test_kv_arrives_bit_by_bit(tokens: range) -> None:
    """Raw KV of any token range comes through exactly, and no other block is touched."""
    with pair() as both:
        both.lease("a", tokens.stop, FROM)
        outcome = both.fetch(both.load("a", tokens, TO))
        assert outcome.failure == ""
        assert same(both, tokens)
        assert all(blank(both.target, block) for block in set(range(32)) - set(TO))
        assert both.ended() == ({"a"}, {"Sent": 1})
        assert outcome.native_bytes == LAYOUT.native_bytes(len(tokens))
        assert outcome.wire_bytes > outcome.native_bytes


@pytest.mark.parametrize("name", ["lossless", "int8-token"])
def test_pinned_profile_is_used(name: str) -> None:
    """The table's profile codes the transfer, and the consumer needs nothing but the blobs to decode it."""
    with pair() as both:
        both.selector.install(ReadyTable.of(table(pinned=name)))
        both.lease("a", 80, FROM)
        outcome = both.fetch(both.load("a", range(80), TO))
        assert outcome.failure == ""
        assert outcome.accept is not None
        assert outcome.end is not None
        assert (outcome.accept.profile, outcome.accept.bound) == (name, "Pinned")
        assert outcome.accept.version == table().version
        assert outcome.wire_bytes < outcome.native_bytes
        assert outcome.end.encode_s > 0
        assert outcome.decode_s > 0
        if Pipeline.of(PRESETS[name]).lossless:
            assert same(both, range(80))
        else:
            ours, theirs = (
                cache.read_tokens(LAYERS, range(80), ids)[0].float()
                for cache, ids in ((both.source, FROM), (both.target, TO))
            )
            assert 0 < (ours - theirs).abs().max() < 0.05


def calibrated(bundle: Bundle) -> ReadyTable:
    """Return a table that pins a calibrated profile, ready."""
    joint = candidate("int4-token", strategy=joint_strategy(), bundle=bundle.digest)
    candidates = {"none": candidate("none"), "int4-token": joint}
    made = table(*candidates, candidates=candidates, pinned="int4-token")
    return ReadyTable.of(made, {bundle.digest: bundle})


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle of the loopback's model."""
    return write_sample(tmp_path / "bundle", LAYOUT, ENGINE.fingerprint)


def test_calibrated_profile_crosses(bundle: Bundle) -> None:
    """With the bundle on both sides whole groups of layers make a chunk, and come back close to what they were."""
    with pair() as both:
        both.producer_bundles.keep({bundle.digest: bundle})
        both.consumer_bundles.keep({bundle.digest: bundle})
        ready = calibrated(bundle)
        both.warm_up(ready.pipelines["int4-token"])
        both.selector.install(ready)
        both.lease("a", 70, FROM)
        outcome = both.fetch(both.load("a", range(70), TO))
        assert outcome.failure == ""
        assert outcome.accept is not None
        assert (outcome.accept.profile, outcome.accept.bound) == ("int4-token", "Pinned")
        # the settings say two layers a chunk, the basis joins three
        spans = [(c.layers.start, c.layers.stop) for c in outcome.accept.chunks]
        assert spans == [(0, 3), (3, 6), (6, 7)]
        assert outcome.wire_bytes < outcome.native_bytes
        for ours, theirs in zip(
            both.source.read_tokens(LAYERS, range(70), FROM),
            both.target.read_tokens(LAYERS, range(70), TO),
            strict=True,
        ):
            assert torch.equal(ours[:, :4], theirs[:, :4])
            assert 0 < (ours - theirs).float().abs().max() < 0.1


def test_nothing_is_made_ready_in_a_transfer(bundle: Bundle) -> None:
    """After warming up for both ways of cutting, coding a chunk of either builds no matrices."""
    pipeline = calibrated(bundle).pipelines["int4-token"]
    coder = ChunkCoder(FORM, {bundle.digest: bundle}.get)
    ways = {7, ahead_layers(FORM, 7)}
    assert len(ways) == 2
    coder.warm_up(pipeline, ways)
    built = matrices_of.cache_info().misses
    step = pipeline.layer_step
    for chunk in (
        *plan_form(FORM, range(64), 7, layer_multiple=step),
        *plan_ahead(FORM, range(64), 7, layer_multiple=step, step_tokens=64),
    ):
        shape = (len(chunk.layers), 64, LAYOUT.kv_heads, LAYOUT.head_dim)
        keys = torch.zeros(shape, dtype=getattr(torch, LAYOUT.dtype))
        coder.decode(bytearray(coder.encode(pipeline, chunk, keys, keys)), chunk)
    assert matrices_of.cache_info().misses == built


def test_consumer_without_the_bundle_gets_raw(bundle: Bundle) -> None:
    """A producer sends nothing calibrated to a consumer that did not say it has the bundle, and says why."""
    with pair() as both:
        both.producer_bundles.keep({bundle.digest: bundle})
        both.selector.install(calibrated(bundle))
        both.lease("a", 40, FROM)
        outcome = both.fetch(both.load("a", range(40), TO))
        assert outcome.failure == ""
        assert outcome.accept is not None
        assert (outcome.accept.profile, outcome.accept.wanted) == ("none", "int4-token")
        assert outcome.accept.bound == "PeerCannotDecode"
        assert same(both, range(40))


def test_bundle_on_a_peers_word_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk that names a bundle which no table named here fails by its reason; nothing is fetched or written."""
    with pair() as both:
        both.producer_bundles.keep({bundle.digest: bundle})
        both.selector.install(calibrated(bundle))
        # a producer that does not heed what the consumer has
        monkeypatch.setattr(
            "kvserve_connector.selector.ReadyTable.decodable", lambda self, *_: self.table
        )
        both.lease("a", 40, FROM)
        outcome = both.fetch(both.load("a", range(40), TO))
        assert outcome.failure == "BundleMismatch"
        assert bundle.digest in outcome.detail
        assert blank(both.target, TO[0])


def test_values_a_strategy_refuses_go_raw() -> None:
    """A chunk with NaN in it, which a lossy strategy can't carry, arrives exactly."""
    with pair() as both:
        both.selector.install(ReadyTable.of(table(pinned="int4-token")))
        keys, values = both.source.read_tokens(LAYERS, range(32), FROM)
        keys[0, 3, 0, 0] = float("nan")
        both.source.write_tokens(LAYERS, range(32), FROM, keys, values)
        both.lease("a", 32, FROM)
        assert both.fetch(both.load("a", range(32), TO)).failure == ""
        found = both.target.read_tokens(range(1), range(32), TO)[0]
        assert torch.equal(found.view(torch.int16), keys[:1].view(torch.int16))


def test_connections_are_used_again() -> None:
    """Eight transfers one after the other take one connection."""
    with pair() as both, HostileProxy(both.server.port) as proxy:
        for index in range(8):
            both.lease(f"r{index}", 20, FROM)
            load = both.load(f"r{index}", range(20), TO, port=proxy.port)
            assert both.fetch(load).failure == ""
        assert len(proxy.connections) == 2  # both sides of one


def test_dead_connection_is_replaced() -> None:
    """A kept connection that died meanwhile does not fail the next transfer."""
    with pair() as both, HostileProxy(both.server.port) as proxy:
        for index in range(2):
            both.lease(f"r{index}", 20, FROM)
            load = both.load(f"r{index}", range(20), TO, port=proxy.port)
            assert both.fetch(load).failure == ""
            proxy.cut()
        assert len(proxy.connections) == 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param({"fingerprint": "sha256:" + "1" * 64}, "ModelMismatch", id="model"),
        pytest.param(
            {"parts": (replace(FORM.parts[0], layout=replace(LAYOUT, kv_heads=4)),)},
            "LayoutMismatch",
            id="layout",
        ),
        pytest.param({"ranks": 2}, "LayoutMismatch", id="more-workers"),
        pytest.param({"ranks": 2, "rank": 1}, "LayoutMismatch", id="another-worker"),
        pytest.param({"blocks": "sha256:" + "2" * 64}, "LayoutMismatch", id="blocks"),
    ],
)
def test_another_model_is_refused(change: dict[str, str], reason: str) -> None:
    """A consumer of another model or layout gets nothing, and the producer's blocks are free."""
    with pair(form=replace(FORM, **change)) as both:  # type: ignore[arg-type]
        both.lease("a", 20, FROM)
        outcome = both.fetch(both.load("a", range(20), TO))
        assert outcome.failure == "PeerRefused"
        assert reason in outcome.detail
        assert both.ended() == ({"a"}, {reason: 1})
        assert blank(both.target, 1)


def test_another_prompt_is_refused() -> None:
    """KV of another prompt, or of another number of tokens, is not sent."""
    with pair() as both:
        for index, (tokens, digest) in enumerate(((20, "x" * 32), (21, "d" * 32))):
            both.lease(f"r{index}", 20, FROM)
            load = both.load(f"r{index}", range(tokens), TO, prompt_digest=digest)
            assert both.fetch(load).failure == "PeerRefused"
            assert both.ended() == ({f"r{index}"}, {"RangeMismatch": 1})


def test_restarted_producer_refuses_at_once() -> None:
    """A prefill of an engine that has been restarted is refused without waiting for it."""
    with pair(timeout_s=30.0) as both:
        outcome = both.fetch(both.load("a", range(20), TO, engine_id="producer-0"))
        assert outcome.failure == "PeerRefused"
        assert "Expired" in outcome.detail
        assert outcome.total_s < 1


def test_consumer_may_be_early() -> None:
    """A fetch that comes before the news of the prefill's end waits for it."""
    with pair() as both:
        load = both.load("a", range(20), TO)
        both.client.start(load)
        time.sleep(0.3)
        both.lease("a", 20, FROM)
        assert both.outcome(load.request_id).failure == ""
        assert same(both, range(20))


def test_ended_prefill_is_refused_at_once() -> None:
    """A lease that has expired is gone for its consumer, who is told so immediately."""
    with pair(lease_s=0.05, timeout_s=30.0) as both:
        both.lease("a", 20, FROM)
        assert both.ended() == ({"a"}, {"Expired": 1})
        outcome = both.fetch(both.load("a", range(20), TO))
        assert outcome.failure == "PeerRefused"
        assert outcome.total_s < 1


def test_lease_does_not_expire_while_it_is_sent() -> None:
    """A slow transfer that began in time keeps its blocks to its end."""
    with pair(lease_s=0.2) as both, HostileProxy(both.server.port, bytes_per_s=60_000) as proxy:
        both.lease("a", 80, FROM)
        load = both.load("a", range(80), TO, port=proxy.port)
        both.client.start(load)
        time.sleep(0.5)
        assert both.leases.take_ended() == (set(), {})
        assert both.outcome(load.request_id).failure == ""
        assert both.ended() == ({"a"}, {"Sent": 1})


def test_release_frees_at_once() -> None:
    """A prefill that its consumer does not need is freed without waiting for its lease."""
    with pair() as both:
        both.lease("a", 20, FROM)
        both.client.release(both.load("a", range(20), TO).remote)
        assert both.ended() == ({"a"}, {"Released": 1})


def test_every_flipped_byte_is_found() -> None:
    """Wherever a byte of the answer is altered, the transfer fails with a typed reason, or the KV is right."""
    with pair(timeout_s=3.0, stall_s=0.3) as both:
        both.lease("size", 40, FROM)
        with HostileProxy(both.server.port) as proxy:
            load = both.load("size", range(40), TO, port=proxy.port)
            assert both.fetch(load).failure == ""
            size = proxy.forwarded
        reasons = set()
        for index, at in enumerate(range(0, size, size // 40)):
            both.target.write_tokens(
                LAYERS, range(40), TO, *make_cache().read_tokens(LAYERS, range(40), TO)
            )
            both.lease(f"r{index}", 40, FROM)
            with HostileProxy(both.server.port, flip_at=at) as proxy:
                load = both.load(f"r{index}", range(40), TO, port=proxy.port)
                outcome = both.fetch(load)
            assert outcome.failure != "" or same(both, range(40))
            reasons.add(outcome.failure)
        assert "ChecksumMismatch" in reasons
        assert "Error" not in reasons


@pytest.mark.parametrize(
    ("harm", "reason", "most_s"),
    [
        pytest.param({"cut_at": 9000}, "PeerLost", 1.0, id="cut"),
        pytest.param({"freeze_at": 9000}, "Timeout", 1.5, id="frozen"),
        pytest.param({"bytes_per_s": 2000.0}, "Timeout", 3.5, id="crawling"),
    ],
)
def test_broken_links_end_in_bounded_time(
    harm: dict[str, float], reason: str, most_s: float
) -> None:
    """A link that breaks, freezes or crawls fails the transfer in bounded time and frees the producer's blocks."""
    with (
        pair(timeout_s=2.0, stall_s=0.5) as both,
        HostileProxy(both.server.port, **harm) as proxy,  # type: ignore[arg-type]
    ):
        both.lease("a", 80, FROM)
        outcome = both.fetch(both.load("a", range(80), TO, port=proxy.port))
        assert outcome.failure == reason
        assert outcome.total_s < most_s
        # whatever was in the air is gone; nothing writes into the cache after the outcome
        before = both.target.read_tokens(LAYERS, range(80), TO)[0]
        time.sleep(0.2)
        assert torch.equal(before, both.target.read_tokens(LAYERS, range(80), TO)[0])
    ended, _ = both.ended(5)
    assert ended == {"a"}


def test_nobody_listens() -> None:
    """A producer that is gone is a lost peer."""
    with pair() as both:
        outcome = both.fetch(both.load("a", range(20), TO, port=1))
        assert outcome.failure == "PeerLost"


def test_cancelled_transfer_ends_soon() -> None:
    """An aborted request's transfer ends at once, and both sides know."""
    with pair(timeout_s=30.0) as both, HostileProxy(both.server.port, freeze_at=5000) as proxy:
        both.lease("a", 80, FROM)
        load = both.load("a", range(80), TO, port=proxy.port)
        both.client.start(load)
        proxy.wait_forwarded(1)
        both.client.cancel(load.request_id)
        assert both.outcome(load.request_id, 1.0).failure == "Cancelled"
        proxy.cut()
        assert both.ended()[0] == {"a"}


def test_strangers_are_turned_away() -> None:
    """Noise, wrong frames and silence on the port end their connection and nothing else."""
    with pair(stall_s=0.3) as both:
        for noise in (b"GET / HTTP/1.1\r\n\r\n", pack_header(Kind.DONE, 0), b"KVT1"):
            with socket.create_connection(("127.0.0.1", both.server.port), timeout=5) as stranger:
                stranger.sendall(noise)
                # closed, or reset because it had not been read to its end
                with contextlib.suppress(ConnectionResetError):
                    assert stranger.recv(1) == b""
        both.lease("a", 20, FROM)
        assert both.fetch(both.load("a", range(20), TO)).failure == ""


def test_oversized_chunks_are_not_read() -> None:
    """A producer that announces an absurd chunk is dropped before any room is made for it."""
    with pair() as both, socket.create_server(("127.0.0.1", 0)) as listener:

        def lie() -> None:
            connection, _ = listener.accept()
            with connection, socket.create_connection(("127.0.0.1", both.server.port)) as real:
                wish = connection.recv(65_536)
                real.sendall(wish)
                time.sleep(0.2)
                answer = real.recv(1 << 20)
                first = answer.index(b"KVT1", 1)
                huge = pack_header(Kind.CHUNK, 2**32 - 1, seed=zlib.crc32(wish[HEADER_BYTES:]))
                connection.sendall(answer[:first] + huge)
                connection.recv(1)

        threading.Thread(target=lie, daemon=True).start()
        both.lease("a", 20, FROM)
        port = listener.getsockname()[1]
        outcome = both.fetch(both.load("a", range(20), TO, port=port))
        assert outcome.failure == "TooLarge"


def test_choice_follows_the_link() -> None:
    """On a fast link raw is chosen, on a slow one the highest ratio; the next transfer already follows."""
    with pair() as both:
        slow_codecs = {
            name: candidate(name, bytes_per_s=2e8) for name in ("none", "int8-token", "int4-token")
        }
        names = tuple(slow_codecs)
        both.selector.install(ReadyTable.of(table(*names, candidates=slow_codecs)))
        chosen = []
        for index, bytes_per_s in enumerate((1e10, 1e6, 1e10)):
            link = both.links.link("127.0.0.1")
            link._goodput = Goodput(bytes_per_s=bytes_per_s, shown_bytes_per_s=bytes_per_s)
            both.lease(f"r{index}", 80, FROM)
            outcome = both.fetch(both.load(f"r{index}", range(80), TO))
            assert outcome.accept is not None
            chosen.append(outcome.accept.profile)
        assert chosen == ["none", "int4-token", "none"]
        assert both.links.link("127.0.0.1").snapshot(1.0).backlog_bytes == 0


def test_a_hundred_transfers_leave_nothing() -> None:
    """After a hundred transfers, a tenth of them broken, no lease, thread or connection is left over."""
    with pair(timeout_s=5.0, stall_s=0.5) as both:
        before = threading.active_count()
        for index in range(100):
            both.lease(f"r{index}", 40, FROM)
            load = both.load(f"r{index}", range(40), TO)
            if index % 10:
                both.client.start(load)
                continue
            with HostileProxy(both.server.port, cut_at=4000) as proxy:
                remote = replace(load.remote, port=proxy.port)
                assert both.fetch(replace(load, remote=remote)).failure == "PeerLost"
        for index in range(100):
            both.outcome(f"local-r{index}")
        deadline_s = time.monotonic() + 5
        while len(both.leases) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert len(both.leases) == 0
        assert sum(1 for outcome in both.outcomes if outcome.failure) == 10
        # eight pulling threads, as many serving ones at most, the two that code and the one that renews
        assert threading.active_count() <= before + 19


def test_chunks_know_how_far_the_request_goes_on() -> None:
    """Of a transfer in several chunks of tokens, only the request's last 10 tokens arrive as they were."""
    raw, levels = PRESETS["none"].parts[0].chain, PRESETS["int4-token"].parts[0].chain
    apart = StrategyConfig(
        parts=(Part(kind="kv", chain=raw, tokens="-10:"), Part(kind="kv", chain=levels))
    )
    candidates = {"none": candidate("none"), "int4-token": candidate("int4-token", strategy=apart)}
    made = table(*candidates, candidates=candidates, pinned="int4-token")
    with pair() as both, pytest.MonkeyPatch.context() as patch:
        # a token of one layer has 128 bytes: 32 tokens make a chunk, and the last one holds 8
        patch.setattr("kvserve_connector.chunks.MAX_CHUNK_BYTES", 4096)
        patch.setattr("kvserve_connector.form.TOKEN_STEP", 16)
        both.selector.install(ReadyTable.of(made))
        both.lease("a", 72, FROM)
        outcome = both.fetch(both.load("a", range(72), TO))
        assert outcome.failure == ""
        assert outcome.accept is not None
        assert {chunk.tokens for chunk in outcome.accept.chunks} >= {range(32, 64), range(64, 72)}
    ours, theirs = (
        cache.read_tokens(LAYERS, range(72), ids)[0]
        for cache, ids in ((both.source, FROM), (both.target, TO))
    )
    exact = [torch.equal(ours[:, token], theirs[:, token]) for token in range(72)]
    assert exact == [False] * 62 + [True] * 10


def test_waiting_for_a_turn_is_not_silence() -> None:
    """A transfer that waits longer behind others for its coder than a peer may be silent arrives all the same."""
    with pair(stall_s=0.6, timeout_s=20.0) as both:
        held = threading.Event()
        others = both.encoders.submit(held.wait, 10)
        both.lease("a", 80, FROM)
        load = both.load("a", range(80), TO)
        both.client.start(load)
        time.sleep(1.5)
        held.set()
        assert both.outcome(load.request_id).failure == ""
        assert same(both, range(80))
        assert others.result()
