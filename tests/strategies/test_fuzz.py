"""A million damaged payloads: each is refused with a reason or gives finite tensors of the right form."""

import dataclasses
import math
import random
import resource
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.strategies.calibrated import CALIBRATED_CONFIGS
from tests.strategies.damage import Sections, damage, damage_section, join_sections
from tests.strategies.laws import CONFIGS, DTYPES, bits, sample
from tests.strategies.test_blob import forge

from bundles import FINGERPRINT, LAYOUT, small_cache, write_small_bundle
from kvserve_api.errors import WireError
from kvserve_api.strategy import Kind, StrategyConfig
from kvserve_api.wire import PREFIX_NBYTES, BlobPrefix
from kvserve_strategies import Expectation, Pipeline, Place, decode_blob, encode_blob
from kvserve_strategies.bundle import Bundle
from kvserve_strategies.chain import Chain
from kvserve_strategies.peers import PEERS
from kvserve_strategies.split import Extent, cut
from kvserve_strategies.stages import ExponentCode, Grid, Ladder, PredictLayer, Rans

TOTAL: Final = 1_000_000
BLOBS: Final = 20_000
TRACED: Final = 40
"""Payloads of each strategy and dtype whose decoding is watched for memory."""
TOKENS: Final = 33
FIXED_NBYTES: Final = 1 << 20
NBYTES_PER_VALUE: Final = 64
GROWTH_KIB: Final = 64 << 10
_EXPONENT: Final = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A strategy with a cache it has coded.

    Attributes:
        name: Of the strategy, and the dtype.
        pipeline: The strategy.
        shape: Of keys and of values.
        dtype: Of keys and values.
        at: Where in the model they are.
        payloads: Of two caches, each as its sections and whole.
        exact: Which cells are coded without loss and may decode to anything, ``[2, layers, tokens, kv_heads]``.
        header: Of its blob.
        expect: What the blob's receiver expects.
        weight: How many damages it gets, relative to others; fewer where decoding is slow.
    """

    name: str
    pipeline: Pipeline
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    at: Place
    payloads: tuple[tuple[Sections, bytes], ...]
    exact: NDArray[np.bool_]
    header: bytes
    expect: Expectation
    weight: int

    def check(self, keys: torch.Tensor, values: torch.Tensor, payload: bytes) -> None:
        """Check what a damaged payload gave."""
        exponent = _EXPONENT[self.dtype]
        for half, exact in zip((keys, values), self.exact, strict=True):
            assert half.shape == self.shape
            assert half.dtype == self.dtype
            wild = (bits(half) & exponent) == exponent
            assert not wild.any() or not wild[~exact].any()
        if self.pipeline.lossless and self.pipeline.fixed_size:
            assert bytes(self.pipeline.encode(keys, values, at=self.at)) == payload


def subject(name: str, config: StrategyConfig, dtype: torch.dtype, bundle: Bundle) -> Subject:
    """Return a strategy with caches; those of calibrated ones are of the bundle's model."""
    pipeline = Pipeline.of(config, bundle)
    if pipeline.calibrated:
        at = Place()
        caches = [small_cache(seed, TOKENS, dtype) for seed in (0, 1)]
    else:
        # the second layer and the third: where the parts of strategies for some layers meet
        at = Place(first_layer=1, model_layers=LAYOUT.layers)
        shape = (2, TOKENS, LAYOUT.kv_heads, LAYOUT.head_dim)
        kinds = (("gauss", "outliers"), ("mixed", "one"))
        caches = [(sample(k, 1, shape, dtype), sample(v, 2, shape, dtype)) for k, v in kinds]
    payloads = []
    for keys, values in caches:
        encoded = pipeline.encode_sections(keys, values, at=at)
        sections = [b"".join(piece.tobytes() for piece in section) for section in encoded]
        payloads.append((sections, bytes(join_sections(sections))))
        assert payloads[-1][1] == pipeline.encode(keys, values, at=at)
    layers, count = caches[0][0].shape[0], LAYOUT.layers
    expect = Expectation(
        model_fingerprint=FINGERPRINT,
        layout=dataclasses.replace(LAYOUT, dtype=str(dtype).removeprefix("torch.")),
        layers=range(at.first_layer, at.first_layer + layers),
        tokens=range(TOKENS),
        max_bytes=1_000_000,
        bundles={bundle.digest: bundle}.get,
    )
    exact = np.zeros((2, layers, TOKENS, LAYOUT.kv_heads), np.bool_)
    extent = Extent(
        layers=expect.layers, model_layers=count, heads=LAYOUT.kv_heads, tokens=expect.tokens
    )
    for cells in cut(config.parts, extent):
        if Chain.of(config.parts[cells.part]).lossless:
            kinds_at = [list(Kind).index(kind) for kind in cells.kinds]
            rows = [layer - at.first_layer for layer in cells.layers]
            exact[np.ix_(kinds_at, rows, cells.tokens, cells.heads)] = True
    blob = encode_blob(
        pipeline,
        *caches[0],
        model_fingerprint=FINGERPRINT,
        layout=expect.layout,
        layers=expect.layers,
        tokens=expect.tokens,
    )
    return Subject(
        name=f"{name} {dtype}",
        pipeline=pipeline,
        at=at,
        payloads=tuple(payloads),
        exact=exact,
        header=bytes(blob[PREFIX_NBYTES : BlobPrefix.parse(blob[:PREFIX_NBYTES]).payload_offset]),
        expect=expect,
        shape=(layers, TOKENS, LAYOUT.kv_heads, LAYOUT.head_dim),
        dtype=dtype,
        weight=weight(pipeline),
    )


