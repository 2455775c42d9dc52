"""``manifest.json``: what a bundle is of, which files it has, and what each must hold."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

from kvserve_api.canonical import canonical_json, digest_bytes
from kvserve_api.errors import ArtifactError, SpecError
from kvserve_api.fields import Fields
from kvserve_api.wire import KVLayout
from kvserve_strategies.bundle.basis import CENTRED, BasisKey, is_space
from kvserve_strategies.bundle.files import (
    CORE,
    BasisEntry,
    FileEntry,
    basis_file,
    basis_forms,
    core_forms,
)
from kvserve_strategies.bundle.rope import Rope
from kvserve_strategies.bundle.tensors import Form, max_nbytes, sha256

SCHEMA: Final = "kvserve.io/bundle/v1"
MANIFEST: Final = "manifest.json"
MAX_MANIFEST_NBYTES: Final = 4 * 1024 * 1024
MAX_BUNDLE_NBYTES: Final = 64 * 1024**3
"""A larger bundle is refused before anything of it is fetched."""
MAX_BASES: Final = 256
MAX_METRICS: Final = 16
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A bundle's manifest; attributes as in `Contents`.

    Attributes:
        metrics: Names of the metrics, sorted.
        bases: What each basis is.
        files: Every other file of the bundle, by name.
    """

    model_fingerprint: str
    layout: KVLayout
    ropes: tuple[Rope | None, ...]
    metrics: tuple[str, ...]
    bases: Mapping[BasisKey, BasisEntry]
    files: Mapping[str, FileEntry]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def canonical(self) -> bytes:
        """Return the document."""
        variants = list(dict.fromkeys(rope for rope in self.ropes if rope is not None))
        return canonical_json(
            {
                "schema": SCHEMA,
                "model": {"fingerprint": self.model_fingerprint},
                "layout": self.layout.to_json(),
                "ropes": [rope.to_json() for rope in variants],
                "rope_of_layer": [
                    None if rope is None else variants.index(rope) for rope in self.ropes
                ],
                "metrics": list(self.metrics),
                "bases": {
                    str(key): {
                        "scale": float(e.scale),
                        "components": list(e.components),
                        "features": e.features,
                    }
                    for key, e in self.bases.items()
                },
                "files": {
                    name: {"sha256": e.sha256, "nbytes": e.nbytes} for name, e in self.files.items()
                },
                "provenance": dict(self.provenance),
            }
        )

    @classmethod
    def parse(cls, document: bytes) -> Self:
        """Read a document, which may be hostile.

        Raises:
            ArtifactError: It is too large, not canonical JSON, of another schema, or contradicts itself.
        """
        if len(document) > MAX_MANIFEST_NBYTES:
            raise ArtifactError(MANIFEST, f"has more than {MAX_MANIFEST_NBYTES} bytes")
        try:
            value = json.loads(document)
            if canonical_json(value) != document:
                raise ArtifactError(MANIFEST, "is not canonical JSON: it was edited; fetch it anew")
        except (ValueError, RecursionError) as error:
            raise ArtifactError(MANIFEST, f"is not JSON: {error}") from error
        except SpecError as error:
            raise ArtifactError(MANIFEST, str(error)) from error
        fields = Fields(value, error=ArtifactError)
        schema = fields.string("schema", max_length=128)
        if schema != SCHEMA:
            raise fields.fail(
                "schema", f"is {schema!r}, this version reads {SCHEMA!r}: calibrate anew"
            )
        manifest = cls._read(fields)
        manifest._check_files()
        if manifest.canonical() != document:
            # like an integer where a float stands
            raise ArtifactError(MANIFEST, "is not what this version writes of the same contents")
        return manifest

    @classmethod
    def _read(cls, fields: Fields) -> Self:
        model = fields.child("model")
        fingerprint = model.string("fingerprint", max_length=80)
        if not _DIGEST.fullmatch(fingerprint):
            raise model.fail("fingerprint", f"must be sha256: and 64 hex digits: {fingerprint!r}")
        model.done()
        layout = _layout(fields.child("layout"))
        metrics = fields.items("metrics", max_items=MAX_METRICS)
        if not all(isinstance(name, str) and is_space(name) for name in metrics):
            raise fields.fail("metrics", f"must be names of metrics, got {metrics!r:.200}")
        if sorted(set(metrics)) != metrics:
            raise fields.fail("metrics", "must be sorted and unique")
        manifest = cls(
            model_fingerprint=fingerprint,
            layout=layout,
            ropes=_ropes(fields, layout),
            metrics=tuple(metrics),
            bases=_bases(fields.child("bases"), layout, metrics),
            files=_files(fields.child("files")),
            provenance=fields.mapping("provenance"),
        )
        fields.done()
        return manifest

    @property
    def digest(self) -> str:
        """The bundle's identity."""
        return digest_bytes(self.canonical())

    @property
    def entry(self) -> FileEntry:
        """The manifest itself as a file."""
        document = self.canonical()
        return FileEntry(sha256(document), len(document))

    @property
    def nbytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(entry.nbytes for entry in self.files.values())

    def core_forms(self) -> dict[str, Form]:
        """Return what ``core.safetensors`` must hold."""
        return core_forms(self.layout, self.metrics)

    def basis_forms(self, key: BasisKey) -> dict[str, Form]:
        """Return what a basis's file must hold."""
        return basis_forms(key, self.layout, self.bases[key])

    def needed(self, keys: Iterable[BasisKey] | None) -> list[str]:
        """Return the files to have for these bases, or for all.

        Raises:
            ArtifactError: There is no such basis.
        """
        wanted = sorted(self.bases) if keys is None else sorted(set(keys))
        for key in wanted:
            self.require(key)
        return [CORE, *(basis_file(key) for key in wanted)]

    def require(self, key: BasisKey) -> BasisEntry:
        """Return what a basis is.

        Raises:
            ArtifactError: There is no such basis; the error names those that there are.
        """
        if key not in self.bases:
            known = ", ".join(str(k) for k in sorted(self.bases)) or "none"
            raise ArtifactError(
                "basis", f"this bundle has no {key}; it has: {known}. Calibrate with its widths"
            )
        return self.bases[key]

    def _check_files(self) -> None:
        wanted = {CORE: self.core_forms()}
        wanted |= {basis_file(key): self.basis_forms(key) for key in self.bases}
        for name in sorted(wanted.keys() ^ self.files.keys()):
            state = "missing" if name in wanted else "not known"
            raise ArtifactError("files", f"{name[:80]} is {state}")
        for name, forms in wanted.items():
            most = max_nbytes(forms)
            if self.files[name].nbytes > most:
                raise ArtifactError(
                    f"files.{name}",
                    f"has {self.files[name].nbytes} bytes, its tensors take at most {most}",
                )
        if self.nbytes > MAX_BUNDLE_NBYTES:
            raise ArtifactError("files", f"have {self.nbytes} bytes, at most {MAX_BUNDLE_NBYTES}")


