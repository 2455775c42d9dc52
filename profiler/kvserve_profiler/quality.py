"""Quality loss: how far compression of the KV cache moves the model's predictions.

The loss is ``exp(mean KL) - 1``, KL being the divergence of the next-token distribution with the compressed cache from
the one with the exact cache: the expected relative growth of perplexity. Its upper limit is a bootstrap in two stages,
windows and then blocks of neighbouring tokens in them (Davison and Hinkley, Bootstrap Methods, 1997, §3.8), because
tokens of one text, and even more neighbours, lose alike.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvserve_api.errors import KVServeError
from kvserve_api.fields import Fields
from kvserve_profiler.settings import Settings

BASIS_POINTS: Final = 10_000
FloatArray: TypeAlias = npt.NDArray[np.float64]


class MeasurementError(KVServeError):
    """A strategy that could not be measured; the trial fails, the run goes on."""

    reason = "TrialFailed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """What a strategy does to the predictions on one text.

    Attributes:
        ratio: Native bytes over bytes of the blobs, headers and checksums included.
        kl: Mean divergence, in nats a token.
        loss_bp: ``exp(kl) - 1``, in basis points.
        loss_upper_bp: Its one-sided upper confidence limit, in basis points.
        agreement: Share of tokens whose most likely successor stays the same.
        tokens: Scored tokens.
        windows_bp: The loss of each window by itself, in basis points.
    """

    ratio: float
    kl: float
    loss_bp: float
    loss_upper_bp: float
    agreement: float
    tokens: int
    windows_bp: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the quality as an object."""
        return {
            "ratio": self.ratio,
            "kl": self.kl,
            "loss_bp": self.loss_bp,
            "loss_upper_bp": self.loss_upper_bp,
            "agreement": self.agreement,
            "tokens": self.tokens,
            "windows_bp": list(self.windows_bp),
        }

    @classmethod
    def from_json(cls, fields: Fields) -> Self:
        """Read a quality."""
        quality = cls(
            ratio=fields.number("ratio", minimum=1e-3),
            kl=fields.number("kl", minimum=0),
            loss_bp=fields.number("loss_bp", minimum=0),
            loss_upper_bp=fields.number("loss_upper_bp", minimum=0),
            agreement=fields.number("agreement", minimum=0, maximum=1),
            tokens=fields.integer("tokens", minimum=0),
            windows_bp=numbers(fields, "windows_bp"),
        )
        fields.done()
        return quality


def numbers(fields: Fields, key: str) -> tuple[float, ...]:
    """Read a list of numbers that are not negative."""
    items = fields.items(key)
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int | float) or not 0 <= item < math.inf:
            raise fields.fail(key, f"must be a list of numbers from 0, holds {item!r}")
    return tuple(map(float, items))


def divergence(exact: torch.Tensor, approximate: torch.Tensor) -> FloatArray:
    """Return KL(exact ‖ approximate) of each prediction.

    Args:
        exact: ``[tokens, vocabulary]`` log-probabilities, float32.
        approximate: The same shape.

    Returns:
        ``[tokens]`` float64, in nats, not negative.

    Raises:
        MeasurementError: A prediction is not finite.
    """
    # log-probabilities of -inf in both give 0 * nan; such tokens have no share in the divergence
    difference = torch.where(exact == approximate, 0.0, exact - approximate)
    result = (exact.exp() * difference).sum(dim=-1, dtype=torch.float64).numpy()
    if not np.isfinite(result).all():
        raise MeasurementError("the model's predictions with the decoded KV cache are not finite")
    clipped: FloatArray = np.maximum(result, 0.0)
    return clipped


def loss_bp(kl: float) -> float:
    """Return the expected growth of perplexity for a mean divergence, in basis points."""
    return math.expm1(kl) * BASIS_POINTS


def upper_mean(windows: Sequence[FloatArray], settings: Settings) -> float:
    """Return the upper confidence limit of the mean over all tokens.

    Args:
        windows: For each window ``[tokens]`` float64; all of one length.
        settings: Block length, resamples, level and seed.

    Returns:
        The limit; never below the mean itself.
    """
    values = np.stack(windows)
    count, tokens = values.shape
    block = min(settings.block_tokens, tokens)
    blocks = values[:, : tokens // block * block].reshape(count, -1, block).mean(axis=2)
    generator = np.random.default_rng(settings.seed)
    shape = (settings.resamples, count, blocks.shape[1])
    chosen_windows = generator.integers(count, size=(*shape[:2], 1))
    chosen_blocks = generator.integers(blocks.shape[1], size=shape)
    means = blocks[chosen_windows, chosen_blocks].mean(axis=(1, 2))
    limit = float(np.percentile(means, settings.confidence_percent))
    return max(limit, float(values.mean()))


def assess(
    *,
    ratio: float,
    divergences: Sequence[FloatArray],
    agreements: Sequence[float],
    settings: Settings,
) -> Quality:
    """Sum up the windows of a text.

    Args:
        ratio: Of all windows together.
        divergences: For each window ``[tokens]``, as `divergence` returns it.
        agreements: For each window the share of equal most likely tokens.
        settings: How to bound the loss.
    """
    kl = float(np.mean(np.stack(divergences)))
    return Quality(
        ratio=ratio,
        kl=kl,
        loss_bp=loss_bp(kl),
        loss_upper_bp=loss_bp(upper_mean(divergences, settings)),
        agreement=float(np.mean(agreements)),
        tokens=sum(len(window) for window in divergences),
        windows_bp=tuple(loss_bp(float(window.mean())) for window in divergences),
    )
