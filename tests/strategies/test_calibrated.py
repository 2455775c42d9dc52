"""Calibrated strategies: within their step, the same however a piece is cut, and never garbage."""

import dataclasses

import numpy as np
import pytest
import torch
from tests.strategies.calibrated import CALIBRATED_CONFIGS, grid, joint
from tests.strategies.laws import bits

from bundles import FINGERPRINT, LAYOUT, small_cache, write_small_bundle
from kvserve_api.errors import StrategyError, ValuesError, WireError, WireReason
from kvserve_api.strategy import StrategyConfig
from kvserve_strategies import Expectation, Pipeline, Place, decode_blob, encode_blob
from kvserve_strategies.bundle import Bundle
from kvserve_strategies.stages import Mean, Metric, Rans, TokenMinMax, Unrope

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return the small model's bundle."""
    return write_small_bundle(tmp_path_factory.mktemp("bundle") / "small")


ALL = pytest.mark.parametrize("config", CALIBRATED_CONFIGS.values(), ids=CALIBRATED_CONFIGS.keys())


def error(config: StrategyConfig, bundle: Bundle, dtype: torch.dtype, tokens: int) -> float:
    """Return the root mean square error of keys and values over theirs."""
    pipeline = Pipeline.of(config, bundle)
    keys, values = small_cache(3, tokens, dtype)
    shape = (keys.shape[0], keys.shape[1], keys.shape[2], keys.shape[3])
    payload = pipeline.encode(keys, values)
    assert len(payload) <= pipeline.max_encoded_nbytes(
        layers=5, tokens=tokens, kv_heads=2, head_dim=8, dtype=dtype
    )
    assert payload == pipeline.encode(keys, values)
    decoded = pipeline.decode(payload, shape=shape, dtype=dtype)
    square = sum(
        float((a.double() - b.double()).square().mean())
        for a, b in zip((keys, values), decoded, strict=True)
    )
    assert all(half.dtype == dtype for half in decoded)
    return float(np.sqrt(square / 2) / keys.double().square().mean().sqrt())


@ALL
@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16", "float32"])
def test_round_trip(config: StrategyConfig, bundle: Bundle, dtype: torch.dtype) -> None:
    """A fine step gives values back to a few percent, whatever the chain, the dtype and the number of tokens."""
    for tokens in (1, 7, 65):
        assert error(config, bundle, dtype, tokens) < 0.06


def test_step_rules_error_and_size(bundle: Bundle) -> None:
    """A larger step gives fewer bytes and a larger error."""
    keys, values = small_cache(3, 256, torch.float32)
    steps = (0.15, 0.3, 0.6, 1.2)
    configs = [joint(*grid(step)) for step in steps]
    errors = [error(config, bundle, torch.float32, 256) for config in configs]
    sizes = [len(Pipeline.of(config, bundle).encode(keys, values)) for config in configs]
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)


def test_sinks_are_exact(bundle: Bundle) -> None:
    """The first tokens of a request come back bit by bit, and only those of the request, not of a later piece."""
    keys, values = small_cache(4, 40, torch.bfloat16)
    pipeline = Pipeline.of(joint(*grid(0.8), sinks=4), bundle)
    for first, exact in ((0, 4), (3, 1), (4, 0)):
        at = Place(first_token=first)
        payload = pipeline.encode(keys, values, at=at)
        decoded = pipeline.decode(payload, shape=(5, 40, 2, 8), dtype=keys.dtype, at=at)
        for native, restored in zip((keys, values), decoded, strict=True):
            same = (bits(native) == bits(restored)).all(axis=(0, 2, 3))
            assert same[:exact].all()
            assert not same[exact:].all()


