"""What is claimed of our codecs, checked on what was measured: ratios at a loss, and CacheGen at its own loss."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final

from codec_rows import Measured

RATIOS: Final = ((0.010, 12.0, 16.0), (0.040, 24.0, 32.0))
"""Loss in KL, then floor and aim of the ratio."""
LOSSLESS: Final = (1.40, 1.48)
CACHEGEN: Final = "LMCache 0.5.6 CacheGen"
SMALLER: Final = 6.0
FASTER: Final = 50.0


def mean_of_texts(lines: Sequence[Measured]) -> list[Measured]:
    """Return each name's mean over texts: of losses plain, of ratios and speeds harmonic, as a mix would see."""
    groups: dict[str, list[Measured]] = {}
    for line in lines:
        groups.setdefault(line.name, []).append(line)
    result = []
    for name, group in groups.items():
        decode = [line.decode_mb_s for line in group if line.decode_mb_s]
        result.append(
            Measured(
                name=name,
                kind=group[0].kind,
                text="mean",
                ratio=_harmonic([line.ratio for line in group]),
                kl=sum(line.kl for line in group) / len(group),
                top1=sum(line.top1 for line in group) / len(group),
                encode_mb_s=_harmonic([line.encode_mb_s for line in group]),
                decode_mb_s=_harmonic(decode) if decode else None,
                family=group[0].family,
            )
        )
    return result


def ratio_at(curve: Sequence[tuple[float, float]], kl: float) -> float | None:
    """Return the ratio at a loss, from points of a curve, straight between them in the logarithms of both.

    Args:
        curve: Loss and ratio of each point, in any order.
        kl: The loss.

    Returns:
        The ratio. Beyond the last point it is that point's, which loses less than may be lost; None if all lose more.
    """
    points = sorted(curve)
    if points and points[-1][0] <= kl:
        return points[-1][1]
    for (low_kl, low), (high_kl, high) in pairwise(points):
        if low_kl <= kl < high_kl:
            if low_kl == 0:
                return low
            part = math.log(kl / low_kl) / math.log(high_kl / low_kl)
            return math.exp(math.log(low) + part * math.log(high / low))
    return None


def claims(lines: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return each claim with what was measured for it, over all texts and for each one.

    Args:
        lines: What was measured, for each text.
    """
    texts = list(dict.fromkeys(line.text for line in lines))
    groups = [("mean", mean_of_texts(lines))]
    groups += [(text, [line for line in lines if line.text == text]) for text in texts]
    return [claim | {"text": text} for text, group in groups for claim in _claims(group)]


def _claims(lines: Sequence[Measured]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    ours = [line for line in lines if line.kind == "ours"]
    for kl, floor, aim in RATIOS:
        at = {
            family: ratio
            for family in dict.fromkeys(line.family for line in ours if line.family)
            if (ratio := ratio_at([(x.kl, x.ratio) for x in ours if x.family == family], kl))
        }
        best = max(at.items(), key=lambda item: item[1], default=(None, None))
        found.append(_claim(f"ratio at KL {kl:.3f}", best[1], floor, aim, of=best[0]))
    exact = [line for line in ours if line.kl == 0 and line.top1 == 1]
    if exact:
        best_exact = max(exact, key=lambda line: line.ratio)
        found.append(_claim("lossless ratio", best_exact.ratio, *LOSSLESS, of=best_exact.name))
    theirs = next((line for line in lines if line.name == CACHEGEN), None)
    if theirs is None:
        return found
    at = {
        family: ratio / theirs.ratio
        for family in dict.fromkeys(line.family for line in ours if line.family)
        if (ratio := ratio_at([(x.kl, x.ratio) for x in ours if x.family == family], theirs.kl))
    }
    best = max(at.items(), key=lambda item: item[1], default=(None, None))
    found.append(
        _claim("times smaller than CacheGen at its KL", best[1], SMALLER, None, of=best[0])
    )
    # of those that are small enough the fastest; of others there is nothing to claim
    small = {family for family, times in at.items() if times >= SMALLER} or (
        {best[0]} if best[0] else set()
    )
    nearest = [
        max(members, key=lambda line: line.kl)
        for family in small
        if (members := [x for x in ours if x.family == family and x.kl <= theirs.kl])
    ]
    if nearest and theirs.decode_mb_s:
        fastest = max(nearest, key=lambda line: min(line.encode_mb_s, line.decode_mb_s or 0))
        faster = {
            "encoding": fastest.encode_mb_s / theirs.encode_mb_s,
            "decoding": (fastest.decode_mb_s or 0) / theirs.decode_mb_s,
        }
        for what, times in faster.items():
            found.append(
                _claim(f"times faster than CacheGen, {what}", times, FASTER, None, of=fastest.name)
            )
    return found


def _claim(
    name: str, measured: float | None, floor: float, aim: float | None, *, of: str | None
) -> dict[str, Any]:
    return {
        "claim": name,
        "measured": measured,
        "floor": floor,
        "aim": aim,
        "holds": None if measured is None else measured >= floor,
        "of": of,
    }


def _harmonic(numbers: Sequence[float]) -> float:
    return len(numbers) / sum(1 / number for number in numbers)
