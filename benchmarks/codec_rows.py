"""Measuring what is not ours: peers' own codecs, and entropy coders on one set of levels."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

import peers_code
from kvserve_kernels import absmax
from kvserve_profiler.codec_bench import CodecBench, Passage
from kvserve_profiler.model import KV
from kvserve_strategies.entropy import decode_integers, encode_integers
from kvserve_strategies.ladder import decode_levels, encode_levels
from kvserve_strategies.values import to_array

Objects = list[bytes]


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnCode:
    """A peer's codec, driven as it is.

    Attributes:
        name: For the table.
        encode: Keys and values to what is sent.
        decode: The reverse; the second argument is a tensor of the wanted shape and dtype.
        lossless: It gives back every bit.
    """

    name: str
    encode: Callable[[torch.Tensor, torch.Tensor], Objects]
    decode: Callable[[Objects, torch.Tensor], peers_code.Pair]
    lossless: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One line of the table.

    Attributes:
        name: Of preset, strategy or peer.
        kind: ``ours``, ``restated`` (a peer made of our stages) or ``peer`` (its own code).
        text: Name of the text.
        ratio: Native bytes over all bytes sent.
        kl: Mean divergence, nats a token.
        top1: Share of tokens whose most likely successor stays the same.
        encode_mb_s: Native megabytes a second of processor time on one core.
        decode_mb_s: The same; None if it can't be told from encoding.
        family: Strategies that differ in their step only, or empty.
    """

    name: str
    kind: str
    text: str
    ratio: float
    kl: float
    top1: float
    encode_mb_s: float
    decode_mb_s: float | None
    family: str = field(default="")

    def to_json(self) -> dict[str, Any]:
        """Return the line as an object."""
        return asdict(self)


OWN_CODE: Final = (
    OwnCode(
        name="LMCache 0.5.6 CacheGen",
        encode=peers_code.cachegen_encode,
        decode=lambda objects, like: peers_code.cachegen_decode(objects, like.dtype),
    ),
    *(
        OwnCode(
            name=f"lmcache-turbo-quant-serde {bits} bit",
            encode=lambda keys, values, bits=bits: peers_code.polar_encode(keys, values, bits),  # type: ignore[misc]
            decode=lambda objects, like, bits=bits: peers_code.polar_decode(objects, bits),  # type: ignore[misc]
        )
        for bits in (4, 3, 2)
    ),
    OwnCode(
        name="zstd-1 byte planes",
        encode=peers_code.byte_planes_encode,
        decode=peers_code.byte_planes_decode,
        lossless=True,
    ),
)
LATTICE_RANGES: Final = (37, 10, 5)


def own_code(bench: CodecBench, passage: Passage, text: str, *, quick: bool) -> list[Measured]:
    """Measure every peer's own code on one passage.

    Args:
        bench: Knows the model.
        passage: The passage.
        text: Its name.
        quick: Only the first of each, timed once.
    """
    repeats = 1 if quick else 2
    keys, values = passage.kv.keys, passage.kv.values
    native = 2 * keys.numel() * keys.element_size()
    lines = []
    for peer in OWN_CODE[:2] if quick else OWN_CODE:
        objects = peer.encode(keys, values)
        decoded = peer.decode(objects, keys)
        kl, top1 = _loss(bench, passage, decoded, lossless=peer.lossless)
        encode_s = process_s(lambda: peer.encode(keys, values), repeats)  # noqa: B023
        decode_s = process_s(lambda: peer.decode(objects, keys), repeats)  # noqa: B023
        lines.append(
            Measured(
                name=peer.name,
                kind="peer",
                text=text,
                ratio=native / sum(len(data) for data in objects),
                kl=kl,
                top1=top1,
                encode_mb_s=native / 1e6 / encode_s,
                decode_mb_s=native / 1e6 / decode_s,
            )
        )
    for q_range in LATTICE_RANGES[:1] if quick else LATTICE_RANGES:
        lattice = peers_code.lattice_round_trip(keys, values, q_range)
        kl, top1 = _loss(bench, passage, (lattice.keys, lattice.values))
        both_s = process_s(
            lambda: peers_code.lattice_round_trip(keys, values, q_range),  # noqa: B023
            repeats,
        )
        lines.append(
            Measured(
                name=f"kakeyalattice E8 q{q_range} (round trip)",
                kind="peer",
                text=text,
                ratio=native / lattice.nbytes,
                kl=kl,
                top1=top1,
                encode_mb_s=native / 1e6 / both_s,
                decode_mb_s=None,
            )
        )
    return lines


def _loss(
    bench: CodecBench, passage: Passage, decoded: peers_code.Pair, *, lossless: bool = False
) -> tuple[float, float]:
    kv = KV(keys=decoded[0], values=decoded[1])
    divergences, same = bench.loss(passage, kv, lossless=lossless)
    return float(divergences.mean()), same


def process_s(action: Callable[[], object], repeats: int) -> float:
    """Return the least processor time of an action, over all threads of this process, in seconds.

    Peers start threads of their own; counting what all of them take is what one core would need.
    """
    times = []
    for _ in range(repeats):
        start_s = time.process_time()
        action()
        times.append(time.process_time() - start_s)
    return min(times)