def test_positions_matter(bundle: Bundle) -> None:
    """Keys are rotated back by their positions: the same piece decoded at another place is another piece."""
    keys, values = small_cache(5, 20, torch.float32)
    pipeline = Pipeline.of(joint(*grid(0.05)), bundle)
    payload = pipeline.encode(keys, values, at=Place(first_token=100))
    shape = (5, 20, 2, 8)
    right = pipeline.decode(payload, shape=shape, dtype=keys.dtype, at=Place(first_token=100))
    wrong = pipeline.decode(payload, shape=shape, dtype=keys.dtype, at=Place(first_token=101))
    np.testing.assert_array_equal(right[1].numpy(), wrong[1].numpy())
    assert float((right[0] - keys).abs().max()) < 0.5
    assert float((wrong[0] - keys).abs().max()) > 0.5
    # the last layer does not rotate
    np.testing.assert_array_equal(right[0][4].numpy(), wrong[0][4].numpy())


def test_layers_in_pieces(bundle: Bundle) -> None:
    """Pieces cut at multiples of the layer step decode to what the whole decodes to; other cuts are refused."""
    keys, values = small_cache(6, 33, torch.bfloat16)
    pipeline = Pipeline.of(joint(*grid(0.3)), bundle)
    assert pipeline.layer_step == 2
    whole = pipeline.decode(pipeline.encode(keys, values), shape=(5, 33, 2, 8), dtype=keys.dtype)
    for layers in (range(2), range(2, 4), range(4, 5), range(2, 5)):
        at = Place(first_layer=layers.start, model_layers=5)
        part = slice(layers.start, layers.stop)
        payload = pipeline.encode(keys[part], values[part], at=at)
        shape = (len(layers), 33, 2, 8)
        decoded = pipeline.decode(payload, shape=shape, dtype=keys.dtype, at=at)
        for mine, all_layers in zip(decoded, whole, strict=True):
            np.testing.assert_array_equal(bits(mine), bits(all_layers[part]))
    with pytest.raises(StrategyError, match="multiples of 2 layers"):
        pipeline.encode(keys[1:3], values[1:3], at=Place(first_layer=1, model_layers=5))


def test_ranks(bundle: Bundle) -> None:
    """A tensor-parallel rank codes its heads with its part of the bundle; a basis over all heads it refuses."""
    keys, values = small_cache(7, 20, torch.float32)
    config = joint(*grid(0.05, layers=1, heads=1))
    whole = Pipeline.of(config, bundle)
    both = whole.decode(whole.encode(keys, values), shape=(5, 20, 2, 8), dtype=keys.dtype)
    for head in range(2):
        rank = Pipeline.of(config, bundle.of_heads(range(head, head + 1)))
        mine = keys[:, :, head : head + 1], values[:, :, head : head + 1]
        decoded = rank.decode(rank.encode(*mine), shape=(5, 20, 1, 8), dtype=keys.dtype)
        for one, other in zip(decoded, both, strict=True):
            np.testing.assert_array_equal(one.numpy(), other[:, :, head : head + 1].numpy())
        wide = Pipeline.of(joint(*grid(0.05)), bundle.of_heads(range(head, head + 1)))
        with pytest.raises(StrategyError, match="has no basis"):
            wide.encode(*mine)


def test_values_far_away(bundle: Bundle) -> None:
    """Outliers a thousand times larger than calibration saw are coded; what float32 can't span is refused."""
    keys, values = small_cache(8, 20, torch.float32)
    pipeline = Pipeline.of(joint(*grid(0.5)), bundle)
    keys[2, 5] *= 1000
    decoded, _ = pipeline.decode(
        pipeline.encode(keys, values), shape=(5, 20, 2, 8), dtype=keys.dtype
    )
    relative = (decoded[2, 5] - keys[2, 5]).norm() / keys[2, 5].norm()
    assert float(relative) < 0.3
    values[0, 0] = 1e30
    with pytest.raises(ValuesError):
        pipeline.encode(keys, values)


