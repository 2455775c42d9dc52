"""The presets that restate peers give what the peers' own code gives, which is fetched and run here."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import peers_code
from kvserve_api.errors import StrategyError
from kvserve_kernels import hadamard, lloyd
from kvserve_strategies import Pipeline
from kvserve_strategies.peers import PEERS
from kvserve_strategies.stages import AbsMax, LloydMax
from kvserve_strategies.stages.hadamard import signs
from kvserve_strategies.stages.lloyd import centroids, thresholds

SHAPE = (12, 300, 3, 64)


def cache(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys with a mean for each channel and an outlying first token, and values of tokens of unlike size."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(SHAPE, generator=generator)
    keys += 4 * torch.randn(SHAPE[0], 1, *SHAPE[2:], generator=generator)
    keys[:, 0] *= 8
    values = torch.randn(SHAPE, generator=generator)
    values *= torch.rand(*SHAPE[:3], 1, generator=generator) + 0.05
    return keys.to(dtype), values.to(dtype)


def round_trip(name: str, keys: torch.Tensor, values: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Return a preset's bytes, and the keys and values it gives back, one after the other."""
    pipeline = Pipeline.of(PEERS[name])
    payload = pipeline.encode(keys, values)
    decoded = pipeline.decode(payload, shape=SHAPE, dtype=keys.dtype)
    return len(payload), torch.stack(decoded)


def density(x: float) -> float:
    """Return the standard normal density."""
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi) if abs(x) < 40 else 0.0


def share(x: float) -> float:
    """Return the standard normal distribution function."""
    return (1 + math.erf(x / math.sqrt(2))) / 2


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_lloyd_levels_are_fixed_points(bits: int) -> None:
    """Each level is the mean of the normal values between the thresholds around it, which lie midway."""
    levels, between = centroids(bits), thresholds(bits)
    assert len(levels) == 2**bits
    np.testing.assert_array_equal(levels, -levels[::-1])
    np.testing.assert_allclose(between, (levels[1:].astype(float) + levels[:-1]) / 2, atol=1e-7)
    edges = [-math.inf, *between.tolist(), math.inf]
    for level, low, high in zip(levels, edges, edges[1:], strict=False):
        mean = (density(low) - density(high)) / (share(high) - share(low))
        assert level == pytest.approx(mean, abs=2e-7)


