"""The model that a policy is for, and where its files are."""

from dataclasses import dataclass
from typing import Self

from kvserve_api.fields import Fields


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """A model folder on a PersistentVolumeClaim."""

    claim_name: str
    path: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """The model a policy is for.

    Attributes:
        name: Hub id, or any name if ``source`` is given; what vLLM serves.
        revision: Revision on the hub, or empty.
        source: Where the files are; None for the hub.
    """

    name: str
    revision: str
    source: ModelSource | None

    @classmethod
    def read(cls, fields: Fields) -> Self:
        """Read the model."""
        source = None
        if fields.has("source"):
            wrapper = fields.child("source")
            claim = wrapper.child("pvc")
            source = ModelSource(
                claim_name=claim.string("claimName", min_length=1, max_length=253),
                path=claim.string("path", "", max_length=1024),
            )
            claim.done()
            wrapper.done()
        model = cls(
            name=fields.string("name", min_length=1, max_length=512),
            revision=fields.string("revision", "", max_length=128),
            source=source,
        )
        fields.ignore("source")
        fields.done()
        return model
