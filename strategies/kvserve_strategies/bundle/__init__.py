"""Calibration bundles: what was learnt of a model's KV cache, in a form that both ends of a transfer can share.

A bundle is a folder of ``manifest.json``, ``core.safetensors`` and one ``basis-<key>.safetensors`` for each basis. Its
identity is the digest of the manifest, which lists every other file with its SHA-256. Nothing in it is ever run.
"""

from kvserve_strategies.bundle.basis import Basis, BasisKey, Block, Group
from kvserve_strategies.bundle.bundle import Bundle
from kvserve_strategies.bundle.contents import Contents, Metric
from kvserve_strategies.bundle.rope import Rope
from kvserve_strategies.bundle.writer import write_bundle

__all__ = [
    "Basis",
    "BasisKey",
    "Block",
    "Bundle",
    "Contents",
    "Group",
    "Metric",
    "Rope",
    "write_bundle",
]
