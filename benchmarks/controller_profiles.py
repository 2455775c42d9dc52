"""The sets of profiles that the controller's benchmark decides between.

*cpu*: our own codecs on SmolLM2-135M, as ``make bench-codec`` measured them (one core with AVX-512, real texts). *gpu*:
the paper's pipelines with the compression ratios and relative accuracies of its profiles (Qwen2.5-32B and Qwen2.5-7B)
and the speeds of its components on an H100 (Llama-3.1-8B at 4k, 16k and 32k tokens), all from its public artefact.
There a profile's loss is 100 less its relative accuracy, in per cent, since no confidence limits are published.
*serving*: the presets on SmolLM2-135M as ``make bench-pd`` measured them for its engines.
"""

import math
from dataclasses import dataclass
from typing import Final

from kvserve_api.latency import StageCost
from kvserve_api.profile_set import ModelIdentity, ParetoSet, Profile
from kvserve_api.strategy import Kind, Part, StageConfig, StrategyConfig

MODEL: Final = "bench/replay"
GIB: Final = float(1 << 30)
MB: Final = 1e6

CPU: Final = (
    # name, ratio, KL mean, KL of the worst of three texts, encode MB/s, decode MB/s
    ("none", 1.0, 0.0, 0.0, 3171, 4962),
    ("splitzip", 1.33, 0.0, 0.0, 1039, 2181),
    ("lossless", 1.52, 0.0, 0.0, 484, 670),
    ("int8-vllm", 1.94, 0.00008, 0.00008, 963, 3726),
    ("kivi-4", 3.56, 0.00522, 0.00602, 654, 1485),
    ("centred-rans-fine", 4.76, 0.00257, 0.00283, 286, 575),
    ("centred-rans", 5.98, 0.00681, 0.00755, 303, 621),
    ("cachegen", 5.92, 0.03860, 0.04904, 298, 718),
    ("centred-rans-coarse", 7.66, 0.02017, 0.02170, 290, 607),
)
CPU_DEFAULT: Final = "kivi-4"

SERVING: Final = (
    # name, ratio, loss and its upper limit in basis points, ms and MB/s to encode, ms and MB/s to decode
    ("focus-3", 16.96, 45.11, 58.87, 18.0, 281, 13.7, 437),
    ("joint-10", 14.31, 63.59, 82.72, 21.7, 380, 18.9, 438),
    ("focus-3-fine", 11.37, 16.21, 21.26, 31.1, 174, 20.9, 218),
    ("joint-3", 10.29, 38.13, 51.00, 10.6, 1040, 8.4, 996),
    ("joint-layer", 8.44, 62.53, 88.32, 1.7, 1461, 1.5, 1211),
    ("joint-3-fine", 8.13, 17.71, 24.85, 10.2, 923, 7.8, 851),
    ("int8-token", 1.88, 0.39, 0.56, 0.1, 426, 0.2, 903),
    ("lossless", 1.52, 0.0, 0.0, 2.2, 552, 1.0, 1272),
    ("none", 1.0, 0.0, 0.0, 0.1, 2967, 0.1, 5934),
)
SERVING_DEFAULT: Final = "focus-3-fine"


@dataclass(frozen=True, slots=True)
class Component:
    """One kernel of the paper's pipelines: ``max(floor, V / speed)``, both ways."""

    encode_floor_s: float
    encode_bytes_per_s: float
    decode_floor_s: float
    decode_bytes_per_s: float


