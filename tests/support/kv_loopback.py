"""A producer and a consumer in one process: real caches, real TCP, no engine around them."""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kvserve_api.wire import KVLayout
from kvserve_connector.bundles import BundleBook
from kvserve_connector.cache import EngineCache
from kvserve_connector.chunks import Chunk
from kvserve_connector.client import TransferClient
from kvserve_connector.coding import ChunkCoder, known_stages, raw_pipeline
from kvserve_connector.config import ConnectorConfig
from kvserve_connector.engine import Engine
from kvserve_connector.form import Form, Part
from kvserve_connector.groups import Group
from kvserve_connector.handover import Lease, Load, Prefill, Progress
from kvserve_connector.layout import split_content
from kvserve_connector.leases import LeaseBook
from kvserve_connector.links import LinkBook
from kvserve_connector.metrics import Metrics
from kvserve_connector.outcome import Outcome
from kvserve_connector.paged import PagedCache
from kvserve_connector.pulls import Pulls
from kvserve_connector.remote import Remote
from kvserve_connector.selector import Selector
from kvserve_connector.server import TransferServer
from kvserve_strategies import Pipeline

BLOCK = 16
LAYOUT = KVLayout(layers=7, kv_heads=2, head_dim=16, dtype="bfloat16")
GROUP = Group(
    index=0,
    layer_names=tuple(f"layers.{index}" for index in range(LAYOUT.layers)),
    block_tokens=BLOCK,
)
ENGINE = Engine(
    groups=(GROUP,),
    layout=LAYOUT,
    fingerprint="sha256:" + "0" * 64,
    engine_id="producer-1",
)
FORM = Form(
    fingerprint=ENGINE.fingerprint, parts=(Part(layout=LAYOUT, group=GROUP, block_rows=BLOCK),)
)


