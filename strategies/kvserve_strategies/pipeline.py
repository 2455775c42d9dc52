"""A strategy made ready to run: keys and values to payload bytes (`kvserve_strategies.payload`) and back."""

import json
import math
from functools import lru_cache
from typing import Final

import numpy as np
import torch

from kvserve_api.errors import StrategyError
from kvserve_api.strategy import Kind, StrategyConfig
from kvserve_api.wire import Buffer
from kvserve_kernels.checksum import checksum
from kvserve_strategies.bundle import BasisKey, Bundle
from kvserve_strategies.chain import Chain
from kvserve_strategies.payload import (
    own_bytes,
    payload_bound,
    payload_nbytes,
    read_payload,
    write_payload,
)
from kvserve_strategies.piece import Piece, Place
from kvserve_strategies.split import Extent, cut
from kvserve_strategies.stage import Array, Form, Spec
from kvserve_strategies.values import dtype_name, to_array, to_tensor

Shape = tuple[int, int, int, int]
_CACHED: Final = 64
_PLANS: Final = 32
_MAX_COUNT: Final = 1 << 40


class Pipeline:
    """A strategy whose chains have been checked; immutable, and safe to use from many threads.

    Attributes:
        config: The strategy.
        bundle: The calibration that it works with; None if it needs none, or has not got it yet.
        digest: The strategy's digest.
        lossless: Keys and values come back bit by bit, NaN and infinity too.
        fixed_size: The payload's size depends on shape and dtype only.
        calibrated: It needs a bundle to encode and decode.
        takes_bytes: It carries caches whose values are not numbers too.
        layer_step: Pieces must start at layers that are multiples of this, and end so or with the model.
        stage_ids: The ids of all stages in use, without doubles.
    """

    __slots__ = (
        "_chains",
        "_pieces",
        "bundle",
        "calibrated",
        "config",
        "digest",
        "fixed_size",
        "layer_step",
        "lossless",
        "stage_ids",
        "takes_bytes",
    )

    def __init__(self, config: StrategyConfig, bundle: Bundle | None = None) -> None:
        chains = tuple(Chain.of(part, f"parts[{at}]") for at, part in enumerate(config.parts))
        self._chains: Final = chains
        # what follows from the shape alone takes longer than decoding a small piece
        self._pieces: Final = lru_cache(maxsize=_PLANS)(self._cut)
        self.config: Final = config
        self.digest: Final = config.digest
        self.lossless: Final = all(chain.lossless for chain in chains)
        self.fixed_size: Final = all(chain.is_fixed_size for chain in chains)
        self.takes_bytes: Final = all(chain.takes_bytes for chain in chains)
        self.calibrated: Final = any(chain.calibrated for chain in chains)
        self.bundle: Final = bundle if self.calibrated else None
        self.layer_step: Final = math.lcm(*(chain.layer_step for chain in chains))
        self.stage_ids: Final = tuple(
            dict.fromkeys(stage.id for part in config.parts for stage in part.chain)
        )

    @staticmethod
    def of(config: StrategyConfig, bundle: Bundle | None = None) -> "Pipeline":
        """Return the pipeline of a strategy; the last 64 are kept.

        Args:
            config: The strategy.
            bundle: The model's calibration; without it a calibrated strategy can be looked at, not used.

        Raises:
            StrategyError: The strategy can't work; the error says which stage and why.
        """
        # by canonical bytes: 1, 1.0 and True are equal and hash alike, but are different parameters
        return _build(config.canonical(), bundle)

    @staticmethod
    def needs_bundle(config: StrategyConfig) -> frozenset[BasisKey]:
        """Return the bases that a strategy needs of its model's bundle; see also `config_needs_bundle`."""
        return frozenset(Pipeline.of(config).basis_keys)

    @property
    def bundle_digest(self) -> str | None:
        """The digest of the bundle, if it has one."""
        return None if self.bundle is None else self.bundle.digest

    @property
    def basis_keys(self) -> tuple[BasisKey, ...]:
        """The bases of the bundle that it needs."""
        keys = (
            chain.basis_key(part.kinds)
            for part, chain in zip(self.config.parts, self._chains, strict=True)
        )
        return tuple(dict.fromkeys(key for key in keys if key is not None))

    def encode(
        self, keys: torch.Tensor, values: torch.Tensor, *, at: Place | None = None
    ) -> memoryview:
        """Return the payload.

        Args:
            keys: ``[layers, tokens, kv_heads, head_dim]`` on the CPU; bfloat16, float16, float32 or, if the strategy
                ``takes_bytes``, uint8.
            values: The same shape and dtype.
            at: Where in the model's cache these are; by default its beginning.

        Raises:
            ValuesError: The strategy is lossy and can't carry these values; send them by a lossless one.
            StrategyError: The tensors are not canonical, or the strategy can't code this piece.
        """
        sections = self.encode_sections(keys, values, at=at)
        out = np.empty(payload_nbytes(sections), np.uint8)
        write_payload(sections, out)
        return out.data

    def decode(
        self, buffer: Buffer, *, shape: Shape, dtype: torch.dtype, at: Place | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of a payload; they may share memory with a writable buffer.

        Args:
            buffer: The payload; anything may be in it.
            shape: ``(layers, tokens, kv_heads, head_dim)``.
            dtype: bfloat16, float16, float32 or uint8.
            at: Where in the model's cache the piece is; by default its beginning.

        Raises:
            WireError: It is not a payload of this strategy and shape.
            StrategyError: The strategy can't code this piece.
        """
        spec = _spec(shape, dtype)
        pieces = self._pieces(spec, at or Place())
        sections = read_payload(own_bytes(buffer), [piece.bounds for piece in pieces])
        halves: dict[Kind, Array] = {}
        for piece, part in zip(pieces, sections, strict=True):
            if piece.is_apart:
                for kind in piece.cells.kinds:
                    halves.setdefault(kind, np.empty(spec.shape, spec.array_dtype))
                piece.chain.decode_into(part, piece.specs, piece.views(halves))
                continue
            decoded = piece.chain.decode(part, piece.specs)
            kinds = piece.cells.kinds
            layers = len(piece.cells.layers)
            for at_kind, kind in enumerate(kinds):
                half = decoded[at_kind * layers : (at_kind + 1) * layers]
                if half.shape == spec.shape:
                    # the whole half of the cache: nothing to put together
                    halves[kind] = half
                    continue
                target = halves.setdefault(kind, np.empty(spec.shape, spec.array_dtype))
                piece.put(target, half)
        keys, values = (to_tensor(halves[kind], spec.dtype) for kind in Kind)
        return keys, values

    def max_encoded_nbytes(
        self,
        *,
        layers: int,
        tokens: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        at: Place | None = None,
    ) -> int:
        """Return the most bytes a payload can have; exactly its size if ``fixed_size``."""
        pieces = self._pieces(_spec((layers, tokens, kv_heads, head_dim), dtype), at or Place())
        return payload_bound([bound for piece in pieces for bound in piece.bounds])

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile and fold all that coding a dtype needs, so that the first transfer does not wait for it."""
        layers, kv_heads, head_dim = 2, 1, 8
        if self.bundle is not None:
            layout = self.bundle.layout
            # all of them, for the matrices of each block are made when it is first met
            layers, kv_heads, head_dim = layout.layers, layout.kv_heads, layout.head_dim
        shape = (layers, 33, kv_heads, head_dim)
        ramp = torch.linspace(-1, 1, math.prod(shape)).reshape(shape).to(dtype)
        payload = self.encode(ramp, ramp.flip(1))
        checksum(own_bytes(payload))
        self.decode(payload, shape=shape, dtype=dtype)

    def encode_sections(
        self, keys: torch.Tensor, values: torch.Tensor, *, at: Place | None = None
    ) -> list[tuple[Array, ...]]:
        """Return the sections of a payload, not yet in one piece of memory; see `encode`."""
        if keys.shape != values.shape or keys.dtype != values.dtype or keys.dim() != 4:
            raise StrategyError(
                "keys/values",
                "must both be [layers, tokens, kv_heads, head_dim] of one dtype, got "
                f"{tuple(keys.shape)} {keys.dtype} and {tuple(values.shape)} {values.dtype}",
            )
        layers, tokens, kv_heads, head_dim = keys.shape
        spec = _spec((layers, tokens, kv_heads, head_dim), keys.dtype)
        pieces = self._pieces(spec, at or Place())
        halves = {Kind.KEYS: to_array(keys), Kind.VALUES: to_array(values)}
        return [
            section
            for piece in pieces
            for section in piece.chain.encode(piece.take(halves), piece.specs)
        ]

    def _cut(self, spec: Spec, at: Place) -> tuple[Piece, ...]:
        """Return what each chain codes, in the order of the payload."""
        model_layers = at.model_layers or at.first_layer + spec.layers
        layers = range(at.first_layer, at.first_layer + spec.layers)
        tokens = range(at.first_token, at.first_token + spec.tokens)
        if layers.stop > model_layers:
            raise StrategyError("layers", f"{layers} are not in a model of {model_layers} layers")
        extent = Extent(
            layers=layers, model_layers=model_layers, heads=spec.kv_heads, tokens=tokens
        )
        return tuple(
            Piece.of(self._chains[cells.part], cells, spec, at, self.bundle)
            for cells in cut(self.config.parts, extent)
        )


@lru_cache(maxsize=_CACHED)
def _build(canonical: bytes, bundle: Bundle | None) -> Pipeline:
    return Pipeline(StrategyConfig.from_json(json.loads(canonical)), bundle)


def config_needs_bundle(config: StrategyConfig) -> bool:
    """Return whether a strategy works only with the calibration bundle of its model."""
    return Pipeline.of(config).calibrated


def _spec(shape: Shape, dtype: torch.dtype) -> Spec:
    layers, tokens, kv_heads, head_dim = shape
    spec = Spec(
        form=Form.NATIVE,
        layers=layers,
        tokens=tokens,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype_name(dtype),
    )
    if spec.count > _MAX_COUNT:
        raise StrategyError("shape", f"{shape} has more than {_MAX_COUNT} values")
    return spec
