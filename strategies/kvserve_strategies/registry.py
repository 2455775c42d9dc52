"""The stages that exist, by id; an id is never replaced, and nothing is ever imported by name."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeVar

from kvserve_api.errors import StrategyError
from kvserve_api.fields import Fields
from kvserve_api.strategy import StageConfig
from kvserve_strategies.stage import Stage

T = TypeVar("T", bound=type[Stage])

_STAGES: dict[str, type[Stage]] = {}
STAGES: Mapping[str, type[Stage]] = MappingProxyType(_STAGES)
"""Every registered stage by its id."""


def register(stage: T) -> T:
    """Add a stage; used as a decorator of its class.

    Raises:
        StrategyError: The id is taken, or is not ``<role>.<name>.v<version>``.
    """
    parts = stage.id.split(".")
    if len(parts) != 3 or parts[0] != stage.role or not parts[2].removeprefix("v").isdigit():
        raise StrategyError("id", f"must be {stage.role}.<name>.v<version>, got {stage.id!r}")
    if stage.id in _STAGES:
        raise StrategyError("id", f"{stage.id!r} is taken by {_STAGES[stage.id].__name__}")
    _STAGES[stage.id] = stage
    return stage


def make_stage(config: StageConfig, path: str) -> Stage:
    """Return the stage that a configuration describes.

    Args:
        config: Id and parameters.
        path: Where it stands in its document, for errors.

    Raises:
        StrategyError: The id or a parameter is not known, or a parameter is out of range.
    """
    stage = _STAGES.get(config.id)
    if stage is None:
        known = ", ".join(sorted(_STAGES))
        raise StrategyError(f"{path}.id", f"{config.id!r} is no known stage; known: {known}")
    params = Fields(dict(config.params), path, error=StrategyError)
    made = stage.parse(params)
    params.done()
    return made
