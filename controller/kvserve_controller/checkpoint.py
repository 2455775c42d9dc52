"""What the controller has learned, as a compact document that survives it.

Only learning is kept: policies, Pareto sets and pods are read anew. A document that is damaged, too large or of another
form is refused; learning then starts anew, from the profiles.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvserve_api.canonical import canonical_json, digest
from kvserve_api.errors import ArtifactError, SpecError
from kvserve_api.fields import Fields
from kvserve_api.table import Version
from kvserve_controller.forecast import Forecast
from kvserve_controller.learn import Learner
from kvserve_controller.versions import MAX_EPOCH

SCHEMA: Final = "kvserve.io/controller-state/v1"
MAX_BYTES: Final = 16 << 20
MAX_POLICIES: Final = 4096


@dataclass(frozen=True, slots=True)
class Saved:
    """What was learned for one policy.

    Attributes:
        pareto_digest: Of the set whose profiles it is about.
        learner: The corrections.
        forecast: The predictions.
    """

    pareto_digest: str
    learner: Learner
    forecast: Forecast


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a controller knew at a time.

    Attributes:
        wall_s: When, in seconds since 1970.
        version: The last version it handed out.
        policies: What was learned, by policy.
    """

    wall_s: float
    version: Version
    policies: Mapping[str, Saved]

    def document(self) -> bytes:
        """Return it as canonical JSON, with a digest of the rest.

        Raises:
            ArtifactError: It would be too large to be read again.
        """
        value: dict[str, Any] = {
            "schema": SCHEMA,
            "wall_s": self.wall_s,
            "version": str(self.version),
            "policies": {
                key: {
                    "pareto": saved.pareto_digest,
                    "learner": saved.learner.to_json(),
                    "forecast": saved.forecast.to_json(),
                }
                for key, saved in self.policies.items()
            },
        }
        document = canonical_json(value | {"digest": digest(value)})
        if len(document) > MAX_BYTES:
            raise ArtifactError("state", f"has {len(document)} bytes, more than {MAX_BYTES}")
        return document

    @classmethod
    def parse(cls, document: bytes) -> "Checkpoint":
        """Read a document.

        Raises:
            ArtifactError: It is damaged, too large or of another form.
        """
        if len(document) > MAX_BYTES:
            raise ArtifactError("state", f"has more than {MAX_BYTES} bytes")
        try:
            value = json.loads(document)
        except (ValueError, RecursionError) as error:
            raise ArtifactError("state", f"is not JSON: {error}") from error
        fields = Fields(value, "state", error=ArtifactError)
        fields.string("schema", choices=[SCHEMA])
        rest = {key: item for key, item in value.items() if key != "digest"}
        try:
            whole = fields.string("digest", max_length=80) == digest(rest)
        except (ValueError, RecursionError) as error:
            raise ArtifactError("state", f"is damaged: {error}") from error
        if not whole:
            raise ArtifactError("state.digest", "is not that of the rest: the file is damaged")
        policies = fields.child("policies")
        keys = list(policies.mapping_of())
        if len(keys) > MAX_POLICIES:
            raise ArtifactError("state.policies", f"are {len(keys)}, more than {MAX_POLICIES}")
        try:
            checkpoint = cls(
                wall_s=fields.number("wall_s", minimum=0),
                version=Version.parse(fields.string("version", max_length=64)),
                policies={key: _saved(policies.child(key)) for key in keys},
            )
        except ArtifactError:
            raise
        except SpecError as error:
            raise ArtifactError(error.field, error.problem) from error
        fields.done()
        if checkpoint.version.epoch >= MAX_EPOCH:
            raise ArtifactError("state.version", f"has no time's epoch: {checkpoint.version}")
        return checkpoint


def _saved(fields: Fields) -> Saved:
    saved = Saved(
        fields.string("pareto", max_length=80),
        Learner.from_json(fields.child("learner")),
        Forecast.from_json(fields, "forecast"),
    )
    fields.done()
    return saved


def read(path: Path) -> Checkpoint | None:
    """Read a file; None if there is none.

    Raises:
        ArtifactError: It can't be read or used.
    """
    try:
        with path.open("rb") as file:
            return Checkpoint.parse(file.read(MAX_BYTES + 1))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ArtifactError("state", f"can't read {path}: {error.strerror}") from error


def write(path: Path, document: bytes) -> None:
    """Write a file so that it is always whole: the old one or the new one.

    Raises:
        ArtifactError: It can't be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(document)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise ArtifactError("state", f"can't write {path}: {error.strerror}") from error
