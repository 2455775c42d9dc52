"""What the operator knows of Pareto ConfigMaps, whose documents have hundreds of KiB."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from kvserve_api.canonical import digest_bytes
from kvserve_api.errors import KVServeError
from kvserve_api.names import ANNOTATION_DIGEST
from kvserve_api.profile_set import CONFIGMAP_KEY, NONE, ParetoSet
from kvserve_api.quality import TaskScore
from kvserve_operator.meta import MAX_TEXT, JsonObject, Meta


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileFacts:
    """What a profile of a Pareto set may lose.

    Attributes:
        name: Its name.
        loss_upper_bp: Upper limit of the growth of perplexity, in basis points.
        lossless: It changes nothing.
        tasks: Its answers to tasks.
    """

    name: str
    loss_upper_bp: float
    lossless: bool = False
    tasks: Mapping[str, TaskScore] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class SetFacts:
    """A Pareto ConfigMap.

    Attributes:
        meta: Its metadata.
        digest: Digest of its document.
        problem: Why it must not be used, or empty.
        model: The model it was measured on.
        losses: For each workload class what the profiles but ``none`` may lose.
        profiles: How many different profiles it holds, ``none`` included.
    """

    meta: Meta
    digest: str = ""
    problem: str = ""
    model: str = ""
    losses: Mapping[str, tuple[ProfileFacts, ...]] = field(default_factory=dict)
    profiles: int = 0

    @classmethod
    def read(cls, value: JsonObject) -> Self:
        """Read and check a Pareto ConfigMap."""
        meta = Meta.read(value)
        document = (value.get("data") or {}).get(CONFIGMAP_KEY)
        if document is None:
            return cls(meta=meta, problem=f"has no key {CONFIGMAP_KEY}")
        digest = digest_bytes(document.encode())
        named = (value["metadata"].get("annotations") or {}).get(ANNOTATION_DIGEST, "")
        if named != digest:
            return cls(meta=meta, problem=f"was changed: its document's digest is {digest}")
        try:
            pareto = ParetoSet.parse(document.encode())
        except KVServeError as error:
            return cls(meta=meta, problem=str(error)[:MAX_TEXT])
        losses = {
            name: tuple(
                ProfileFacts(
                    name=p.name, loss_upper_bp=p.loss_upper_bp, lossless=p.lossless, tasks=p.tasks
                )
                for p in profiles
                if p.name != NONE
            )
            for name, profiles in pareto.classes.items()
        }
        return cls(
            meta=meta,
            digest=digest,
            model=pareto.model.name,
            losses=losses,
            profiles=len({p.name for profiles in pareto.classes.values() for p in profiles}),
        )
