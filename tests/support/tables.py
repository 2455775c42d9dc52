"""Decision tables of real strategies, for tests of the pod's side."""

from typing import Any

from kvserve_api.latency import StageCost
from kvserve_api.policy import Goal, Mode
from kvserve_api.table import Candidate, ClassRule, DecisionTable, OnControllerLoss, Version
from kvserve_strategies import PRESETS

RATIOS = {"none": 1.0, "lossless": 1.4, "int8-token": 1.9, "int4-token": 3.6}


def candidate(name: str, *, bytes_per_s: float = 1e9, **changes: Any) -> Candidate:
    """Return the candidate of a preset."""
    values: dict[str, Any] = {
        "name": name,
        "strategy": PRESETS[name],
        "ratio": RATIOS[name],
        "loss_upper_bp": 20.0 * (RATIOS[name] - 1),
        "encode": StageCost(bytes_per_s=20e9 if name == "none" else bytes_per_s),
        "decode": StageCost(bytes_per_s=20e9 if name == "none" else bytes_per_s),
    }
    return Candidate(**(values | changes))


def table(*names: str, counter: int = 1, **changes: Any) -> DecisionTable:
    """Return a table with candidates of these names, by default of four usual ones."""
    chosen = names or tuple(RATIOS)
    pinned = changes.get("pinned")
    values: dict[str, Any] = {
        "version": Version(epoch=1, counter=counter),
        "policy": "default/chat",
        "mode": Mode.ACTIVE if pinned is None else Mode.PINNED,
        "candidates": {name: candidate(name) for name in chosen},
        "rules": {"default": ClassRule(goal=Goal.MINIMIZE_LATENCY, candidates=chosen)},
        "pinned": None,
        "fallback": "none",
        "ttl_s": 30.0,
        "on_controller_loss": OnControllerLoss.HOLD_LAST_GOOD,
        "prior_bytes_per_s": 125e6,
    }
    return DecisionTable(**(values | changes))
