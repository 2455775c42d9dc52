"""A strategy made ready to run: keys and values to payload bytes and back.

A payload is the length of each section (u64), first those of the keys' chain in its order, then the values', and then
the sections, each followed by zeros to a multiple of 8.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import numpy as np
import torch

from kvserve_api.errors import StrategyError, WireError, WireReason
from kvserve_api.strategy import Kind, StrategyConfig
from kvserve_api.wire import Buffer
from kvserve_kernels.checksum import checksum
from kvserve_strategies.chain import Chain
from kvserve_strategies.stage import Array, Bytes, Form, Spec
from kvserve_strategies.values import dtype_name, to_array, to_tensor

Shape = tuple[int, int, int, int]
_KINDS: Final = (Kind.KEYS, Kind.VALUES)
_CACHED: Final = 64
_MAX_COUNT: Final = 1 << 40


class Pipeline:
    """A strategy whose chains have been checked; immutable, and safe to use from many threads.

    Attributes:
        config: The strategy.
        digest: Its digest.
        lossless: Keys and values come back bit by bit, NaN and infinity too.
        fixed_size: The payload's size depends on shape and dtype only.
        stage_ids: The ids of all stages in use, without doubles.
    """

    __slots__ = ("_chains", "config", "digest", "fixed_size", "lossless", "stage_ids")

    def __init__(self, config: StrategyConfig) -> None:
        chains = tuple(Chain.of(config.part(kind)) for kind in _KINDS)
        self._chains: Final = chains
        self.config: Final = config
        self.digest: Final = config.digest
        self.lossless: Final = all(chain.lossless for chain in chains)
        self.fixed_size: Final = all(chain.is_fixed_size for chain in chains)
        self.stage_ids: Final = tuple(
            dict.fromkeys(stage.id for chain in chains for stage in chain.stages)
        )

    @staticmethod
    def of(config: StrategyConfig) -> "Pipeline":
        """Return the pipeline of a strategy; the last 64 are kept.

        Raises:
            StrategyError: The strategy can't work; the error says which stage and why.
        """
        # by canonical bytes: 1, 1.0 and True are equal and hash alike, but are different parameters
        return _build(config.canonical())

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> memoryview:
        """Return the payload.

        Args:
            keys: ``[layers, tokens, kv_heads, head_dim]`` on the CPU; bfloat16, float16 or float32.
            values: The same shape and dtype.

        Raises:
            ValuesError: The strategy is lossy and can't carry these values; send them by a lossless one.
            StrategyError: The tensors are not canonical.
        """
        sections = self.encode_sections(keys, values)
        out = np.empty(payload_nbytes(sections), np.uint8)
        write_payload(sections, out)
        return out.data

    def decode(
        self, buffer: Buffer, *, shape: Shape, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of a payload; they may share memory with a writable buffer.

        Args:
            buffer: The payload; anything may be in it.
            shape: ``(layers, tokens, kv_heads, head_dim)``.
            dtype: bfloat16, float16 or float32.

        Raises:
            WireError: It is not a payload of this strategy and shape.
        """
        spec = _spec(shape, dtype)
        sections = self._read_payload(own_bytes(buffer), spec)
        keys, values = (
            to_tensor(chain.decode(part, spec), spec.dtype)
            for chain, part in zip(self._chains, sections, strict=True)
        )
        return keys, values

    def max_encoded_nbytes(
        self, *, layers: int, tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        """Return the most bytes a payload can have; exactly its size if ``fixed_size``."""
        spec = _spec((layers, tokens, kv_heads, head_dim), dtype)
        bounds = [bound for chain in self._chains for bound in chain.section_bounds(spec)]
        return 8 * len(bounds) + sum(_padded(bound) for bound in bounds)

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile all that coding a dtype needs, so that the first transfer does not wait for it."""
        shape = (2, 33, 1, 8)
        ramp = torch.linspace(-1, 1, 528).reshape(shape).to(dtype)
        payload = self.encode(ramp, ramp.flip(1))
        checksum(own_bytes(payload))
        self.decode(payload, shape=shape, dtype=dtype)

    def encode_sections(self, keys: torch.Tensor, values: torch.Tensor) -> list[tuple[Array, ...]]:
        """Return the sections of a payload, not yet in one piece of memory; see `encode`."""
        if keys.shape != values.shape or keys.dtype != values.dtype or keys.dim() != 4:
            raise StrategyError(
                "keys/values",
                "must both be [layers, tokens, kv_heads, head_dim] of one dtype, got "
                f"{tuple(keys.shape)} {keys.dtype} and {tuple(values.shape)} {values.dtype}",
            )
        layers, tokens, kv_heads, head_dim = keys.shape
        spec = _spec((layers, tokens, kv_heads, head_dim), keys.dtype)
        return [
            section
            for chain, tensor in zip(self._chains, (keys, values), strict=True)
            for section in chain.encode(to_array(tensor), spec)
        ]

    def _read_payload(self, data: Bytes, spec: Spec) -> list[list[Bytes]]:
        """Return the sections of each chain."""
        bounds = [chain.section_bounds(spec) for chain in self._chains]
        count = sum(len(of_chain) for of_chain in bounds)
        if data.size < 8 * count:
            raise WireError(WireReason.MALFORMED, f"{data.size} bytes can't hold {count} lengths")
        lengths = iter(data[: 8 * count].view(np.uint64).tolist())
        at = 8 * count
        sections: list[list[Bytes]] = []
        for of_chain in bounds:
            sections.append([])
            for bound in of_chain:
                size = next(lengths)
                if size > bound or at + _padded(size) > data.size:
                    raise WireError(
                        WireReason.MALFORMED,
                        f"a section of {size} bytes at {at}; most is {bound}, end is {data.size}",
                    )
                sections[-1].append(data[at : at + size])
                if data[at + size : at + _padded(size)].any():
                    raise WireError(WireReason.MALFORMED, "padding is not zero")
                at += _padded(size)
        if at != data.size:
            raise WireError(WireReason.MALFORMED, f"{data.size - at} bytes too many")
        return sections


@lru_cache(maxsize=_CACHED)
def _build(canonical: bytes) -> Pipeline:
    return Pipeline(StrategyConfig.from_json(json.loads(canonical)))


def payload_nbytes(sections: Sequence[tuple[Array, ...]]) -> int:
    """Return the bytes that sections take as a payload."""
    return 8 * len(sections) + sum(_padded(_nbytes(section)) for section in sections)


def write_payload(sections: Sequence[tuple[Array, ...]], out: Bytes) -> None:
    """Write sections as a payload into ``[payload_nbytes(sections)]`` bytes."""
    lengths = np.array([_nbytes(section) for section in sections], np.uint64)
    at = lengths.nbytes
    out[:at] = lengths.view(np.uint8)
    for section in sections:
        for piece in section:
            out[at : at + piece.nbytes] = piece.reshape(-1).view(np.uint8)
            at += piece.nbytes
        gap = -_nbytes(section) % 8
        out[at : at + gap] = 0
        at += gap


def _nbytes(section: tuple[Array, ...]) -> int:
    return sum(piece.nbytes for piece in section)


def _padded(size: int) -> int:
    return -(-size // 8) * 8


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


def own_bytes(buffer: Buffer) -> Bytes:
    """Return the bytes as a writable array that starts at a multiple of 8, copied only if they do not.

    Writable, because a kernel is compiled once more for read-only memory, and that would be in the midst of serving.
    """
    data = np.frombuffer(buffer, np.uint8)
    return data if data.flags.writeable and data.ctypes.data % 8 == 0 else data.copy()
