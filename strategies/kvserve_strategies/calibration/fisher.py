"""The Fisher information of a model's predictions about its KV cache: what errors cost in divergence.

For a small error e of the cache, the divergence of the predictions, summed over the tokens of a continuation, is
``e' F e / 2`` with F the expectation of ``g g'``, where g is the gradient of the log-likelihood of tokens that the
model itself draws (Amari, "Natural gradient works efficiently in learning", 1998). Each token of a continuation is
drawn from the model's prediction there, the text before it being given, so that gradients of different tokens are
uncorrelated and one backward pass for the sum of all of them gives an unbiased sample of F.
"""

from collections.abc import Iterator, Sequence

import torch

from kvserve_strategies.calibration.protocol import Predictor, Prefill


def gradients(
    model: Predictor,
    prefill: Prefill,
    continuation: Sequence[int],
    *,
    samples: int,
    generator: torch.Generator,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield gradients of sampled log-likelihoods with respect to the cache.

    They are divided by the square root of the continuation's length: ``E[g g']`` is then the Fisher information per
    predicted token.

    Args:
        model: The model.
        prefill: Its cache of a text.
        continuation: The tokens that follow.
        samples: How often to draw.
        generator: Draws the tokens.

    Yields:
        Gradients of keys (rotated) and values, each ``[layers, tokens, kv_heads, head_dim]`` float32.
    """
    keys = prefill.keys.float().requires_grad_()
    values = prefill.values.float().requires_grad_()
    with torch.enable_grad():
        logs = torch.log_softmax(model.logits(continuation, keys, values), dim=-1)
    probabilities = logs.detach().exp()
    for sample in range(samples):
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        with torch.enable_grad():
            score = logs.gather(1, drawn).sum() / len(continuation) ** 0.5
        by_key, by_value = torch.autograd.grad(
            score, (keys, values), retain_graph=sample + 1 < samples
        )
        yield by_key, by_value


class Information:
    """The Fisher information of each head of each key and value layer, in the mean over tokens."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int) -> None:
        self._sum = torch.zeros(2, layers, kv_heads, head_dim, head_dim)
        self._tokens = 0

    def add(self, gradient: torch.Tensor) -> None:
        """Take note of a sample.

        Args:
            gradient: ``[2, layers, tokens, kv_heads, head_dim]``, keys before rotation.
        """
        by_head = gradient.transpose(2, 3)
        self._sum += by_head.mT @ by_head
        self._tokens += gradient.shape[2]

    @property
    def mean(self) -> torch.Tensor:
        """``[2, layers, kv_heads, head_dim, head_dim]`` float32."""
        return self._sum / max(self._tokens, 1)


def token_costs(gradient: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Return what a unit of error costs in each token, for errors that are white in the metric's coordinates.

    Args:
        gradient: ``[2, layers, tokens, kv_heads, head_dim]``, keys before rotation.
        inverse: ``[2, layers, kv_heads, head_dim, head_dim]``: the inverse of the metric's root.

    Returns:
        ``[2, layers, tokens, kv_heads]`` float32: 1 in the mean over the tokens that the metric was measured on.
    """
    whitened = torch.einsum("slthd,slhdc->slthc", gradient, inverse)
    return whitened.square().mean(dim=-1)
