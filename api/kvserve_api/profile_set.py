"""The Pareto set: strategies with what was measured of them, as one immutable document.

The profiler writes it, as canonical JSON in an immutable ConfigMap or a file; the controller reads it. It always
contains the profile ``none``. Its identity is the digest of its canonical JSON.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

from kvserve_api.canonical import canonical_json, digest_bytes
from kvserve_api.errors import ArtifactError
from kvserve_api.fields import Fields
from kvserve_api.latency import StageCost
from kvserve_api.quality import TaskScore
from kvserve_api.strategy import StrategyConfig

SCHEMA: Final = "kvserve.io/pareto/v1"
NONE: Final = "none"
"""The name of the profile that sends the KV cache as it is."""
DEFAULT_CLASS: Final = "default"
"""The workload class of requests that name none."""
CONFIGMAP_KEY: Final = "pareto.json"
MAX_BYTES: Final = 900 * 1024
"""A larger document is refused, never truncated: a ConfigMap holds 1 MiB."""
MAX_PROFILES: Final = 64
NAME_PATTERN: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """A strategy with what was measured of it for one model and workload class.

    Attributes:
        name: Unique in its set; a DNS label.
        strategy: What it does.
        ratio: Native bytes over wire bytes, headers and checksums included.
        loss_bp: Expected quality loss, ``exp(mean KL) - 1``, in basis points.
        loss_upper_bp: Its upper confidence limit; what budgets are compared with.
        encode: Cost of encoding, in native bytes.
        decode: Cost of decoding, in native bytes.
        lossless: The decoded KV equals the native KV bit by bit.
        bundle: Digest of the calibration bundle it needs, or None.
        tasks: What it does to the answers of the class's tasks, by the task's name.
    """

    name: str
    strategy: StrategyConfig
    ratio: float
    loss_bp: float
    loss_upper_bp: float
    encode: StageCost
    decode: StageCost
    lossless: bool
    bundle: str | None = None
    tasks: Mapping[str, TaskScore] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not NAME_PATTERN.fullmatch(self.name):
            raise ArtifactError("name", f"must be a DNS label, got {self.name!r}")
        if not 0 < self.ratio < 1e6:
            raise ArtifactError("ratio", f"must be positive, got {self.ratio}")
        if not 0 <= self.loss_bp <= self.loss_upper_bp:
            raise ArtifactError("loss_upper_bp", "must not be below loss_bp, which is not below 0")

    def to_json(self) -> dict[str, Any]:
        """Return the profile as an object."""
        value: dict[str, Any] = {
            "name": self.name,
            "strategy": self.strategy.to_json(),
            "strategy_digest": self.strategy.digest,
            # an int would be read back as a float, and the document's digest would not be the set's
            "ratio": float(self.ratio),
            "loss_bp": float(self.loss_bp),
            "loss_upper_bp": float(self.loss_upper_bp),
            "encode": self.encode.to_json(),
            "decode": self.decode.to_json(),
            "lossless": self.lossless,
        }
        if self.bundle is not None:
            value["bundle"] = self.bundle
        if self.tasks:
            value["tasks"] = {name: score.to_json() for name, score in self.tasks.items()}
        return value

    @classmethod
    def from_json(cls, fields: Fields) -> Self:
        """Read a profile and check that the strategy is the one its digest names."""
        strategy = StrategyConfig.from_json(fields.mapping("strategy"), fields.at("strategy"))
        if fields.string("strategy_digest", max_length=80) != strategy.digest:
            raise fields.fail("strategy_digest", f"does not match the strategy, {strategy.digest}")
        tasks = fields.child("tasks", {})
        profile = cls(
            name=fields.string("name", max_length=63),
            strategy=strategy,
            ratio=fields.number("ratio", minimum=1e-3),
            loss_bp=fields.number("loss_bp", minimum=0),
            loss_upper_bp=fields.number("loss_upper_bp", minimum=0),
            encode=StageCost.from_json(fields.child("encode")),
            decode=StageCost.from_json(fields.child("decode")),
            lossless=fields.boolean("lossless"),
            bundle=fields.string("bundle", None, max_length=80),
            tasks={name: TaskScore.from_json(tasks.child(name)) for name in tasks.mapping_of()},
        )
        fields.done()
        return profile


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelIdentity:
    """Which model a set was measured on.

    Attributes:
        name: As the policy names it.
        revision: As the policy names it, or empty.
        fingerprint: Digest of what decides the meaning of a KV cache: architecture, layers, heads, head size, RoPE,
            dtype.
    """

    name: str
    revision: str
    fingerprint: str

    def to_json(self) -> dict[str, Any]:
        """Return the identity as an object."""
        return {"name": self.name, "revision": self.revision, "fingerprint": self.fingerprint}

    @classmethod
    def from_json(cls, fields: Fields) -> Self:
        """Read an identity."""
        identity = cls(
            name=fields.string("name", max_length=512),
            revision=fields.string("revision", "", max_length=128),
            fingerprint=fields.string("fingerprint", max_length=80),
        )
        fields.done()
        return identity


@dataclass(frozen=True, kw_only=True, slots=True)
class ParetoSet:
    """The profiles of one model, for each workload class those that no other beats in ratio, loss and codec time.

    Attributes:
        model: What it was measured on.
        device: Kind of device the costs were measured on, like ``cpu-avx512``.
        classes: For each workload class its profiles, by falling ratio; each list contains ``none``.
        provenance: How it was made: seed, texts, tool versions, times; free-form JSON, for people.
    """

    model: ModelIdentity
    device: str
    classes: Mapping[str, tuple[Profile, ...]]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if DEFAULT_CLASS not in self.classes:
            raise ArtifactError("classes", f"must hold the class {DEFAULT_CLASS!r}")
        for name, profiles in self.classes.items():
            names = [profile.name for profile in profiles]
            if NONE not in names or len(set(names)) != len(names):
                raise ArtifactError(
                    f"classes.{name}", f"must hold {NONE!r} and unique names, got {names}"
                )

    def profiles(self, workload_class: str) -> tuple[Profile, ...]:
        """Return the profiles of a class; those of ``default`` for a class that was not measured."""
        return self.classes.get(workload_class, self.classes[DEFAULT_CLASS])

    def canonical(self) -> bytes:
        """Return the document.

        Raises:
            ArtifactError: It would exceed ``MAX_BYTES``.
        """
        document = canonical_json(
            {
                "schema": SCHEMA,
                "model": self.model.to_json(),
                "device": self.device,
                "classes": {
                    name: [profile.to_json() for profile in profiles]
                    for name, profiles in self.classes.items()
                },
                "provenance": dict(self.provenance),
            }
        )
        if len(document) > MAX_BYTES:
            raise ArtifactError(
                "document", f"has {len(document)} bytes, more than {MAX_BYTES}: keep fewer profiles"
            )
        return document

    @property
    def digest(self) -> str:
        """The digest of the document."""
        return digest_bytes(self.canonical())

    @classmethod
    def parse(cls, document: bytes) -> Self:
        """Read a document.

        Raises:
            ArtifactError: It is too large, not JSON, of another schema, or inconsistent.
        """
        if len(document) > MAX_BYTES:
            raise ArtifactError("document", f"has more than {MAX_BYTES} bytes")
        try:
            value = json.loads(document)
        except (ValueError, RecursionError) as error:
            raise ArtifactError("document", f"is not JSON: {error}") from error
        fields = Fields(value, error=ArtifactError)
        fields.string("schema", choices=[SCHEMA])
        classes = fields.child("classes")
        pareto_set = cls(
            model=ModelIdentity.from_json(fields.child("model")),
            device=fields.string("device", max_length=128),
            classes={
                name: tuple(
                    Profile.from_json(profile)
                    for profile in classes.children(name, max_items=MAX_PROFILES)
                )
                for name in classes.mapping_of()
            },
            provenance=fields.mapping("provenance", {}),
        )
        fields.done()
        return pareto_set