class LoopbackCache(EngineCache):
    """A cache of one part, read and written by its layers and tokens."""

    def read_tokens(
        self, layers: range, tokens: range, block_ids: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of a request with these blocks."""
        return self.read(Chunk(layers=layers, tokens=tokens), (block_ids,))

    def write_tokens(
        self,
        layers: range,
        tokens: range,
        block_ids: Sequence[int],
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Write keys and values of a request with these blocks."""
        self.write(Chunk(layers=layers, tokens=tokens), (block_ids,), keys, values)


def make_cache(blocks: int = 32, *, seed: int | None = None, form: Form = FORM) -> LoopbackCache:
    """Make a cache with random content, or zeros without a seed."""
    shape = (blocks, LAYOUT.kv_heads, BLOCK, 2 * LAYOUT.head_dim)
    generator = torch.Generator().manual_seed(seed or 0)
    layers = [
        torch.zeros(shape, dtype=torch.bfloat16)
        if seed is None
        else torch.randn(shape, generator=generator).to(torch.bfloat16)
        for _ in range(LAYOUT.layers)
    ]
    views = [split_content(t, LAYOUT.head_dim) for t in layers]
    return LoopbackCache(form, [PagedCache(views, LAYOUT, BLOCK)])


@dataclass
class Pair:
    """Both ends, and what came of the transfers."""

    config: ConnectorConfig
    server: TransferServer
    client: TransferClient
    source: LoopbackCache
    target: LoopbackCache
    leases: LeaseBook
    links: LinkBook
    selector: Selector
    metrics: Metrics
    producer_bundles: BundleBook
    consumer_bundles: BundleBook
    encoders: Executor
    outcomes: list[Outcome] = field(default_factory=list)
    arrived: threading.Condition = field(default_factory=threading.Condition)

    def warm_up(self, pipeline: Pipeline) -> None:
        """Compile all that a pipeline needs."""
        ChunkCoder(FORM, self.producer_bundles.find).warm_up(pipeline)

    def lease(self, request_id: str, tokens: int, block_ids: tuple[int, ...]) -> Lease:
        """Hold a prefill."""
        lease = Lease(
            request_id=request_id,
            tokens=tokens,
            prompt_digest="d" * 32,
            block_ids=(block_ids,),
            workload="default",
            model_s=0.5,
        )
        self.leases.add(lease)
        return lease

    def begin(self, request_id: str, tokens: int, transfer_id: str | None = None) -> None:
        """Have a prefill arrive."""
        self.leases.begin(
            Prefill(
                request_id=request_id,
                transfer_id=transfer_id,
                tokens=tokens,
                prompt_digest="d" * 32,
                workload="default",
            )
        )

    def advance(
        self, request_id: str, tokens: int, block_ids: tuple[int, ...], layers: int | None = None
    ) -> None:
        """Have a prefill go on."""
        progress = Progress(request_id=request_id, block_ids=(block_ids,), tokens=tokens, before=0)
        self.leases.advance(progress, layers=layers)

    def load(
        self,
        request_id: str,
        tokens: range,
        block_ids: tuple[int, ...],
        *,
        port: int | None = None,
        engine_id: str = ENGINE.engine_id,
        prompt_digest: str = "d" * 32,
        transfer: bool = False,
    ) -> Load:
        """Describe a fetch."""
        remote = Remote(
            host="127.0.0.1",
            port=port or self.server.port,
            engine_id="" if transfer else engine_id,
            request_id=request_id,
            tokens=0 if transfer else tokens.stop,
            transfer=transfer,
        )
        return Load(
            request_id=f"local-{request_id}",
            remote=remote,
            tokens=tokens,
            prompt_digest=prompt_digest,
            block_ids=(block_ids,),
            workload="default",
        )

    def fetch(self, load: Load, timeout_s: float = 20.0) -> Outcome:
        """Fetch, and wait for the outcome."""
        self.client.start(load)
        return self.outcome(load.request_id, timeout_s)

    def outcome(self, request_id: str, timeout_s: float = 20.0) -> Outcome:
        """Wait for an outcome."""
        with self.arrived:
            found = self.arrived.wait_for(lambda: self._find(request_id), timeout_s)
            assert found, f"no outcome of {request_id}"
            return found

    def ended(self, timeout_s: float = 5.0) -> tuple[set[str], dict[str, int]]:
        """Wait until a lease has ended, and return which and how."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            ended, counts = self.leases.take_ended()
            if ended:
                return ended, counts
            time.sleep(0.01)
        return set(), {}

    def note(self, outcome: Outcome) -> None:
        """Take an outcome from the client."""
        with self.arrived:
            self.outcomes.append(outcome)
            self.arrived.notify_all()

    def _find(self, request_id: str) -> Outcome | None:
        return next((o for o in self.outcomes if o.load.request_id == request_id), None)


@contextmanager
def pair(
    *, form: Form = FORM, lease_s: float = 30.0, blocks: int = 32, **settings: Any
) -> Iterator[Pair]:
    """Start both ends; ``form`` is what the consumer believes of its cache, ``blocks`` how large both are."""
    config = replace(
        ConnectorConfig(
            listen_host="127.0.0.1", listen_port=0, timeout_s=5.0, stall_s=1.0, chunk_layers=2
        ),
        lease_s=lease_s,
        **settings,
    )
    selector = Selector()
    metrics = Metrics(selector)
    leases = LeaseBook(lease_s)
    links = LinkBook(probe_share=config.probe_share)
    source, target = make_cache(blocks, seed=7), make_cache(blocks, form=form)
    ours = BundleBook(None, ENGINE.fingerprint, ENGINE.layout)
    theirs = BundleBook(None, form.fingerprint, form.layout)
    encoders, decoders = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
    pulls = Pulls(
        config, ENGINE.engine_id, source, leases, selector, links, encoders, metrics, ours, 32
    )
    server = TransferServer(config, ENGINE.engine_id, leases, metrics, pulls)
    made: list[Pair] = []
    client = TransferClient(
        config,
        target,
        known_stages(),
        theirs,
        decoders,
        lambda outcome: made[0].note(outcome),
    )
    both = Pair(
        config,
        server,
        client,
        source,
        target,
        leases,
        links,
        selector,
        metrics,
        ours,
        theirs,
        encoders,
    )
    made.append(both)
    # as an engine does before it serves: what has to be compiled must not count as a transfer's time
    both.warm_up(raw_pipeline())
    server.start()
    try:
        yield both
    finally:
        client.close()
        server.close()
        encoders.shutdown()
        decoders.shutdown()
