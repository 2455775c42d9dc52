"""Presets give what peers' own code gave on the samples that ``benchmarks/peers_golden.py`` made with it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from kvserve_kernels import escape, minmax
from kvserve_strategies import Pipeline
from kvserve_strategies.presets import preset

FOLDER = Path(__file__).with_name("peer-samples")


def sample(peer: str) -> dict[str, torch.Tensor]:
    """Return what a peer made."""
    with safe_open(FOLDER / f"{peer}.safetensors", framework="pt") as file:
        assert file.metadata()["of"]
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


def round_trip(name: str, native: torch.Tensor) -> list[torch.Tensor]:
    """Return what a preset gives back of rows ``[tokens, 1, dim]`` sent in float32 as keys and as values."""
    x = native.float()[None]
    pipeline = Pipeline.of(preset(name))
    layers, tokens, heads, dim = x.shape
    keys, values = pipeline.decode(
        pipeline.encode(x, x), shape=(layers, tokens, heads, dim), dtype=torch.float32
    )
    return [keys[0, :, 0], values[0, :, 0]]


def steps_apart(
    ours: torch.Tensor, theirs: torch.Tensor, step: torch.Tensor
) -> NDArray[np.float32]:
    """Return how far restored values differ, in steps of their quantiser."""
    apart: NDArray[np.float32] = ((ours - theirs).abs() / step.clamp(min=1e-6)).numpy()
    return apart


@pytest.mark.parametrize("bits", [2, 4])
def test_kivi(bits: int) -> None:
    """Keys by channel and values by token come back as KIVI's own functions give them, but for ties."""
    made = sample("kivi")
    for kind, ours in zip("kv", round_trip(f"kivi-{bits}", made["native"]), strict=True):
        codes, scales, least = (made[f"{kind}{bits}.{n}"] for n in ("codes", "scales", "least"))
        # groups are all 64 tokens of a channel, or all 64 channels of a token
        by = (1, -1) if kind == "k" else (-1, 1)
        step = scales.reshape(by)
        apart = steps_apart(ours, codes * step + least.reshape(by), step)
        assert (apart > 1e-3).mean() < 2e-3
        assert apart.max() < 1.001


def test_splitzip() -> None:
    """The 16 exponents, each value's code, and where and which escapes are, are those of SplitZip's kernels."""
    made = sample("splitzip")
    words = made["native"].reshape(-1).view(torch.int16).numpy().view(np.uint16)
    ours = escape.encode((words >> 7 & 0xFF).astype(np.uint8))
    book = made["book"].numpy()
    assert sorted(book.tolist()) == ours.book.tolist()
    np.testing.assert_array_equal(ours.positions, made["positions"].numpy())
    np.testing.assert_array_equal(ours.values, made["escapes"].numpy())
    assert 0 < ours.values.size < words.size // 10
    theirs = np.stack([made["codes"].numpy() >> 4, made["codes"].numpy() & 15], 1).reshape(-1)
    own = np.stack([ours.codes & 15, ours.codes >> 4], 1).reshape(-1)
    common = np.ones(words.size, bool)
    common[ours.positions] = False
    np.testing.assert_array_equal(ours.book[own][common], book[theirs][common])
    np.testing.assert_array_equal(
        made["rest"].numpy(), (words >> 8 & 0x80 | words & 0x7F).astype(np.uint8)
    )
    for restored in round_trip("splitzip", made["native"]):
        assert torch.equal(restored, made["native"][:, 0].float())


def test_vllm_int8() -> None:
    """Values come back as vLLM's int8_per_token_head cache holds them, but for ties, which go away from zero there."""
    made = sample("vllm")
    scales = made["int8.scales"]
    theirs = made["int8.codes"][:, 0].float() * scales
    for ours in round_trip("int8-vllm", made["native"]):
        apart = steps_apart(ours, theirs, scales)
        assert (apart > 1e-3).mean() < 0.01
        assert apart.max() < 1.001


def test_vllm_fp8() -> None:
    """Values come back as vLLM's fp8_per_token_head cache holds them, but for ties and the last place of a scale.

    The scales are its kernel's; codes are PyTorch's of what that rounds, because Triton's interpreter rounds wrong.
    """
    made = sample("vllm")
    scales, native = made["fp8.scales"], made["native"][:, 0].float()
    codes = (native * (1 / scales)).clamp(-448, 448).to(torch.float8_e4m3fn)
    for ours in round_trip("fp8", made["native"]):
        apart = ((ours - codes.float() * scales).abs() / native.abs().clamp(min=1e-6)).numpy()
        assert (apart > 1e-5).mean() < 0.005
        # neighbours of e4m3 lie an eighth apart
        assert apart.max() < 0.126


def test_vllm_int4() -> None:
    """Steps are those of vLLM's int4_per_token_head cache; its rounded zero points move values by up to half of one.

    It spends 4 bits of the scale on them. On the whole neither is further from what was there.
    """
    made = sample("vllm")
    turned = made["int4.turned"][:, 0].float()
    coded = minmax.encode_rows(turned.numpy(), group=64, levels=16)
    assert coded is not None
    step = torch.from_numpy((coded[2] - coded[1]) / 15)
    bits = made["int4.scales"].view(torch.int32)
    scales, zeros = (bits & -16).view(torch.float32), (bits & 15).float()
    np.testing.assert_allclose(scales, step.clamp(min=1e-6), rtol=2**-19)
    packed = made["int4.codes"][:, 0]
    codes = torch.stack([packed & 15, packed >> 4], -1).reshape(turned.shape).float()
    theirs = (codes - zeros) * scales
    ours = torch.from_numpy(minmax.decode_rows(*coded, group=64, levels=16))
    assert steps_apart(ours, theirs, scales).max() < 1.501
    squares = [float((x - turned).pow(2).mean()) for x in (ours, theirs)]
    assert squares[0] < squares[1] < 1.3 * squares[0]
    # the preset turns by other signs, and an error is spread alike
    native = made["native"][:, 0].float()
    for restored in round_trip("int4-vllm", made["native"]):
        assert float((restored - native).pow(2).mean()) == pytest.approx(squares[1] / 64, rel=0.3)
