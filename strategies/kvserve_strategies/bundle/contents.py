"""What calibration hands over to be written as a bundle."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvserve_api.errors import ArtifactError
from kvserve_api.wire import KVLayout
from kvserve_strategies.bundle.basis import CENTRED, Basis, BasisKey, is_space
from kvserve_strategies.bundle.rope import Rope

SIDES = ("k", "v")


class Metric(NamedTuple):
    """A linear map for each layer and head after which equal errors cost equally, and its inverse.

    Attributes:
        matrix: ``[layers, kv_heads, head_dim, head_dim]`` float32; ``y = matrix @ x`` for a column x.
        inverse: The same shape; ``x = inverse @ y``.
    """

    matrix: NDArray[np.float32]
    inverse: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """All that a bundle holds; keys are without RoPE everywhere.

    Attributes:
        model_fingerprint: See `kvserve_api.wire.model_fingerprint`.
        layout: Form of the whole cache; its dtype is what the model is served in.
        ropes: One for each layer; None for a layer that does not rotate.
        means: For ``k`` and ``v`` the mean of each channel, ``[layers, kv_heads, head_dim]`` float32.
        deviations: The same for the deviation of each channel from its mean.
        metrics: By name, then ``k`` and ``v``.
        bases: By key.
        provenance: How it was made: free-form JSON, for people. No times and no paths: they would change the digest.
    """

    model_fingerprint: str
    layout: KVLayout
    ropes: tuple[Rope | None, ...]
    means: Mapping[str, NDArray[np.float32]]
    deviations: Mapping[str, NDArray[np.float32]]
    metrics: Mapping[str, Mapping[str, Metric]] = field(default_factory=dict)
    bases: Mapping[BasisKey, Basis] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def core(self) -> dict[str, NDArray[Any]]:
        """Return the tensors of ``core.safetensors``."""
        tensors: dict[str, NDArray[Any]] = {}
        for side in SIDES:
            tensors[f"mean.{side}"] = self.means[side]
            tensors[f"deviation.{side}"] = self.deviations[side]
            for name, metric in self.metrics.items():
                tensors[f"metric.{name}.{side}"] = metric[side].matrix
                tensors[f"inverse.{name}.{side}"] = metric[side].inverse
        return tensors

    def check(self) -> None:
        """Refuse what no calibration makes: a bundle is written once and read for ever.

        Raises:
            ArtifactError: The error says which tensor is wrong, and in what.
        """
        if len(self.ropes) != self.layout.layers:
            raise ArtifactError(
                "ropes", f"must be {self.layout.layers}, one a layer, got {len(self.ropes)}"
            )
        for name in self.metrics:
            if not is_space(name):
                raise ArtifactError("metrics", f"no metric may be named {name!r}")
            for side in SIDES:
                _check_inverse(name, side, self.metrics[name][side])
        for key, basis in self.bases.items():
            if key.space != CENTRED and key.space not in self.metrics:
                raise ArtifactError(str(key), f"is in the space of a metric not here: {key.space}")
            _check_basis(key, basis)


def _check_inverse(name: str, side: str, metric: Metric) -> None:
    error = metric.matrix.astype(np.float64) @ metric.inverse.astype(np.float64)
    error -= np.eye(error.shape[-1])
    if not np.abs(error).max() < 1e-2:
        raise ArtifactError(f"metric.{name}.{side}", "the inverse is not the matrix's")


def _check_basis(key: BasisKey, basis: Basis) -> None:
    for index, (rows, sigma) in enumerate(basis.groups):
        norms = np.sqrt(np.einsum("cw,cw->c", rows, rows, dtype=np.float64))
        if not np.abs(norms - 1).max(initial=0) < 1e-2:
            raise ArtifactError(f"{key} group {index}", "the rows are not of length 1")
        if sigma.size and not (np.all(sigma >= 0) and np.all(np.diff(sigma) <= 0)):
            raise ArtifactError(f"{key} group {index}", "deviations must fall and not be negative")
