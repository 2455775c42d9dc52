"""What a pod is told of its KV store: the ``store`` object of ``kv_connector_extra_config``."""

from dataclasses import dataclass
from typing import Self

from kvserve_api.fields import Fields
from kvserve_connector.stores.keys import CHUNK_TOKENS, STEP_TOKENS
from kvserve_strategies import PRESETS, Pipeline, preset


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreConfig:
    """The settings of one KV store.

    Attributes:
        url: See `kvserve_connector.stores.url.open_kv_store`.
        max_bytes: Most bytes of a folder.
        ttl_s: Seconds after which a value has expired.
        timeout_s: Most seconds of one value.
        lookup_s: Most seconds that a request waits to hear whether its prompt is there.
        profile: Preset that every value is coded with; None leaves it to the decision table, and stores values as they
            are without one.
        weights: Name of the weights, the same for all pods that share prefixes; None takes a digest of the model's
            files.
        chunk_tokens: Tokens of a chunk; pods that share prefixes must agree on it.
        save: Whether prefixes that are computed here are stored.
        recompute: Whether a prefix is computed where that is faster; False fetches whatever is there.

    Raises:
        SpecError: A setting is out of range.
    """

    url: str
    max_bytes: int = 10 << 30
    ttl_s: float = 86_400.0
    timeout_s: float = 10.0
    lookup_s: float = 1.0
    profile: str | None = None
    weights: str | None = None
    chunk_tokens: int = CHUNK_TOKENS
    save: bool = True
    recompute: bool = True

    @classmethod
    def from_json(cls, fields: Fields) -> Self:
        """Read the settings.

        Raises:
            SpecError: A setting is missing, unknown, of the wrong type or out of range.
        """
        config = cls(
            url=fields.string("url", min_length=1, max_length=2048),
            max_bytes=fields.integer("max_bytes", 10 << 30, minimum=1 << 20, maximum=1 << 60),
            ttl_s=fields.number("ttl_s", 86_400.0, minimum=1, maximum=1e9),
            timeout_s=fields.number("timeout_s", 10.0, minimum=0.05, maximum=600),
            lookup_s=fields.number("lookup_s", 1.0, minimum=0.01, maximum=60),
            profile=fields.string("profile", None, max_length=64),
            weights=fields.string("weights", None, min_length=1, max_length=512),
            chunk_tokens=fields.integer("chunk_tokens", CHUNK_TOKENS, minimum=32, maximum=4096),
            save=fields.boolean("save", True),
            recompute=fields.boolean("recompute", True),
        )
        if config.chunk_tokens % STEP_TOKENS:
            raise fields.fail("chunk_tokens", f"must be a multiple of {STEP_TOKENS}")
        if config.profile is not None:
            if config.profile not in PRESETS:
                raise fields.fail("profile", f"must be one of {', '.join(PRESETS)}")
            if Pipeline.of(preset(config.profile)).calibrated:
                raise fields.fail(
                    "profile", "needs a calibration bundle: let the decision table name it"
                )
        fields.done()
        return config


def read_store(fields: Fields) -> StoreConfig | None:
    """Return the settings below ``store``; None without any.

    Raises:
        SpecError: They are wrong.
    """
    return StoreConfig.from_json(fields.child("store")) if fields.has("store") else None