COMPONENTS: Final = {
    "hadamard": Component(0.0, 130 * GIB, 0.0, 165 * GIB),
    "quantiser": Component(9.6e-3, 84 * GIB, 3.9e-3, 165 * GIB),
    "layers": Component(6.0e-3, 99 * GIB, 3.0e-3, 177 * GIB),
    "ans": Component(1.0e-3, 216 * GIB, 1.1e-3, 254 * GIB),
    "bitcomp": Component(0.6e-3, 319 * GIB, 1.0e-3, 272 * GIB),
}
GPU: Final = (
    # name, ratio, relative accuracy in per cent, components
    ("none", 1.0, 100.0, ()),
    ("layers-bitcomp", 3.75, 98.5, ("layers", "bitcomp")),
    ("layers-ans", 4.45, 98.5, ("layers", "ans")),
    ("heads-3-bitcomp", 6.24, 100.0, ("quantiser", "bitcomp")),
    ("heads-7-bitcomp", 6.92, 97.57, ("quantiser", "bitcomp")),
    ("heads-3-ans", 9.19, 100.0, ("quantiser", "ans")),
    ("heads-7-ans", 10.17, 97.57, ("quantiser", "ans")),
    ("hadamard-1-ans", 10.63, 100.0, ("hadamard", "quantiser", "ans")),
    ("hadamard-9-ans", 11.59, 96.13, ("hadamard", "quantiser", "ans")),
)
GPU_DEFAULT: Final = "layers-bitcomp"
"""The paper's static curve is 0.155 s + 8.22 Gbit / B: a ratio of 3.6 of the 29.4 Gbit of its Qwen-32B prompts."""


def cpu() -> ParetoSet:
    """Return the set of our own codecs on a CPU."""
    return _set(
        "cpu-avx512",
        [
            _profile(
                name,
                ratio,
                math.expm1(kl) * 1e4,
                math.expm1(worst) * 1e4,
                StageCost(bytes_per_s=encode * MB),
                StageCost(bytes_per_s=decode * MB),
            )
            for name, ratio, kl, worst, encode, decode in CPU
        ],
    )


def gpu() -> ParetoSet:
    """Return the set of the paper's pipelines on an H100."""
    profiles = []
    for name, ratio, accuracy, parts in GPU:
        kernels = [COMPONENTS[part] for part in parts]
        loss_bp = (100.0 - accuracy) * 100
        profiles.append(
            _profile(
                name,
                ratio,
                loss_bp,
                loss_bp,
                _chain([(k.encode_floor_s, k.encode_bytes_per_s) for k in kernels]),
                _chain([(k.decode_floor_s, k.decode_bytes_per_s) for k in kernels]),
            )
        )
    return _set("h100", profiles)


def serving() -> ParetoSet:
    """Return the set of the presets as they are served."""
    return _set(
        "cpu-avx512",
        [
            _profile(
                name,
                ratio,
                loss_bp,
                upper_bp,
                StageCost(offset_s=encode_ms / 1e3, bytes_per_s=encode * MB),
                StageCost(offset_s=decode_ms / 1e3, bytes_per_s=decode * MB),
            )
            for name, ratio, loss_bp, upper_bp, encode_ms, encode, decode_ms, decode in SERVING
        ],
    )


def _chain(kernels: list[tuple[float, float]]) -> StageCost:
    """Return the cost of kernels one after the other."""
    if not kernels:
        return StageCost()
    return StageCost(
        floor_s=sum(floor_s for floor_s, _ in kernels),
        bytes_per_s=1 / sum(1 / speed for _, speed in kernels),
    )


def _profile(
    name: str,
    ratio: float,
    loss_bp: float,
    loss_upper_bp: float,
    encode: StageCost,
    decode: StageCost,
) -> Profile:
    chain = (StageConfig(id=f"code.{name}.v1"),)
    return Profile(
        name=name,
        strategy=StrategyConfig(parts=tuple(Part(kind=kind, chain=chain) for kind in Kind)),
        ratio=ratio,
        loss_bp=loss_bp,
        loss_upper_bp=loss_upper_bp,
        encode=encode,
        decode=decode,
        lossless=loss_upper_bp == 0,
    )


def _set(device: str, profiles: list[Profile]) -> ParetoSet:
    ordered = tuple(sorted(profiles, key=lambda profile: -profile.ratio))
    return ParetoSet(
        model=ModelIdentity(name=MODEL, revision="", fingerprint="sha256:" + "0" * 64),
        device=device,
        classes={"default": ordered},
    )
