"""Small valid policies and Pareto sets for tests; every argument changes one thing."""

import copy
from typing import Any

from kvserve_api.latency import StageCost
from kvserve_api.profile_set import NONE, ModelIdentity, ParetoSet, Profile
from kvserve_api.strategy import Kind, Part, StageConfig, StrategyConfig

MODEL = "test/model"
FINGERPRINT = "sha256:" + "ab" * 32


def strategy(name: str) -> StrategyConfig:
    """Return a strategy of one made-up stage; another name is another strategy."""
    chain = (StageConfig(id=f"code.{name}.v1"),)
    return StrategyConfig(parts=tuple(Part(kind=kind, chain=chain) for kind in Kind))


def profile(
    name: str,
    *,
    ratio: float = 1.0,
    loss_bp: float = 0.0,
    upper_bp: float | None = None,
    encode_bytes_per_s: float = 1e9,
    decode_bytes_per_s: float = 1e9,
) -> Profile:
    """Return a profile."""
    return Profile(
        name=name,
        strategy=strategy(name),
        ratio=ratio,
        loss_bp=loss_bp,
        loss_upper_bp=loss_bp if upper_bp is None else upper_bp,
        encode=StageCost(bytes_per_s=encode_bytes_per_s),
        decode=StageCost(bytes_per_s=decode_bytes_per_s),
        lossless=loss_bp == 0,
    )


RAW = profile(NONE, encode_bytes_per_s=20e9, decode_bytes_per_s=20e9)
INT8 = profile("int8", ratio=1.9, loss_bp=4, encode_bytes_per_s=2e9, decode_bytes_per_s=2e9)
INT4 = profile(
    "int4", ratio=3.6, loss_bp=40, upper_bp=60, encode_bytes_per_s=1e9, decode_bytes_per_s=1e9
)
RANS = profile(
    "rans", ratio=6.0, loss_bp=50, upper_bp=80, encode_bytes_per_s=1e8, decode_bytes_per_s=1e8
)


def pareto(*profiles: Profile, model: str = MODEL, **classes: tuple[Profile, ...]) -> ParetoSet:
    """Return a set of the given profiles, or of four usual ones."""
    return ParetoSet(
        model=ModelIdentity(name=model, revision="", fingerprint=FINGERPRINT),
        device="cpu",
        classes={"default": profiles or (RANS, INT4, INT8, RAW), **classes},
    )


def policy_object(name: str = "chat", *, namespace: str = "default", **spec: Any) -> dict[str, Any]:
    """Return a KVServePolicy object; keywords replace parts of its spec."""
    base: dict[str, Any] = {
        "model": {"name": MODEL},
        "targets": [
            {"role": role, "selector": {"matchLabels": {"app": f"{name}-{role.lower()}"}}}
            for role in ("Prefill", "Decode")
        ],
        "quality": {"maxLossBasisPoints": 100},
    }
    return {
        "apiVersion": "kvserve.io/v1alpha1",
        "kind": "KVServePolicy",
        "metadata": {"name": name, "namespace": namespace},
        "spec": copy.deepcopy(base | spec),
    }
