"""Strategies to measure, and what was measured of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvserve_api.canonical import digest
from kvserve_api.strategy import StrategyConfig
from kvserve_strategies.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A strategy to measure.

    Attributes:
        label: For people: the preset's name, or the file's.
        preset: The preset's name, or empty.
        strategy: Its configuration.
    """

    label: str
    preset: str
    strategy: StrategyConfig

    @property
    def calibrated(self) -> bool:
        """Whether it needs the model's calibration bundle."""
        return Pipeline.of(self.strategy).calibrated


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What was measured of one strategy on one text.

    Attributes:
        strategy: The strategy.
        preset: The preset's name, or empty.
        ratio: Native bytes over bytes of the blobs, headers and checksums included.
        kl: Mean divergence of the next-token distribution, in nats a token.
        kl_upper: Its one-sided upper confidence limit of 95 %, by bootstrap.
        top1: Share of tokens whose most likely successor stays the same.
        encode_mb_s: Native megabytes (10⁶ bytes) that one thread encodes in a second of its processor time.
        decode_mb_s: The same for decoding.
        bytes_raw: Native bytes.
        bytes_wire: Bytes of the blobs.
        text: Name of the text.
    """

    strategy: StrategyConfig
    preset: str
    ratio: float
    kl: float
    kl_upper: float
    top1: float
    encode_mb_s: float
    decode_mb_s: float
    bytes_raw: int
    bytes_wire: int
    text: str

    def to_json(self) -> dict[str, Any]:
        """Return the row as an object."""
        return {
            "strategy": self.strategy.to_json(),
            "preset": self.preset,
            "ratio": self.ratio,
            "kl": self.kl,
            "kl_upper": self.kl_upper,
            "top1": self.top1,
            "encode_mb_s": self.encode_mb_s,
            "decode_mb_s": self.decode_mb_s,
            "bytes_raw": self.bytes_raw,
            "bytes_wire": self.bytes_wire,
            "text": self.text,
        }


def means(rows: Sequence[Row]) -> list[tuple[Row, dict[str, float]]]:
    """Return for each strategy, in order, its first row and the means over texts.

    A ratio's mean is that of all bytes together, a speed's the harmonic one: what a mix of the texts would see.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(digest(row.strategy.to_json()), []).append(row)
    result = []
    for group in groups.values():
        count = len(group)
        mean = {
            "ratio": sum(r.bytes_raw for r in group) / sum(r.bytes_wire for r in group),
            "kl": sum(r.kl for r in group) / count,
            "kl_upper": sum(r.kl_upper for r in group) / count,
            "top1": sum(r.top1 for r in group) / count,
            "encode_mb_s": count / sum(1 / r.encode_mb_s for r in group),
            "decode_mb_s": count / sum(1 / r.decode_mb_s for r in group),
        }
        result.append((group[0], mean))
    return result
