"""The same input gives the same bytes, on every instruction set and from many threads at once."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tests.strategies.calibrated import CALIBRATED_CONFIGS
from tests.strategies.laws import CONFIGS, bits, sample

from bundles import small_cache, write_small_bundle
from kvserve_kernels.native import Simd, coder
from kvserve_strategies import Pipeline
from kvserve_strategies.bundle import Bundle
from kvserve_strategies.registry import STAGES
from kvserve_strategies.stage import Role

# tokens enough for more than one stream of a coder, and for what does not fill a register
TOKENS = 1_237
PLAIN = (
    "none",
    "lossless",
    "int4-token",
    "centred-rans",
    "stage:escape",
    "stage:token-ladder",
    "stage:step-ladder",
    "stage:hadamard-lloyd",
    "stage:predict",
)
CALIBRATED = pytest.mark.parametrize(
    "name",
    ["joint-2x0-even", "apart-1x1-centred", "sinks", "grid-rans", "metric-token", "importance"],
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return the small model's bundle."""
    return write_small_bundle(tmp_path_factory.mktemp("bundle") / "small")


def choices() -> list[str]:
    """Return who can do the work on this machine."""
    library = coder()
    widest = Simd.NUMBA if library is None else library.kvserve_widest()
    return [level.name.lower() for level in Simd if level <= widest]


def check_instruction_sets(
    pipeline: Pipeline,
    keys: torch.Tensor,
    values: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Check that all instruction sets write one payload, and read it alike."""
    shape = (keys.shape[0], keys.shape[1], keys.shape[2], keys.shape[3])
    payloads, decoded = [], []
    for simd in choices():
        monkeypatch.setenv("KVSERVE_SIMD", simd)
        payloads.append(bytes(pipeline.encode(keys, values)))
        decoded.append(pipeline.decode(payloads[0], shape=shape, dtype=keys.dtype))
    assert payloads == payloads[:1] * len(payloads)
    first = decoded[0]
    for halves in decoded[1:]:
        for one, other in zip(halves, first, strict=True):
            if not pipeline.calibrated:
                np.testing.assert_array_equal(bits(one), bits(other))
            # a calibrated transform is a sum, and its order is the processor's
            scale = float(other.double().square().mean().sqrt())
            difference = float((one.double() - other.double()).abs().max())
            assert difference <= 2.0**-7 * max(scale, float(other.double().abs().max()))


def test_every_coder_is_among_them() -> None:
    """A coder that these tests do not run fails here."""
    coders = {id_ for id_, stage in STAGES.items() if stage.role == Role.CODE}
    assert coders == {part.chain[-1].id for name in PLAIN for part in CONFIGS[name].parts}


@pytest.mark.parametrize("name", PLAIN)
def test_instruction_sets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without calibration bytes and values are equal on all instruction sets."""
    keys, values = (sample("gauss", seed, (3, TOKENS, 2, 24), torch.bfloat16) for seed in (1, 2))
    check_instruction_sets(Pipeline.of(CONFIGS[name]), keys, values, monkeypatch)


@CALIBRATED
def test_instruction_sets_calibrated(
    name: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With calibration bytes are equal on all instruction sets, values to the last place of bfloat16."""
    pipeline = Pipeline.of(CALIBRATED_CONFIGS[name], bundle)
    check_instruction_sets(pipeline, *small_cache(1, TOKENS, torch.bfloat16), monkeypatch)


@CALIBRATED
def test_threads_calibrated(name: str, bundle: Bundle) -> None:
    """Many threads at once, with plans not made before, get the bytes and values that one gets."""
    shape = (5, 90, 2, 8)
    inputs = [small_cache(seed, 90, torch.bfloat16) for seed in range(8)]
    pipeline = Pipeline(CALIBRATED_CONFIGS[name], bundle)

    def work(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[bytes, torch.Tensor]:
        payload = bytes(pipeline.encode(*pair))
        return payload, torch.stack(
            pipeline.decode(bytearray(payload), shape=shape, dtype=torch.bfloat16)
        )

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, inputs))
    for pair, (payload, restored) in zip(inputs, together, strict=True):
        alone = work(pair)
        assert payload == alone[0]
        np.testing.assert_array_equal(bits(restored), bits(alone[1]))
