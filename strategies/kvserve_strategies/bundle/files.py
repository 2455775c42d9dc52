"""The files of a bundle beside its manifest: their names, what the manifest tells of them, and what each must hold."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self

import numpy as np

from kvserve_api.fields import Fields
from kvserve_api.wire import KVLayout
from kvserve_strategies.bundle.basis import BasisKey
from kvserve_strategies.bundle.contents import SIDES
from kvserve_strategies.bundle.tensors import Form

CORE: Final = "core.safetensors"
MAX_FEATURES: Final = 65_536
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of a bundle.

    Attributes:
        sha256: 64 hex digits.
        nbytes: Its size.
    """

    sha256: str
    nbytes: int

    @classmethod
    def read(cls, fields: Fields) -> Self:
        """Read what a manifest tells of a file.

        Raises:
            ArtifactError: It can't be one.
        """
        entry = cls(fields.string("sha256", max_length=64), fields.integer("nbytes", minimum=1))
        if not _SHA256.fullmatch(entry.sha256):
            raise fields.fail("sha256", "must be 64 hex digits")
        fields.done()
        return entry


@dataclass(frozen=True, slots=True)
class BasisEntry:
    """A basis as the manifest tells of it, without loading it.

    Attributes:
        scale: See `Basis.scale`.
        components: Rows of each group.
        features: Weights of each group's importance; 0 for none.
    """

    scale: float
    components: tuple[int, ...]
    features: int = 0

    @classmethod
    def read(cls, fields: Fields, key: BasisKey, layout: KVLayout) -> Self:
        """Read what a manifest tells of a basis.

        Raises:
            ArtifactError: It can't be one of this key and layout.
        """
        # a document of some bytes may speak of billions of blocks: they are counted before they are made
        blocks = key.count(layout)
        components = fields.items("components", max_items=blocks)
        if len(components) != blocks:
            raise fields.fail("components", f"must have {blocks} items, has {len(components)}")
        for block, count in zip(key.blocks(layout), components, strict=True):
            width = key.width(block, layout)
            if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= width:
                raise fields.fail(
                    "components", f"must be 1 to the width {width}, got {count!r:.80}"
                )
        entry = cls(
            fields.number("scale", minimum=0),
            tuple(components),
            fields.integer("features", minimum=0, maximum=MAX_FEATURES),
        )
        fields.done()
        return entry


def basis_file(key: BasisKey) -> str:
    """Return the name of a basis's file."""
    return f"basis-{key}.safetensors"


def core_forms(layout: KVLayout, metrics: Iterable[str]) -> dict[str, Form]:
    """Return what ``core.safetensors`` must hold."""
    single = np.dtype(np.float32)
    channels = (layout.layers, layout.kv_heads, layout.head_dim)
    forms = {}
    for side in SIDES:
        forms[f"mean.{side}"] = forms[f"deviation.{side}"] = Form(single, channels)
        for name in metrics:
            square = Form(single, (*channels, layout.head_dim))
            forms[f"metric.{name}.{side}"] = forms[f"inverse.{name}.{side}"] = square
    return forms


def basis_forms(key: BasisKey, layout: KVLayout, entry: BasisEntry) -> dict[str, Form]:
    """Return what a basis's file must hold."""
    half, single = np.dtype(np.float16), np.dtype(np.float32)
    forms = {}
    for index, (block, count) in enumerate(zip(key.blocks(layout), entry.components, strict=True)):
        forms[f"rows.{index}"] = Form(half, (count, key.width(block, layout)))
        forms[f"sigma.{index}"] = Form(single, (count,))
        if entry.features:
            forms[f"importance.{index}"] = Form(single, (entry.features,))
    return forms