def weight(pipeline: Pipeline) -> int:
    """Return how many damages a strategy gets, so that each takes about the same time."""
    ids = set(pipeline.stage_ids)
    if PredictLayer.id in ids or (pipeline.calibrated and Grid.id not in ids):
        return 1
    return 2 if ids & {Rans.id, ExponentCode.id, Ladder.id} else 4


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> list[Subject]:
    """Return every strategy with each dtype, warmed up."""
    bundle = write_small_bundle(tmp_path_factory.mktemp("fuzz") / "bundle")
    peers = {name: c for name, c in PEERS.items() if not Pipeline.of(c).calibrated}
    made = [
        subject(name, config, dtype, bundle)
        for name, config in (CONFIGS | peers | CALIBRATED_CONFIGS).items()
        for dtype in DTYPES
    ]
    for one in made:
        for _, payload in one.payloads:
            keys, values = decode(one, bytearray(payload))
            one.check(keys, values, payload)
    return made


def decode(one: Subject, payload: bytearray) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode a payload."""
    return one.pipeline.decode(payload, shape=one.shape, dtype=one.dtype, at=one.at)


def damaged(rng: random.Random, one: Subject, other: Subject) -> bytearray:
    """Return a damaged payload, maybe with parts of another's."""
    sections, payload = rng.choice(one.payloads)
    their_sections, theirs = rng.choice(other.payloads)
    if rng.random() < 0.7:
        return damage_section(rng, sections, their_sections)
    return damage(rng, payload, theirs)


def try_decode(one: Subject, payload: bytearray) -> bool:
    """Decode a damaged payload and check the outcome; return whether it was refused."""
    before = bytes(payload)
    try:
        keys, values = decode(one, payload)
    except WireError:
        return True
    one.check(keys, values, before)
    return False


def run(
    subjects: list[Subject], total: int, attempt: Callable[[random.Random, Subject, Subject], bool]
) -> Counter[str]:
    """Attempt damages of all subjects in turn; return how many were refused, of which strategy.

    Raises:
        AssertionError: Anything but a `WireError` came out; it says how to see it again.
    """
    refused: Counter[str] = Counter()
    started = time.process_time()
    each = -(-total // sum(one.weight for one in subjects))
    count = 0
    rng = random.Random()
    for one in subjects:
        own = zlib.crc32(one.name.encode()) << 32
        for n in range(each * one.weight):
            # a seed for each, so that one can be repeated alone
            rng.seed(own + n)
            other = one if rng.random() < 0.5 else subjects[rng.randrange(len(subjects))]
            try:
                refused[one.name] += attempt(rng, one, other)
            except Exception as error:
                raise AssertionError(f"{one.name}, damage {n}") from error
            count += 1
    seconds = time.process_time() - started
    share = refused.total() / count
    print(
        f"{count} damaged payloads, {share:.1%} refused, {count / seconds:.0f} a processor second"
    )
    assert count >= total
    return refused


def attempt_payload(rng: random.Random, one: Subject, other: Subject) -> bool:
    """Decode a damaged payload that no checksum protects."""
    return try_decode(one, damaged(rng, one, other))


def attempt_blob(rng: random.Random, one: Subject, other: Subject) -> bool:
    """Decode a damaged blob, or one of true checksums with a damaged payload, header, or another's header."""
    header, payload = one.header, rng.choice(one.payloads)[1]
    match rng.randrange(4):
        case 0:
            theirs = forge(other.header, other.payloads[0][1])
            blob = bytes(damage(rng, forge(header, payload), theirs))
        case 1:
            blob = forge(bytes(damage(rng, header, other.header)), payload)
        case 2:
            blob = forge(other.header, payload)
        case _:
            payload = bytes(damaged(rng, one, other))
            blob = forge(header, payload)
    try:
        decoded = decode_blob(blob, expect=one.expect)
    except WireError:
        return True
    assert decoded.header.tokens == one.expect.tokens
    if decoded.header.strategy == one.pipeline.config:
        one.check(decoded.keys, decoded.values, payload)
    assert decoded.keys.shape == decoded.values.shape == one.shape
    return False


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_payloads(subjects: list[Subject], capsys: pytest.CaptureFixture[str]) -> None:
    """Payloads: a typed error or finite tensors, from every strategy both, and no memory is kept."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with capsys.disabled():
        refused = run(subjects, TOTAL - BLOBS, attempt_payload)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < GROWTH_KIB
    assert all(refused[one.name] > 0 for one in subjects)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_blobs(subjects: list[Subject], capsys: pytest.CaptureFixture[str]) -> None:
    """Blobs, half of them with true checksums: a typed error or finite tensors."""
    with capsys.disabled():
        refused = run(subjects, BLOBS, attempt_blob)
    assert all(refused[one.name] > 0 for one in subjects)


@pytest.mark.long
@pytest.mark.slow
def test_memory(subjects: list[Subject]) -> None:
    """No damage makes a decoder ask for more memory than the form of the tensors explains."""
    rng = random.Random(0)
    tracemalloc.start()
    try:
        for one in subjects:
            allowed = FIXED_NBYTES + NBYTES_PER_VALUE * 2 * math.prod(one.shape)
            for _ in range(TRACED):
                payload = damaged(rng, one, rng.choice(subjects))
                tracemalloc.reset_peak()
                held = tracemalloc.get_traced_memory()[0]
                try_decode(one, payload)
                peak = tracemalloc.get_traced_memory()[1] - held
                assert peak < allowed, f"{one.name}: {peak} bytes"
    finally:
        tracemalloc.stop()
