"""What every Kubernetes object has, as far as decisions need it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from kvserve_api.names import ANNOTATION_INPUTS, LABEL_POLICY

MAX_TEXT: Final = 512
"""Most characters of a text from elsewhere that facts keep."""
JsonObject = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Meta:
    """What every object has.

    Attributes:
        namespace: Its namespace.
        name: Its name.
        uid: Its identity; a new object of the same name has another.
        version: Grows with each change, over all objects.
        created: Creation time, in RFC 3339; such times of one cluster compare as strings.
        deleting: It is on its way out.
        policy: The policy's name, from the label; empty if it has none.
        owner_uid: The uid of the KVServePolicy that owns it, or empty.
        inputs_digest: Digest of the inputs of the run it belongs to, or empty.
    """

    namespace: str
    name: str
    uid: str
    version: int = 0
    created: str = ""
    deleting: bool = False
    policy: str = ""
    owner_uid: str = ""
    inputs_digest: str = ""

    @classmethod
    def read(cls, value: JsonObject) -> Self:
        """Read the metadata of an object."""
        metadata = value["metadata"]
        owners = metadata.get("ownerReferences") or []
        return cls(
            namespace=metadata.get("namespace", ""),
            name=metadata["name"],
            uid=metadata.get("uid", ""),
            version=int(metadata.get("resourceVersion") or 0),
            created=metadata.get("creationTimestamp") or "",
            deleting=metadata.get("deletionTimestamp") is not None,
            policy=(metadata.get("labels") or {}).get(LABEL_POLICY, ""),
            owner_uid=next((o["uid"] for o in owners if o.get("kind") == "KVServePolicy"), ""),
            inputs_digest=(metadata.get("annotations") or {}).get(ANNOTATION_INPUTS, ""),
        )