@dataclass(frozen=True, kw_only=True, slots=True)
class CoderLine:
    """An entropy coder on one set of levels.

    Attributes:
        name: Of the coder.
        bits: A level, probability tables included unless the name says otherwise.
        encode_m_s: Million levels a second of processor time.
        decode_m_s: The same.
    """

    name: str
    bits: float
    encode_m_s: float
    decode_m_s: float

    def to_json(self) -> dict[str, Any]:
        """Return the line as an object."""
        return asdict(self)


def coders(keys: torch.Tensor, *, quick: bool) -> list[CoderLine]:
    """Code one and the same set of levels, CacheGen's of the keys with 32 bins, by each coder.

    Args:
        keys: ``[layers, tokens, kv_heads, head_dim]`` bfloat16.
        quick: Time once.
    """
    layers, tokens, heads, dim = keys.shape
    flat = to_array(keys).reshape(layers * tokens, heads * dim)
    codes, _ = absmax.encode(flat, 32)
    levels = codes.reshape(layers, tokens, heads * dim)
    by_channel = np.ascontiguousarray(levels.transpose(0, 2, 1)).reshape(-1, tokens)
    repeats = 1 if quick else 3
    return [
        _oracle(by_channel, repeats),
        _cachegen(levels, repeats),
        _line(
            "code.rans.v1 (16 tables of the piece)",
            levels.size,
            lambda: encode_integers(levels, max_tables=16),
            lambda data: decode_integers(data, shape=levels.shape, dtype=levels.dtype),
            repeats,
        ),
        _line(
            "code.ladder.v1 (built-in tables)",
            levels.size,
            lambda: encode_levels(by_channel.astype(np.int16) - 15),
            lambda data: decode_levels(data, *by_channel.shape),
            repeats,
        ),
    ]


def _line(
    name: str,
    count: int,
    encode: Callable[[], tuple[NDArray[Any], ...]],
    decode: Callable[[NDArray[np.uint8]], object],
    repeats: int,
) -> CoderLine:
    pieces = [piece.reshape(-1).view(np.uint8) for piece in encode()]
    data = np.concatenate(pieces)
    decode(data)
    return CoderLine(
        name=name,
        bits=8 * data.nbytes / count,
        encode_m_s=count / 1e6 / process_s(encode, repeats),
        decode_m_s=count / 1e6 / process_s(lambda: decode(data), repeats),
    )


def _oracle(by_channel: NDArray[np.uint8], repeats: int) -> CoderLine:
    """Return constriction's ANS with each channel's own frequencies, which are not counted: a bound."""
    channels, tokens = by_channel.shape
    counts = np.stack([np.bincount(row, minlength=31) for row in by_channel]) + 1e-6
    probabilities = counts / counts.sum(1, keepdims=True)
    symbols = by_channel.astype(np.int32)
    words = peers_code.ans_encode(symbols, probabilities)
    restored = peers_code.ans_decode(words, probabilities, tokens)
    if not np.array_equal(restored, symbols):
        raise RuntimeError("constriction did not give back the levels")
    count = channels * tokens
    return CoderLine(
        name="constriction ANS, each channel's own table (tables not counted: the bound)",
        bits=8 * words.nbytes / count,
        encode_m_s=count
        / 1e6
        / process_s(lambda: peers_code.ans_encode(symbols, probabilities), repeats),
        decode_m_s=count
        / 1e6
        / process_s(lambda: peers_code.ans_decode(words, probabilities, tokens), repeats),
    )


def _cachegen(levels: NDArray[np.uint8], repeats: int) -> CoderLine:
    """Return LMCache's arithmetic coder, with its tables and lengths, chunk by chunk."""
    encoder, _, kernels = peers_code.cachegen_modules()
    layers, tokens, channels = levels.shape
    chunk = peers_code.CACHEGEN_CHUNK
    parts = [torch.from_numpy(levels[:, at : at + chunk].copy()) for at in range(0, tokens, chunk)]

    def encode() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        made = []
        for part in parts:
            tables = kernels.calculate_cdf(part, 32)
            buffer = torch.zeros((layers, channels, chunk), dtype=torch.uint8)
            lengths = torch.zeros((layers, channels), dtype=torch.int32)
            made.append((tables, encoder.encode_ntokens(tables, part, buffer, lengths), lengths))
        return made

    def decode() -> None:
        for (tables, data, lengths), part in zip(made, parts, strict=True):
            out = torch.zeros(part.shape, dtype=torch.uint8)
            ends = lengths.flatten().cumsum(0).reshape(lengths.shape)
            kernels.decode_fast_prefsum(tables, data, ends, out)
            if not torch.equal(out, part):
                raise RuntimeError("LMCache's coder did not give back the levels")

    made = encode()
    nbytes = sum(x.numel() * x.element_size() for item in made for x in item)
    return CoderLine(
        name="LMCache arithmetic coder (a table for each channel and 256 tokens)",
        bits=8 * nbytes / levels.size,
        encode_m_s=levels.size / 1e6 / process_s(encode, repeats),
        decode_m_s=levels.size / 1e6 / process_s(decode, repeats),
    )