@pytest.mark.parametrize(("bits", "loss"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_lloyd_distortion_is_that_of_max(bits: int, loss: float) -> None:
    """The mean square error on normal values is what Max (1960) tabulated."""
    x = np.random.default_rng(0).standard_normal((2000, 256)).astype(np.float32)
    ones = np.ones(len(x), np.float32)
    codes = lloyd.encode(x, ones, thresholds(bits))
    out = lloyd.decode(codes, ones, centroids(bits), np.float32)
    assert np.mean((out - x) ** 2) == pytest.approx(loss, rel=0.01)


def test_signs_are_the_same_everywhere() -> None:
    """The signs of a seed are fixed for ever, balanced, and none for seed 0."""
    assert signs(0, 8).tolist() == [1] * 8
    assert signs(1, 16).tolist() == [-1, -1, 1, -1, -1, 1, -1, -1, 1, 1, -1, 1, 1, 1, 1, -1]
    assert abs(signs(1, 4096).sum()) < 200


@pytest.mark.parametrize("scope", ["layer", "", "Token"])
def test_scopes_are_checked(scope: str) -> None:
    """A scope that there is not is refused."""
    with pytest.raises(StrategyError, match="scope: must be one of token, head"):
        AbsMax(bins=16, scope=scope)
    with pytest.raises(StrategyError, match="bits: must be 1 to 4"):
        LloydMax(bits=5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_cachegen_is_what_lmcache_decodes(dtype: torch.dtype) -> None:
    """Bit by bit the values that LMCache 0.5.6 decodes from its own bytes, in fewer bytes, for every layer's bins."""
    keys, values = cache(dtype)
    objects = peers_code.cachegen_encode(keys, values)
    theirs = torch.stack(peers_code.cachegen_decode(objects, dtype))
    nbytes, ours = round_trip("cachegen", keys, values)
    assert torch.equal(ours, theirs)
    assert nbytes < 0.8 * sum(len(data) for data in objects)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lloyd_is_what_tqai_quantises(bits: int) -> None:
    """The levels, and with our rotation put into it the codes and values, of lmcache-turbo-quant-serde's quantiser.

    Its levels come from an iteration that stopped early; ours are the fixed points.
    """
    quantizer = peers_code.polar_quantizer(64, bits)
    np.testing.assert_allclose(centroids(bits), quantizer._centroids.numpy() * 8, atol=1e-3)
    quantizer._centroids = torch.from_numpy(centroids(bits) / 8)
    turn = hadamard.hadamard(np.diag(signs(1, 64)))
    assert turn is not None
    quantizer._rotation = torch.from_numpy(turn.T.copy())
    keys, _ = cache(torch.float16)
    rows = keys.reshape(-1, 64).float()
    indices, norms = quantizer.quantize(rows)
    turned = hadamard.hadamard(rows.numpy() * signs(1, 64))
    assert turned is not None
    scales = lloyd.root_mean_squares(turned, np.float32)
    assert scales is not None
    codes = lloyd.encode(turned, scales, thresholds(bits))
    # in the last place of float32 a value can lie on either side of a threshold
    assert (codes != indices.numpy()).mean() < 1e-4
    np.testing.assert_allclose(scales * 8, norms.numpy()[:, 0], rtol=2**-10)
    theirs = quantizer.dequantize(indices, norms).reshape(SHAPE)
    pipeline = Pipeline.of(PEERS["turboquant-4"])
    if bits == 4:
        ours = pipeline.decode(
            pipeline.encode(keys, keys), shape=SHAPE, dtype=torch.float16
        )[0].float()  # fmt: skip
        error = (ours - theirs).pow(2).sum(-1).sqrt() / keys.float().pow(2).sum(-1).sqrt()
        assert error.median() < 1e-3
        assert error.mean() < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("bits", [3, 4])
def test_lloyd_levels_are_those_of_vllm(bits: int) -> None:
    """The turboquant cache of vLLM computes the same levels, as far as its trapezoids reach."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0])
    file = path / "model_executor" / "layers" / "quantization" / "turboquant" / "centroids.py"
    module = peers_code.load(f"vllm_centroids_{bits}", file)
    theirs = module.solve_lloyd_max(64, bits)[0].numpy() * 8
    np.testing.assert_allclose(centroids(bits), theirs, atol=2e-3)


def test_escape_takes_twelve_bits() -> None:
    """A bfloat16 value takes 12 bits, and what escapes cost is what the list says: 24 bits each."""
    keys, values = cache()
    nbytes, ours = round_trip("splitzip", keys, values)
    assert torch.equal(ours, torch.stack([keys, values]))
    escapes = 0
    for x in (keys, values):
        exponents = x.contiguous().view(torch.int16).numpy().view(np.uint16) >> 7 & 255
        escapes += int(np.sort(np.bincount(exponents.reshape(-1), minlength=256))[:-16].sum())
    fixed = 2 * keys.numel() * 12 // 8
    assert 0 < escapes < keys.numel() // 100
    assert fixed + 3 * escapes <= nbytes <= fixed + 3 * escapes + 200


def test_vllm_turboquant_leaves_the_ends_alone() -> None:
    """Two layers at each end come back bit by bit, those between do not."""
    keys, values = cache()
    _, ours = round_trip("turboquant-4-vllm", keys, values)
    for native, restored in zip((keys, values), ours, strict=True):
        same = (native == restored).flatten(1).all(1)
        assert same.tolist() == [True, True, *[False] * 8, True, True]