def _layout(fields: Fields) -> KVLayout:
    try:
        layout = KVLayout(
            layers=fields.integer("layers"),
            kv_heads=fields.integer("kv_heads"),
            head_dim=fields.integer("head_dim"),
            dtype=fields.string("dtype", max_length=16),
        )
    except ArtifactError:
        raise
    except SpecError as error:
        raise fields.fail(error.field, error.problem) from error
    fields.done()
    return layout


def _ropes(fields: Fields, layout: KVLayout) -> tuple[Rope | None, ...]:
    variants = [
        Rope.from_json(child, layout.head_dim)
        for child in fields.children("ropes", max_items=layout.layers)
    ]
    indices = fields.items("rope_of_layer", max_items=layout.layers)
    if len(indices) != layout.layers:
        raise fields.fail("rope_of_layer", f"must have {layout.layers} items, has {len(indices)}")
    ropes: list[Rope | None] = []
    for index in indices:
        if index is not None and (
            isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(variants)
        ):
            raise fields.fail("rope_of_layer", f"must be null or an index of ropes, got {index!r}")
        ropes.append(None if index is None else variants[index])
    return tuple(ropes)


def _bases(fields: Fields, layout: KVLayout, metrics: Iterable[str]) -> dict[BasisKey, BasisEntry]:
    names = fields.mapping_of()
    if len(names) > MAX_BASES:
        raise ArtifactError("bases", f"must be at most {MAX_BASES}, are {len(names)}")
    bases = {}
    for name in names:
        key = BasisKey.parse(name)
        if key.space != CENTRED and key.space not in metrics:
            raise fields.fail(name, f"is in the space of a metric not here: {key.space}")
        bases[key] = BasisEntry.read(fields.child(name), key, layout)
    return bases


def _files(fields: Fields) -> dict[str, FileEntry]:
    names = fields.mapping_of()
    if len(names) > MAX_BASES + 1:
        raise ArtifactError("files", f"must be at most {MAX_BASES + 1}, are {len(names)}")
    return {name: FileEntry.read(fields.child(name)) for name in names}