def test_without_bundle() -> None:
    """Without its bundle a calibrated strategy can be built and looked at, but not used."""
    pipeline = Pipeline.of(joint(*grid(0.5)))
    assert pipeline.calibrated
    assert pipeline.bundle is None
    assert [str(key) for key in pipeline.basis_keys] == ["centred.kv.2x0"]
    keys, values = small_cache(9, 5, torch.bfloat16)
    with pytest.raises(StrategyError, match="kvserve calibrate"):
        pipeline.encode(keys, values)


def test_missing_basis_and_metric(bundle: Bundle) -> None:
    """A width or metric that the bundle does not have is refused with what it has."""
    keys, values = small_cache(9, 5, torch.bfloat16)
    with pytest.raises(StrategyError, match=r"no basis centred.kv.3x0; it has: centred.k.1x0"):
        Pipeline.of(joint(*grid(0.5, layers=3)), bundle).encode(keys, values)
    with pytest.raises(StrategyError, match="'odd' is not in the bundle"):
        Pipeline.of(
            joint(
                Unrope(),
                Mean(),
                Metric(metric="odd"),
                TokenMinMax(levels=4, group=0),
                Rans(tables=1),
            ),
            bundle,
        ).encode(keys, values)


def test_blob(bundle: Bundle) -> None:
    """A blob names its bundle; without it, or for another model or place, it is refused, never decoded wrongly."""
    keys, values = small_cache(10, 30, torch.bfloat16)
    pipeline = Pipeline.of(joint(*grid(0.3), sinks=2), bundle)
    layers, tokens = range(2, 4), range(7, 37)
    blob = encode_blob(
        pipeline,
        keys[2:4],
        values[2:4],
        model_fingerprint=FINGERPRINT,
        layout=LAYOUT,
        layers=layers,
        tokens=tokens,
    )
    expect = Expectation(
        model_fingerprint=FINGERPRINT,
        layout=LAYOUT,
        layers=layers,
        tokens=tokens,
        max_bytes=len(blob),
        bundles={bundle.digest: bundle}.get,
    )
    decoded = decode_blob(blob, expect=expect)
    assert decoded.header.bundle == bundle.digest
    at = Place(first_layer=2, model_layers=5, first_token=7)
    payload = pipeline.encode(keys[2:4], values[2:4], at=at)
    direct = pipeline.decode(payload, shape=(2, 30, 2, 8), dtype=keys.dtype, at=at)
    np.testing.assert_array_equal(bits(decoded.keys), bits(direct[0]))
    np.testing.assert_array_equal(bits(decoded.values), bits(direct[1]))
    for other in (
        dataclasses.replace(expect, bundles=lambda digest: None),
        dataclasses.replace(expect, bundles={"sha256:" + "0" * 64: bundle}.get),
    ):
        with pytest.raises(WireError) as caught:
            decode_blob(blob, expect=other)
        assert caught.value.reason == WireReason.BUNDLE_MISMATCH
    with pytest.raises(StrategyError, match="was calibrated on"):
        encode_blob(
            pipeline,
            keys,
            values,
            model_fingerprint="sha256:" + "6" * 64,
            layout=LAYOUT,
            layers=range(5),
            tokens=range(30),
        )


@ALL
def test_damage(config: StrategyConfig, bundle: Bundle) -> None:
    """Altered and cut payloads give a typed error or finite tensors of the right form."""
    pipeline = Pipeline.of(config, bundle)
    keys, values = small_cache(11, 20, torch.bfloat16)
    payload = bytes(pipeline.encode(keys, values))
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(payload)
        if rng.random() < 0.3:
            damaged = damaged[: rng.integers(len(damaged))]
        else:
            damaged[rng.integers(len(damaged))] ^= 1 << int(rng.integers(8))
        try:
            decoded = pipeline.decode(damaged, shape=(5, 20, 2, 8), dtype=keys.dtype)
        except WireError:
            refused += 1
            continue
        # exact tokens carry any bits, like a lossless strategy
        start = 4 if config.parts[0].tokens else 0
        assert all(half.shape == keys.shape for half in decoded)
        assert all(half[:, start:].isfinite().all() for half in decoded)
    assert refused > 0
